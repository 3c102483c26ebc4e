"""The callback that has checkpoints written beside the training."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from .checkpoint_io import BackgroundCheckpointIO
from .lightning_internals import original_save, replace_save, steps_logged
from .wandb_logger import RunWandbLogger

IMMEDIATE = "link"  # `save_last`: a link to a file that has to be there


class BackgroundSaves(Callback):
    """Has what ModelCheckpoint and LastCheckpoint save written during the training.

    Loggers are told of a checkpoint when its file is there. An error is raised at the next step.
    A subclass may read what it has saved, so it is served as by stock: the training waits. So does
    every other caller of `trainer.save_checkpoint`. A CheckpointIO that the user gives is left
    alone.

    It is called before the other callbacks, so that at the end of the training they find all files.

    Args:
        kinds: The classes whose saves are written in the background.
    """

    def __init__(self, kinds: Iterable[type[ModelCheckpoint]]) -> None:
        self.kinds = tuple(kinds)
        self.io: BackgroundCheckpointIO | None = None
        self.served: list[ModelCheckpoint] = []
        self.saved_at: tuple[int, int] | None = None  # where the training was

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()
        self.saved_at = None
        io = trainer.strategy.checkpoint_io
        self.io = io if isinstance(io, BackgroundCheckpointIO) and stage == "fit" else None
        if self.io is None:
            return
        if trainer.is_global_zero:
            self.io.writer.mark = lambda: what_is_logged(trainer)
        for saving in trainer.checkpoint_callbacks:
            if not isinstance(saving, ModelCheckpoint) or type(saving) not in self.kinds:
                continue
            if saving.save_last != IMMEDIATE:
                self._serve(saving, self.io)

    def _serve(self, saving: ModelCheckpoint, io: BackgroundCheckpointIO) -> None:
        save, exists = original_save(saving), saving.file_exists

        def save_in_background(trainer: Trainer, filepath: str) -> None:
            self.saved_at = place_of(trainer)
            with io.in_background(), told_later(trainer, io, saving):
                save(trainer, filepath)
            io.take_over(Path(filepath), getattr(saving, "takes_over", False))

        def file_exists(filepath: Any, trainer: Trainer) -> bool:
            io.settle_file(filepath)
            return exists(filepath, trainer)

        replace_save(saving, save_in_background)
        vars(saving)["file_exists"] = file_exists
        self.served.append(saving)

    def _restore(self) -> None:
        for saving in self.served:
            replace_save(saving, None)
            vars(saving).pop("file_exists", None)
        self.served = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any
    ) -> None:
        if self.io is not None:
            self.io.begin_writing()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_batch_start(trainer, pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # The values of the step, or of the epoch, are logged after the callbacks have saved. A run
        # that resumes from such a checkpoint would not log them again.
        if self.io is not None and self.saved_at and place_of(trainer) <= self.saved_at:
            self.io.drop_held()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.io is not None:
            self.io.finish_writing()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_end(trainer, pl_module)  # callbacks may save in `on_train_end`

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.on_train_end(trainer, pl_module)
        self._restore()


def place_of(trainer: Trainer) -> tuple[int, int]:
    """Return the steps and the epochs whose values have been logged."""
    return steps_logged(trainer), trainer.fit_loop.epoch_progress.current.completed


@contextmanager
def told_later(
    trainer: Trainer, io: BackgroundCheckpointIO, saving: ModelCheckpoint
) -> Iterator[None]:
    """Have loggers told of what is saved in here when the file is there.

    They are given a copy of the callback as it is now: meanwhile it may save another one.
    """
    for logger in trainer.loggers:
        tell: Callable[..., None] = logger.after_save_checkpoint
        vars(logger)["after_save_checkpoint"] = lambda _, tell=tell: io.tell(tell, as_it_is(saving))
    try:
        yield
    finally:
        for logger in trainer.loggers:
            vars(logger).pop("after_save_checkpoint", None)


def as_it_is(saving: ModelCheckpoint) -> ModelCheckpoint:
    """Return a copy of a callback that does not change with it."""
    twin = copy.copy(saving)
    twin.best_k_models = dict(saving.best_k_models)
    return twin


def what_is_logged(trainer: Trainer) -> Callable[[], bool]:
    """Return what says whether all that is logged so far is in a file."""
    ours = [logger for logger in trainer.loggers if isinstance(logger, RunWandbLogger)]
    written = [logger.what_is_logged() for logger in ours]
    return lambda: all(is_written() for is_written in written)
