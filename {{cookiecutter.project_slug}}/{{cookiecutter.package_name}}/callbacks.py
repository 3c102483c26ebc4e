"""Callbacks of this project; configs/media.yaml names them. Put your own here."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

Columns = dict[str, Tensor]  # by name, with a value or an image for each sample


class Samples(Callback):
    """Show the first validation samples, those of the largest loss and a confusion matrix in W&B.

    The model's method `samples` returns what to show of a batch: `truth`, `prediction` and `loss`
    (B,), and more like them or images (B, C, H, W). Several ranks take the samples in turn; each
    keeps what may be shown, and the first rank gathers and logs it.

    Args:
        first: Number of samples to show from the start of the data.
        worst: Number of samples to show by their loss.
        every_n_epochs: Epochs from one table to the next.
    """

    def __init__(self, first: int = 16, worst: int = 16, every_n_epochs: int = 1) -> None:
        self.first, self.worst, self.every_n_epochs = first, worst, every_n_epochs

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        due = trainer.current_epoch % self.every_n_epochs == 0 and not trainer.sanity_checking
        self.active = due and bool(self.loggers)
        self.kept: list[Columns] = []  # the first and the worst samples so far
        self.classes: list[Tensor] = []  # (B, 2): truth and prediction of every sample

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, loader=0):
        if not self.active or loader > 0:
            return
        columns = {name: part.cpu() for name, part in pl_module.samples(batch, outputs).items()}
        places = sum(map(len, self.classes)) + torch.arange(len(columns["loss"]))
        columns["index"] = places * trainer.world_size + trainer.global_rank
        self.classes.append(torch.stack([columns["truth"], columns["prediction"]], dim=1))
        self.kept = [self.select([*self.kept, columns])]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.active:
            return
        ranks = [(self.kept, self.classes)] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(ranks, (self.kept, self.classes))
        columns = self.select([part for kept, _ in ranks for part in kept])
        classes = torch.cat([part for _, parts in ranks for part in parts])
        for logger in self.loggers if trainer.is_global_zero else ():
            self.show(logger, columns, classes, trainer.global_step)

    def select(self, parts: list[Columns]) -> Columns:
        """Return the first samples and the worst ones, in the order of the data."""
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        order = columns["index"].argsort()
        columns = {name: column[order] for name, column in columns.items()}
        chosen = columns["index"] < self.first
        chosen[self.largest(columns["loss"])] = True
        return {name: column[chosen] for name, column in columns.items()}

    def largest(self, losses: Tensor) -> Tensor:
        """Return the places of the largest losses; NaN is larger than all others."""
        return losses.argsort(descending=True, stable=True)[: self.worst]

    def show(self, logger: WandbLogger, columns: Columns, classes: Tensor, step: int) -> None:
        import wandb  # not above: commands without W&B need not wait half a second for it

        lists = [list(map(wandb.Image, c)) if c.ndim > 1 else c.tolist() for c in columns.values()]
        rows = [list(row) for row in zip(*lists, strict=True)]
        worst = [rows[place] for place in self.largest(columns["loss"])]
        for name, data in (("first", rows[: self.first]), ("worst", worst)):
            logger.log_table(f"samples/{name}", columns=list(columns), data=data, step=step)
        labels, places = classes.unique(return_inverse=True)
        truths, predictions = places.T.tolist()
        names = [str(label) for label in labels.tolist()]
        matrix = wandb.plot.confusion_matrix(y_true=truths, preds=predictions, class_names=names)
        logger.experiment.log({"samples/confusion": matrix, "trainer/global_step": step})
