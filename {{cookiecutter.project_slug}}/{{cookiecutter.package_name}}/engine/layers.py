"""Configuration files, read once: YAML, JSON or jsonnet, with today's names.

A layer is a source of values: a file, or a text that a checkpoint or a call from Python brought.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from .errors import UsageError, did_you_mean
from .files import PROJECT, display_path
from .legacy import Renames

SECTIONS = ("trainer", "callbacks")  # groups of options, in which an empty value would drop all
SAVED_MODEL = "the checkpoint"  # the layer with the `model` section of a checkpoint
OF_WANDB = ("_wandb", "wandb_version")  # what W&B writes into configurations for itself
SUFFIXES = (".yaml", ".yml", ".json", ".jsonnet")


@dataclass(frozen=True)
class Layer:
    """One source of values.

    Args:
        name: What to call it on the screen.
        argument: What `--config` takes: a file name, or JSON.
        values: The configuration in it; a section that names a file is read as well.
        from_checkpoint: Whether a checkpoint and its run brought it.
    """

    name: str
    argument: str
    values: dict[str, Any]
    from_checkpoint: bool = False


def read_layers(
    sources: Iterable[str], renames: Renames, from_checkpoint: Iterable[str] = ()
) -> list[Layer]:
    """Read sources of values: names of files, or JSON texts.

    Raises:
        UsageError: If a file is not there or is no configuration.
    """
    marked = set(from_checkpoint)
    return [read_layer(source, renames, source in marked) for source in sources]


def read_layer(source: str, renames: Renames, from_checkpoint: bool = False) -> Layer:
    """Read one source of values; see `read_layers`."""
    if source.startswith("{"):
        values = renames.in_values(without_records(json.loads(source)))
        name = SAVED_MODEL if from_checkpoint else "JSON"
        return Layer(name, json.dumps(values), values, from_checkpoint)
    file = Path(source)
    values = read_file(file)
    current = renames.in_values(without_records(values))
    as_is = current == values and file.suffix != ".jsonnet"
    argument = source if as_is else json.dumps(current)
    return Layer(display_path(file), argument, with_nested_files(current, file), from_checkpoint)


def read_file(file: Path) -> dict[str, Any]:
    """Return the values in a configuration file.

    Raises:
        UsageError: If it is not there, or is no mapping of sections.
    """
    shown = display_path(file)
    if not file.is_file():
        candidates = [*file.parent.glob("*"), *(PROJECT / "configs").glob("*")]
        hint = did_you_mean(file.name, (other.name for other in candidates))
        problem = "expected a file, got a folder" if file.is_dir() else f"no such file{hint}"
        raise UsageError(f"{shown}: {problem}")
    values = parse_file(file, shown)
    if not isinstance(values, dict):
        raise UsageError(f"{shown}: expected sections such as `model:`, got {values!r:.60}")
    for section in SECTIONS:
        options = values.get(section, {})
        if not isinstance(options, dict) and not is_config_file(options):
            raise UsageError(f"{shown}: {section}: expected options, got {options!r:.60}")
    return values


def parse_file(file: Path, shown: str) -> Any:
    """Return whatever a YAML, JSON or jsonnet file holds."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonnet":
            return get_loader("jsonnet")(text, path=str(file))
        return get_loader("yaml")(text)
    except (UnicodeDecodeError, OSError, ImportError) as error:
        raise UsageError(f"{shown}: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{shown}{line}: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{shown}: {error}") from error


def is_config_file(value: Any) -> bool:
    """Return True for a section that names a file: `trainer: trainer.yaml`."""
    return isinstance(value, str) and value.endswith(SUFFIXES)


def with_nested_files(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the values with each section that is a file beside `file` replaced by its content."""
    inlined = dict(values)
    for section, value in values.items():
        nested = file.parent / value if is_config_file(value) else None
        if nested and nested.is_file():
            inlined[section] = parse_file(nested, display_path(nested))
    return inlined


def without_records(values: dict[str, Any]) -> dict[str, Any]:
    """Return values without what the engine and W&B record beside the options of a run.

    W&B hands it back with the configuration, as for a trial that was preempted.
    """
    about = values.get("run")
    is_record = isinstance(about, dict) and "engine_version" in about
    left_out = (*OF_WANDB, "run") if is_record else OF_WANDB
    return {key: item for key, item in values.items() if key not in left_out}
