"""Lightning's WandbLogger for a run with a folder: never in the way, and offline where W&B is."""

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from .distributed import DUMMY_RUN
from .errors import UsageError, did_you_mean
from .files import display_path, sync_command
from .lightning_internals import run_of_parent, set_wandb_run, wandb_run
from .run import Run
from .wandb_session import call_in_time, teardown_wandb, unavailable_reason

if TYPE_CHECKING:
    from .wandb_log import GrowingLog
    from .wandb_uploads import Uploads

FLUSH_INTERVAL = 0.02  # seconds, after which W&B's client has what was logged in its file
PREEMPTED = 138  # exit code of a run that SIGUSR1 has ended
SIGINT_CODES = {130: 255}  # 255 is W&B's exit code for Ctrl-C
INIT_SECONDS = 8
CLIENT_SECONDS = 5  # that W&B's client may take beyond the time that it is given
SET_BY_ENGINE = ("id", "dir", "mode", "resume", "settings")


class RunWandbLogger(WandbLogger):
    """Lightning's WandbLogger with typed options, which never asks for a key.

    Without a key, or where W&B does not answer, the run is offline.

    Args:
        project: Project of the run.
        entity: User or team that owns it; W&B's default one if null.
        name: Display name of the run.
        group: Name that ties runs together.
        tags: Labels of the run.
        notes: Description of the run.
        job_type: Kind of the run.
        log_model: Whether checkpoints become artifacts: `false`, `true` (best and last at the
            end), `all` (each).
        config: Further keys of the run's configuration in W&B.
        save_dir: Folder in which W&B makes its folder `wandb/`; the run's folder if null.
        offline: Whether to send nothing; `python main.py sync` can send it later.
        finish_timeout: Seconds that the end of the run may wait for W&B at most, half of them for
            checkpoints.
        init: Further arguments of `wandb.init`, by name.
    """

    def __init__(  # noqa: PLR0913 (each is an option)
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
        finish_timeout: float = 60,
        init: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(name=name, save_dir=save_dir or ".", project=project)
        self.options: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "name": name,
            "group": group,
            "tags": tags,
            "notes": notes,
            "job_type": job_type,
            "config": config,
        }
        self.run_id: str | None = None
        self.folder = save_dir
        self.sends = not offline
        # Half for uploads, half for the client.
        self.patience = max(finish_timeout - CLIENT_SECONDS, 2) / 2
        self.log_models = log_model
        self.offline_reason = ""
        self.uploads: Uploads | None = None
        self.opened_session = False
        self.finished = False
        self.first_row = 0
        self.growing: GrowingLog | None = None  # what W&B's client has written
        if init:
            self._add_init_arguments(init)

    def _add_init_arguments(self, init: dict[str, Any]) -> None:
        import wandb

        known = inspect.signature(wandb.init).parameters
        for name, value in init.items():
            option = f"trainer.logger.init.{name}"
            if name in SET_BY_ENGINE:
                raise UsageError(f"{option}: the engine sets {name} for each run")
            if self.options.get(name) is not None:
                raise UsageError(f"{option}: is given as trainer.logger.{name} too")
            if name not in known:
                hint = did_you_mean(name, known)
                raise UsageError(f"{option}: wandb.init has no such argument{hint}")
            self.options[name] = value

    def use_run(self, run: Run) -> None:
        """Log as this run, into its folder unless `save_dir` names another."""
        self.run_id = run.id
        self.folder = self.folder or str(run.folder)

    @property
    def save_dir(self) -> str | None:
        return self.folder

    @property
    def experiment(self) -> Any:
        """The W&B run, begun when it is first asked for; on other ranks one that does nothing."""
        import wandb

        if rank_zero_only.rank:  # type: ignore[attr-defined]
            wandb.log = DUMMY_RUN  # so that a model may call it on all ranks
            return DUMMY_RUN
        if wandb_run(self) is None:
            run = run_of_parent(self, wandb) or self._begin()
            set_wandb_run(self, run)
            self.first_row, self.growing = run.step, None
            run.define_metric("trainer/global_step")
            run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return wandb_run(self)

    def _begin(self) -> Any:
        """Begin the W&B run, offline where W&B is not there."""
        import wandb

        self.opened_session = True
        Path(self.folder or ".").mkdir(parents=True, exist_ok=True)  # else W&B takes a temporary
        try:
            if self.sends and os.environ.get("WANDB_MODE", "online") == "online":
                self._go_offline_if(self._refusal())
            return self._init()
        except wandb.errors.CommError as error:
            teardown_wandb()  # else W&B's client says that the id is in use
            self._go_offline_if(str(error))
            return self._init()

    def _init(self) -> Any:
        import wandb

        offline = bool(self.offline_reason) or not self.sends
        settings = wandb.Settings(
            save_code=True,  # with it goes the patch to the commit
            x_transaction_log_flush_interval=FLUSH_INTERVAL,  # a kill takes what is not in the file
            init_timeout=INIT_SECONDS,
            finish_timeout=self.patience,
            finish_timeout_raises=True,
        )
        return wandb.init(
            **self.options,
            id=self.run_id,
            dir=self.folder,
            resume="allow",
            mode="offline" if offline else None,
            settings=settings,
        )

    def _go_offline_if(self, reason: str) -> None:
        if reason and os.environ.get("WANDB_MODE") == "online":
            raise UsageError(f"W&B: {reason}; WANDB_MODE=online asks for it")
        self.offline_reason = self.offline_reason or reason

    def _refusal(self) -> str:
        """Return why the run cannot be sent now, or "".

        Sends what earlier starts of the run left, because W&B numbers rows as they come.
        """
        reason = unavailable_reason()
        folder = Path(self.folder or ".")
        if not reason and list(folder.glob("wandb/*run-*/run-*.wandb")):
            from .wandb_sync import sync_run

            reason = sync_run(folder, tries=1, checkpoints=False, run_id=self.run_id)
        return reason

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        try:
            super().log_metrics(metrics, step)
        except ConnectionError:  # W&B's client was ended, as by SLURM's SIGTERM: begin again
            teardown_wandb()
            set_wandb_run(self, None)
            super().log_metrics(metrics, step)

    def what_is_logged(self) -> Callable[[], bool]:
        """Return what says whether W&B's client has written all that is logged so far.

        It asks the client, which takes a moment: not for the thread of the training.
        """
        from .wandb_log import GrowingLog, RowsWritten

        run = wandb_run(self)
        if rank_zero_only.rank or run is None or run.disabled:  # type: ignore[attr-defined]
            return lambda: True
        self.growing = self.growing or GrowingLog(Path(run.settings.sync_file))
        return RowsWritten(run, self.growing, self.first_row)

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Have what was saved uploaded, now or when the run ends."""
        if not self.log_models:
            return
        from .wandb_uploads import Uploads

        if self.uploads is None:
            folder = Path(self.folder or ".") / "uploads"
            every = self.log_models == "all"
            self.uploads = Uploads(self.experiment, folder, every, self.patience)
        self.uploads.add(checkpoint_callback)

    def log_input_artifact(self, checkpoint: str) -> None:
        """Record that the run begins with a checkpoint, if that came from W&B."""
        parts = Path(checkpoint).parts
        if ".artifacts" not in parts or self.experiment.offline:
            return
        *_, entity, project, name, version, _ = parts
        try:
            self.use_artifact(f"{entity}/{project}/{name}:{version}", "model")
        except Exception as error:  # W&B raises many kinds, and a record is not worth a run
            problem = "W&B did not record which checkpoint the run begins with"
            print(f"warning: {problem}: {error}", flush=True)

    @property
    def url_or_dir(self) -> str:
        """Where to look at the run: its page, or its folder if it is offline."""
        run = self.experiment
        if run.offline:
            return display_path(Path(run.dir).parent)
        return run.url or "disabled"

    @property
    def status(self) -> str:
        """Where to look at the run; if it is offline why, and how to see and send it."""
        run = self.experiment
        if not run.offline:
            return self.url_or_dir
        folder = Path(run.dir).parents[1]
        why = f" ({self.offline_reason})" if self.offline_reason else ""
        see = f"to see this run: wandb leet {display_path(folder)}"
        return f"offline{why}; {see}; to send it later: {sync_command(folder.parent)}"

    def finish(self, exit_code: int) -> None:
        """End the W&B run if one was begun, and say what W&B does not have of it."""
        if self.uploads is not None:
            uploads, self.uploads = self.uploads, None
            uploads.close(exit_code)
        run = wandb_run(self)
        if run is None or self.finished:
            return
        folder = Path(run.dir).parents[2]
        missing = self._finish_run(run, folder, exit_code)
        self.finished = True
        if missing:
            send = f"to send the rest: {sync_command(folder)}"
            print(f"W&B      has not all of this run ({missing}); {send}")

    def _finish_run(self, run: Any, folder: Path, exit_code: int) -> str:
        """Finish the W&B run, and return what W&B lacks of it, in words."""
        try:
            if exit_code == PREEMPTED:
                run.mark_preempting()
            code = SIGINT_CODES.get(exit_code, exit_code)
            # The client ends the waiting itself, as a rule.
            call_in_time(lambda: run.finish(code), self.patience + CLIENT_SECONDS)
            if run.offline or run.disabled:
                return ""
            from .wandb_sync import sync_run

            return sync_run(folder, tries=0)
        except TimeoutError:
            waiting = len(list(folder.glob("uploads/*.ckpt")))
            checkpoints = f"; {waiting} checkpoints wait" if waiting else ""
            return f"W&B does not answer{checkpoints}"
        except Exception as error:  # W&B raises many kinds; the record lies in the run's folder
            return str(error)


def finish_wandb(loggers: Iterable[Any], exit_code: int) -> None:
    """End the W&B runs that these loggers began, and W&B's session if they opened one."""
    ours = [logger for logger in loggers if isinstance(logger, RunWandbLogger)]
    for logger in ours:
        logger.finish(exit_code)
    if any(logger.opened_session for logger in ours):
        teardown_wandb()
