"""Where the values of a configuration come from, and what differs from a checkpoint's: imported when that is shown."""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from .run import REDACTED, Mistake, shown


def options(value: Any, name: str = "", in_lists: bool = False) -> Iterator[tuple[str, Any]]:
    """The options within a configuration, and their full names; those in its lists are named by their position."""
    if in_lists and isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from options(item, f"{name}.{key}".strip("."), in_lists)
    else:
        yield name, value


def given(layers: Sequence[str], flags: Sequence[str], in_lists: bool = False) -> Iterator[tuple[str, str, Any]]:
    """What gives a value, to which option, and which value, by layers, which are files or JSON texts, then by flags."""
    sources = [(layer, "", layer if layer.startswith("{") else Path(layer).read_text("utf-8")) for layer in layers]
    for word, following in zip(flags, [*flags, ""][1:], strict=True):
        flag, equals, text = word.partition("=")
        if flag.startswith("--"):
            sources.append((flag, flag.strip("-+"), text if equals else following))
    for source, section, text in sources:
        try:
            value = get_loader("yaml")(text)
        except yaml.YAMLError:  # such as a name with a bracket in it
            value = text
        for name, item in options(value, section, in_lists):
            yield source, name, item


def short(name: str) -> str:
    """The name by which one knows an option: `model` for its class, `model.lr` for an option of that class."""
    return re.sub(r"\.(init_args|class_path\b)", "", name)


def place_of(source: str, theirs: Collection[str] = ()) -> str:
    """What to call a source; `theirs` are those that a checkpoint and its run brought."""
    if source.startswith("{"):
        return "the checkpoint" if source in theirs else "JSON"
    return source if source.startswith("--") else shown(Path(source))


def differences(
    recipe: dict[str, Any], layers: Sequence[str], flags: Sequence[str], theirs: Collection[str]
) -> Iterator[str]:
    """A line for each option of `recipe` on which the command and a checkpoint, or its run, do not agree."""
    sides: dict[str, dict[bool, tuple[str, Any]]] = {}  # by option: what counts on either side
    for source, name, value in given(layers[1:], flags):  # what lies under every run was not asked for
        side = sides.setdefault(short(name), {})
        side.pop(source in theirs, None)  # so that the one that counts is the second
        side[source in theirs] = source, value
    for name, _ in options(recipe):
        if len(side := sides.get(short(name), {})) == 2:
            (other, left), (source, value) = side.values()
            classes = [isinstance(x, str) and f".{x}".endswith(f".{y}") for x, y in ((value, left), (left, value))]
            if value != left and not any(classes):  # which may go by their last names
                yield f"{short(name)}: {value} of {place_of(source, theirs)}, not {left} of {place_of(other, theirs)}"


def examined(
    recipe: dict[str, Any], layers: Sequence[str], flags: Sequence[str], theirs: Collection[str], show: bool
) -> list[str]:
    """Says what differs from a checkpoint; shows it all and ends, if asked to; asks for a secret that was not saved."""
    if show:  # as YAML, flat
        last = {short(name): place_of(source, theirs) for source, name, _ in given(layers, flags)}
        for name, value in options(recipe):
            print(f"{name}: {json.dumps(value)}  # {last.get(short(name), 'default')}")
        raise SystemExit(0)
    if name := next((short(name) for name, value in options(recipe) if value == REDACTED), ""):
        raise Mistake(f"{name}: expected the secret itself, which no record holds, as a flag, --{name}")
    return [*differences(recipe, layers, flags, theirs)]
