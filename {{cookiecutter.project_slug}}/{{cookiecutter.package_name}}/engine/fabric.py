"""What a training loop on Fabric shares with `main.py fit`.

The command line, the run's folder, checkpoints, and the record in W&B.
"""

import inspect
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import lightning
import torch
from lightning import Fabric
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn, TrainerState
from torch.utils.data import DataLoader

from .batches import Position, SharedBatches
from .checkpoints import decide_the_best
from .cli import CLI
from .errors import UsageError, did_you_mean
from .files import atomic_write, display_path, redact
from .lightning_internals import read_by, restore_reader
from .metrics import Divergence, MetricsFile, Summaries
from .progress import EpochLines
from .random_streams import random_states, restore_random
from .recorder import RunRecorder, logged_values
from .restore import RestoreRun
from .shutdown import GracefulShutdown
from .wandb_logger import RunWandbLogger


def main(loop: type["Loop"], args: Sequence[str] | None = None) -> "LoopCLI":
    """Run a loop as `main.py fit` runs the Trainer.

    Args:
        loop: A subclass of `Loop` with a method `fit`.
        args: What follows the script on the command line; `sys.argv` if None.
    """
    argv = list(sys.argv[1:] if args is None else args)
    words = argv if argv[:1] == ["fit"] else ["fit", *argv]
    return LoopCLI(trainer_class=loop, args=words)


