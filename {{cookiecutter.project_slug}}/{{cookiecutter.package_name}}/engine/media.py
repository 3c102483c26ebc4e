"""What W&B can show of a training besides its numbers. All of it is off by default; configs/media.yaml turns it on."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import wandb
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.utilities.plot import plot_confusion_matrix

from .ranks import lent
from .run import Mistake

Row = dict[str, Any]  # what is shown of a sample, by column
Kept = tuple[list[Row], list[Row], list[tuple[Any, Any]]]  # the first, the worst, and of all: truth, prediction


@dataclass(eq=False)
class Samples(Callback):
    """Shows samples of the first validation loader: the first, those of the largest loss, and a confusion matrix.

    The model says what there is to show, by a method `samples(batch, outputs)`, which gets what `validation_step` has
    returned. It returns columns by name, with a value for each sample of the batch: images (B, C, H, W) in [0, 1] or
    of bytes, numbers (B,), or a list of texts. `loss` says which samples are the worst, `truth` and `prediction` which
    classes are confused.

    Args:
        first: How many to show from the beginning.
        worst: How many to show by their loss.
        every_n_epochs: Epochs from one showing to the next.
    """

    first: int = 16
    worst: int = 16
    every_n_epochs: int = 1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        if not callable(getattr(pl_module, "samples", None)):
            kind = type(pl_module).__name__
            raise Mistake(f"callbacks.samples: expected {kind} to have a method samples(batch, outputs), got none")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept: Kept = ([], [], [])
        self.seen = 0  # samples on this rank
        self.due = bool(self.loggers) and not (trainer.sanity_checking or trainer.current_epoch % self.every_n_epochs)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if not self.due or dataloader_idx or lent(trainer.val_dataloaders, 0):
            return
        columns = {name: values_of(column) for name, column in pl_module.samples(batch, outputs).items()}
        if len({len(values) for values in columns.values()}) != 1:
            got = ", ".join(f"{name} {len(values)}" for name, values in columns.items()) or "none"
            raise Mistake(f"{type(pl_module).__name__}.samples: expected columns of one length, got {got}")
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        for row in rows:
            row["index"] = self.seen * trainer.world_size + trainer.global_rank
            self.seen += 1
        pairs = [(row["truth"], row["prediction"]) for row in rows if {"truth", "prediction"} <= row.keys()]
        self.keep(rows, [row for row in rows if "loss" in row], pairs)

    def keep(self, first: list[Row], worst: list[Row], pairs: list[tuple[Any, Any]]) -> None:
        """Takes in what may be among the first and the worst; a loss that is no number is the worst."""

        def badness(row: Row) -> tuple[float, int]:
            return (-math.inf if math.isnan(row["loss"]) else -row["loss"], row["index"])

        first = sorted(self.kept[0] + first, key=lambda row: row["index"])[: self.first]
        self.kept = (first, sorted(self.kept[1] + worst, key=badness)[: self.worst], self.kept[2] + pairs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.due and trainer.world_size > 1:
            ranks: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(ranks, self.kept)
            self.kept = ([], [], [])
            for kept in ranks:
                self.keep(*kept)
        for logger in self.loggers if self.due and trainer.is_global_zero else ():
            for name, rows in (("first", self.kept[0]), ("worst", self.kept[1])):
                if rows:
                    image = any(isinstance(value, Tensor) for value in rows[0].values())
                    cells = [[wandb.Image(v) if isinstance(v, Tensor) else v for v in row.values()] for row in rows]
                    log: Any = logger.log_table if image else logger.log_text
                    log(f"samples/{name}", columns=[*rows[0]], data=cells, step=trainer.global_step)
            if (pairs := self.kept[2]) and all(isinstance(value, int | str) for pair in pairs for value in pair):
                logger.log_image("samples/confusion", [confusion(pairs)], step=trainer.global_step)


def values_of(column: Any) -> list[Any]:
    if not isinstance(column, Tensor):
        return [*column]
    if column.ndim == 1:
        return column.tolist()
    if column.is_floating_point():  # W&B's client (0.31) takes grey levels from 0 to 255 alone, and shows others black
        column = (column.detach().clamp(0, 1) * 255).round().to(torch.uint8)
    return [*column.cpu()]


def confusion(pairs: list[tuple[Any, Any]]) -> Figure:
    """Draws how often each class was taken for which."""
    classes = sorted({value for pair in pairs for value in pair})
    n, place = len(classes), {value: place for place, value in enumerate(classes)}
    cells = torch.tensor([place[truth] * n + place[prediction] for truth, prediction in pairs])
    counts = cells.bincount(minlength=n * n).reshape(n, n)
    figure = Figure(figsize=(2 + n / 2, 2 + n / 2), layout="constrained")
    plot_confusion_matrix(counts, figure.subplots(), add_text=n <= 30, labels=classes)
    return figure


class Watch(Callback):
    """Has W&B draw histograms of gradients and weights, and the graph of the model.

    Args:
        log: What to draw.
        log_freq: Batches from one drawing to the next.
        log_graph: Whether to record the modules of the model, with their shapes.
    """

    def __init__(
        self,
        log: Literal["gradients", "parameters", "all"] = "gradients",
        log_freq: int = 100,
        log_graph: bool = False,
    ) -> None:
        self.what, self.log_freq, self.log_graph = log, log_freq, log_graph  # `log` is a method that Lightning adds

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # W&B waits for the output of every part before it draws the graph, and metrics have none in training.
        networks = [child for child in pl_module.children() if next(child.parameters(), None) is not None]
        for run in runs_of(trainer):
            run.watch(pl_module, log=self.what, log_freq=self.log_freq, idx=0)
            if self.log_graph:
                run.watch(networks, log=None, log_graph=True, idx=0)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for run in runs_of(trainer):
            run.unwatch()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_fit_end(trainer, pl_module)


def runs_of(trainer: Trainer) -> list[wandb.Run]:
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)]
