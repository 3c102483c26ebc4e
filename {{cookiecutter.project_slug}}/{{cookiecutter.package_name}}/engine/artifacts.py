"""Checkpoints as artifacts of W&B, up and down. Imported only where there are any."""

import os
import shutil
import time
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import torch
import wandb

from .run import Mistake, commit, delivery, replacing

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import ModelCheckpoint
    from wandb import Run


class Uploads:
    """Delivers checkpoints from a thread of its own, so that no step of the training waits for W&B.

    What is still to be delivered lies in a folder, each checkpoint as a link, where the disk knows links, by the time
    and its alias. It goes when W&B has it; what an offline run leaves there is for `sync`. After a good end a file
    `registry` lies there too, until W&B has linked the best one to the collection that it names.
    """

    def __init__(self, run: "Run", folder: Path, every: bool, timeout: float, registry: str | None) -> None:
        self.run, self.folder, self.every, self.timeout = run, folder, every, timeout
        self.saved: dict[str, ModelCheckpoint] = {}
        self.seen: set[tuple[Path, int]] = set()
        self.step = -1  # of the version that is the latest
        self.registry, self.wish = registry, folder / "registry"
        self.warned, self.over = False, Event()
        self.queue: SimpleQueue[Path | None] = SimpleQueue()
        folder.mkdir(exist_ok=True)
        for file in sorted(folder.glob("*.ckpt")):  # what an earlier start left
            self.queue.put(file)
        self.wish.unlink(missing_ok=True)  # that of an earlier start, whose end this one's replaces
        self.thread = Thread(target=self._work, daemon=True)
        self.thread.start()

    def add(self, saved: "ModelCheckpoint") -> None:
        """Takes what a callback has saved: every checkpoint at once, or its best and its last one at the end."""
        self.saved[saved.state_key] = saved
        if self.every:
            self._take(saved)

    def _take(self, saved: "ModelCheckpoint") -> None:
        names = [*(saved.best_k_models if self.every else ()), saved.best_model_path, saved.last_model_path]
        for file in (Path(name).resolve() for name in dict.fromkeys(names) if name and Path(name).is_file()):
            if (mark := (file, file.stat().st_mtime_ns)) in self.seen:
                continue
            self.seen.add(mark)
            alias = "best" if file == Path(saved.best_model_path).resolve() else "latest"
            kept = self.folder / f"{time.time_ns()}-{alias}.ckpt"
            try:
                os.link(file, kept)
            except OSError:
                shutil.copy(file, kept)
            self.queue.put(kept)

    def close(self, exit_code: int) -> None:
        """Takes what is left, and waits for its delivery, `timeout` seconds at most."""
        for saved in self.saved.values():
            self._take(saved)
        if self.registry and not exit_code:
            with replacing(self.wish) as part:
                part.write_text(self.registry, encoding="utf-8")
            self.queue.put(self.wish)
        self.queue.put(None)
        self.thread.join(min(self.timeout, 20) if exit_code else self.timeout)  # who sends a signal kills after 30 s
        self.over.set()

    def _work(self) -> None:
        while (file := self.queue.get()) and not self.run.offline:
            if file == self.wish:
                if reason := link(self.wish, self.run):
                    print(f"warning: {reason}; to try again: {delivery(self.folder.parent)}")
                continue
            while not self._delivered(file):  # the later ones wait as well, or an alias would end at an earlier one
                if self.over.wait(5):
                    return

    def _delivered(self, file: Path) -> bool:
        """Whether a checkpoint needs no further try; one that cannot be read stays where it is."""
        try:
            artifact, aliases = version(file, self.run.id, commit())
        except Exception as error:  # of torch, of whatever kind
            print(f"warning: {file}: not a checkpoint that can be read ({type(error).__name__})")
            return True
        try:
            if "best" in aliases or artifact.metadata["step"] != self.step:  # else it is the best one once more
                self.run.log_artifact(artifact, aliases=aliases)
                artifact.wait()
                self.step = artifact.metadata["step"]
            file.unlink()
        except Exception as error:  # of W&B, of whatever kind
            if not (self.warned or self.over.is_set()):
                reason = " ".join(str(error).split())
                print(f"warning: W&B did not take a checkpoint, which waits in uploads/: {reason}")
            self.warned = True
            return False
        return True


def version(file: Path, run: str, commit: str | None) -> tuple[wandb.Artifact, list[str]]:
    """A checkpoint in `uploads/` as a version of the run's model, and its aliases."""
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    about = {"epoch": content["epoch"], "step": content["global_step"], "commit": commit}
    about["class_path"] = content.get("hyper_parameters", {}).get("_class_path")
    for name, state in content["callbacks"].items():
        if "ModelCheckpoint" in name and state.get("current_score") is not None:
            about |= {"monitor": state.get("monitor"), "score": float(state["current_score"])}
    artifact = wandb.Artifact(f"model-{run}", "model", metadata=about)
    artifact.add_file(str(file), "model.ckpt", policy="immutable")
    return artifact, ["latest", file.stem.partition("-")[2]]


def link(wish: Path, run: Any) -> str:
    """Links the best version of a run's model to the collection that a file names; returns why it could not."""
    target = wish.read_text(encoding="utf-8")
    try:
        wandb.Api().artifact(f"{run.entity}/{run.project}/model-{run.id}:best").link(target)
        wish.unlink()
    except Exception as error:  # of W&B, of whatever kind
        return f"W&B did not link model-{run.id}:best to {target}: {' '.join(str(error).split())}"
    return ""


def download(name: str, root: Path, option: str) -> Path:
    """Fetches the checkpoint in an artifact, ENTITY/PROJECT/NAME:ALIAS, once; it stays under the runs' root."""
    try:
        artifact = wandb.Api().artifact(name)
        if artifact.type != "model" or "model.ckpt" not in artifact.manifest.entries:
            raise Mistake(f"{option}: wandb:{name}: expected a model with a file model.ckpt, got a {artifact.type}")
        file = root / ".artifacts" / name.partition(":")[0] / artifact.version / "model.ckpt"
        if not file.exists():
            artifact.download(root=str(file.parent), skip_cache=True)  # moved there when it is whole
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise Mistake(f"{option}: wandb:{name}: {error}") from error
    return file