class Loop(Fabric):
    """Fabric, with what a subclass's method `fit(model, datamodule, ckpt_path)` needs besides.

    To the callbacks that it shares with a Trainer it looks like one.

    Args:
        max_epochs: Epochs to train.
        log_every_n_steps: Steps from one logged row of the training to the next.
        logger: As a Trainer takes it.
        options: Those of Fabric.
    """

    fast_dev_run = sanity_checking = interrupted = False
    accumulate_grad_batches = 1
    state = TrainerState(fn=TrainerFn.FITTING)

    def __init__(
        self,
        max_epochs: int = 1,
        log_every_n_steps: int = 50,
        logger: Logger | list[Logger] | bool | None = None,
        **options: Any,
    ) -> None:
        given = logger if isinstance(logger, list) else [logger]
        super().__init__(loggers=[one for one in given if isinstance(one, Logger)], **options)
        self.max_epochs = max_epochs
        self.log_every_n_steps = log_every_n_steps
        self.current_epoch = self.global_step = self.seed = 0
        self.batch = 0  # batches done in this epoch
        self.batches: SharedBatches | None = None  # of the training
        self.saved_batches: dict[str, Any] | None = None  # what a checkpoint has of them
        self.callbacks: list[Any] = []
        self.callback_metrics: dict[str, torch.Tensor] = {}

    def attach(self, cli: "LoopCLI") -> None:
        """Take what the command line has made."""
        self.cli = cli
        self.recorder: RunRecorder = cli.recorder
        self.restore: RestoreRun = cli.restore
        self.shutdown: GracefulShutdown = cli.shutdown
        self.shutdown.trainer = self  # type: ignore[assignment]
        self.datamodule = cli.datamodule
        named: dict[str, Any] = cli.named_callbacks
        self.checkpoint: ModelCheckpoint | None = named.get("checkpoint")
        self.summaries: Summaries | None = named.get("summaries")
        self.divergence: Divergence | None = named.get("divergence")
        self.last = cli.run.checkpoints / "last.ckpt"
        self.lines = EpochLines()
        self.checkpoint_callbacks = [self.checkpoint] if self.checkpoint else []
        self.callbacks = [self.summaries] if self.summaries else []
        if self.checkpoint:
            decide_the_best(self.checkpoint)
        for logger in self.loggers:
            if isinstance(logger, RunWandbLogger):
                logger.use_run(cli.run)
        file = MetricsFile(cli.run.folder, self)
        self.loggers.append(file)
        cli.resources.callback(file.finalize, "success")  # at the end

    def begin(self, model: LightningModule, ckpt_path: str | None, **objects: Any) -> None:
        """Open the run's record, and restore objects from a checkpoint if there is one.

        Args:
            model: The module, whose hyperparameters are saved.
            ckpt_path: Checkpoint to resume from.
            objects: What has a state to save and restore, by its name in the checkpoint.

        Raises:
            UsageError: If the checkpoint is not one of this loop.
        """
        self.model, self.objects = model, objects
        drawn = int(os.environ.get("PL_GLOBAL_SEED") or secrets.randbits(32))
        self.seed = self.broadcast(drawn)
        if self.is_global_zero:
            self.shutdown.made_folder = self.cli.run.lock(self.cli.resources)
        for callback in filter(None, (self.recorder, self.summaries, self.shutdown)):
            callback.setup(self, model, "fit")  # type: ignore[arg-type]
        if self.world_size > 1:
            reset_seed()  # as a Trainer's strategies do
        if ckpt_path:
            self._restore(Path(ckpt_path))
        if self.is_global_zero:
            self.recorder.write_config()
        for logger in self.loggers:
            if isinstance(logger, MetricsFile):
                logger.drop_rows(self.restore.first_row, self.global_step)
        for one in (self.lines, self.shutdown):
            one.on_train_start(self, model)  # type: ignore[arg-type]

    def _restore(self, file: Path) -> None:
        try:
            rest = self.load(file, self.objects, weights_only=True)
        except KeyError as error:
            script = script_of(type(self))
            expected = f"expected a checkpoint of {script}, got another"
            raise UsageError(f"{display_path(file)}: {expected}") from error
        state = rest["loop"]
        self.current_epoch, self.batch, self.global_step, self.seed = state["at"]
        self.saved_batches = state.get("batches")
        self.restore.restored_step = self.global_step
        self.restore.first_row = rest.get("engine", {}).get("rows")
        self._restore_callbacks(file, rest["callbacks"])
        if len(state["random"]) == self.world_size:
            restore_random(state["random"][self.global_rank])

    def _restore_callbacks(self, file: Path, states: dict[str, Any]) -> None:
        if self.summaries and self.summaries.state_key in states:
            self.summaries.load_state_dict(states[self.summaries.state_key])
        saved = self.checkpoint
        in_this_run = file.is_relative_to(self.recorder.run.folder)
        if saved and saved.state_key in states and in_this_run:
            before = states[saved.state_key]
            saved.best_model_score = before["best_model_score"]
            saved.best_model_path = str(file.with_name(Path(before["best_model_path"]).name))

    def share(self, loader: DataLoader, training: bool = False) -> DataLoader:
        """Have a loader give this rank its share, in the order in which `main.py fit` reads it."""
        kind = "train_dataloader" if training else "val_dataloaders"
        batch = self.batch if training else 0
        position = Position((self.seed, kind, 0, self.current_epoch), batch, training)
        restore_reader(loader)  # if the data module returned it before
        rank = self.global_rank, self.world_size
        batches = SharedBatches(loader, lambda: position, rank, pads=False)
        read_by(loader, batches)
        if training and self.batches is None:
            self.recorder.note_batch_size(self, loader)  # type: ignore[arg-type]
        if training:
            self.batches = batches
            if self.saved_batches:
                batches.resume(self.saved_batches, [])
            self.saved_batches = None
        return loader

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Give values to all loggers, and to the callbacks."""
        super().log_dict(metrics, step)
        for name, value in metrics.items():
            if name != "epoch":
                self.callback_metrics[name] = torch.as_tensor(value)

    def after_batch(self) -> None:
        """Count a batch; save a checkpoint and leave if a signal asks for it."""
        self.batch += 1
        self.global_step += 1
        trainer: Any = self
        if self.divergence:
            self.divergence.on_train_batch_start(trainer, self.model, None, self.batch)
        self.shutdown.trained = True
        self.shutdown.agree(at_once=True)
        if self.shutdown.exit_signal:
            self._write(self.last)
            self.shutdown.on_train_batch_start(trainer, self.model)

    def after_epoch(self, metrics: dict[str, torch.Tensor]) -> None:
        """Save the last checkpoint, and the best one if this epoch is it.

        Args:
            metrics: Those of the validation, by name.
        """
        trainer: Any = self
        if self.summaries:
            self.summaries.on_validation_end(trainer, self.model)
        self.lines.note(trainer)
        epoch = self.current_epoch
        self.current_epoch, self.batch = epoch + 1, 0
        if self.checkpoint and self.checkpoint.monitor:
            self._save_best(self.checkpoint, metrics, epoch)
            self.checkpoint.last_model_path = str(self.last)
        self.lines.show(trainer)
        self._write(self.last)
        self.recorder.note_progress(trainer, self.current_epoch, logged_values(trainer))
        for logger in self.loggers if self.is_global_zero else ():
            if isinstance(logger, RunWandbLogger) and self.checkpoint:
                logger.after_save_checkpoint(self.checkpoint)

    def _save_best(
        self, saved: ModelCheckpoint, metrics: dict[str, torch.Tensor], epoch: int
    ) -> None:
        monitor = str(saved.monitor)
        if monitor not in metrics:
            hint = did_you_mean(monitor, metrics)
            problem = f"no metric named {monitor} was logged; there are {', '.join(metrics)}{hint}"
            raise UsageError(f"callbacks.checkpoint.monitor: {problem}")
        saved.current_score = now = metrics[monitor]
        best, before = saved.best_model_score, saved.best_model_path
        if best is not None and not (now > best if saved.mode == "max" else now < best):
            return
        counts = {"epoch": torch.tensor(epoch), "step": torch.tensor(self.global_step)}
        saved.best_model_path = saved.format_checkpoint_name(counts)
        saved.best_model_score = now
        self._write(Path(saved.best_model_path))
        if before and before != saved.best_model_path and self.is_global_zero:
            Path(before).unlink(missing_ok=True)

    def _write(self, file: Path) -> None:
        """Write a checkpoint that `main.py test` and `load` can read."""
        if self.divergence:
            weights = {"state_dict": self.model.state_dict()}
            self.divergence.on_save_checkpoint(self, self.model, weights)  # type: ignore[arg-type]
        states: list[Any] = [random_states()]
        if self.world_size > 1:
            states = states * self.world_size
            torch.distributed.all_gather_object(states, random_states())
        kept = [one for one in (self.checkpoint, self.summaries) if one]
        at = [self.current_epoch, self.batch, self.global_step, self.seed]
        batches = self.batches.capture(self.batch) if self.batches else None
        trainer: Any = self
        content = {
            **self.objects,
            "epoch": self.current_epoch,
            "global_step": self.global_step,
            "callbacks": {callback.state_key: callback.state_dict() for callback in kept},
            "hyper_parameters": redact(dict(self.model.hparams)),
            "pytorch-lightning_version": lightning.__version__,
            "loop": {"at": at, "random": states, "batches": batches},
        }
        self.recorder.on_save_checkpoint(trainer, self.model, content)
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) if self.is_global_zero else nullcontext(file) as part:
            self.save(part, content)


def script_of(loop: type[Loop]) -> str:
    """Return the name of the file that a loop is written in."""
    return Path(inspect.getfile(loop)).name


class LoopCLI(CLI):
    """The command line of a loop: that of `main.py fit`, with the options that the loop has."""

    default_config_files: ClassVar[list[str]] = []
    callbacks: ClassVar[dict[str, Any]] = {
        "checkpoint": ModelCheckpoint,
        "summaries": Summaries,
        "divergence": Divergence,
    }

    @staticmethod
    def add_trainer_arguments(parser: LightningArgumentParser) -> None:
        """Add none of them."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": {"model", "datamodule"}}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        skip = {"callbacks", "loggers"}
        parser.add_class_arguments(self.trainer_class, "trainer", instantiate=False, skip=skip)
        parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments(
            "data.num_classes", "model.init_args.num_classes", apply_on="instantiate"
        )

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        loop: Any = self.trainer_class(**self.config_init["fit"].trainer)
        loop.attach(self)
        return loop
