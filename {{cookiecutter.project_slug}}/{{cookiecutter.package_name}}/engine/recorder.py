"""The record of a run: config.yaml, the configuration in every logger, and lines on the screen."""

import time
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden

from .checkpoints import best_saving, decide_the_best
from .files import atomic_write, display_path, git_commit, python_command
from .metrics import MetricsFile, Summaries
from .run import Run
from .run_record import RUNNING, RunRecord, read_record
from .screen import say
from .version import __version__
from .wandb_logger import RunWandbLogger

RECORD_INTERVAL = 2  # seconds from one record of a training to the next, at least


class RunRecorder(Callback):
    """Writes config.yaml, gives the configuration to every logger, and says what begins.

    Args:
        run: This run.
        config: The resolved configuration, without secrets.
        checkpoint: File or reference from which the command begins, if there is one.
        record: What run.json says of this command.
        notes: Lines to print about the configuration.
        options: The values in the configuration, by the full names of their options.
    """

    def __init__(
        self,
        run: Run,
        config: dict[str, Any],
        checkpoint: str | None,
        record: RunRecord,
        notes: list[str],
        options: dict[str, Any],
    ) -> None:
        self.run = run
        self.config = config
        self.options = options
        self.checkpoint = checkpoint
        self.record = record
        self.notes = notes
        self.about: dict[str, Any] = {}  # facts about this command
        self.active = False  # on the first rank, once `setup` was called
        self.keeps_record = False
        self.recorded_at = 0.0  # when the record was written, in seconds

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        dry_run = trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.active or dry_run or not trainer.is_global_zero:
            return
        self.active = True
        if stage != "fit" and not (self.run.folder / "config.yaml").exists():
            self.write_config()  # an evaluation may join a run, whose configuration stays
        for line in self.first_lines(trainer, pl_module, stage):
            say(line)
        self.log_config(trainer, stage)
        self.begin_record(stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.active:  # not before: a run that cannot be resumed like this keeps its own
            self.write_config()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_fit_start(trainer, pl_module)  # a sharded strategy restores between the two
        self.note_batch_size(trainer, trainer.train_dataloader)
        self.say_what_is_best(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        saving: Any = best_saving(trainer)
        score = saving and getattr(saving, "current_score", None)
        checkpoint["engine"] = {
            "version": __version__,
            "run_id": self.run.id,
            "config": self.config,
            "model_class": f"{type(pl_module).__module__}.{type(pl_module).__qualname__}",
            "best": Path(saving.best_model_path).name or None if saving else None,
            "monitor": saving and saving.monitor,
            "score": None if score is None else float(score),
            "rows": sum(one.next_row for one in trainer.loggers if isinstance(one, MetricsFile)),
        }

    def write_config(self) -> None:
        """Write config.yaml, which `fit --config` reads as a new run with the same settings."""
        with atomic_write(self.run.folder / "config.yaml") as part:
            part.write_text(yaml.safe_dump(self.config, sort_keys=False), encoding="utf-8")

    def begin_record(self, stage: str) -> None:
        """Write run.json, unless this is an evaluation that joins a training."""
        before = read_record(self.run.folder)
        if before is not None and before.verb == "fit" and stage != "fit":
            return
        record = self.record
        record.verb = stage  # a subcommand of the team's may train too
        if before is not None and before.verb == stage:
            record.take_over(before)
        record.begin()
        file = Path(self.checkpoint or "")
        if stage != "fit" and file.parent.name == "checkpoints":
            record.evaluates = file.parents[1].name
        record.write(self.run.folder)
        self.keeps_record = True

    def note_progress(
        self,
        trainer: Trainer,
        epochs: int,
        metrics: dict[str, float] | None = None,
        state: str | None = None,
    ) -> None:
        """Note in run.json how far the run is.

        Args:
            trainer: The trainer, or a Fabric loop.
            epochs: Epochs that were trained.
            metrics: The values that were logged last; None for those that are noted.
            state: What became of the run; None while it is under way.
        """
        record = self.record
        if not self.keeps_record:
            return
        limit = trainer.max_epochs
        record.max_epochs = limit if limit and limit > 0 else None
        record.epoch, record.step = epochs, trainer.global_step
        record.metrics = record.metrics if metrics is None else metrics
        record.state = state or record.state
        if record.verb == "fit":
            self._note_best(record, trainer)
        if state or time.monotonic() > self.recorded_at + RECORD_INTERVAL:
            record.write(self.run.folder)
            self.recorded_at = time.monotonic()

    def note_end(self, code: int, error: str) -> None:
        """Note in run.json how the command ended.

        Args:
            code: Its exit code.
            error: What ended it, in a line; "" for a success.
        """
        # A process that was spawned may have kept it.
        record = self.record if self.keeps_record else read_record(self.run.folder)
        if record is not None and (self.keeps_record or record.state == RUNNING):
            record.end(code, error)
            record.write(self.run.folder)

    @staticmethod
    def _note_best(record: RunRecord, trainer: Trainer) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        summaries = next((one for one in callbacks if isinstance(one, Summaries)), None)
        saving = best_saving(trainer)
        if summaries is not None:
            record.monitor, record.mode = summaries.monitor(trainer)
            best = summaries.best.items()
            values = {name.removeprefix("best/"): value for name, value in best}
            record.best = values or record.best
        elif saving is not None and saving.monitor and saving.best_model_score is not None:
            record.monitor, record.mode = saving.monitor, saving.mode
            record.best = {saving.monitor: saving.best_model_score.item()}

    def first_lines(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> list[str]:
        """Return what is printed before a command's work begins."""
        lines = [f"run      {display_path(self.run.folder)}"]
        if self.checkpoint:
            file = Path(self.checkpoint)
            lines.append(f"from     {display_path(file) if file.exists() else self.checkpoint}")
        lines += self.notes
        parameters = sum(parameter.numel() for parameter in pl_module.parameters())
        lines.append(f"model    {type(pl_module).__name__}, {parameters:,} parameters")
        device = type(trainer.accelerator).__name__.removesuffix("Accelerator")
        if trainer.world_size > 1:
            device = f"{trainer.world_size} x {device}; --trainer.devices 1 for one"
        lines.append(f"device   {device}")
        return lines

    def log_config(self, trainer: Trainer, stage: str) -> None:
        """Give every logger the whole configuration, and facts about this command under `run`."""
        self.about = {
            "command": self.record.command,
            "commit": git_commit(),
            "engine_version": __version__,
            "folder": str(self.run.folder),
        }
        config = {**self.config, "run": self.about}
        if self.checkpoint:
            config["ckpt_path"] = self.checkpoint
        for logger in trainer.loggers:
            logger.log_hyperparams(config)
            if isinstance(logger, RunWandbLogger):
                logger.correct_config({**self.options, **config})
                logger.log_input_artifact(self.checkpoint or "")
                for line in f"W&B      {logger.status}".splitlines():
                    say(line)

    def say_what_is_best(self, trainer: Trainer) -> None:
        """Say it if another callback serves in place of `callbacks.checkpoint`."""
        best = best_saving(trainer)
        if best is None or not best.monitor or not decide_the_best(best):
            return
        if self.active:
            kind = type(best).__name__
            say(f"best     by {best.monitor} of a {kind} that is not callbacks.checkpoint")

    def note_batch_size(self, trainer: Trainer, loaders: Any) -> None:
        """Say how many samples a step of the optimizer takes, where each takes as many."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        changes = any(isinstance(one, GradientAccumulationScheduler) for one in callbacks)
        size = None if changes else batch_size(loaders)
        if not self.active or size is None:
            return
        batches = trainer.world_size * trainer.accumulate_grad_batches
        if batches > 1:
            total = f"{size * batches} samples a step"
            say(f"batch    {total}, {batches} batches of {size}")
        self.about["batch_size"] = size * batches
        for logger in trainer.loggers:
            if isinstance(logger, RunWandbLogger):
                logger.log_hyperparams({"run": self.about})
                logger.correct_config({"run": self.about})


class RunProgress(Callback):
    """Keeps run.json up to date; stands behind all callbacks, whose decisions it notes.

    On every rank: reading metrics may be work of all of them.

    Args:
        recorder: That of the run.
        in_command: Whether a command says at its end what became of the run.
    """

    def __init__(self, recorder: RunRecorder, in_command: bool) -> None:
        self.recorder = recorder
        self.in_command = in_command

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.recorder.note_progress(trainer, trainer.current_epoch, logged_values(trainer))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.recorder.note_progress(trainer, trainer.current_epoch)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        state = RUNNING if self.in_command else "finished"
        values = logged_values(trainer)
        self.recorder.note_progress(trainer, trainer.current_epoch, values, state)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if trainer.global_step > self.recorder.record.step:
            self.recorder.note_progress(trainer, trainer.current_epoch)
        if not self.in_command:
            self.recorder.note_end(1, f"{type(exception).__name__}: {exception}")


def logged_values(trainer: Trainer) -> dict[str, float]:
    """Return the values that were logged last, by name."""
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def batch_size(loaders: Any) -> int | None:
    """Return the samples in a batch on one device; None if there is no one number.

    Args:
        loaders: A trainer's loaders.
    """
    flattened = CombinedLoader(loaders).flattened
    sizes = [getattr(loader, "batch_size", None) for loader in flattened]
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], int) else None


def best_or_last(trainer: Trainer) -> str:
    """Return the best checkpoint that was saved, or else the last one; "" if there is none."""
    saving = [saved for saved in trainer.checkpoint_callbacks if isinstance(saved, ModelCheckpoint)]
    best = best_saving(trainer)
    files = [best.best_model_path] if best else []
    files += [saved.last_model_path for saved in saving]
    return next(filter(None, files), "")


def is_of_this_run(trainer: Trainer, file: str) -> bool:
    """Return False for a checkpoint of another run, with which this one began."""
    saving = [saved for saved in trainer.checkpoint_callbacks if isinstance(saved, ModelCheckpoint)]
    return any(file and saved.dirpath and file.startswith(str(saved.dirpath)) for saved in saving)


def print_outcome(
    trainer: Trainer, run: Run, callbacks: dict[str, Any], default_root: bool
) -> None:
    """Print what a `fit` left, and the command that tests it.

    Args:
        trainer: The trainer, after `fit`.
        run: This run.
        callbacks: The named callbacks.
        default_root: Whether the run is where its id alone finds it.
    """
    stopping: Any = callbacks.get("early_stopping")
    if epoch := getattr(stopping, "stopped_epoch", 0):
        say(f"stopped  after epoch {epoch}: {stopping.monitor} no longer improves")
    if values := getattr(callbacks.get("summaries"), "best", None):
        best = [f"{name.removeprefix('best/')} {value:.4g}" for name, value in values.items()]
        say("best     " + "  ".join(best))
    for logger in trainer.loggers:
        if isinstance(logger, RunWandbLogger):
            say(f"W&B      {logger.url_or_dir}")
    file = best_or_last(trainer)
    if not is_of_this_run(trainer, file):
        return
    shown = file if "://" in file else display_path(Path(file))
    by_id = default_root and (run.checkpoints / "last.ckpt").exists()
    reference = run.id if by_id else shown
    say(f"saved    {shown}")
    module: Any = getattr(trainer, "lightning_module", None) or trainer.model  # or of a Fabric loop
    if is_overridden("test_step", module):
        say(f"test     {python_command('test', '--ckpt_path', reference)}")
