"""The record of a run, `run.json` in its folder: what `main.py runs` shows without opening more."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import RunError
from .files import atomic_write

RECORD = "run.json"
RUNNING = "running"
STATES_OF_CODES = {0: "finished", 130: "stopped", 143: "stopped", 138: "preempted"}


@dataclass
class RunRecord:
    """What is known of a run.

    Args:
        verb: The subcommand that made it.
        state: running, finished, stopped (by Ctrl-C or SIGTERM), preempted or failed.
        command: The command line, without secrets.
        began: When its first start began, in seconds since 1970.
        updated: When this was written.
        epoch: Epochs that were trained.
        max_epochs: Epochs to train; None without a limit.
        step: Steps of the optimizer.
        monitor: The metric that decides which validation is the best.
        mode: `min` or `max`.
        best: The values of the best validation, by metric.
        metrics: The values that were logged last, by metric.
        options: The values of all options, without secrets.
        given: Names of those that the command's files and flags gave.
        evaluates: Id of the run whose checkpoint was evaluated.
        error: What ended a run that failed.
        pid: The process.
        host: Its machine.
    """

    verb: str = "fit"
    state: str = RUNNING
    command: str = ""
    began: float = 0.0
    updated: float = 0.0
    epoch: int = 0
    max_epochs: int | None = None
    step: int = 0
    monitor: str | None = None
    mode: str = "min"
    best: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    given: list[str] = field(default_factory=list)
    evaluates: str | None = None
    error: str = ""
    pid: int = 0
    host: str = ""

    def begin(self) -> None:
        """Note that this process begins, or resumes, the run."""
        self.state, self.error = RUNNING, ""
        self.pid, self.host = os.getpid(), socket.gethostname()
        self.began = self.began or time.time()

    def take_over(self, before: "RunRecord") -> None:
        """Keep what an earlier start of the run has reached."""
        for name in ("began", "epoch", "max_epochs", "step", "monitor", "mode", "best", "metrics"):
            setattr(self, name, getattr(before, name))
        self.given = sorted({*before.given, *self.given})

    def end(self, code: int, error: str) -> None:
        """Note the exit code of the command and, in a line, what ended it."""
        self.state, self.error = STATES_OF_CODES.get(code, "failed"), error

    def write(self, folder: Path) -> None:
        """Write the record; a disk that is full is another's to report."""
        self.updated = time.time()
        try:
            with atomic_write(folder / RECORD) as part:
                part.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        except RunError:
            return

    @property
    def score(self) -> float | None:
        """The best value of the monitor."""
        return self.best.get(self.monitor or "")


def read_record(folder: Path) -> RunRecord | None:
    """Return the record of a run; None where there is none, or the file is another program's."""
    try:
        values = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    blank = asdict(RunRecord())
    if not isinstance(values, dict):
        return None
    known = {name: value for name, value in values.items() if name in blank}
    if all(is_like(value, blank[name]) for name, value in known.items()):
        return RunRecord(**known)
    return None


def is_like(value: Any, default: Any) -> bool:
    """Return whether a value has the type of a default; None has none."""
    if default is None:
        return not isinstance(value, dict | list)
    kinds = (int, float) if isinstance(default, float) else type(default)
    return isinstance(value, kinds)


@dataclass(frozen=True)
class RunFolder:
    """A run as its folder shows it."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @cached_property
    def record(self) -> RunRecord:
        """The record; one that says nothing for a run of an engine that wrote none."""
        return read_record(self.path) or RunRecord(state="unknown", began=modified(self.path))

    @cached_property
    def state(self) -> str:
        """The state of the record, or `killed` where no process is at work on the run."""
        if self.record.state in (RUNNING, "unknown") and self.is_live:
            return "training" if self.record.verb == "fit" else RUNNING
        return "killed" if self.record.state == RUNNING else self.record.state

    @cached_property
    def is_live(self) -> bool:
        """Whether a process is at work on the run."""
        lock = self.path / ".lock"
        if not lock.exists():
            return False
        try:
            with FileLock(lock).acquire(timeout=0):
                return False
        except Timeout:
            return True
        except (NotImplementedError, OSError):  # a file system without locks, or read-only
            return self._has_process()

    def _has_process(self) -> bool:
        if self.record.state != RUNNING:
            return False
        if self.record.host != socket.gethostname() or os.name == "nt":
            return True  # nobody can know: on Windows asking would end it
        try:
            os.kill(self.record.pid, 0)
        except PermissionError:  # another user's
            return True
        except OSError:
            return False
        return True

    @cached_property
    def files(self) -> dict[str, int]:
        """The size in bytes of each file in the folder, by its path from there."""
        return dict(sizes(self.path, ""))

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    @property
    def wandb(self) -> str:
        """Whether W&B has the run: `sent`, `unsent`, or "" where there is no W&B run."""
        logs = [name for name in self.files if name.startswith("wandb/") and is_log(name)]
        waiting = any(name.startswith("uploads/") for name in self.files)
        if not logs:
            return ""
        sent = all(f"{name}.synced" in self.files for name in logs)
        return "sent" if sent and not waiting else "unsent"


def is_log(name: str) -> bool:
    """Return True for the log of W&B's client of one start of a run."""
    return "run-" in name and name.endswith(".wandb")


def sizes(folder: Path | str, prefix: str) -> Iterator[tuple[str, int]]:
    """Yield each file below a folder by its path from there, and its size in bytes."""
    try:
        entries = list(os.scandir(folder))
    except OSError:  # it was removed meanwhile
        return
    for entry in entries:
        name = f"{prefix}{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            yield from sizes(entry.path, f"{name}/")
            continue
        with suppress(OSError):  # it was removed meanwhile
            yield name, entry.stat(follow_symlinks=False).st_size


def modified(path: Path) -> float:
    """Return when a file or folder was changed last, in seconds since 1970."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def run_folders(root: Path) -> list[RunFolder]:
    """Return the runs in a folder; what is no run is left out."""
    if not root.is_dir():
        return []
    folders = (Path(entry.path) for entry in os.scandir(root) if entry.is_dir())
    return [RunFolder(folder) for folder in sorted(folders) if is_run(folder)]


def is_run(folder: Path) -> bool:
    """Return whether a folder is one that a run has left."""
    try:
        marks = ((folder / mark).exists() for mark in (RECORD, "config.yaml", "checkpoints"))
        return not folder.name.startswith(".") and any(marks)
    except OSError:  # another user's
        return False
