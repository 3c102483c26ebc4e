"""A run: its id, its folder, its lock, and finding one. Imports neither torch nor Lightning."""

import json
import os
import re
import secrets
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import UsageError, did_you_mean
from .files import PROJECT
from .metrics_log import LOG, STAGE, STEP, TABLE, last_line

# What may lie in the folder of a command that has done nothing; not error.txt, which a line names.
MADE_BY_A_START = {
    *(".lock", "config.yaml", "run.json", LOG, TABLE),
    *("checkpoints", "uploads", "wandb"),
}
WANDB_LOGS = "wandb/*run-*/run-*.wandb"  # of W&B's client, one for each start of a run


@dataclass(frozen=True)
class Run:
    """One run; its folder `root/id` has config.yaml, checkpoints/, metrics.* and wandb/."""

    id: str
    root: Path

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.id):
            expected = "letters, digits, dashes, dots and underscores"
            raise UsageError(f"run id: expected {expected}, got {self.id or 'nothing'}")

    @property
    def folder(self) -> Path:
        return self.root / self.id

    @property
    def wandb_id(self) -> str:
        """The run's id in W&B: that of its logs, if the folder has been renamed since."""
        logs = sorted(
            self.folder.glob(WANDB_LOGS), key=lambda log: log.parent.name.partition("run-")[2]
        )
        newest = logs[-1].stem.removeprefix("run-") if logs else self.id
        is_copy = newest != self.id and (self.root / newest).exists()
        return self.id if is_copy else newest

    @property
    def checkpoints(self) -> Path:
        """Folder of this run's checkpoints."""
        return self.folder / "checkpoints"

    @property
    def error_file(self) -> Path:
        """File in which the first rank that fails says why."""
        return self.folder / "error.txt"

    def export(self) -> None:
        """Write the environment that the processes of other ranks and of W&B's client read."""
        os.environ.update(WANDB_RUN_ID=self.id, RUNS_ROOT=str(self.root))
        # W&B's staging folder too: in the user's home it would be lost when this folder moves.
        os.environ.update(WANDB_DIR=str(self.folder), WANDB_DATA_DIR=str(self.folder / "wandb"))

    def lock(self, resources: ExitStack) -> bool:
        """Make the folder and keep other processes out of it until `resources` is closed.

        Returns:
            Whether the folder is new.

        Raises:
            UsageError: If another process works on this run.
        """
        is_new = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            resources.enter_context(FileLock(self.folder / ".lock").acquire(timeout=0))
        except Timeout as error:
            raise UsageError(f"run {self.id}: another process is at work on it") from error
        except (NotImplementedError, OSError):  # a file system without locks
            pass
        for unfinished in self.checkpoints.glob("*.part"):
            unfinished.unlink()
        self.error_file.unlink(missing_ok=True)  # of an earlier start
        return is_new

    def remove_unused(self) -> bool:
        """Remove the folder if there is nothing in it but what a start makes; return whether.

        That is neither a checkpoint nor a row of a step, nor a file that the engine does not know.
        """
        others = {entry.name for entry in self.folder.iterdir()} - MADE_BY_A_START
        saved = [*self.folder.glob("checkpoints/*"), *self.folder.glob("uploads/*")]
        if others or saved or has_steps(self.folder / LOG):
            return False
        shutil.rmtree(self.folder, ignore_errors=True)
        return True


def has_steps(log: Path) -> bool:
    """Return whether rows were logged of an evaluation, or after the first step of a training."""
    last = last_line(log)[1] if log.exists() else b""
    row: dict[str, Any] = json.loads(last) if last else {STAGE: "fit", STEP: 0}
    return bool(row[STAGE] != "fit" or row[STEP] > 0)


def new_run_id() -> str:
    """Draw an id that sorts by time, such as r260131-094500-1f3c."""
    return f"r{time.strftime('%y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def runs_root() -> Path:
    """Return the folder of all runs: RUNS_ROOT, or `runs` beside main.py."""
    return Path(os.environ.get("RUNS_ROOT") or PROJECT / "runs").expanduser().absolute()


def find_run(reference: str, root: Path, option: str, expected: str = "a run") -> Path:
    """Return the folder of a run that is given by its id or its path.

    Raises:
        UsageError: If there is none; the message names `option` and the closest id.
    """
    for folder in (root / reference, Path(reference)):
        if reference and folder.is_dir():
            return folder.absolute()
    hint = did_you_mean(reference, (folder.name for folder in root.glob("*/")))
    raise UsageError(f"{option}: expected {expected}, got {reference or 'nothing'}{hint}")
