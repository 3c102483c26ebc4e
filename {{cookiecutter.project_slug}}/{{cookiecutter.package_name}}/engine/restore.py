"""Applying a checkpoint to this run: moved folders, new options, and rows that are logged again."""

import copy
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from .errors import UsageError, warn_user
from .lightning_internals import is_tuner_restoring, steps_in_checkpoint
from .metrics import MetricsFile
from .readable import upgrade_checkpoint
from .run import Run
from .wandb_logger import RunWandbLogger


class RestoreRun(Callback):
    """Adapts a checkpoint to this run before the trainer restores it.

    Args:
        run: This run.
        checkpoint: What the command begins from, for messages.
    """

    def __init__(self, run: Run, checkpoint: str | None) -> None:
        self.run = run
        self.checkpoint = checkpoint
        self.initial_optimizer_options: dict[str, Any] = {}
        self.restored_step = -1  # of the checkpoint from which this fit resumes
        self.first_step: int | None = None  # that is logged again
        self.first_row: int | None = None  # that was logged after the checkpoint
        self._restoring: dict[str, Any] = {}  # the checkpoint, until it is restored
        self._in_own_folder = False
        self._rows_before: dict[int, int] = {}  # those in each metrics file before this start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == TrainerFn.FITTING:
            self.initial_optimizer_options = {}
            self.restored_step, self.first_step, self.first_row = -1, None, None
            self._in_own_folder = False
            self._rows_before = {id(one): one.next_row for one in metrics_files(trainer)}

    def state_dict(self) -> dict[str, Any]:
        options = self.initial_optimizer_options
        return {"initial_optimizer_options": options} if options else {}

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._note_options(trainer)  # a tuner saves before `on_fit_start`, and then sets another lr

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        upgrade_checkpoint(checkpoint)
        if trainer.state.fn != TrainerFn.FITTING or is_tuner_restoring(trainer):
            return
        if "loops" not in checkpoint and "optimizer_states" not in checkpoint:
            expected = "expected a checkpoint that a Trainer can resume from, got another"
            raise UsageError(f"{self.checkpoint or trainer.ckpt_path}: {expected}; see --init_from")
        self._restoring = checkpoint
        self.restored_step = checkpoint["global_step"]
        self.first_step = first_step_to_log(checkpoint)
        file = Path(str(trainer.ckpt_path)).absolute()
        self._in_own_folder = file.is_relative_to(self.run.folder)
        if self._in_own_folder:
            self.first_row = checkpoint.get("engine", {}).get("rows")
        folder = self.run.folder if self._in_own_folder else None
        adapt_callback_states(trainer, checkpoint["callbacks"], folder)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note_options(trainer)
        self._apply_to_optimizers(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._apply_to_optimizers(trainer)  # a sharded strategy restores after `on_fit_start`
        if self._in_own_folder:
            trainer.ckpt_path = None  # else ModelCheckpoint keeps this file when another is better
        if self.restored_step not in (-1, trainer.global_step) and trainer.is_global_zero:
            begins = f"training begins at step {trainer.global_step}, not {self.restored_step}"
            warn_user(f"{begins}: a callback such as LearningRateFinder restored another state")
        first = trainer.global_step if self.first_step is None else self.first_step
        for file in metrics_files(trainer):
            file.drop_rows(self.first_row, first, self._rows_before.get(id(file)))

    def _note_options(self, trainer: Trainer) -> None:
        if trainer.optimizers and not self.initial_optimizer_options:
            self.initial_optimizer_options = initial_optimizer_options(trainer)

    def _apply_to_optimizers(self, trainer: Trainer) -> None:
        checkpoint, self._restoring = self._restoring, {}
        if not checkpoint:
            return
        if self._in_own_folder:
            announce_checkpoints(trainer)
        saved = checkpoint["callbacks"].get(self.state_key, {})
        before, now = saved.get("initial_optimizer_options"), self.initial_optimizer_options
        apply_new_optimizer_options(trainer, before, now, checkpoint)


def metrics_files(trainer: Trainer) -> list[MetricsFile]:
    """Return those loggers whose rows a resumed run must not repeat."""
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsFile)]


def first_step_to_log(checkpoint: dict[str, Any]) -> int:
    """Return the step from which a resumed run logs again."""
    if "loops" not in checkpoint:
        return 0
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    within_epoch = epochs["processed"] < epochs["ready"]
    # Within an epoch, Lightning saves before it counts the last step.
    return steps_in_checkpoint(checkpoint) + within_epoch


