"""Checkpoints by reference: a file, a run (its best checkpoint), or `RUN:last`; and the models in them."""

import json
import os
import random
import re
import sys
import warnings
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from .run import Mistake, Run, find_run, runs_root, shown

if TYPE_CHECKING:
    from .resume import Bookmark


def find_checkpoint(reference: str, root: Path, option: str) -> Path:
    """Finds a file, or the best checkpoint of a run given by id or folder, or with `:last` its last one."""
    if Path(reference).is_file():
        return Path(reference).absolute()
    if reference.startswith("wandb:"):
        if not re.fullmatch(r"wandb:([^/:]+/){2}[^/:]+:[^/:]+", reference):
            raise Mistake(f"{option}: expected wandb:ENTITY/PROJECT/NAME:ALIAS, got {reference}")
        from .artifacts import download

        return download(reference.removeprefix("wandb:"), root, option)
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


def newest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a run that is whole; says so if it is not the last."""
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
    """Reads a checkpoint, without running any code that it may hold."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
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
    """Imports a model's class."""
    try:
        return resolve_name(class_path)
    except (ImportError, AttributeError, ValueError) as error:
        raise Mistake(f"the checkpoint's model is of a class that is not there, {class_path}: {error}") from error


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


def way_on(verb: str, ways: list[str], given: Any, root: Path, layers: list[str]) -> tuple[Path, str, list[str]]:
    """Finds the checkpoint to begin with, and exports the run's id if it is the same run that goes on.

    Puts into `layers` the configuration of the checkpoint's run, and what the checkpoint itself says of its model.
    Returns where this run is kept, the checkpoint, and those of the layers from which the command should not differ.
    """
    option, reference = f"--{ways[-1]}", getattr(given, ways[-1])
    if ways[1:] or (verb != "fit" and ways != ["ckpt_path"]):
        raise Mistake(f"{option}: is for fit, and instead of any other way on from a checkpoint")
    if option == "--resume":
        folder = find_run(reference, root, option)
        if os.environ.setdefault("WANDB_RUN_ID", folder.name) != folder.name:
            raise Mistake(f"{option} names {folder.name}, WANDB_RUN_ID names {os.environ['WANDB_RUN_ID']}")
        root, checkpoint = folder.parent, newest_checkpoint(folder)
    elif option == "--ckpt_path" and re.fullmatch(r"best|last|hpc|registry(:.*)?|\w+://.*", reference):
        return root, reference, []  # Lightning's own words
    else:
        checkpoint = find_checkpoint(reference, root, option)
    file, model = checkpoint.parent.parent / "config.yaml", settings_of(checkpoint)
    recipe, settings = [str(file)] * file.is_file(), json.dumps({"model": model} if model else {})
    if not recipe and not given.config and verb != "fit":  # a checkpoint alone
        states = read_checkpoint(checkpoint).get("callbacks", {})
        recipe = [json.dumps(states[name]["config"]) for name in states if name == "Record"]
    layers.insert(1 if verb == "fit" else len(layers), settings)
    layers[1:1] = recipe
    return root, str(checkpoint), [settings, *(recipe if option == "--resume" else [])]


