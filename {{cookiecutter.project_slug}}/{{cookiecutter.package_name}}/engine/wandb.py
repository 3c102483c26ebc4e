"""All use of W&B."""

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from .run import Mistake, delivery, end_session, refusal, shown

if TYPE_CHECKING:
    from wandb import Run

    from .artifacts import Uploads

FLUSH = 0.02  # seconds, after which W&B's client has what was logged in its file
PREEMPTED = 138  # exit code of a run that SIGUSR1 has ended
UPLOADS: "list[Uploads]" = []  # of this process's run, if it has any


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
        registry: Collection of W&B's Registry, `wandb-registry-NAME/COLLECTION`, to which the best checkpoint is linked
            when a `fit` ends well; it is uploaded then, whatever `log_model` is.
        config: Further keys of the run's configuration in W&B.
        save_dir: Folder in which W&B makes its own, `wandb/`; that of WANDB_DIR, the run's folder, if null.
        offline: Whether to send nothing; `python main.py sync` can send it later.
        finish_timeout: How many seconds the end of the run may wait for W&B at most, half of them for checkpoints.
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
        registry: str | None = None,
        config: dict[str, Any] | None = None,
        save_dir: str | None = None,
        offline: bool = False,
        finish_timeout: float = 60,
    ) -> None:
        if registry is not None and not re.fullmatch(r"wandb-registry-[^/:]+/[^/:]+", registry):
            raise Mistake(f"trainer.logger.registry: expected wandb-registry-NAME/COLLECTION, got {registry}")
        save_dir = save_dir or os.environ.get("WANDB_DIR", ".")
        super().__init__(name=name, save_dir=save_dir, project=project)
        self._options: dict[str, Any] = {"project": project, "entity": entity, "name": name, "group": group}
        self._options |= {"tags": tags, "notes": notes, "job_type": job_type, "config": config, "dir": save_dir}
        self._send = not offline
        self._patience = max(finish_timeout - 5, 2) / 2  # the client itself may take five more
        self._reason = ""
        self._models, self._registry = log_model or registry is not None, registry

    @property
    def experiment(self) -> "Run":
        """The W&B run, begun when it is first asked for; on other ranks a stand-in that does nothing."""
        import wandb

        if rank_zero_only.rank:  # type: ignore[attr-defined]
            from .ranks import NOTHING

            wandb.log = NOTHING  # so that a model may call it on all ranks
            return NOTHING
        if self._experiment is None:
            Path(self._options["dir"]).mkdir(parents=True, exist_ok=True)  # else W&B takes a temporary folder
            try:
                if self._send and os.environ.get("WANDB_MODE", "online") == "online":
                    self._offline_if(self._refusal())
                self._experiment = self._begun()
            except wandb.errors.CommError as error:
                end_session()  # else W&B's client says that the id is in use
                self._offline_if(str(error))
                self._experiment = self._begun()
            run = self._experiment
            run.define_metric("trainer/global_step")
            run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return self._experiment  # type: ignore[return-value]

    def _begun(self) -> "Run":
        import wandb

        return wandb.init(
            **self._options,
            id=os.environ.get("WANDB_RUN_ID"),
            resume="allow",
            mode="offline" if self._reason or not self._send else None,
            settings=wandb.Settings(
                save_code=True,  # with it goes the patch to the commit
                x_transaction_log_flush_interval=FLUSH,  # what is not yet in the file, a kill takes with it
                init_timeout=8,
                finish_timeout=self._patience,
                finish_timeout_raises=True,
            ),
        )

    def _offline_if(self, reason: str) -> None:
        if reason and os.environ.get("WANDB_MODE") == "online":
            raise Mistake(f"W&B: {reason}; WANDB_MODE=online asks for it")
        self._reason = self._reason or reason

    def _refusal(self) -> str:
        """Why the run cannot be sent now, if so. Sends what earlier starts left, for W&B numbers rows as they come."""
        folder, reason = Path(self._options["dir"]), refusal()
        if not reason and list(folder.glob("wandb/*run-*/run-*.wandb")):
            from .sync import deliver

            reason = deliver(folder, tries=1, checkpoints=False)
        return reason

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        try:
            super().log_metrics(metrics, step)
        except ConnectionError:  # W&B's client is gone, as SLURM sends SIGTERM to it too: it begins once more
            end_session()
            self._experiment = None
            super().log_metrics(metrics, step)

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Has what was saved uploaded, now or when the run ends."""
        if self._models:
            from .artifacts import Uploads

            if not UPLOADS:
                folder = Path(self._options["dir"]) / "uploads"
                every = self._models == "all"
                UPLOADS.append(Uploads(self.experiment, folder, every, self._patience, self._registry))
            UPLOADS[0].add(checkpoint_callback)

    def define(self, metrics: dict[str, Any]) -> None:
        """Has the summary show of a metric what its rules say. They replace that of `*`, hence its x axis once more."""
        for name, rules in metrics.items():
            summary = rules if isinstance(rules, str) else ",".join(rules)
            self.experiment.define_metric(name, summary=summary, step_metric="trainer/global_step", step_sync=True)

    def uses(self, file: str) -> None:
        """Records that the run begins with a checkpoint, if it came from W&B."""
        if ".artifacts" in (parts := Path(file).parts) and not self.experiment.offline:
            try:
                self.use_artifact(f"{'/'.join(parts[-5:-2])}:{parts[-2]}", "model")
            except Exception as error:  # of W&B, of whatever kind: a record that is not worth a run
                print(f"warning: W&B did not record which checkpoint the run begins with: {error}")

    @property
    def place(self) -> str:
        """Where to look at the run: its page, or its folder if it is offline."""
        return shown(Path(self.experiment.dir).parent) if self.experiment.offline else self.experiment.url or "disabled"

    @property
    def state(self) -> str:
        """Where to look at the run and, if it is offline, why, and how to see and send it."""
        if not self.experiment.offline:
            return self.place
        folder, why = Path(self.experiment.dir).parents[1], self._reason and f" ({self._reason})"
        return f"offline{why}; to see this run: wandb leet {shown(folder)}; to send it later: {delivery(folder.parent)}"


def finish(exit_code: int) -> None:
    """Ends the W&B run of this process, if it has one, and W&B's session, so that a next run starts afresh."""
    while UPLOADS:
        UPLOADS.pop().close(exit_code)
    if "wandb" in sys.modules:
        import wandb

        if (run := wandb.run) is not None:
            folder, left = Path(run.dir).parents[2], ""
            try:
                if exit_code == PREEMPTED:
                    run.mark_preempting()
                run.finish({130: 255}.get(exit_code, exit_code))  # 255 is W&B's own for Ctrl-C
                if not (run.offline or run.disabled):
                    from .sync import deliver

                    left = deliver(folder, tries=0)
            except TimeoutError:
                waiting = len(list(folder.glob("uploads/*.ckpt")))
                left = "W&B does not answer" + f"; {waiting} checkpoints wait" * bool(waiting)
            except Exception as error:  # of W&B, of whatever kind: the record lies in the run's folder
                left = str(error)
            if left:
                print(f"W&B      has not all of this run ({left}); to send the rest: {delivery(folder)}")
        end_session()
