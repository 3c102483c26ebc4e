"""Writes and removes checkpoints in a thread, in the order in which that was asked for."""

import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition, Thread
from typing import Any

import torch

from .checkpoint_record import append_record
from .errors import RunError, warn_user
from .files import display_path

PIECE = 1 << 24  # bytes that are written at a time
POLL_SECONDS = 0.01
ROWS_SECONDS = 10  # that a checkpoint waits for what was logged before it


class Abandoned(Exception):
    """What is left to write is not waited for any more."""


@dataclass(eq=False)
class Job:
    """One checkpoint to write, or one file to remove.

    Args:
        tickets: Numbers of what was asked for; several where one content has several names.
        paths: The names of the content; or what to remove.
        content: What to write; None once it is written, and for a removal.
        ready: Waits until a GPU has copied the content.
        may_be_placed: Whether what was logged before the checkpoint is written.
    """

    tickets: list[int]
    paths: list[Path]
    content: dict[str, Any] | None = None
    record: dict[str, Any] = field(default_factory=dict)
    ready: Callable[[], None] = lambda: None
    may_be_placed: Callable[[], bool] = lambda: True


class CheckpointWriter:
    """A queue of jobs, and the thread that does them.

    What is asked for is held until `release`. A file is written beside its place, with the suffix
    `.part`, and renamed once it is complete. After an error nothing later is done, so that no
    older file is removed.

    Args:
        check: Called in the thread with the first content that is written.
    """

    def __init__(self, check: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
        self.check: Callable[[dict[str, Any]], None] | None = check
        # Returns what says whether all that is logged by now is written.
        self.mark: Callable[[], Callable[[], bool]] = lambda: lambda: True
        self.held: list[Job] = []
        self.queue: deque[Job] = deque()  # the first is being done
        self.change = Condition()
        self.error: tuple[Path, BaseException] | None = None
        self.abandoned = False
        self.asked = 0
        self.thread: Thread | None = None

    # What the training asks for.

    def write(self, path: Path, content: dict[str, Any], record: dict[str, Any]) -> Job:
        """Hold a checkpoint that is to be written; a removal of the same file is not done then."""
        self.asked += 1
        self.held = [job for job in self.held if not is_removal_of(path, job)]
        job = Job([self.asked], [path], content, record)
        self.held.append(job)
        return job

    def remove(self, remove: Callable[[Path], None], path: Path, after: int) -> None:
        """Hold the removal of a file, until what was asked for before is in its place.

        Args:
            remove: What removes it.
            path: The file.
            after: Number of what loggers have to be told of before.
        """
        self.asked += 1
        self.held.append(Removal([self.asked], [path], remove=remove, after=after))

    def drop_after(self, ticket: int) -> None:
        """Neither write nor remove what is held and was asked for after a number."""
        self.held = [job for job in self.held if min(job.tickets) <= ticket]

    def take_over(self, job: Job, others: list[Job]) -> None:
        """Have a job write what others that are held would write, under their names too."""
        for other in others:
            self.held.remove(other)
            job.paths = [*(path for path in other.paths if path not in job.paths), *job.paths]
            job.tickets = [*other.tickets, *job.tickets]

    def release(self, waits_for_rows: bool = True, untold: float = math.inf) -> None:
        """Have what is held done: first the writing, then the removing.

        Args:
            waits_for_rows: Whether files take their place after what is logged by now.
            untold: Number of the first file of which loggers are still to be told.
        """
        if self.error:
            self.held = []
        if not self.held:
            return
        may_be_placed = self.mark() if waits_for_rows else lambda: True
        writing = [job for job in self.held if not isinstance(job, Removal)]
        others = [job for job in self.held if isinstance(job, Removal)]
        removing = [job for job in others if job.after < untold]
        for job in writing:
            job.may_be_placed = may_be_placed
        self.held = [job for job in others if job not in removing]
        with self.change:
            self.queue += [*writing, *removing]
            self.change.notify_all()
        if self.thread is None:
            self.thread = Thread(target=self._work, name="checkpoints", daemon=True)
            self.thread.start()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to do."""
        return not (self.held or self.queue)

    def knows(self, path: Path) -> bool:
        """Return True if a file is still to be written or removed."""
        with self.change:
            return any(path in job.paths for job in (*self.held, *self.queue))

    @property
    def done(self) -> int:
        """The number of the last thing asked for before which, and with which, all is done."""
        with self.change:
            open_tickets = [number for job in (*self.queue, *self.held) for number in job.tickets]
        return min(open_tickets, default=self.asked + 1) - 1

    def wait_until_written(self, untold: float = math.inf) -> None:
        """Wait until no content is needed any more; what is held is released, see `release`."""
        self.release(untold=untold)
        with self.change:
            self.change.wait_for(lambda: not any(job.content for job in self.queue))

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until all is done, or failed; return False if it takes longer."""
        self.release()
        return self.wait_for_released(seconds)

    def wait_for_released(self, seconds: float | None = None) -> bool:
        """Wait until all that is not held is done, or failed; return False if it takes longer."""
        with self.change:
            return self.change.wait_for(lambda: not self.queue, seconds)

    def raise_error(self) -> None:
        """Raise a RunError if something could not be written, once."""
        with self.change:
            failed, self.error = self.error, None
        if failed:
            self.held = []  # no older file is removed
            path, error = failed
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            problem = f"{display_path(path)} cannot be written, and is as it was: {reason}"
            raise RunError(problem) from error

    def abandon(self) -> str:
        """Give up what is left; return which file is not written, or ""."""
        with self.change:
            self.abandoned = True
            left = [display_path(job.paths[-1]) for job in self.queue]
            self.change.notify_all()
        return left[0] if left else ""

    def end(self) -> None:
        """End the thread; the next `release` begins another."""
        with self.change:
            self.abandoned = True
            self.change.notify_all()
        if self.thread:
            self.thread.join(2)
        self.thread, self.abandoned = None, False

    # In the thread.

    def _work(self) -> None:
        while True:
            with self.change:
                self.change.wait_for(lambda: self.queue or self.abandoned)
                if not self.queue:
                    return
                job = self.queue[0]
            try:
                self._do(job)
            except BaseException as error:
                with self.change:
                    if not isinstance(error, Abandoned):
                        self.error = job.paths[-1], error
                    self.queue.clear()
                    self.change.notify_all()
            else:
                with self.change:
                    self.queue.popleft()
                    self.change.notify_all()

    def _do(self, job: Job) -> None:
        if isinstance(job, Removal):
            return job.remove(job.paths[0])
        part = part_of(job.paths[-1])
        try:
            self._write_part(job, part)
            self._wait_for_rows(job)
            for path in job.paths[:-1]:
                place_twin(part, path)
            part.replace(job.paths[-1])
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)

    def _write_part(self, job: Job, part: Path) -> None:
        job.ready()
        content: Any = job.content
        if self.check:
            self.check(content)
            self.check = None
        write_file(part, content, job.record, lambda: self.abandoned)
        with self.change:
            job.content = None
            self.change.notify_all()

    def _wait_for_rows(self, job: Job) -> None:
        end = time.monotonic() + ROWS_SECONDS
        while not job.may_be_placed():
            if self.abandoned:
                raise Abandoned
            if time.monotonic() > end:
                file = display_path(job.paths[-1])
                warn_user(f"{file} is newer than what W&B's client has written of this run")
                return
            time.sleep(POLL_SECONDS)


