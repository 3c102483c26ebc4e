"""`$run`, `$verb`, `$monitor` and `$mode` in the values of a configuration.

They are filled in after parsing, so that each place can still be given another value, and
config.yaml keeps the placeholder. The syntax is not that of OmegaConf, `${...}`.
"""

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from jsonargparse import Namespace

from .parser import is_required

PLACEHOLDER = re.compile(r"\$(run|verb|monitor|mode)(?!\w)")


def fill_placeholders(value: Any, values: Mapping[str, str | None]) -> Any:
    """Return the value with placeholders replaced in all texts within it, keys included.

    Args:
        value: A configuration, or a part of it.
        values: By the name of the placeholder, what it stands for. A text that is nothing but a
            placeholder becomes None where it stands for None; such a key is left out.
    """
    if isinstance(value, str):
        return fill_text(value, values)
    if isinstance(value, PurePath):
        return type(value)(str(fill_text(str(value), values)))
    if isinstance(value, list):
        return [fill_placeholders(item, values) for item in value]
    if isinstance(value, Namespace):
        return Namespace(fill_mapping(vars(value), values))
    return fill_mapping(value, values) if isinstance(value, dict) else value


def fill_mapping(mapping: Mapping[Any, Any], values: Mapping[str, str | None]) -> dict[Any, Any]:
    filled = {}
    for key, item in mapping.items():
        name = fill_text(key, values) if isinstance(key, str) else key
        if name is not None:
            filled[name] = fill_placeholders(item, values)
    return filled


def fill_text(text: str, values: Mapping[str, str | None]) -> str | None:
    if whole := PLACEHOLDER.fullmatch(text):
        return values[whole[1]]
    return PLACEHOLDER.sub(lambda found: str(values[found[1]]), text)


def without_unmonitored(callbacks: Namespace) -> Namespace:
    """Return the callbacks without those that need a monitor where there is none.

    `--monitor null` so switches early stopping off; a ModelCheckpoint without a monitor keeps the
    newest checkpoint.
    """
    kept = Namespace()
    for name, options in vars(callbacks).items():
        arguments: Any = options.get("init_args") if isinstance(options, Namespace) else None
        unmonitored = "monitor" in (arguments or ()) and arguments.monitor is None
        switched_off = unmonitored and is_required(options.class_path, "monitor")
        kept[name] = None if switched_off else options
    return kept
