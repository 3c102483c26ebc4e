"""Modules and callbacks that set something when an epoch begins: what a resumed run needs too."""

# mypy: ignore-errors
# It is written as people write it, without types where they leave them out.

import copy
import time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from loaders import Notes
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR


class Temperature(Notes):
    """Divides the loss by a number that depends on the epoch, and keeps a time."""

    def on_train_epoch_start(self) -> None:
        self.temperature, self.began = 1.0 + self.current_epoch, time.time()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        assert self.began > 0
        return super().training_step(batch, batch_idx) / self.temperature


class Mask(Notes):
    """Draws a mask for each epoch."""

    def on_train_epoch_start(self) -> None:
        self.mask = torch.rand(4).double()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch * self.mask, batch_idx)


class Target(Notes):
    """Copies its layer at each epoch's start, and shrinks a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.target = copy.deepcopy(self.layer).requires_grad_(False)
        self.register_buffer("factor", torch.ones(()).double())

    def on_train_epoch_start(self) -> None:
        self.target.load_state_dict(self.layer.state_dict())
        self.factor.mul_(0.9)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        samples = self.note("train", batch_idx, batch) * 0.01
        return (self.layer(samples) - self.target(samples) - self.factor).square().mean()


class Halved(Notes):
    """Halves the learning rate by hand."""

    def on_train_epoch_start(self) -> None:
        for group in self.optimizers().param_groups:
            group["lr"] *= 0.5


class Logged(Notes):
    """Logs in the hook, to the logger and by `log`, and draws from the logger's experiment."""

    def on_train_epoch_start(self) -> None:
        self.log("epoch/start", float(torch.rand(())))
        for logger in self.trainer.loggers:
            logger.log_metrics({"by hand": 1.0}, step=self.trainer.global_step)


class Backbone(Notes):
    """A backbone with BatchNorm, which a callback freezes for an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        samples = self.note("train", batch_idx, batch) * 0.01
        return (self.layer(self.dropout(self.backbone(samples))) - 1).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([one for one in self.parameters() if one.requires_grad], 0.01)


class Frozen(Backbone):
    """Freezes a layer and switches a part to evaluation by itself, from an epoch on."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.backbone[0].requires_grad_(False)
            self.backbone[1].eval()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


class FrozenWithin(Backbone):
    """Trains a layer in the first batches of each epoch only."""

    def on_train_epoch_start(self) -> None:
        self.backbone[0].requires_grad_(True)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.backbone[0].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Estimated(Notes):
    """Sizes its schedule by the trainer's own count of steps."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = OneCycleLR(optimizer, 0.02, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class AsksForData(Notes):
    """Has the loaders made while it configures its optimizer."""

    def configure_optimizers(self) -> Any:
        self.trainer.fit_loop.setup_data()
        self.steps = len(self.trainer.train_dataloader)
        return super().configure_optimizers()


class ByEpoch(Notes):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.01)
        return [optimizer], [StepLR(optimizer, 1, 0.5)]


class DrawsAtStart(Notes):
    """Draws when the training starts, which is once more in each resumed run."""

    def on_train_start(self) -> None:
        torch.rand(self.trainer.global_step + 1)


class Counts(Callback):
    """Counts epochs in its state, and sets a value of the data module."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.count += 1
        trainer.datamodule.epoch = trainer.current_epoch

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.rows.append(("count", self.count, trainer.datamodule.epoch))

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def averaging() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(
        0.005, swa_epoch_start=1, annealing_epochs=2, device=torch.device("cpu")
    )


HOOKS: dict[str, tuple[Any, Any]] = {  # a module, and what makes the callbacks
    "a temperature": (Temperature, tuple),
    "a drawn mask": (Mask, tuple),
    "a target network": (Target, tuple),
    "a learning rate by hand": (Halved, tuple),
    "a layer that is frozen": (Frozen, tuple),
    "a layer that is frozen within an epoch": (FrozenWithin, tuple),
    "drawn at the start": (DrawsAtStart, tuple),
    "a schedule by epoch": (ByEpoch, tuple),
    "a schedule by the estimated steps": (Estimated, tuple),
    "loaders that are asked for early": (AsksForData, tuple),
    "a callback that counts": (Notes, lambda: (Counts(),)),
    "EMA": (Notes, lambda: (EMAWeightAveraging(decay=0.9),)),
    "SWA": (Notes, lambda: (averaging(),)),
    "SWA with BatchNorm": (Backbone, lambda: (averaging(),)),
    "a backbone": (Backbone, lambda: (BackboneFinetuning(1, lambda _: 1.5),)),
}
ACCUMULATION = {1: 2, 2: 4}  # from an epoch on


def accumulation() -> tuple[Callback, ...]:
    return (GradientAccumulationScheduler(ACCUMULATION),)
