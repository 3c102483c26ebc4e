"""Lightning's WandbLogger for a run with a folder: never in the way, and offline where W&B is."""

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only

from .distributed import DUMMY_RUN
from .errors import UsageError
from .files import display_path, sync_command
from .lightning_internals import run_of_parent, set_wandb_run, wandb_run
from .run import Run
from .screen import say
from .wandb_ending import Ending
from .wandb_session import (
    OF_THE_OPEN_RUN,
    calls_are_ours,
    end_session,
    forget_run,
    open_run,
    session_is_ours,
    unavailable_reason,
)

if TYPE_CHECKING:
    from .wandb_log import GrowingLog
    from .wandb_uploads import Uploads

FLUSH_INTERVAL = 0.02  # seconds, after which W&B's client has what was logged in its file
INIT_SECONDS = 8
FINISH_SECONDS = 60
EXIT_SECONDS = 20  # after a signal or an error: whoever sends a signal kills after 30 s
CLIENT_SECONDS = 5  # that W&B's client may take beyond the time that it is given
Options = Mapping[str, Any]


class RunWandbLogger(WandbLogger):
    """Lightning's WandbLogger with typed options, which never asks for a key.

    Without a key, or where W&B does not answer, the run is offline. W&B's variables count wherever
    an option here is null.

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
        checkpoint_name: Name of that artifact; `model-` and the run's id if null.
        prefix: Put before the name of each metric, with a dash.
        config: Further keys of the run's configuration in W&B.
        save_dir: Folder in which W&B makes its folder `wandb/`; the run's folder if null.
        offline: Whether to send nothing; `python main.py sync` can send it later.
        finish_timeout: Seconds that the end of the run may wait for W&B at most, half of them for
            checkpoints; WANDB_FINISH_TIMEOUT or 60 if null, and 0 waits for ever, as in W&B.
        settings: Further settings of W&B (`wandb.Settings`), by name.
        init: Further arguments of `wandb.init`, by name.

    Raises:
        UsageError: If W&B's client would refuse an option or a variable.
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
        checkpoint_name: str | None = None,
        prefix: str = "",
        config: dict[str, Any] | None = None,
        save_dir: str | None = None,
        offline: bool = False,
        finish_timeout: float | None = None,
        settings: dict[str, Any] | None = None,
        init: dict[str, Any] | None = None,
    ) -> None:
        self.prefix = (init or {}).get("prefix", prefix)
        super().__init__(name, save_dir or ".", project=project, prefix=self.prefix)
        options = {
            "project": project,
            "entity": entity,
            "name": name,
            "group": group,
            "tags": tags,
            "notes": notes,
            "job_type": job_type,
            "finish_timeout": finish_timeout,
            "mode": "offline" if offline else None,
        }
        self.artifact_name = checkpoint_name
        self._read_options(options, config or {}, settings or {}, init or {})
        self.run_id: str | None = None
        self.folder, self.log_models = save_dir, log_model
        self.finish_seconds = 0.0  # 0 waits for ever
        self.ending: Ending | None = None
        self.offline_reason = ""
        self.uploads: Uploads | None = None
        self.joined = False  # a run that somebody else has begun, and will end
        self.opened_session = self.finished = False
        self.first_row = 0
        self.growing: GrowingLog | None = None  # what W&B's client has written
        self._settings()

    def _read_options(
        self, options: Options, config: Options, settings: Options, init: Options
    ) -> None:
        """Sort options into settings of W&B and arguments of `wandb.init`, and check them.

        Raises:
            UsageError: If W&B's client would refuse an option or a variable.
        """
        from .wandb_options import check_variables, split_init

        check_variables()
        left = dict(init)
        settings = {**left.pop("settings", {}), **settings}
        config = {**left.pop("config", {}), **config}
        left.pop("prefix", None)  # Lightning's class has it
        left.pop("add_file_policy", None)  # an upload has a link, which no later save changes
        self.artifact_name = left.pop("checkpoint_name", self.artifact_name)
        init_settings, self.init_arguments = split_init(left)
        self.init_arguments["config"] = {str(key): value for key, value in config.items()}
        self.given = [
            *((f"trainer.logger.{key}", key, value) for key, value in options.items()),
            *((f"trainer.logger.settings.{key}", key, value) for key, value in settings.items()),
            *((f"trainer.logger.init.{key}", key, value) for key, value in init_settings.items()),
        ]
        refuse_twice(self.given)

    def _settings(self) -> Any:
        """Return W&B's settings that the options give."""
        from .wandb_options import checked_settings

        return checked_settings(self.given, self.run_id)

    def use_run(self, run: Run) -> None:
        """Log as this run, into its folder unless `save_dir` names another.

        Raises:
            UsageError: If an option or a variable belongs to another run.
        """
        from .wandb_options import check_together

        self.run_id = run.wandb_id
        self.folder = self.folder or str(run.folder)
        check_together(self._settings(), self.run_id)

    @property
    def save_dir(self) -> str | None:
        return self.folder

    @property
    def experiment(self) -> Any:
        """The W&B run, begun when it is first asked for; on other ranks one that does nothing."""
        if rank_zero_only.rank:  # type: ignore[attr-defined]
            return answer_nothing()
        if wandb_run(self) is None:
            import wandb

            run = run_of_parent(self, wandb) or self._joined() or self._begin()
            set_wandb_run(self, run)
            self.first_row, self.growing = run.step, None
            if run.settings.sync_tensorboard:
                run.define_metric("*", step_metric="global_step")
            else:
                run.define_metric("trainer/global_step")
                run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return wandb_run(self)

    def _joined(self) -> Any:
        """Return the run that the caller has open, if it has this run's id."""
        import wandb

        from .wandb_options import with_defaults

        run = open_run(wandb, self.run_id)
        self.joined = run is not None
        if self.joined:
            default = {"finish_timeout": FINISH_SECONDS}
            self.finish_seconds = with_defaults(self._settings(), default, "finish_timeout")
        return run

    def _begin(self) -> Any:
        """Begin the W&B run, offline where W&B is not there.

        Raises:
            UsageError: If W&B refuses it for good.
        """
        import wandb

        from .wandb_options import mode_of

        self.opened_session = session_is_ours()
        Path(self.folder or ".").mkdir(parents=True, exist_ok=True)  # else W&B takes a temporary
        try:
            if mode_of(self._settings()) == "online":
                self._go_offline_if(self._refusal())
            return self._init()
        except wandb.errors.UsageError as error:
            raise UsageError(f"W&B: {error}") from error
        except wandb.errors.Error as error:
            if not self.opened_session:
                raise
            end_session()  # else W&B's client says that the id is in use
            self._go_offline_if(str(error))
            return self._init()

    def _init(self) -> Any:
        import wandb

        from .wandb_options import with_defaults

        settings = self._settings()
        if self.offline_reason:
            settings.mode = "offline"
        defaults = {
            "save_code": True,  # with it goes the patch to the commit
            "x_transaction_log_flush_interval": FLUSH_INTERVAL,  # a kill takes what is not there
            "init_timeout": INIT_SECONDS,
            "finish_timeout": FINISH_SECONDS,
            "resume": "allow",
        }
        self.finish_seconds = with_defaults(settings, defaults, "finish_timeout")
        if self.finish_seconds:  # half for checkpoints, and a rest to ask what is lacking
            settings.finish_timeout = self._client_seconds()
        settings.finish_timeout_raises = True
        return wandb.init(**self.init_arguments, dir=self.folder, settings=settings)

    def _client_seconds(self) -> float:
        """Return how long checkpoints, and then what is logged, may take at the end."""
        return max(self.finish_seconds - CLIENT_SECONDS, 2) / 2

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

    def full_name(self, metric: str) -> str:
        """Return the name that a metric has in W&B."""
        return f"{self.prefix}{self.LOGGER_JOIN_CHAR}{metric}" if self.prefix else metric

    def correct_config(self, values: Mapping[str, Any]) -> None:
        """Write over what a sweep or a launch has set in the configuration, which it locks.

        Args:
            values: What the run acts by.
        """
        config = self.experiment.config
        wrong = {key: values[key] for key in config.keys() & values.keys()}
        wrong = {key: value for key, value in wrong.items() if config[key] != value}
        if wrong:
            config.update_locked(wrong, user="sweep", _allow_val_change=True)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        try:
            super().log_metrics(metrics, step)
        except ConnectionError:  # W&B's client was ended, as by SLURM's SIGTERM: begin again
            forget_run(wandb_run(self))
            end_session()
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
        if self.joined:  # its client takes its time
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
            run, seconds = self.experiment, self._client_seconds() if self.finish_seconds else None
            self.uploads = Uploads(run, folder, every, seconds, self.artifact_name)
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
            say(f"warning: {problem}: {error}")

    @property
    def url_or_dir(self) -> str:
        """Where to look at the run: its page, or its folder if it is offline."""
        run = self.experiment
        if run.offline:
            return display_path(Path(run.dir).parent)
        return run.url or "disabled"

    @property
    def status(self) -> str:
        """Where to look at the run; if it is offline why, and lines on how to see and send it."""
        run = self.experiment
        if not run.offline:
            return self.url_or_dir
        folder = Path(run.dir).parents[1]
        why = f" ({self.offline_reason})" if self.offline_reason else ""
        see = f"see      wandb leet {display_path(folder)}"
        return f"offline{why}\n{see}\nsend     {sync_command(folder.parent)}"

    def finish(self, exit_code: int) -> None:
        """End the W&B run if one was begun, and say what W&B does not have of it.

        Called again after a signal, it waits for the run alone, and no more for checkpoints.
        """
        run = wandb_run(self)
        if run is None or self.finished:
            return
        if self.ending is None:
            folder = Path(self.folder or run.dir)
            self.ending = Ending(run, folder, self.uploads, exit_code, self.joined)
            missing = self.ending.wait(self._seconds(exit_code))
        else:
            missing = self.ending.wait(CLIENT_SECONDS)
        self.finished = True
        if not self.joined:
            forget_run(run)
        if missing:
            say(f"W&B      has not all of this run ({missing})")
            say(f"send     {sync_command(self.ending.folder)}")

    def _seconds(self, exit_code: int) -> float | None:
        """Return how long the end may wait for W&B; None for ever."""
        if not exit_code:
            return self.finish_seconds or None
        return min(self.finish_seconds or EXIT_SECONDS, EXIT_SECONDS)


