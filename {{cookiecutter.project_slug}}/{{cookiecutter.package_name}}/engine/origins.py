"""Where the values of a configuration come from, and what differs from a checkpoint's: imported when that is shown."""

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from .run import shown

Given = dict[str, list[tuple[str, Any]]]  # by option: what gives it a value, and which value; the last one counts


def options(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The options within a configuration, by their short names: `model` for the class, `model.lr` for its option."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from options(item, f"{name}.{key}")
    else:
        yield re.sub(r"\.(init_args|class_path\b)", "", name).strip(".+"), value


def given_by(layers: Sequence[str], flags: Sequence[str]) -> Given:
    """What was given for each option, by layers, which are files or JSON texts, and by flags."""
    load = get_loader("yaml")
    pairs = [
        (layer, option)
        for layer in layers
        for option in options(load(layer if layer.startswith("{") else Path(layer).read_text(encoding="utf-8")))
    ]
    for word, following in zip(flags, [*flags, ""][1:], strict=True):
        flag, equals, text = word.partition("=")
        if flag.startswith("--"):
            pairs += [(flag, option) for option in options(load(text if equals else following), flag.strip("-"))]
    given: Given = {}
    for source, (name, value) in pairs:
        given.setdefault(name, []).append((source, value))
    return given


def place(source: str, theirs: Collection[str]) -> str:
    """What to call a source; `theirs` are those that a checkpoint and its run brought."""
    if source.startswith("{"):
        return "the checkpoint" if source in theirs else "JSON"
    return source if source.startswith("--") else shown(Path(source))


def differences(
    recipe: dict[str, Any], layers: Sequence[str], flags: Sequence[str], theirs: Collection[str]
) -> Iterator[str]:
    """A line for each option of `recipe` on which the command and a checkpoint, or its run, do not agree."""
    given = given_by(layers[1:], flags)  # what lies under every run was not asked for
    for name in (name for name, _ in options(recipe) if name in given):
        source, value = given[name][-1]
        other, left = next(
            (pair for pair in given[name][::-1] if (pair[0] in theirs) != (source in theirs)), (source, value)
        )
        classes = [isinstance(x, str) and f".{x}".endswith(f".{y}") for x, y in ((value, left), (left, value))]
        if value != left and not any(classes):  # which may go by their last names
            yield f"{name}: {value} of {place(source, theirs)}, not {left} of {place(other, theirs)}"


def commented(recipe: dict[str, Any], layers: Sequence[str], flags: Sequence[str], theirs: Collection[str]) -> str:
    """The configuration as YAML, with a comment that says where each value comes from."""
    given = given_by(layers, flags)
    lines = yaml.safe_dump(recipe, sort_keys=False).splitlines()

    def comment(node: yaml.MappingNode, name: str) -> None:
        for key, value in node.value:
            if isinstance(value, yaml.MappingNode) and value.value:
                comment(value, f"{name}.{key.value}")
            else:
                ((option, _),) = options(None, f"{name}.{key.value}")
                sources = given.get(option)
                lines[key.start_mark.line] += f"  # {place(sources[-1][0], theirs) if sources else 'default'}"

    comment(yaml.compose("\n".join(lines)), "")
    return "\n".join(lines)