def restarted(run: Run) -> Path:
    """The newest checkpoint of a run that a scheduler, torchrun or a sweep's agent starts once more."""
    counts = ("SLURM_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "WANDB_SWEEP_ID")
    if not any(os.environ.get(name, "0") != "0" for name in counts):
        raise Mistake(f"run {run.id} has checkpoints already; to go on with it: --resume {run.id}")
    return newest_checkpoint(run.folder)


def adapt(trainer: Trainer, run: Run, file: str | None, checkpoint: dict[str, Any]) -> int:
    """Tells a ModelCheckpoint of this run where its files are now, for the folder may have been moved.

    Returns the step from which on the run logs again.
    """
    if "loops" not in checkpoint:
        raise Mistake(f"{file}: expected a checkpoint that a Trainer can go on from, got another's; see --init_from")
    saved: Any
    for saved in trainer.checkpoint_callbacks:  # restores all but this, with which W&B would say what was reached
        saved.current_score = checkpoint["callbacks"].get(saved.state_key, {}).get("current_score")
    for callback in trainer.early_stopping_callbacks:  # whose state would overrule a new patience
        checkpoint["callbacks"].get(callback.state_key, {})["patience"] = callback.patience
    here = str(run.folder / "checkpoints")
    for state in checkpoint["callbacks"].values():
        before = state.get("dirpath") if isinstance(state, dict) else None
        if before and file and Path(file).is_relative_to(run.folder):
            for key, value in state.items():
                state[key] = value.replace(before, here) if isinstance(value, str) else value
            state["best_k_models"] = {k.replace(before, here): v for k, v in state["best_k_models"].items()}
    loops = checkpoint["loops"]["fit_loop"]
    epochs, step = loops["epoch_progress"]["current"], loops["epoch_loop.state_dict"]["_batches_that_stepped"]
    return step + (epochs["processed"] < epochs["ready"])  # within an epoch the last step is not counted yet


def renew(trainer: Trainer, begun: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    """Has new options of optimizers and schedules take effect, where Lightning would restore the old ones.

    Schedules run anew up to the step of the checkpoint, so that a learning rate is what a fresh run would have there.
    What the optimizers know of the gradients (Adam's moments) stays. `begun` comes from `begun_with`, and `checkpoint`
    is changed before the trainer restores it.
    """
    if Path(str(trainer.ckpt_path)).is_relative_to(trainer.default_root_dir):
        for saved in trainer.checkpoint_callbacks:  # by an earlier start of this run, of which W&B may know nothing
            for logger in trainer.loggers:
                logger.after_save_checkpoint(saved)  # type: ignore[arg-type]
    before = checkpoint["callbacks"].get("Record", {}).get("begun")
    if before is None or repr(before) == repr(begun):
        return
    if before["kinds"] != begun["kinds"]:
        old, new = (" and ".join(kinds["kinds"]) for kinds in (before, begun))
        raise Mistake(f"the optimizer's state: expected {old}, as it was saved, got {new}; see --init_from")
    if trainer.strategy.restore_checkpoint_after_setup:  # then it is, with the old ones
        raise Mistake(f"{type(trainer.strategy).__name__} cannot go on with new options; see --init_from")
    for config, state in zip(trainer.lr_scheduler_configs, checkpoint["lr_schedulers"], strict=True):
        scheduler: Any = config.scheduler
        if config.reduce_on_plateau or "last_epoch" not in state:
            raise Mistake(f"{type(scheduler).__name__}: cannot go on with a new learning rate; see --init_from")
        with warnings.catch_warnings(action="ignore"):  # of steps without the optimizer's
            try:
                for _ in range(state["last_epoch"]):
                    scheduler.step()
            except ValueError as error:  # OneCycleLR's, beyond its last step
                raise Mistake(f"{type(scheduler).__name__}: {error}") from error
        state.update(scheduler.state_dict())
    for optimizer, state in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True):
        for group, old in zip(optimizer.param_groups, state["param_groups"], strict=True):
            old.update({name: value for name, value in group.items() if name != "params"})


def go_on(trainer: Trainer, pl_module: LightningModule, mark: "Bookmark") -> dict[str, Any]:
    """Takes up what a checkpoint's bookmark holds, just before the first batch, and cures what Lightning does then.

    Returns the sums of what the model logs by the epoch, to which those of the rest of the epoch are to be added.
    """
    if trainer.ckpt_path and Path(trainer.ckpt_path).is_relative_to(trainer.default_root_dir):
        trainer.ckpt_path = None  # or ModelCheckpoint would keep this file when there is a better one
    loop = trainer.fit_loop
    if not mark.batch and loop.restarting:  # with `max_steps` Lightning would take an ended epoch for one begun
        loop.epoch_progress.increment_completed()
        loop.on_iteration_done()
        loop.epoch_loop.on_iteration_done()
    trainer.callback_metrics.update(mark.metrics)
    for config in trainer.lr_scheduler_configs if not mark.batch else []:
        ended = config.interval == "epoch" and mark.epoch % config.frequency == 0
        if config.reduce_on_plateau and ended and config.monitor in mark.metrics:  # Lightning does so after saving
            pl_module.lr_scheduler_step(config.scheduler, mark.metrics[config.monitor])
    if len(mark.ranks) != trainer.world_size:
        rank_zero_only(print)(f"ranks    {len(mark.ranks)} before, {trainer.world_size} now: not the same to the bit")
        return {}
    mine = move_data_to_device(mark.ranks[trainer.global_rank], pl_module.device)
    for name, module in pl_module.named_modules():
        vars(module).update(mine["states"].get(name, {}))
    restore_random(mark.ranks[trainer.global_rank]["random"])
    return mine["means"]


def restore_random(states: dict[str, Any]) -> None:
    """Sets the states that `random_states` gave."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


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
    return class_of(model["class_path"]).load_from_checkpoint(file, map_location="cpu").eval()


def init_weights(module: LightningModule, checkpoint: Path) -> None:
    """Copies the weights of a checkpoint that fit, and prints a line for what did not."""
    module.configure_model()
    own, given = module.state_dict(), read_checkpoint(checkpoint)["state_dict"]
    fit = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    if not fit:
        kind = type(module).__name__
        raise Mistake(f"--init_from: none of the {len(given)} tensors in {shown(checkpoint)} fits {kind}")
    module.load_state_dict(fit, strict=False)
    for name in sorted((own.keys() | given.keys()) - fit.keys()):
        here, there = (tuple(tensors[name].shape) if name in tensors else "none" for tensors in (own, given))
        rank_zero_only(print)(f"weights  {name}: {here} here, {there} in the checkpoint")
