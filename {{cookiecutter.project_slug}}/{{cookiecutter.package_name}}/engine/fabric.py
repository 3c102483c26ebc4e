"""What a loop of one's own shares with `main.py fit`: command line, run folder, checkpoints, record in W&B."""

import inspect
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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

from .callbacks import Divergence, EpochLines, MetricsFile, Record, Summaries
from .cli import CLI, execute
from .endings import Endings
from .references import restore_random
from .resume import Order, random_states
from .run import Mistake, nearest, redacted, replacing, reported, shown
from .wandb import Wandb


def main(loop: type["Loop"], args: Sequence[str] | None = None) -> None:
    """Runs a loop as `main.py fit` runs the Trainer; `args` is what follows the script, `sys.argv` if None."""
    words = list(sys.argv[1:] if args is None else args)
    with reported():
        execute(words if words[:1] == ["fit"] else ["fit", *words], partial(LoopCLI, loop))


@dataclass
class Callbacks:
    """The callbacks of `main.py` that a loop knows; null for none."""

    checkpoint: ModelCheckpoint | None = None
    summaries: Summaries | None = None
    divergence: Divergence | None = None


class Loop(Fabric):
    """Fabric, with what the loop, a subclass's method `fit(model, datamodule, ckpt_path)`, needs besides.

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
        self.max_epochs, self.log_every_n_steps = max_epochs, log_every_n_steps
        self.current_epoch = self.batch = self.global_step = self.seed = 0  # `batch` counts those done in the epoch
        self.callbacks: list[Any] = []
        self.callback_metrics: dict[str, torch.Tensor] = {}

    def attach(self, record: Record, named: Callbacks, endings: Endings, datamodule: Any) -> None:
        """Takes what the command line has made."""
        self.record, self.named, self.endings, self.datamodule = record, named, endings, datamodule
        self.last = record.run.folder / "checkpoints" / "last.ckpt"
        self.checkpoint_callbacks = [named.checkpoint] if named.checkpoint else []
        self.loggers.append(MetricsFile(record.run.folder / "metrics.csv", write=True))
        endings.error_file = record.run.folder / "error.txt"

    def begin(self, model: LightningModule, ckpt_path: str | None, **objects: Any) -> None:
        """Opens the run's record, and takes up the states of the objects in a checkpoint if there is one."""
        self.model, self.objects = model, objects
        self.seed = self.broadcast(int(os.environ.get("PL_GLOBAL_SEED") or secrets.randbits(32)))
        if self.is_global_zero:
            self.record.run.lock()
        for callback in filter(None, (self.record, self.named.summaries, self.endings)):
            callback.setup(self, model, "fit")  # type: ignore[arg-type]
        if self.world_size > 1:
            reset_seed()  # as a Trainer's strategies do
        if ckpt_path:
            self._go_on(Path(ckpt_path))
        if self.is_global_zero:
            self.record.write()
        for logger in self.loggers:
            if isinstance(logger, MetricsFile):
                logger.forget(self.global_step)
        self.endings.on_train_start(self, model)  # type: ignore[arg-type]

    def _go_on(self, file: Path) -> None:
        try:
            rest = self.load(file, self.objects, weights_only=True)
        except KeyError as error:
            raise Mistake(f"{shown(file)}: expected a checkpoint of {script(type(self))}, got another") from error
        mark, states = rest["loop"], rest["callbacks"]
        self.current_epoch, self.batch, self.global_step, self.seed = mark["at"]
        self.record.restored_step = self.global_step
        if self.named.summaries and "Summaries" in states:
            self.named.summaries.load_state_dict(states["Summaries"])
        saved = self.named.checkpoint
        if saved and saved.state_key in states and file.is_relative_to(self.record.run.folder):
            saved.best_model_score = states[saved.state_key]["best_model_score"]
            saved.best_model_path = str(file.with_name(Path(states[saved.state_key]["best_model_path"]).name))
        if len(mark["random"]) == self.world_size:
            restore_random(mark["random"][self.global_rank])

    def share(self, loader: DataLoader, training: bool = False) -> DataLoader:
        """Has a loader of the data module give this rank its share, in the order in which `main.py fit` reads it."""
        batches: Any = loader.batch_sampler
        rank, start = (self.global_rank, self.world_size), self.batch if training else 0
        batches.sampler = Order(batches, loader, self.seed, rank, training, (self.current_epoch, start))
        batches.sampler.lent = False  # here a rank may have no sample
        return loader

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Gives values to all loggers, and to the callbacks."""
        super().log_dict(metrics, step)
        self.callback_metrics |= {name: torch.as_tensor(value) for name, value in metrics.items() if name != "epoch"}

    def after_batch(self) -> None:
        """Counts a batch, and leaves with a checkpoint if a signal asks for it."""
        self.batch, self.global_step = self.batch + 1, self.global_step + 1
        if self.named.divergence:
            self.named.divergence.on_train_batch_start(self, self.model, None, self.batch)  # type: ignore[arg-type]
        self.endings.on_train_batch_end(self, self.model)  # type: ignore[arg-type]
        if self.endings.leaving:
            self._write(self.last)
            self.endings.on_train_batch_start(self, self.model)  # type: ignore[arg-type]

    def after_epoch(self, metrics: dict[str, torch.Tensor]) -> None:
        """Keeps the best checkpoint and the last one."""
        for callback in filter(None, (self.named.summaries, EpochLines())):
            callback.on_validation_end(self, self.model)  # type: ignore[arg-type]
        epoch, saved = self.current_epoch, self.named.checkpoint
        self.current_epoch, self.batch = epoch + 1, 0
        if saved and saved.monitor:
            if saved.monitor not in metrics:
                logged = f"nobody logs {saved.monitor}, but {', '.join(metrics)}{nearest(saved.monitor, metrics)}"
                raise Mistake(f"callbacks.checkpoint.monitor: {logged}")
            now, best, before = metrics[saved.monitor], saved.best_model_score, saved.best_model_path
            saved.current_score = now
            if best is None or (now > best if saved.mode == "max" else now < best):
                step = torch.tensor(self.global_step)
                name = saved.format_checkpoint_name({"epoch": torch.tensor(epoch), "step": step})
                saved.best_model_score, saved.best_model_path = now, name
                self._write(Path(name))
                if before and before != name and self.is_global_zero:
                    Path(before).unlink(missing_ok=True)
            saved.last_model_path = str(self.last)
        self._write(self.last)
        for logger in self.loggers if self.is_global_zero else ():
            if isinstance(logger, Wandb) and saved:
                logger.after_save_checkpoint(saved)

    def _write(self, file: Path) -> None:
        """Writes a checkpoint, of which `main.py` can test the model, and `load` give it."""
        if self.named.divergence:
            self.named.divergence.on_save_checkpoint(self, self.model, {"state_dict": self.model.state_dict()})  # type: ignore[arg-type]
        kept = [callback for callback in (self.named.checkpoint, self.named.summaries) if callback]
        states = [random_states()]
        if self.world_size > 1:
            ranks: list[Any] = [None] * self.world_size
            torch.distributed.all_gather_object(ranks, states[0])
            states = ranks
        content = {
            **self.objects,
            "epoch": self.current_epoch,
            "global_step": self.global_step,
            "callbacks": {callback.state_key: callback.state_dict() for callback in kept},
            "hyper_parameters": redacted(dict(self.model.hparams)),
            "pytorch-lightning_version": lightning.__version__,
            "loop": {"at": [self.current_epoch, self.batch, self.global_step, self.seed], "random": states},
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) if self.is_global_zero else nullcontext(file) as part:
            self.save(part, content)


def script(loop: type[Loop]) -> str:
    """The name of the file that a loop is written in."""
    return Path(inspect.getfile(loop)).name


class LoopCLI(CLI):
    """The command line of a loop: `main.py`'s, with the options that the loop has."""

    lowest = []  # noqa: RUF012

    def __init__(self, loop: type[Loop], words: list[str], endings: Endings) -> None:
        self.program = script(loop)
        super().__init__(words, endings, trainer_class=loop)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": {"model", "datamodule"}}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(self.trainer_class, "trainer", instantiate=False, skip={"callbacks", "loggers"})
        parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self.add_run_arguments(parser, Callbacks)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        self.drop_linked()
        config = self.config_init["fit"]
        loop: Any = self.trainer_class(**config.trainer)
        loop.attach(self.record, config.callbacks, self.endings, self.datamodule)
        return loop
