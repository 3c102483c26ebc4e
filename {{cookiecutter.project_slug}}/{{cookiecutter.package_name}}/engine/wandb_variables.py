"""What W&B's variables say of a command: options of the logger, and what a sweep or launch sets."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml

from .errors import UsageError
from .layers import Layer, without_records
from .wandb_logger import RunWandbLogger

# The option of the logger that a variable is.
OPTIONS = {
    "WANDB_PROJECT": "project",
    "WANDB_ENTITY": "entity",
    "WANDB_NAME": "name",
    "WANDB_RUN_GROUP": "group",
    "WANDB_TAGS": "tags",
    "WANDB_NOTES": "notes",
    "WANDB_JOB_TYPE": "job_type",
}
OF_SWEEP, OF_LAUNCH = "the sweep", "the launch"


def variable_layers(defaults: Sequence[Layer]) -> list[Layer]:
    """Return a layer for each of W&B's variables that is an option of the default files' logger."""
    class_path = ""
    for layer in defaults:
        trainer = layer.values.get("trainer")
        if isinstance(trainer, dict) and "logger" in trainer:
            logger = trainer["logger"]
            class_path = logger.get("class_path", class_path) if isinstance(logger, dict) else ""
    if not is_our_logger(class_path):
        return []
    layers = []
    for variable, option in OPTIONS.items():
        if value := os.environ.get(variable):
            given = value.split(",") if option == "tags" else value
            logger = {"class_path": class_path, "init_args": {option: given}}
            layers.append(as_layer(variable, {"trainer": {"logger": logger}}))
    return layers


def is_our_logger(class_path: str) -> bool:
    """Return True for RunWandbLogger and a team's subclass of it."""
    try:
        kind = resolve_name(class_path)
    except (ImportError, AttributeError, ValueError):
        return False
    return isinstance(kind, type) and issubclass(kind, RunWandbLogger)


def unused_folder(run_folder: Path) -> list[str]:
    """Return a line if WANDB_DIR names a folder, and no agent of a sweep has set it."""
    named = os.environ.get("WANDB_DIR", "")
    if named in ("", str(run_folder)) or "WANDB_SWEEP_ID" in os.environ:
        return []
    elsewhere = "W&B's files lie in the run's folder, which --runs_root puts elsewhere"
    return [f"W&B      WANDB_DIR is not used: {elsewhere}"]


def controller_layers() -> list[Layer]:
    """Return layers with what a sweep or `wandb launch` sets for this run.

    Raises:
        UsageError: If W&B's file or variable cannot be read.
    """
    layers = []
    if file := os.environ.get("WANDB_SWEEP_PARAM_PATH"):
        layers.append(as_layer(OF_SWEEP, unwrapped(read(Path(file)))))
    if os.environ.get("WANDB_LAUNCH", "").lower() in ("true", "1"):
        layers.append(as_layer(OF_LAUNCH, unwrapped(launch_config())))
    return [layer for layer in layers if layer.values]


def launch_config() -> dict[str, Any]:
    """Return the configuration that `wandb launch` gives, as W&B's client reads it."""
    pieces = [os.environ.get("WANDB_CONFIG", "")]
    while not pieces[0] and (piece := os.environ.get(f"WANDB_CONFIG_{len(pieces) - 1}")):
        pieces.append(piece)
    if text := "".join(pieces):
        try:
            config: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise UsageError(f"WANDB_CONFIG: expected JSON ({error})") from error
        return config
    file = os.environ.get("WANDB_LAUNCH_CONFIG_PATH")
    given = read(Path(file)) if file and Path(file).exists() else {}
    return (given.get("overrides") or {}).get("run_config") or {}


def read(file: Path) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file of W&B's."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{file}: {error}") from error
    return values if isinstance(values, dict) else {}


def unwrapped(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration of W&B's without what is not the run's.

    W&B's files have `{"value": ...}` for each key.
    """
    values = {
        key: item["value"] if isinstance(item, dict) and "value" in item else item
        for key, item in config.items()
    }
    return without_records(values)


def without_record_flags(flags: Iterable[str]) -> list[str]:
    """Return flags without those that stand for such records."""
    return [
        flag
        for flag in flags
        if not flag.startswith(("--_wandb=", "--wandb_version="))
        and not (flag.startswith("--run=") and "engine_version" in flag)
    ]


def known_part(layer: Layer, options: Iterable[str]) -> tuple[Layer, list[str]]:
    """Return a layer with what are options of the command, and the others, as words for a line.

    Args:
        layer: A layer of a sweep or a launch.
        options: The options and sections of the command.
    """
    known = set(options)
    values = {key: item for key, item in layer.values.items() if key.partition(".")[0] in known}
    others = sorted(layer.values.keys() - values.keys())
    return as_layer(layer.name, values), [f"{name} of {layer.name}" for name in others]


def as_layer(name: str, values: dict[str, Any]) -> Layer:
    return Layer(name, json.dumps(values), values)
