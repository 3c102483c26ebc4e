"""A run: its id, its folder, and the record in it that needs no W&B to be read."""

import csv
import os
import re
import secrets
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed import TCPStore

from . import Failure, Mistake

PROJECT = Path(__file__).resolve().parents[2]  # the folder of main.py
LOCKS = ExitStack()
REDACTED = "***"
# Not `pad_token` or `max_tokens`: the words of a vocabulary are no secrets.
SECRET = re.compile(
    r"(?i)(^|_)(pass(word|wd|phrase)|secret|credentials?|(api|access|private|secret)_?key)$"
    r"|^(\w+_)?(auth|access|api|hf|hub|bearer|refresh)_?token$|^token$"
)


@dataclass(frozen=True)
class Run:
    """One run; `folder` holds config.yaml, checkpoints/, metrics.csv and wandb/."""

    id: str
    folder: Path

    @classmethod
    def start(cls, root: Path) -> "Run":
        """Takes the id from WANDB_RUN_ID or draws one, and tells the processes of other ranks by the environment.

        torchrun starts all ranks alike; they agree by the store that it keeps, on what the first of them drew.
        """
        run_id = os.environ.get("WANDB_RUN_ID") or f"r{time.strftime('%y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
            if not os.environ.get("WANDB_RUN_ID"):
                run_id = store.compare_set("run_id", "", run_id).decode()
            if (attempt := os.environ["TORCHELASTIC_RESTART_COUNT"]) != "0":
                if os.environ["RANK"] == "0":
                    with socket.create_server(("", 0)) as free:
                        store.set(f"port {attempt}", str(free.getsockname()[1]))
                # A store of their own, for in torch's the ranks may find addresses of the attempt before.
                os.environ["MASTER_PORT"] = store.get(f"port {attempt}").decode()
                os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        if not re.fullmatch(r"\w[\w.-]*", run_id):
            raise Mistake(f"WANDB_RUN_ID: expected letters, digits, dashes, dots and underscores, got {run_id}")
        folder = root / run_id
        os.environ.update(WANDB_RUN_ID=run_id, RUNS_ROOT=str(root))
        # Else W&B stages what it is to send in the user's home, where it is lost when the folder moves.
        os.environ.update(WANDB_DIR=str(folder), WANDB_DATA_DIR=str(folder / "wandb"))
        return cls(run_id, folder)

    def lock(self) -> None:
        """Makes the folder, and keeps other processes from working on the run until LOCKS is closed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            LOCKS.enter_context(FileLock(self.folder / ".lock").acquire(timeout=0))
        except Timeout as error:
            raise Mistake(f"run {self.id}: another process is at work on it") from error
        except (NotImplementedError, OSError):  # a file system without locks
            pass
        for unfinished in self.folder.glob("checkpoints/*.part"):
            unfinished.unlink()
        (self.folder / "error.txt").unlink(missing_ok=True)  # of an earlier start


def runs_root() -> Path:
    """Where runs are kept: RUNS_ROOT, or `runs` beside main.py."""
    return Path(os.environ.get("RUNS_ROOT") or PROJECT / "runs").expanduser().absolute()


def commit() -> str | None:
    """The commit that the project stands on; None outside of git."""
    try:
        words = ("git", "-C", str(PROJECT), "rev-parse", "HEAD")
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def redacted(value: Any, name: str = "") -> Any:
    """The value without what goes by the name of a secret, and without passwords in URLs."""
    if isinstance(value, dict):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [redacted(item, name) for item in value]
    if isinstance(value, str):
        return REDACTED if value and SECRET.search(name) else re.sub(r"(://[^/\s:@]*:)[^/\s@]+@", r"\1***@", value)
    return value


def command(words: Sequence[str]) -> str:
    """The command line, without secrets."""
    parts = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    return shlex.join(
        "{...}" if part.startswith("{") else redacted(part, before.rpartition(".")[2])
        for before, part in zip(["", "main.py", *parts], ["main.py", *parts], strict=False)
    )


def shown(path: Path) -> str:
    """The path as one would type it here: absolute or relative, whichever is shorter, quoted if need be."""
    return shlex.quote(min(str(path.absolute()), os.path.relpath(path), key=len))


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Gives a place beside the file's to write it, and moves it when it is whole: there is never half of one."""
    part = file.with_name(f"{file.name}.part")
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(file)
    except OSError as error:
        raise Failure(f"{shown(file)} cannot be written, and is as it was: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


class MetricsFile(DummyLogger):
    """Writes every logged value, whatever the other loggers are, into a table: `step`, `epoch`, then by name.

    To the model it is the logger where there is no other: DummyLogger takes any call and ignores it.
    """

    def __init__(self, file: Path, write: bool) -> None:
        super().__init__()
        self.file = file
        self.write = write
        self.columns = ["step", "epoch"]

    @property
    def save_dir(self) -> str:
        return str(self.file.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if not self.write:  # but under `fast_dev_run`
            return
        values = sorted((name, getattr(value, "item", lambda v=value: v)()) for name, value in metrics.items())
        row: dict[str, Any] = {"step": step, **dict(values)}
        if self.file.exists() and row.keys() <= set(self.columns):
            size = self.file.stat().st_size
            try:
                with self.file.open("a", newline="") as stream:
                    csv.DictWriter(stream, self.columns, lineterminator="\n").writerow(row)
            except OSError as error:
                os.truncate(self.file, size)
                raise Failure(f"{shown(self.file)} cannot be written: {error.strerror}") from error
        else:
            self._write([*self._read(), row])

    @rank_zero_only
    def forget(self, step: int) -> None:
        """Drops the rows from this step on, which are about to be logged again; what a test has logged stays."""
        if self.write and self.file.exists():
            tested = re.compile(r"test/.")
            self._write([row for row in self._read() if int(row["step"]) < step or any(map(tested.match, filter(row.get, row)))])

    def _read(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        with self.file.open(newline="") as stream:
            return [*csv.DictReader(stream)]

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self.columns = list(dict.fromkeys([*self.columns, *(name for row in rows for name in row)]))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.file) as part, part.open("w", newline="") as stream:  # with a new header
            writer = csv.DictWriter(stream, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
