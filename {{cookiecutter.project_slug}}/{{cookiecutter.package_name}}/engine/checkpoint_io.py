"""Writing and reading one checkpoint file."""

import io
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from .errors import UsageError
from .files import atomic_write, display_path, redact


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint without secrets, and renames it to its place once it is complete."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            RunError: If the file cannot be written; an older one stays as it was.
        """
        content = {
            key: redact(value) if "hyper_parameters" in key else value
            for key, value in checkpoint.items()
        }
        if storage_options is not None or "://" in str(path):
            return super().save_checkpoint(content, path, storage_options)
        buffer = io.BytesIO()
        torch.save(content, buffer)
        file = Path(path)
        # Lightning's own writes into TMPDIR first, where a kill leaves the file forever.
        with atomic_write(file) as part:
            file.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(buffer.getbuffer())

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint, also one of an earlier release of the engine."""
        return upgrade_checkpoint(super().load_checkpoint(*args, **kwargs))


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


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without running any code that it may hold.

    Raises:
        UsageError: If it is no checkpoint, or not all of it is there.
    """
    try:
        # A file of before torch 1.6 is no zip archive, and cannot be mapped into memory.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except Exception as error:  # torch raises many kinds
        raise unreadable(file, type(error).__name__) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise unreadable(file, "it has no state_dict")
    return upgrade_checkpoint(content)


def unreadable(file: Path, reason: str) -> UsageError:
    """Return an error that names another checkpoint in the folder, if there is a complete one."""
    others = (other for other in newest_first(file.parent) if other != file)
    complete = next(filter(is_complete, others), None)
    hint = f"; {display_path(complete)} can be" if complete else ""
    return UsageError(f"{display_path(file)}: not a checkpoint that can be read ({reason}){hint}")


def is_complete(file: Path) -> bool:
    """Return True if all of a checkpoint is there, by the checksums that torch.save writes."""
    try:
        with ZipFile(file) as archive:
            return archive.testzip() is None
    except (BadZipFile, EOFError):
        return False


def newest_first(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder: last.ckpt, then the others by their time.

    A copy may have any time, so last.ckpt goes by its name.
    """

    def age(file: Path) -> tuple[bool, float, str]:
        return file.name == "last.ckpt", file.stat().st_mtime, file.name

    return sorted(folder.glob("*.ckpt"), key=age, reverse=True)
