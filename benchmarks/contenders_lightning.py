"""Classes of `contenders.py` that need Lightning or the project: it imports them if it must."""

import os
import time
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from contenders import BATCH, BEGIN, PROFILE, SIZES, TRAINED, images, network
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from my_project.data import Digits, Images
from my_project.model import Classifier


class Clock(pl.Callback):
    """Measures the time between two steps, and then that of a checkpoint."""

    result = first = saving = 0.0  # of the class, to be read when the command is over

    def __init__(self, size: str) -> None:
        *_, self.warm, self.steps = SIZES[size]
        self.step = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int
    ) -> None:
        Clock.first = Clock.first or time.perf_counter() - BEGIN
        if self.step == self.warm:
            self.begin = time.perf_counter()
            if "PROFILE" in os.environ:
                PROFILE.enable()
        if self.step == self.warm + self.steps:
            Clock.result = (time.perf_counter() - self.begin) / self.steps * 1e3
            if "PROFILE" in os.environ:
                PROFILE.dump_stats(os.environ["PROFILE"])
        self.step += 1

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.loggers:  # none in a barebones one, which cannot save
            begin = time.perf_counter()
            trainer.save_checkpoint("clock.ckpt")
            Clock.saving = time.perf_counter() - begin


class Busy(pl.Callback):
    """A callback that has something to do in each step."""

    def on_train_batch_end(self, *_: Any) -> None:
        pass


class Sized(Classifier):
    """The project's model with the network of this benchmark."""

    def __init__(self, num_classes: int = 10, size: str = "small", values: int = 1) -> None:
        super().__init__(num_classes, width=1, dropout=0.0, lr=1e-3)
        self.network = network(size)  # type: ignore[assignment]
        self.names = [f"train/value{number}" for number in range(1, values)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        for name in self.names:
            self.log(name, loss)
        return loss


class Shaped(Digits):
    """The project's data module with data of MNIST's shape."""

    def setup(self, stage: str) -> None:
        self.train, self.val = Images(*images(TRAINED)), Images(*images(640))
        self.test = self.val


class OneByOne(Dataset[tuple[Tensor, int]]):
    """A dataset as torchvision's are: each sample becomes a picture, and that a tensor."""

    def __init__(self, number: int) -> None:
        pixels, self.labels = images(number)
        self.pixels = (pixels[:, 0] * 255).byte().numpy()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        # The steps of torchvision's MNIST, ToTensor and Normalize, which take 46 us a sample; these
        # take 36 us.
        picture = np.array(Image.fromarray(self.pixels[index]), copy=True)
        tensor = (
            torch.from_numpy(picture).view(28, 28, 1).permute(2, 0, 1).contiguous().float().div(255)
        )
        mean, deviation = (
            torch.as_tensor(part, dtype=tensor.dtype) for part in ([0.1307], [0.3081])
        )
        if (deviation == 0).any():
            raise ValueError
        tensor = tensor.clone().sub_(mean.view(-1, 1, 1)).div_(deviation.view(-1, 1, 1))
        return tensor, int(self.labels[index])


class Usual(pl.LightningDataModule):
    """A data module as tutorials write it."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(OneByOne(TRAINED), BATCH, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(OneByOne(640), BATCH)


class Tutorial(pl.LightningModule):
    """A model as tutorials write it: it logs loss and accuracy in each step and in the bar."""

    def __init__(self, size: str = "small") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = network(size)
        self.train_acc, self.val_acc = MulticlassAccuracy(10), MulticlassAccuracy(10)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.network(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.train_acc(logits, batch[1])
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.network(batch[0])
        self.val_acc(logits, batch[1])
        self.log("val/loss", F.cross_entropy(logits, batch[1]), prog_bar=True)
        self.log("val/acc", self.val_acc, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)