def adapt_callback_states(trainer: Trainer, states: dict[str, Any], folder: Path | None) -> None:
    """Adapt the saved states of callbacks in place; `folder` is the run's if it is the same run."""
    for stopping in trainer.early_stopping_callbacks:
        if stopping.state_key in states:
            states[stopping.state_key]["patience"] = stopping.patience  # a new one takes effect
    for saving in trainer.checkpoint_callbacks:
        state = states.get(saving.state_key)
        if not isinstance(saving, ModelCheckpoint) or not state:
            continue
        saving.current_score = state.get("current_score")  # W&B shows it; Lightning leaves it out
        before, now = Path(state.get("dirpath") or ""), Path(saving.dirpath or "")
        if folder and now.is_relative_to(folder.resolve()) and now.name == before.name:
            relocate_paths(state, before, now)


def relocate_paths(state: dict[str, Any], before: Path, now: Path) -> None:
    """Tell a ModelCheckpoint where its files are now, because the run's folder may have moved."""

    def relocated(value: Any) -> Any:
        if not (isinstance(value, str) and value and Path(value).is_relative_to(before)):
            return value
        inside = Path(value).relative_to(before)
        return "" if ".." in inside.parts else str(now / inside)  # Lightning removes what is there

    for key, value in state.items():
        state[key] = relocated(value)
    models = state.get("best_k_models", {})
    found = {relocated(file): score for file, score in models.items()}
    state["best_k_models"] = {file: score for file, score in found.items() if file}


def announce_checkpoints(trainer: Trainer) -> None:
    """Tell W&B what an earlier start of this run saved; it may not have been uploaded."""
    for saving in trainer.checkpoint_callbacks:
        for logger in trainer.loggers:
            if isinstance(saving, ModelCheckpoint) and isinstance(logger, RunWandbLogger):
                logger.after_save_checkpoint(saving)


def initial_optimizer_options(trainer: Trainer) -> dict[str, Any]:
    """Return the options of optimizers and schedules before their first step.

    `kinds` has names of classes, `groups` of each optimizer the parameter groups without the
    parameters, `schedules` the states of schedules.
    """
    configs = trainer.lr_scheduler_configs
    kinds = [type(optimizer).__name__ for optimizer in trainer.optimizers]
    kinds += [f"{type(config.scheduler).__name__} each {config.interval}" for config in configs]
    groups = [
        [{**group, "params": None} for group in optimizer.param_groups]
        for optimizer in trainer.optimizers
    ]
    states = [config.scheduler.state_dict() for config in configs]
    return copy.deepcopy({"kinds": kinds, "groups": groups, "schedules": states})


def apply_new_optimizer_options(
    trainer: Trainer,
    before: dict[str, Any] | None,
    now: dict[str, Any],
    checkpoint: dict[str, Any],
) -> None:
    """Have new options of optimizers and schedules take effect, where Lightning restores the old.

    A schedule is stepped up to the checkpoint, so that a learning rate is what a new run would
    have there. What an optimizer knows of the gradients (Adam's moments) stays.

    Args:
        trainer: The trainer, whose optimizers are new.
        before: The initial options of the run that wrote the checkpoint, if it says them.
        now: The initial options of this run.
        checkpoint: Changed in place, before the trainer restores it.

    Raises:
        UsageError: If the run cannot be resumed with these options.
    """
    if not before or repr(before) == repr(now):
        return
    if before["kinds"] != now["kinds"]:
        old, new = (" and ".join(options["kinds"]) for options in (before, now))
        expected = f"expected {old}, as it was saved, got {new}"
        raise UsageError(f"the optimizer's state: {expected}; see --init_from")
    if trainer.strategy.restore_checkpoint_after_setup:  # the old ones are restored already
        name = type(trainer.strategy).__name__
        raise UsageError(f"{name} cannot resume with new optimizer options; see --init_from")
    schedules = checkpoint.get("lr_schedulers", [])
    for config, state in zip(trainer.lr_scheduler_configs, schedules, strict=False):
        step_to_checkpoint(config, state)
    for optimizer, state in zip(
        trainer.optimizers, checkpoint.get("optimizer_states", []), strict=False
    ):
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=False):
            saved.update({name: value for name, value in group.items() if name != "params"})


def step_to_checkpoint(config: Any, state: dict[str, Any]) -> None:
    """Step a new schedule as often as the saved one was, and put its state in place of that."""
    name = type(config.scheduler).__name__
    if config.reduce_on_plateau or "last_epoch" not in state:
        raise UsageError(f"{name}: cannot resume with a new learning rate; see --init_from")
    with warnings.catch_warnings(action="ignore"):  # that the optimizer makes no step
        try:
            for _ in range(state["last_epoch"]):
                config.scheduler.step()
        except ValueError as error:  # OneCycleLR's, beyond its last step
            raise UsageError(f"{name}: {error}") from error
    state.update(config.scheduler.state_dict())
