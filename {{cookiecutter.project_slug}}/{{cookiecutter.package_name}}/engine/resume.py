"""From --resume, --ckpt_path and --init_from to a checkpoint and layers of configuration."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_only

from .checkpoints import (
    find_checkpoint,
    import_object,
    newest_checkpoint,
    saved_model_config,
)
from .errors import UsageError
from .files import display_path, python_command
from .readable import about_checkpoint, read_checkpoint
from .run import Run, find_run
from .screen import say

CHECKPOINT_FLAGS = ("ckpt_path", "init_from", "resume")
# What Lightning resolves itself: https://lightning.ai/docs/pytorch/stable/common/trainer.html
OF_THE_RUN = ("best", "last", "hpc")
LIGHTNING_WORDS = re.compile(r"best|last|hpc|registry(:.*)?|\w+://.*")
# By these a scheduler, torchrun or a sweep's agent says that it starts a run once more.
RESTART_VARIABLES = ("SLURM_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "WANDB_SWEEP_ID")


@dataclass(frozen=True)
class CheckpointLayers:
    """The checkpoint to begin from, and layers of values: file names, or JSON texts.

    Args:
        mode: The flag that names the checkpoint; "" without one.
        root: Folder of the run that begins or resumes.
        run_id: Id of the run that --resume names.
        path: The checkpoint; a file, or a word that Lightning resolves.
        under: Layers below the configuration files of the command.
        over: Layers above them.
        from_checkpoint: Those layers from which a difference is printed.
    """

    mode: str
    root: Path
    run_id: str | None = None
    path: str | None = None
    under: tuple[str, ...] = ()
    over: tuple[str, ...] = ()
    from_checkpoint: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """What a command asks for beside the checkpoint.

    Args:
        subcommand: `fit`, or another, which evaluates.
        root: Folder of all runs.
        has_config: Whether the command has a configuration file.
        model_class: The model's class, if a file or a flag gives it.
        weights_only: Whether a checkpoint is refused that could run code.
    """

    subcommand: str
    root: Path
    has_config: bool
    model_class: str = ""
    weights_only: bool = True


def resolve_checkpoint_flags(asked: Asked, flags: dict[str, str]) -> CheckpointLayers:
    """Find the checkpoint that the flags name, and the configuration that comes with it.

    Args:
        asked: What the command asks for beside it.
        flags: Those of CHECKPOINT_FLAGS that are given.

    Raises:
        UsageError: If flags do not go together, or if there is no such checkpoint.
    """
    root = asked.root
    if not flags:
        return CheckpointLayers("", root)
    mode = check_flags(asked.subcommand, flags)
    reference = flags[mode]
    if mode == "ckpt_path" and LIGHTNING_WORDS.fullmatch(reference):
        return CheckpointLayers(mode, root, path=reference)
    run_id = None
    if mode == "resume":
        folder = find_run(reference, root, "--resume")
        root, run_id = folder.parent, resumed_id(folder)
        file = newest_checkpoint(folder)
    else:
        file = find_checkpoint(reference, root, f"--{mode}")
    trains = asked.subcommand == "fit"
    about = about_checkpoint(file, asked.weights_only)
    run_config = run_layers(about, file, from_file=not trains and not asked.has_config)
    model = model_layers(about, file, asked, mode)
    if asked.model_class:
        run_config = tuple(with_class(layer, asked.model_class) for layer in run_config)
    return CheckpointLayers(
        mode,
        root,
        run_id,
        str(file),
        under=(*run_config, *model) if trains else run_config,
        over=() if trains else model,
        from_checkpoint=(*model, *run_config) if mode == "resume" else model,
    )


def check_flags(subcommand: str, flags: dict[str, str]) -> str:
    """Return the one flag that is given; raise a UsageError for several, or a wrong one."""
    given = [name for name in CHECKPOINT_FLAGS if name in flags]
    mode = given[-1]
    if len(given) > 1:
        raise UsageError(f"--{mode}: cannot be given together with --{given[0]}")
    if subcommand != "fit" and mode != "ckpt_path":
        raise UsageError(f"--{mode}: is for fit; {subcommand} takes --ckpt_path")
    return mode


def resumed_id(folder: Path) -> str:
    """Return the id of the run that --resume names; the environment must not name another."""
    given = os.environ.get("WANDB_RUN_ID", folder.name)
    if given != folder.name:
        raise UsageError(f"--resume names {folder.name}, WANDB_RUN_ID names {given}")
    return folder.name


def run_layers(about: dict[str, Any], file: Path, from_file: bool) -> tuple[str, ...]:
    """Return the configuration of a checkpoint's run; without a run, perhaps that in the file."""
    config = file.parent.parent / "config.yaml"
    if config.is_file():
        return (str(config),)
    saved = about.get("config") if from_file else None
    return (json.dumps(saved),) if saved else ()


def with_class(layer: str, model_class: str) -> str:
    """Return a run's configuration with another class of the model, if its own is gone."""
    values = yaml.safe_load(layer if layer.startswith("{") else Path(layer).read_text("utf-8"))
    section = values.get("model")
    if not isinstance(section, dict) or "class_path" not in section:
        return layer
    try:
        import_object(section["class_path"])
    except UsageError:
        return json.dumps({**values, "model": {**section, "class_path": model_class}})
    return layer


def model_layers(about: dict[str, Any], file: Path, asked: Asked, mode: str) -> tuple[str, ...]:
    """Return what a checkpoint says of its model.

    Raises:
        UsageError: If its class cannot be imported, and the command gives none.
    """
    try:
        model = saved_model_config(about, file)
    except UsageError:
        if not asked.model_class:
            raise
        if mode == "init_from":
            return ()
        model = saved_model_config(about, file, asked.model_class)
    return (json.dumps({"model": model}),) if model else ()


def find_restart_checkpoint(run: Run) -> Path:
    """Return the newest checkpoint of a run that a scheduler or launcher starts once more.

    Raises:
        UsageError: If this is no restart.
    """
    if not is_restarted():
        resume = python_command("fit", "--resume", display_path(run.folder))
        raise UsageError(f"run {run.id} has checkpoints already; to resume it: {resume}")
    return newest_checkpoint(run.folder)


def is_restarted() -> bool:
    """Return whether a scheduler, a launcher or a sweep may have started this command before."""
    return any(os.environ.get(name, "0") != "0" for name in RESTART_VARIABLES)


def load_initial_weights(module: LightningModule, file: Path, weights_only: bool) -> None:
    """Copy those tensors of a checkpoint that fit a module, and print a line for each other.

    Args:
        module: The module.
        file: The checkpoint.
        weights_only: Whether to refuse a file that could run code.

    Raises:
        UsageError: If none fits.
    """
    module.configure_model()
    own, given = module.state_dict(), read_checkpoint(file, weights_only)["state_dict"]
    shapes, given_shapes = shapes_of(own), shapes_of(given)
    fitting = {
        name: value for name, value in given.items() if given_shapes[name] == shapes.get(name)
    }
    if not fitting:
        problem = f"none of the {len(given)} tensors in {display_path(file)} fits"
        raise UsageError(f"--init_from: {problem} {type(module).__name__}")
    module.load_state_dict(fitting, strict=False)
    for name in sorted((own.keys() | given.keys()) - fitting.keys()):
        here, there = shapes.get(name, "none"), given_shapes.get(name, "none")
        rank_zero_only(say)(f"parameters {name}: {here} here, {there} in the checkpoint")


def shapes_of(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shape of each entry; `()` for what is no tensor."""
    return {name: tuple(getattr(value, "shape", ())) for name, value in state_dict.items()}
