"""What of a checkpoint `torch.load(weights_only=True)` reads, and where it holds anything else."""

import io
from collections import OrderedDict, defaultdict
from datetime import date, datetime, timedelta
from pathlib import PosixPath, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

# What makes numpy's arrays and scalars when they are read; the second names are numpy 1's.
MAKERS: dict[str, Any] = {
    "_reconstruct": np.empty(0).__reduce__()[0],
    "scalar": np.float64(0).__reduce__()[0],
}
NUMPY_1 = [(made, f"numpy.core.multiarray.{name}") for name, made in MAKERS.items()]
DTYPES = [getattr(np.dtypes, name) for name in np.dtypes.__all__]
VALUES = [date, datetime, timedelta, PosixPath, PurePosixPath]
# Beside what torch allows: none of these runs other code, or touches a file, when it is made.
SAFE: list[Any] = [np.ndarray, np.dtype, *MAKERS.values(), *NUMPY_1, *DTYPES, *VALUES]


def first_unsafe(content: dict[str, Any]) -> tuple[str, str] | None:
    """Return key and class of the first value that is not read; None if all are.

    Tensors are taken as empty, so that a checkpoint of any size is checked in milliseconds.
    """
    return unsafe_in(without_data(content, torch.empty(0)), "")


def unsafe_in(value: Any, key: str) -> tuple[str, str] | None:
    """Return key and class of the first value in `value`, which is at `key`, that is not read."""
    name = refused_class(value)
    if not name:
        return None
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    else:
        items = []
    for part, item in items:
        inner = unsafe_in(item, f"{key}.{part}".removeprefix("."))
        if inner:
            return inner
    return key, name


def refused_class(value: Any) -> str:
    """Return the class or function that a value's file would need and does not get, or ""."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    with torch.serialization.safe_globals(SAFE):
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(buffer)
        if unsafe:
            return unsafe[0]
        buffer.seek(0)
        try:
            torch.load(buffer, weights_only=True)
        except Exception:  # torch raises many kinds
            return type(value).__name__
    return ""


def without_data(value: Any, empty: Tensor) -> Any:
    """Return content with one empty tensor, which is written once, in the place of all others."""
    if type(value) in (Tensor, Parameter):
        return empty
    if type(value) in (dict, OrderedDict, defaultdict):
        return {name: without_data(item, empty) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(without_data(item, empty) for item in value)
    return value
