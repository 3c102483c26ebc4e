"""Where the values of a configuration come from, and what differs from a checkpoint's."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from jsonargparse import get_loader

from .errors import UsageError
from .files import REDACTED
from .layers import Layer

SHOW_ORIGINS = "--print_config=origins"


@dataclass(frozen=True)
class Setting:
    """A value that somebody gave: its full name, and the file or flag that has it."""

    name: str
    value: Any
    source: str
    from_checkpoint: bool = False

    @property
    def is_flag(self) -> bool:
        return self.source.startswith("--")


def iter_settings(value: Any, name: str = "", in_lists: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield the options within a configuration by their full names.

    Args:
        value: A configuration, or a part of it.
        name: Full name of that part.
        in_lists: Whether to look into lists too, whose items are named by their position.
    """
    if in_lists and isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        yield name, value
        return
    for key, item in value.items():
        yield from iter_settings(item, f"{name}.{key}".strip("."), in_lists)


def given_settings(
    layers: Sequence[Layer], flags: Sequence[str], in_lists: bool = False
) -> Iterator[Setting]:
    """Yield all that layers and flags give, the lowest first."""
    for layer in layers:
        for name, value in iter_settings(layer.values, "", in_lists):
            if name.endswith(".init_args") and value == {}:
                continue  # says nothing
            yield Setting(name, value, layer.name, layer.from_checkpoint)
    for flag, following in zip(flags, [*flags, ""][1:], strict=True):
        if flag.startswith("--"):
            option, equals, text = flag.partition("=")
            value = parse_value(text if equals else following)
            for name, item in iter_settings(value, option.strip("-+"), in_lists):
                yield Setting(name, item, option)


def parse_value(text: str) -> Any:
    """Return what the text of a flag means, as the parser would read it."""
    try:
        return get_loader("yaml")(text)
    except yaml.YAMLError:  # such as a name with a bracket in it
        return text


def display_name(name: str) -> str:
    """Return `model.lr` for model.init_args.lr, and `model` for model.class_path."""
    return re.sub(r"\.(init_args|class_path\b)", "", name)


def differences(
    config: dict[str, Any], layers: Sequence[Layer], flags: Sequence[str]
) -> Iterator[str]:
    """Yield a line for each option on which this command and the checkpoint disagree."""
    saved: dict[str, Setting] = {}
    asked: dict[str, Setting] = {}
    for setting in given_settings(layers, flags):
        side = saved if setting.from_checkpoint else asked
        side[display_name(setting.name)] = setting
    order = [display_name(name) for name, _ in iter_settings(config)]
    winner = {display_name(setting.name): setting for setting in given_settings(layers, flags)}
    for name in order:
        if name not in saved or name not in asked or same(saved[name].value, asked[name].value):
            continue
        if REDACTED in (saved[name].value, asked[name].value):  # the other one is the secret
            continue
        wins = winner[name]
        loses = asked[name] if wins.from_checkpoint else saved[name]
        yield f"{name}: {wins.value} of {wins.source}, not {loses.value} of {loses.source}"


def same(one: Any, other: Any) -> bool:
    """Compare values; a class may be given by the last part of its path."""
    if isinstance(one, str) and isinstance(other, str):
        return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")
    return bool(one == other)


def print_origins(config: dict[str, Any], layers: Sequence[Layer], flags: Sequence[str]) -> None:
    """Print the configuration as flat YAML, with the source of each value as a comment."""
    sources = {display_name(given.name): given.source for given in given_settings(layers, flags)}
    for name, value in iter_settings(config):
        print(f"{name}: {json.dumps(value)}  # {sources.get(display_name(name), 'default')}")


def refuse_redacted(config: dict[str, Any]) -> None:
    """Ask for a secret that no record holds.

    Raises:
        UsageError: If a value of the configuration was redacted.
    """
    for name, value in iter_settings(config):
        if value == REDACTED:
            option = display_name(name)
            expected = f"expected the secret, which no record holds, as a flag, --{option}"
            raise UsageError(f"{option}: {expected}")
