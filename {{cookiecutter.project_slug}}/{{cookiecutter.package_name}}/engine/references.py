"""Checkpoints by reference: a file, a run (its best checkpoint), or `RUN:last`; and the models in them."""

import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import instantiate_module
from lightning.pytorch.utilities import rank_zero_only

from . import Mistake, nearest
from .run import runs_root, shown


def find_checkpoint(reference: str, root: Path, option: str) -> Path:
    """Finds a checkpoint.

    Args:
        reference: A file, or the id or the folder of a run, with `:last` for its last checkpoint instead of its best.
        root: Where runs are kept.
        option: What the reference was given as, for the messages.

    Raises:
        Mistake: If there is no such file, no such run, or no checkpoint in the run.
    """
    if Path(reference).is_file():
        return Path(reference).absolute()
    name, _, which = reference.partition(":")
    if which not in ("", "last"):
        raise Mistake(f"{option}: expected a checkpoint file, RUN or RUN:last, got {reference}")
    folder = find_run(name, root, option)
    last = folder / "checkpoints" / "last.ckpt"
    if not last.is_file():
        raise Mistake(f"{option}: {folder.name} has no checkpoint; expected {shown(last)}")
    if which == "last":
        return last
    states = read_checkpoint(last)["callbacks"].values()
    best = next((state["best_model_path"] for state in states if state.get("best_model_path")), last)
    best = last.parent / Path(best).name  # by its name alone: the folder may have been moved
    return best if best.exists() else last


def find_run(reference: str, root: Path, option: str) -> Path:
    """Finds the folder of a run by its id or path.

    Raises:
        Mistake: If there is none; names the nearest run.
    """
    folder = next((folder for folder in (root / reference, Path(reference)) if reference and folder.is_dir()), None)
    if folder is None:
        hint = nearest(reference, (folder.name for folder in root.glob("*/")))
        expected = "a run" if option == "--resume" else "a checkpoint file, RUN or RUN:last"
        raise Mistake(f"{option}: expected {expected}, got {reference}{hint}")
    return folder.absolute()


