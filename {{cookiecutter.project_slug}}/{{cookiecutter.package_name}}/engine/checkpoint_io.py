"""Writing and reading one checkpoint file."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from .checkpoint_record import record_of
from .checkpoint_writer import CheckpointWriter, Job
from .errors import RunError, warn_user
from .files import redact
from .host_copy import HostCopy
from .readable import SAFE, TRUST, first_unsafe, unreadable, upgrade_checkpoint

SIGNAL_SECONDS = 15  # that the end waits after a signal: its sender kills after 30 s
ERROR_SECONDS = 120


class BackgroundCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints whole, without secrets, and within `in_background` beside the training.

    There the training waits only until the content is copied into host memory. A second save
    waits until the first one is written. Outside of it, and for a path of fsspec such as
    `memory://`, a file is there when `save_checkpoint` returns.
    """

    def __init__(self) -> None:
        self.waits = True
        # Made when they are needed: a launcher pickles this before.
        self._writer: CheckpointWriter | None = None
        self._host: HostCopy | None = None
        self._untold: list[tuple[int, Callable[[], None]]] = []  # by what has to be done before
        self._begun = 0  # what had been asked for at the last step's start

    @property
    def writer(self) -> CheckpointWriter:
        if self._writer is None:
            self._writer = CheckpointWriter(say_if_unreadable)
            self._host = HostCopy(self._wait_until_written)
        return self._writer

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """Write what is saved in here beside the training."""
        before, self.waits = self.waits, False
        try:
            yield
        finally:
            self.waits = before

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            RunError: If this file, or one before it, cannot be written; an older one stays.
        """
        content = {
            key: redact(value) if "hyper_parameters" in key else value
            for key, value in checkpoint.items()
        }
        self.writer.raise_error()
        remote = storage_options is not None or "://" in str(path)
        if self.waits or remote:
            self.settle()
        if remote:
            return super().save_checkpoint(content, path, storage_options)
        self._hold(content, Path(path))
        if self.waits:
            self.writer.release(waits_for_rows=False)
            self.settle()

    def _hold(self, content: dict[str, Any], path: Path) -> None:
        writer, host = self.writer, self._host
        assert host is not None
        copied = host.copy(content)
        job = writer.write(path, copied, record_of(content))
        job.ready = copy_event()

    def take_over(self, path: Path, takes_over: bool) -> None:
        """Have the file that was saved last written for those held before it with equal weights.

        Args:
            path: The file.
            takes_over: Whether it may; else nothing is done.
        """
        held = [job for job in self._writer.held if job.content] if self._writer else []
        if takes_over and held and path in held[-1].paths:
            same = [other for other in held[:-1] if same_content(other, held[-1])]
            self.writer.take_over(held[-1], same)

    def tell(self, tell: Callable[[Any], None], saving: Any) -> None:
        """Have a logger told that a callback has saved, once the file is there."""
        self._untold.append((self.writer.asked, lambda: tell(saving)))

    def begin_writing(self) -> None:
        """Tell loggers what is there, and write what is held.

        A file is not removed before loggers have been told of it.

        Raises:
            RunError: If something could not be written.
        """
        writer = self._writer
        if writer is None or not (self._untold or writer.held or writer.error):
            return
        writer.raise_error()
        self._tell_loggers()
        self._begun = writer.asked
        writer.release(untold=self._first_untold)

    @property
    def _first_untold(self) -> float:
        return min((ticket for ticket, _ in self._untold), default=math.inf)

    def _wait_until_written(self) -> None:
        self.writer.wait_until_written(self._first_untold)

    def drop_held(self) -> None:
        """Leave files as they are: neither write nor remove what was asked for since the last step.

        Loggers are not told of it.
        """
        if self._writer is not None:
            self._untold = [entry for entry in self._untold if entry[0] <= self._begun]
            self._writer.drop_after(self._begun)

    def finish_writing(self) -> None:
        """Wait until all that was asked for is there, and tell loggers.

        Raises:
            RunError: If something could not be written.
        """
        if self._writer is not None:
            self.settle()

    def _tell_loggers(self) -> None:
        if not self._untold:
            return
        done = self.writer.done
        ready = [tell for ticket, tell in self._untold if ticket <= done]
        self._untold = [(ticket, tell) for ticket, tell in self._untold if ticket > done]
        for tell in ready:
            tell()

    def settle_file(self, path: Any) -> None:
        """Wait until a file that is asked for is there."""
        writer = self._writer
        if writer is not None and writer.knows(Path(str(path))):
            self.settle()

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file once what was asked for before is in its place."""
        if self._writer is None or self._writer.is_idle or "://" in str(path):
            super().remove_checkpoint(path)
        else:
            # What was saved in this step does not need the file any more.
            before = [ticket for ticket, _ in self._untold if ticket <= self._begun]
            self._writer.remove(super().remove_checkpoint, Path(path), max(before, default=0))

    def load_checkpoint(
        self,
        path: Any,
        map_location: Any = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint, also one of an earlier release of the engine.

        Raises:
            UsageError: If it cannot be read. `weights_only` is True unless it is False.
        """
        if self._writer is not None:
            self.settle()
        trusted = weights_only is False
        try:
            with torch.serialization.safe_globals(SAFE):
                content = super().load_checkpoint(path, map_location, not trusted)
        except Exception as error:  # torch raises many kinds
            if not Path(str(path)).is_file():
                raise
            raise unreadable(Path(str(path)), error) from error
        return upgrade_checkpoint(content)

    def settle(self) -> None:
        """Wait until all that was asked for is done, and tell loggers.

        Raises:
            RunError: If something could not be written.
        """
        self.writer.wait_for_released()
        self.writer.raise_error()
        self._tell_loggers()  # before a file goes that is held for removal
        self.writer.wait()
        self.writer.raise_error()
        self._tell_loggers()

    def teardown(self) -> None:
        """Wait for what is left; after an error or a signal for a bounded time, and say it."""
        if self._writer is None:
            return
        error = sys.exc_info()[1]
        try:
            self._end(error)
            self._tell_loggers()
        finally:
            self._writer.end()
            self._writer = self._host = None
            self._untold, self._begun = [], 0

    def _end(self, error: BaseException | None) -> None:
        writer = self.writer
        if error is None:
            return self.settle()
        seconds = ERROR_SECONDS if isinstance(error, Exception) else SIGNAL_SECONDS
        end = time.monotonic() + seconds
        writer.wait_for_released(seconds)
        self._tell_loggers()
        if not writer.wait(max(0, end - time.monotonic())):
            warn_user(f"{writer.abandon()} is not written")
        try:
            writer.raise_error()
        except RunError as problem:  # must not hide what ended the run
            warn_user(str(problem))


def copy_event() -> Callable[[], None]:
    """Return what waits until a GPU has copied what it was asked to copy so far."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


def same_content(one: Job, other: Job) -> bool:
    """Return True if two checkpoints are of the same step, with equal weights."""
    first, second = one.content or {}, other.content or {}
    if first.keys() != second.keys() or first["global_step"] != second["global_step"]:
        return False
    return equal(first["state_dict"], second["state_dict"])


def equal(one: Any, other: Any) -> bool:
    """Return True if two state_dicts hold equal tensors, by where they lie if they are large."""
    if one.keys() != other.keys():
        return False
    return all(
        isinstance(value, Tensor)
        and value.layout == other[name].layout == torch.strided
        and (value.data_ptr() == other[name].data_ptr() or torch.equal(value, other[name]))
        for name, value in one.items()
    )


def say_if_unreadable(content: dict[str, Any]) -> None:
    """Say in one line if a checkpoint could be read by those alone who trust it."""
    unsafe = first_unsafe(content)
    if unsafe:
        key, kind = unsafe
        warn_user(f"checkpoints of this run need {TRUST} to be read: {key} holds {kind}")
