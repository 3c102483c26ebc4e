"""Reading checkpoints without running code that they may hold, and what else they hold."""

import io
from collections import OrderedDict, defaultdict
from datetime import date, datetime, timedelta
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from .checkpoint_record import read_record, record_of
from .errors import UsageError
from .files import display_path

TRUST = "--weights_only false"

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


def upgrade_checkpoint(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Give what earlier releases of the engine saved today's names, in place.

    Returns:
        The same checkpoint.
    """
    if "bookmark" in checkpoint:
        checkpoint["train_state"] = checkpoint.pop("bookmark")
    states = checkpoint.get("callbacks") or {}
    for key in [key for key in states if str(key).startswith("Backup{")]:
        states[key.replace("Backup", "LastCheckpoint", 1)] = states.pop(key)
    record = states.pop("Record", None)
    if record:
        checkpoint.setdefault("engine", {"config": record.get("config", {})})
        states["RestoreRun"] = {"initial_optimizer_options": record.get("begun", {})}
    return checkpoint


def read_checkpoint(file: Path, weights_only: bool = True) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        file: The checkpoint.
        weights_only: Whether to refuse what could run code; False for a file that one trusts.

    Raises:
        UsageError: If it is no checkpoint, or not all of it is there, or not all of it is read.
    """
    try:
        with torch.serialization.safe_globals(SAFE):
            # A file of before torch 1.6 is no zip archive, and cannot be mapped into memory.
            content = torch.load(
                file, map_location="cpu", weights_only=weights_only, mmap=is_zipfile(file)
            )
    except Exception as error:  # torch raises many kinds
        raise unreadable(file, error) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise unreadable(file, "it has no state_dict")
    return upgrade_checkpoint(content)


def about_checkpoint(file: Path, weights_only: bool = True) -> dict[str, Any]:
    """Return the engine's record of a checkpoint, in milliseconds where the file has one.

    Raises:
        UsageError: As `read_checkpoint`, where it has none.
    """
    record = read_record(file)
    return record if record is not None else record_of(read_checkpoint(file, weights_only))


def unreadable(file: Path, reason: Exception | str) -> UsageError:
    """Return an error that says what to do."""
    shown = display_path(file)
    if isinstance(reason, str):
        return UsageError(f"{shown}: not a checkpoint that can be read ({reason})")
    if is_complete(file):
        kind = refused_kind(file) or type(reason).__name__
        hint = f"{TRUST} reads it, and runs what it says: for a file that you trust"
        return UsageError(f"{shown}: holds {kind}; {hint}")
    others = (other for other in newest_first(file.parent) if other != file)
    complete = next(filter(is_complete, others), None)
    hint = f"; {display_path(complete)} can be" if complete else ""
    name = type(reason).__name__
    return UsageError(f"{shown}: not a checkpoint that can be read ({name}){hint}")


def refused_kind(file: Path) -> str:
    """Return the class or function in a checkpoint that is not read, or ""."""
    try:
        with torch.serialization.safe_globals(SAFE):
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # torch raises many kinds
        return ""
    return unsafe[0] if unsafe else ""


def is_complete(file: Path) -> bool:
    """Return True if all of a checkpoint is there, by the checksums that torch.save writes."""
    try:
        with ZipFile(file) as archive:
            return archive.testzip() is None
    except (BadZipFile, EOFError, OSError):
        return False


def newest_first(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder: last.ckpt, then the others by their time.

    A copy may have any time, so last.ckpt goes by its name.
    """

    def age(file: Path) -> tuple[bool, float, str]:
        return file.name == "last.ckpt", file.stat().st_mtime, file.name

    return sorted(folder.glob("*.ckpt"), key=age, reverse=True)