class DryRunLogger(DummyLogger):
    """In the place of a logger in a dry run: takes every call of a model, and does nothing."""

    @property
    def experiment(self) -> Any:
        return answer_nothing()


def answer_nothing() -> Any:
    """Have W&B's calls do nothing where no run is open; return a run that does nothing.

    So a model may call them on all ranks, and without W&B. After the command they are W&B's again.
    """
    wandb: Any = sys.modules.get("wandb")
    if wandb is not None and wandb.run is None and calls_are_ours():
        for name in OF_THE_OPEN_RUN:
            setattr(wandb, name, DUMMY_RUN)
    return DUMMY_RUN


def finish_wandb(loggers: Iterable[Any], exit_code: int) -> None:
    """End the W&B runs that these loggers began, and W&B's session if they opened one."""
    ours = [logger for logger in loggers if isinstance(logger, RunWandbLogger)]
    for logger in ours:
        logger.finish(exit_code)
    if any(logger.opened_session for logger in ours):
        end_session()


def refuse_twice(given: Iterable[tuple[str, str, Any]]) -> None:
    """Raise a UsageError for an option that is given in two places."""
    first: dict[str, str] = {}
    for option, name, value in given:
        if value is None:
            continue
        if name in first:
            raise UsageError(f"{option}: is given as {first[name]} too")
        first[name] = option
