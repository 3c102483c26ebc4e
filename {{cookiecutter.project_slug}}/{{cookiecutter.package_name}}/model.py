"""How the network is trained and judged. Put your own LightningModule here."""

from collections.abc import Callable, Iterable

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from .data import Batch
from .network import ConvNet


class Classifier(LightningModule):
    """Classifies images by cross-entropy.

    Args:
        num_classes: Given by the data.
        width: Channels of the network's first convolution.
        dropout: Share of the features dropped before the last layer.
        lr: Learning rate.
        optimizer: Class of the optimizer, with any argument but parameters and `lr`; AdamW if null.
        lr_scheduler: Class of the scheduler. OneCycleLR and CyclicLR count steps, others epochs.
    """

    def __init__(
        self,
        num_classes: int,
        width: int = 32,
        dropout: float = 0.25,
        lr: float = 2e-3,
        optimizer: Callable[[Iterable[Tensor], float], torch.optim.Optimizer] | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = ConvNet(num_classes, width, dropout)
        self.lr = lr
        self.optimizer = optimizer or torch.optim.AdamW
        self.lr_scheduler = lr_scheduler
        # Metric objects, not floats: exact for a smaller last batch and on any number of devices.
        metrics = MetricCollection(
            {"loss": MeanMetric(), "acc": MulticlassAccuracy(num_classes, average="micro")}
        )
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (B, 1, 8, 8) to logits (B, num_classes)."""
        return self.network(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate(batch, self.test_metrics)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns class probabilities (B, num_classes)."""
        images, _ = batch
        return self(images).softmax(dim=1)

    def samples(self, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        """Return what the callback `Samples` shows of a validation batch, by column."""
        images, labels = batch
        confidences, classes = logits.softmax(dim=1).max(dim=1)
        return {
            "image": (255 * images).byte(),  # W&B shows images of floats in [0, 1] black
            "truth": labels,
            "prediction": classes,
            "confidence": confidences,
            "loss": F.cross_entropy(logits, labels, reduction="none"),
        }

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer(self.parameters(), self.lr)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": scheduler,
                "interval": "step" if isinstance(scheduler, OneCycleLR | CyclicLR) else "epoch",
                "monitor": getattr(scheduler, "monitor", None),  # ReduceLROnPlateau has one
            },
        }

    def _evaluate(self, batch: Batch, metrics: MetricCollection) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        metrics.update(preds=logits, target=labels, value=loss, weight=len(labels))
        self.log_dict(metrics)
        return logits
