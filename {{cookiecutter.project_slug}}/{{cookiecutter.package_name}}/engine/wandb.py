"""All use of W&B."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from . import Mistake
from .run import shown

if TYPE_CHECKING:
    from wandb import Run

    from .artifacts import Uploads

PREEMPTED = 138  # exit code of a run that SIGUSR1 has ended
UPLOADS: "list[Uploads]" = []  # of this process's run, if it has any


class Nothing:
    """Stands for the W&B run on the ranks that have none: takes every call, attribute and key."""

    def __getattr__(self, name: str) -> "Nothing":
        return self

    def __call__(self, *_: Any, **__: Any) -> "Nothing":
        return self

    __getitem__ = __setitem__ = __call__


NOTHING: Any = Nothing()


class Wandb(WandbLogger):
    """Lightning's WandbLogger with typed options, which never asks for a key: without one the run is offline.

    Args:
        project: Project of the run.
        entity: User or team that owns it; W&B's default one if null.
        name: Display name of the run.
        group: Name that ties runs together.
        tags: Labels of the run.
        notes: Description of the run.
        job_type: Kind of the run.
        log_model: Whether checkpoints become artifacts: `false`, `true` (best and last at the end), `all` (each).
        config: Further keys of the run's configuration in W&B.
        save_dir: Folder in which W&B makes its own, `wandb/`; that of WANDB_DIR, the run's folder, if null.
        offline: Whether to send nothing; `wandb sync` can send it later.
    """

    def __init__(
        self,
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        job_type: str | None = None,
        log_model: Literal["all"] | bool = False,
        config: dict[str, Any] | None = None,
        save_dir: str | None = None,
        offline: bool = False,
    ) -> None:
        save_dir = save_dir or os.environ.get("WANDB_DIR", ".")
        super().__init__(name=name, save_dir=save_dir, project=project)
        self._options: dict[str, Any] = {"project": project, "entity": entity, "name": name, "group": group}
        self._options |= {"tags": tags, "notes": notes, "job_type": job_type, "config": config, "dir": save_dir}
        self._send = not offline
        self._reason = ""
        self._models = log_model

    @property
    def experiment(self) -> "Run":
        """The W&B run, begun when it is first asked for; on other ranks a stand-in that does nothing."""
        import wandb

        if rank_zero_only.rank:  # type: ignore[attr-defined]
            wandb.log = NOTHING  # so that a model may call it on all ranks
            return NOTHING
        if self._experiment is None:
            if self._send and os.environ.get("WANDB_MODE", "online") == "online":
                self._reason = self._refusal()
            Path(self._options["dir"]).mkdir(parents=True, exist_ok=True)  # else W&B takes a temporary folder
            self._experiment = run = wandb.init(
                **self._options,
                id=os.environ.get("WANDB_RUN_ID"),
                resume="allow",
                mode="offline" if self._reason or not self._send else None,
                settings=wandb.Settings(
                    save_code=True,  # with it goes the patch to the commit
                    x_transaction_log_flush_interval=0.05,  # seconds; what is not yet in the file, a kill takes with it
                ),
            )
            run.define_metric("trainer/global_step")
            run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return self._experiment  # type: ignore[return-value]

    def _refusal(self) -> str:
        """Why W&B takes nothing from us, if so."""
        import wandb

        try:
            reason = "" if wandb.login(prompt=False, verify=True) else "no key"
        except wandb.errors.CommError as error:
            reason = str(error).rstrip(".")
        if reason and os.environ.get("WANDB_MODE") == "online":
            raise Mistake(f"W&B: {reason}; WANDB_MODE=online asks for it")
        return reason and f" ({reason}; to log in: wandb login)"

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Has what was saved uploaded, now or when the run ends."""
        if self._models:
            from .artifacts import Uploads

            if not UPLOADS:
                UPLOADS.append(Uploads(self.experiment, Path(self._options["dir"]) / "uploads", self._models == "all"))
            UPLOADS[0].add(checkpoint_callback)

    def define(self, metrics: dict[str, Any]) -> None:
        """Has the summary show of a metric what its rules say. They replace that of `*`, hence its x axis once more."""
        for name, rules in metrics.items():
            summary = rules if isinstance(rules, str) else ",".join(rules)
            self.experiment.define_metric(name, summary=summary, step_metric="trainer/global_step", step_sync=True)

    def uses(self, file: str) -> None:
        """Records that the run begins with a checkpoint, if it came from W&B."""
        if ".artifacts" in (parts := Path(file).parts) and not self.experiment.offline:
            self.use_artifact(f"{'/'.join(parts[-5:-2])}:{parts[-2]}", "model")

    @property
    def place(self) -> str:
        """Where to look at the run: its page, or its folder if it is offline."""
        return shown(Path(self.experiment.dir).parent) if self.experiment.offline else self.experiment.url or "disabled"

    @property
    def state(self) -> str:
        """Where to look at the run and, if it is offline, why, and how to see and send it."""
        if not self.experiment.offline:
            return self.place
        folder = shown(Path(self.experiment.dir).parents[1])
        return f"offline{self._reason}; to see this run: wandb leet {folder}; to send it: wandb sync {self.place}"


def finish(exit_code: int) -> None:
    """Ends the W&B run of this process, if it has one, and W&B's session, so that a next run starts afresh."""
    try:
        while UPLOADS:
            UPLOADS.pop().close(timeout=20 if exit_code else 60)  # who sends a signal kills after half a minute
    finally:
        if "wandb" in sys.modules:
            import wandb

            if wandb.run is not None:
                if exit_code == PREEMPTED:
                    wandb.run.mark_preempting()
                wandb.finish(exit_code={130: 255}.get(exit_code, exit_code))  # 255 is W&B's own for Ctrl-C
            wandb.teardown()