def newest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a run that is whole; says so if it is not the last.

    Raises:
        Mistake: If there is none.
    """
    files = newest_first(folder / "checkpoints")
    whole = next(filter(is_whole, files), None)
    if whole is None:
        raise Mistake(f"--resume: no whole checkpoint in {shown(folder / 'checkpoints')}")
    if whole != files[0]:
        line = f"warning: {shown(files[0])} is broken, {shown(whole)} is the newest whole one"
        rank_zero_only(print)(line, file=sys.stderr)
    return whole


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder: last.ckpt by its name, since a copy may have any time, then the others by theirs."""
    files = folder.glob("*.ckpt")
    return sorted(files, key=lambda file: (file.name == "last.ckpt", file.stat().st_mtime, file.name), reverse=True)


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Reads a checkpoint, without running any code that it may hold.

    Raises:
        Mistake: If it cannot be read; names the newest one beside it that can.
    """
    try:
        content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return content if "state_dict" in content else content["state_dict"]
    except Exception as error:
        valid = next((other for other in newest_first(file.parent) if other != file and is_whole(other)), None)
        hint = f"; {shown(valid)} can be" if valid else ""
        raise Mistake(f"{shown(file)}: not a checkpoint that can be read ({type(error).__name__}){hint}") from error


def is_whole(file: Path) -> bool:
    """Whether all of a checkpoint is there, by the checksums that torch.save writes."""
    try:
        with ZipFile(file) as archive:
            return archive.testzip() is None
    except (BadZipFile, EOFError):
        return False


def class_of(class_path: str) -> type[LightningModule]:
    """Imports a model's class.

    Raises:
        Mistake: If there is no such class.
    """
    module, _, name = class_path.rpartition(".")
    try:
        found: type[LightningModule] = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise Mistake(f"the checkpoint's model is of a class that is not there, {class_path}: {error}") from error
    return found


def settings_of(checkpoint: Path) -> dict[str, Any]:
    """The `class_path` and `init_args` of a checkpoint's model; nothing if it was trained without the command line.

    What the class no longer takes is left out, with a warning.
    """
    saved = read_checkpoint(checkpoint).get("hyper_parameters", {})
    if "_class_path" not in saved:
        return {}
    options = {name: value for name, value in saved.items() if name not in ("_class_path", "_instantiator")}
    taken = ArgumentParser().add_class_arguments(class_of(saved["_class_path"]), "model", fail_untyped=False)
    old = sorted(options.keys() - {name.split(".")[1] for name in taken})
    if old:
        line = f"warning: the model no longer takes {', '.join(old)}, which {shown(checkpoint)} has"
        rank_zero_only(print)(line, file=sys.stderr)
    return {"class_path": saved["_class_path"], "init_args": {k: v for k, v in options.items() if k not in old}}


def way_on(verb: str, ways: list[str], reference: str, root: Path) -> tuple[Path, Path, list[str], dict[str, Any]]:
    """Finds the checkpoint to begin with, and exports the run's id if it is the same run that goes on.

    Args:
        verb: What is to be done.
        ways: The options that were given; there must be one, and for other verbs than `fit` it must be `ckpt_path`.
        reference: The value of the last of them.
        root: Where runs are kept.

    Returns:
        Where this run is kept; the checkpoint; the configuration file of the checkpoint's run, if it lies in one; and
        the `model` section that the checkpoint itself holds, if it has one.

    Raises:
        Mistake: If the options do not go together, or there is no such checkpoint.
    """
    option = f"--{ways[-1]}"
    if ways[1:] or (verb != "fit" and ways != ["ckpt_path"]):
        raise Mistake(f"{option}: is for fit, and instead of any other way on from a checkpoint")
    if option == "--resume":
        folder = find_run(reference, root, option)
        if os.environ.setdefault("WANDB_RUN_ID", folder.name) != folder.name:
            raise Mistake(f"{option} names {folder.name}, WANDB_RUN_ID names {os.environ['WANDB_RUN_ID']}")
        root, checkpoint = folder.parent, newest_checkpoint(folder)
    else:
        checkpoint = find_checkpoint(reference, root, option)
    recipe, model = checkpoint.parent.parent / "config.yaml", settings_of(checkpoint)
    return root, checkpoint, [str(recipe)] * recipe.is_file(), {"model": model} if model else {}


def check_learning_rate(options: dict[str, Any], checkpoint: Path) -> None:
    """Refuses a new learning rate for a run that goes on: the optimizer's state holds the old one, and would win.

    Raises:
        Mistake: If `options`, those of the model, have another `lr` than the checkpoint.
    """
    old = read_checkpoint(checkpoint).get("hyper_parameters", {}).get("lr")
    if old is not None and options.get("lr", old) != old:
        raise Mistake(f"model.lr: expected {old}, as the optimizer has it, got {options['lr']}; see --init_from")


def load(reference: str) -> LightningModule:
    """Loads a model, in evaluation mode and on the CPU.

    Args:
        reference: A checkpoint file, a run's id or folder (its best checkpoint), or `RUN:last`.

    Raises:
        Mistake: If there is no such checkpoint, or if it was made without this command line.
    """
    file = find_checkpoint(reference, runs_root(), "load")
    model = settings_of(file)
    if not model:
        raise Mistake(f"{shown(file)}: does not say which class its model is of; use that class's load_from_checkpoint")
    config = {"_class_path": model["class_path"], **model["init_args"]}
    module = instantiate_module(class_of(model["class_path"]), config)
    content = read_checkpoint(file)
    module.configure_model()
    module.on_load_checkpoint(content)
    module.load_state_dict(content["state_dict"])
    return module.eval()


def init_weights(module: LightningModule, checkpoint: Path) -> Iterator[str]:
    """Copies the weights of a checkpoint that fit, and yields a line for what did not.

    Raises:
        Mistake: If none fits.
    """
    module.configure_model()
    own, given = module.state_dict(), read_checkpoint(checkpoint)["state_dict"]
    fit = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    if not fit:
        kind = type(module).__name__
        raise Mistake(f"--init_from: none of the {len(given)} tensors in {shown(checkpoint)} fits {kind}")
    module.load_state_dict(fit, strict=False)
    for name in sorted(own.keys() | given.keys()):
        if name not in given:
            yield f"{name} stays as it was: the checkpoint has none"
        elif name not in own:
            yield f"{name} is left out: the model has none"
        elif name not in fit:
            yield f"{name} stays as it was: {tuple(own[name].shape)} here, {tuple(given[name].shape)} in the checkpoint"
