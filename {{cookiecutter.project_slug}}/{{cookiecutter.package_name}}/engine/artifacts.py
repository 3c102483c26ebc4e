"""Checkpoints as artifacts of W&B, up and down. Imported only where there are any."""

import json
import os
import re
import shutil
import time
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from threading import Thread
from typing import TYPE_CHECKING, Any

import wandb
from filelock import FileLock
from lightning.pytorch.callbacks import ModelCheckpoint

from . import Mistake
from .references import read_checkpoint
from .run import commit

if TYPE_CHECKING:
    from wandb import Run


class Uploads:
    """Delivers checkpoints from a thread of its own, so that no step of the training waits for W&B.

    What is still to be delivered lies in a folder, each checkpoint (a link to it, where the disk knows links) beside a
    JSON file that says what it is. Both go when W&B has it; while the run is offline, `wandb sync` needs them.
    """

    def __init__(self, run: "Run", folder: Path, prune: bool) -> None:
        self.run = run
        self.folder = folder
        self.prune = prune
        self.seen: set[tuple[str, int]] = set()
        self.step = -1  # of the version that is the latest
        self.queue: SimpleQueue[Path | None] = SimpleQueue()
        for entry in sorted(folder.glob("*.json")):  # what an earlier start left
            self.queue.put(entry)
        self.thread = Thread(target=self._work, daemon=True)
        self.thread.start()

    def add(self, saved: ModelCheckpoint, every: bool) -> None:
        """Takes what a callback has saved since the last time: its best and last checkpoint, or every one."""
        best, scores = saved.best_model_path, saved.best_k_models
        names = [*(scores if every else ()), best, saved.last_model_path]
        for file in (Path(name).resolve() for name in dict.fromkeys(names) if name and Path(name).is_file()):
            if (mark := (str(file), file.stat().st_mtime_ns)) in self.seen:
                continue
            self.seen.add(mark)
            score = scores.get(str(file), saved.current_score)
            about = {"score": None if score is None else float(score), "monitor": saved.monitor}
            about |= {"original_filename": file.name, "best": str(file) == best}
            self.folder.mkdir(exist_ok=True)
            entry = self.folder / f"{time.time_ns()}.json"
            try:
                os.link(file, entry.with_suffix(".ckpt"))
            except OSError:
                shutil.copy(file, entry.with_suffix(".ckpt"))
            entry.write_text(json.dumps(about), encoding="utf-8")
            self.queue.put(entry)

    def close(self, timeout: float) -> None:
        """Waits for what is still to be delivered, so many seconds at most."""
        self.queue.put(None)
        self.thread.join(timeout)

    def _work(self) -> None:
        while entry := self.queue.get():
            try:
                self._deliver(entry, entry.with_suffix(".ckpt"))
            except Exception as error:  # of W&B, whatever its kind: what is not delivered stays in the folder
                print(f"warning: W&B did not take a checkpoint: {error}")

    def _deliver(self, entry: Path, file: Path) -> None:
        about: dict[str, Any] = json.loads(entry.read_text(encoding="utf-8"))
        content, best = read_checkpoint(file), about.pop("best")
        if best or content["global_step"] != self.step:  # else the last one is the best one, which is there
            self.step = content["global_step"]
            about |= {"epoch": content["epoch"], "step": self.step, "commit": commit()}
            about["class_path"] = content.get("hyper_parameters", {}).get("_class_path")
            artifact = wandb.Artifact(f"model-{self.run.id}", "model", metadata=about)
            artifact.add_file(str(file), "model.ckpt", policy="immutable")
            self.run.log_artifact(artifact, aliases=["latest", "best"] if best else ["latest"])
            if self.run.offline:
                return
            artifact.wait()
            name = f"{self.run.entity}/{self.run.project}/{artifact.source_collection.name}"
            for old in wandb.Api().artifacts("model", name) if self.prune else ():
                if not old.aliases:
                    old.delete()
        file.unlink()
        entry.unlink()


def download(name: str, root: Path, option: str) -> Path:
    """Fetches the checkpoint in an artifact, ENTITY/PROJECT/NAME:ALIAS, once; it stays under the runs' root."""
    collection, _, alias = name.partition(":")
    folder = root / ".artifacts" / collection
    file = folder / alias / "model.ckpt"
    if re.fullmatch(r"v\d+", alias) and file.exists():
        return file
    try:
        if not wandb.login(prompt=False):
            raise Mistake(f"{option}: wandb:{name}: no key; to log in: wandb login")
        artifact = wandb.Api().artifact(name)
        if artifact.type != "model" or "model.ckpt" not in artifact.manifest.entries:
            raise Mistake(f"{option}: wandb:{name}: expected a model with a file model.ckpt, got a {artifact.type}")
        file = folder / artifact.version / "model.ckpt"
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):  # the ranks of one machine ask at the same time
            if not file.exists():
                with TemporaryDirectory(dir=file.parent) as part:  # never half of it in the place of all
                    artifact.download(root=part, skip_cache=True)
                    (Path(part) / "model.ckpt").replace(file)
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise Mistake(f"{option}: wandb:{name}: {error}") from error
    return file
