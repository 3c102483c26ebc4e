"""Checkpoints as artifacts of W&B, up and down. Imports wandb, which takes a second."""

import math
import os
import shutil
import time
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import wandb

from .errors import UsageError
from .files import git_commit
from .readable import about_checkpoint
from .screen import say
from .version import __version__

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import ModelCheckpoint
    from wandb import Run

NAME_FILE = "artifact"  # in `uploads/`: the name of the artifact, if it is not the usual one
RETRY_SECONDS = 5
EXIT_SECONDS = 10  # after a signal or an error: whoever sends a signal kills after 30 s
POLL_SECONDS = 0.1


class Uploads:
    """Uploads checkpoints from a thread, so that no step of the training waits for W&B.

    What is still to be uploaded lies in a folder: each checkpoint as a hard link, where the file
    system has them, named by the time and its alias. It is removed when W&B has it. What an
    offline run leaves there is for `sync`.

    Args:
        run: The W&B run.
        folder: Folder for what is to be uploaded.
        every: Whether to upload every checkpoint as it is saved, not the best and the last at the
            end.
        timeout: Seconds that the end may wait for uploads; None for ever.
        name: Name of the artifact, if it is not `model-` and the run's id.
    """

    def __init__(
        self, run: "Run", folder: Path, every: bool, timeout: float | None, name: str | None
    ) -> None:
        self.run = run
        self.folder = folder
        self.every = every
        self.timeout = timeout
        self.saving: dict[str, ModelCheckpoint] = {}
        self.seen: set[tuple[Path, int]] = set()
        self.step = -1  # of the version that is the latest
        self.warned = False
        self.closed = Event()
        self.queue: SimpleQueue[Path | None] = SimpleQueue()
        folder.mkdir(exist_ok=True)
        if name:
            (folder / NAME_FILE).write_text(name, encoding="utf-8")
        for file in sorted(folder.glob("*.ckpt")):  # what an earlier start left
            self.queue.put(file)
        self.thread = Thread(target=self._work, daemon=True)
        self.thread.start()

    def add(self, saving: "ModelCheckpoint") -> None:
        """Note a callback that has saved a checkpoint, and queue that if every one is wanted."""
        self.saving[saving.state_key] = saving
        if self.every:
            self._queue_files(saving)

    def close(self, exit_code: int) -> None:
        """Queue what is left, and wait for its upload for a bounded time."""
        for saving in self.saving.values():
            self._queue_files(saving)
        self.queue.put(None)
        most = math.inf if self.timeout is None else self.timeout
        end = time.monotonic() + (min(most, EXIT_SECONDS) if exit_code else most)
        while self.thread.is_alive() and time.monotonic() < end and not self.closed.is_set():
            self.thread.join(POLL_SECONDS)
        self.closed.set()

    def abandon(self) -> None:
        """Leave what is not uploaded to `sync`; `close` then returns."""
        self.closed.set()

    def _queue_files(self, saving: "ModelCheckpoint") -> None:
        decides = getattr(saving, "decides_the_best", False)
        names = list(saving.best_k_models) if self.every else []
        names += [saving.best_model_path] if decides or self.every else []
        names += [saving.last_model_path]
        best = Path(saving.best_model_path).resolve() if decides else None
        for name in dict.fromkeys(filter(None, names)):
            file = Path(name).resolve()
            if file.is_file():
                self._queue_file(file, "best" if file == best else "latest")

    def _queue_file(self, file: Path, alias: str) -> None:
        mark = (file, file.stat().st_mtime_ns)
        if mark in self.seen:
            return
        self.seen.add(mark)
        kept = self.folder / f"{time.time_ns()}-{alias}.ckpt"
        try:
            os.link(file, kept)
        except OSError:
            shutil.copy(file, kept)
        self.queue.put(kept)

    def _work(self) -> None:
        while (file := self.queue.get()) and not self.run.offline:
            while not self._is_done(file):  # later ones wait, or an alias would end at this one
                if self.closed.wait(RETRY_SECONDS):
                    return

    def _is_done(self, file: Path) -> bool:
        """Upload a checkpoint; return True if it needs no further try."""
        try:
            artifact, aliases = checkpoint_artifact(file, self.run.id, git_commit())
        except UsageError as error:  # the file stays where it is
            say(f"warning: {error}")
            return True
        try:
            step = artifact.metadata["step"]
            if "best" in aliases or step != self.step:  # else the best one is the last one too
                self.run.log_artifact(artifact, aliases=aliases)
                artifact.wait()
                self.step = step
            file.unlink()
        except Exception as error:  # W&B raises many kinds
            if not (self.warned or self.closed.is_set()):
                reason = " ".join(str(error).split())
                waits = "W&B did not take a checkpoint, which waits in uploads/"
                say(f"warning: {waits}: {reason}")
            self.warned = True
            return False
        return True


def checkpoint_artifact(
    file: Path, run_id: str, commit: str | None
) -> tuple[wandb.Artifact, list[str]]:
    """Return a checkpoint in `uploads/` as a version of the run's model, and its aliases."""
    record = about_checkpoint(file)
    about: dict[str, Any] = {
        "epoch": record["epoch"],
        "step": record["step"],
        "commit": commit,
        "engine_version": __version__,
        "class_path": record["hyper_parameters"].get("_class_path"),
    }
    if record.get("score") is not None:
        about |= {"monitor": record["monitor"], "score": record["score"]}
    named = file.with_name(NAME_FILE)
    name = named.read_text(encoding="utf-8") if named.exists() else f"model-{run_id}"
    artifact = wandb.Artifact(name, "model", metadata=about)
    artifact.add_file(str(file), "model.ckpt", policy="immutable")
    return artifact, ["latest", file.stem.partition("-")[2]]


def download_checkpoint(name: str, root: Path, option: str) -> Path:
    """Download the checkpoint in an artifact once; it is kept below the folder of all runs.

    Args:
        name: ENTITY/PROJECT/NAME:ALIAS.
        root: Folder of all runs.
        option: Name of the option, for messages.

    Raises:
        UsageError: If there is no such artifact, or no checkpoint in it.
    """
    try:
        artifact = wandb.Api().artifact(name)
        if artifact.type != "model" or "model.ckpt" not in artifact.manifest.entries:
            expected = "expected a model with a file model.ckpt"
            raise UsageError(f"{option}: wandb:{name}: {expected}, got a {artifact.type}")
        project = name.partition(":")[0]
        file = root / ".artifacts" / project / artifact.version / "model.ckpt"
        if not file.exists():
            artifact.download(root=str(file.parent), skip_cache=True)  # moved there when complete
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise UsageError(f"{option}: wandb:{name}: {error}") from error
    return file