@dataclass(eq=False)
class Removal(Job):
    remove: Callable[[Path], None] = Path.unlink
    after: int = 0


def is_removal_of(path: Path, job: Job) -> bool:
    return isinstance(job, Removal) and path in job.paths


class Pieces:
    """A file as torch.save takes it, written in pieces, between which it can be abandoned.

    torch.save hides an OSError in a RuntimeError without its reason; `error` keeps it.
    """

    def __init__(self, file: Any, abandoned: Callable[[], bool]) -> None:
        self.file, self.abandoned, self.flush = file, abandoned, file.flush
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        try:
            for start in range(0, len(view), PIECE):
                if self.abandoned():
                    raise Abandoned
                self.file.write(view[start : start + PIECE])
        except BaseException as error:
            self.error = error
            raise
        return len(view)


def write_file(
    file: Path,
    content: dict[str, Any],
    record: dict[str, Any],
    abandoned: Callable[[], bool] = lambda: False,
) -> None:
    """Write a checkpoint with the engine's record, and have it on the disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)  # of a process that was killed
    with file.open("wb") as stream:
        pieces = Pieces(stream, abandoned)
        try:
            torch.save(content, pieces)  # type: ignore[arg-type]
        except Exception as error:
            raise (pieces.error or error) from None
    append_record(file, record)
    with file.open("r+b") as stream:  # Windows does not sync what is open for reading
        os.fsync(stream.fileno())


def part_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.part")


def place_twin(content: Path, path: Path) -> None:
    """Give what is in the file `content` the name `path` too."""
    part = part_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part.unlink(missing_ok=True)
    try:
        os.link(content, part)
    except OSError:  # a file system without hard links
        shutil.copyfile(content, part)
    part.replace(path)
