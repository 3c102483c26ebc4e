"""A run: its id, its folder, and the record in it that needs no W&B to be read."""

import csv
import os
import secrets
import time
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

PROJECT = Path(__file__).resolve().parents[2]  # the folder of main.py


@dataclass(frozen=True)
class Run:
    """One run; `folder` holds config.yaml, checkpoints/, metrics.csv and wandb/."""

    id: str
    folder: Path

    @classmethod
    def start(cls, root: Path) -> "Run":
        """Takes the id from WANDB_RUN_ID or draws one, and tells the processes of other ranks by the environment."""
        run_id = os.environ.setdefault("WANDB_RUN_ID", f"r{time.strftime('%y%m%d-%H%M%S')}-{secrets.token_hex(2)}")
        folder = root / run_id
        # W&B's staging area would be in the user's home, where it is lost when the folder moves.
        os.environ.update(RUNS_ROOT=str(root), WANDB_DIR=str(folder), WANDB_DATA_DIR=str(folder / "wandb"))
        return cls(run_id, folder)


def runs_root() -> Path:
    """Where runs are kept: RUNS_ROOT, or `runs` beside main.py."""
    return Path(os.environ.get("RUNS_ROOT") or PROJECT / "runs")


def shown(path: Path) -> str:
    """The path as one would type it here: absolute or relative, whichever is shorter."""
    return min(str(path.absolute()), os.path.relpath(path), key=len)


class MetricsFile(Logger):
    """Writes every logged value, whatever the other loggers are, into a table: `step`, `epoch`, then by name.

    Args:
        file: The table; None writes nothing, as `fast_dev_run` wants it.
    """

    def __init__(self, file: Path | None) -> None:
        super().__init__()
        self.file = file
        self.columns = ["step", "epoch"]

    @property
    def name(self) -> None:
        return None

    @property
    def version(self) -> None:
        return None

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Leaves them to config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self.file is None:
            return
        rows: list[dict[str, Any]] = [{"step": step, **metrics}]
        whole = not set(rows[0]) <= set(self.columns) or not self.file.exists()
        if whole:  # the header changes, so all is written anew
            rows = read_rows(self.file) + rows
            self.columns = list(dict.fromkeys([*self.columns, *rows[0], *sorted(rows[-1])]))
            self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("w" if whole else "a", newline="") as stream:
            writer = csv.DictWriter(stream, self.columns, lineterminator="\n")
            if whole:
                writer.writeheader()
            writer.writerows(rows)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a table, none if there is no such file."""
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))
