"""Ways to train one network on data of MNIST's shape, each in a process of its own: what `bench.py` compares.

    python contenders.py KIND SIZE RESULT [WORDS ...], in the folder of a baked project

writes to the file RESULT the milliseconds of a step with a network of that size; the words are appended to the command
line of those that have one. All have the same data, batches, optimizer and one thread; data are random, since only
their shape costs time.
"""

import cProfile
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BEGIN = time.perf_counter()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.data import DataLoader, Dataset, TensorDataset  # noqa: E402

TRAINED, BATCH = 55_000, 64  # images, as MNIST's usual split, and in a batch
# By name: width and number of the hidden layers, steps before the clock starts, steps that it times.
SIZES = {"small": (24, 1, 60, 790), "medium": (512, 2, 30, 400), "large": (512, 17, 5, 100)}
PROFILE = cProfile.Profile(
    builtins=False
)  # of the steps that are timed, into the file that is named by PROFILE
KINDS: dict[str, Callable[[str], float]] = {}  # by name: milliseconds of a step at a size


def network(size: str) -> nn.Sequential:
    """Linear layers: images (B, 1, 28, 28) in, logits (B, 10) out."""
    width, depth, *_ = SIZES[size]
    hidden = (layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), nn.ReLU()))
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, width), nn.ReLU(), *hidden, nn.Linear(width, 10)
    )


def batches(size: str) -> int:
    """How many there are in an epoch."""
    return sum(SIZES[size][2:]) + 1


def images(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(number, 1, 28, 28, generator=generator)
    return pixels, torch.randint(10, (number,), generator=generator)


def kind(function: Callable[[str], float]) -> Callable[[str], float]:
    KINDS[function.__name__] = function
    return function


def timed(batches: Iterator[Any], size: str) -> float:
    """A plain loop over batches."""
    net = network(size)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    *_, warm, steps = SIZES[size]
    begin = 0.0
    for number in range(warm + steps):
        if number == warm:
            begin = time.perf_counter()
        pixels, labels = next(batches)
        loss = F.cross_entropy(net(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.perf_counter() - begin) / steps * 1e3


@kind
def raw(size: str) -> float:
    """A loop of PyTorch alone over tensors in memory: the limit."""
    pixels, labels = images(TRAINED)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for indices in torch.randperm(TRAINED).split(BATCH):
            yield pixels[indices], labels[indices]

    return timed(batches(), size)


@kind
def loader(size: str) -> float:
    """The same with PyTorch's DataLoader, which takes samples one by one."""
    return timed(iter(DataLoader(TensorDataset(*images(TRAINED)), BATCH, shuffle=True)), size)


def with_lightning() -> dict[str, Any]:
    """What needs Lightning and the project: imported by those contenders alone."""
    import lightning.pytorch as pl
    import numpy as np
    from PIL import Image
    from torchmetrics.classification import MulticlassAccuracy

    from my_project.data import Digits, Images
    from my_project.model import Classifier

    class Clock(pl.Callback):
        """Stops the time between two steps, and then that of a checkpoint."""

        result = first = saving = 0.0

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
        """A dataset as tutorials take it from torchvision: each sample becomes a picture, and that a tensor."""

        def __init__(self, number: int) -> None:
            pixels, self.labels = images(number)
            self.pixels = (pixels[:, 0] * 255).byte().numpy()

        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            # The steps of torchvision's MNIST, ToTensor and Normalize, which takes 46 us a sample, and this 36.
            picture = np.array(Image.fromarray(self.pixels[index]), copy=True)
            tensor = (
                torch.from_numpy(picture)
                .view(28, 28, 1)
                .permute(2, 0, 1)
                .contiguous()
                .float()
                .div(255)
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
        """A model as tutorials write it: loss and accuracy are logged in each step, and shown in the bar."""

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

    parts = {thing.__name__: thing for thing in (Clock, Busy, Sized, Shaped, Usual, Tutorial)}
    for name, thing in parts.items():
        thing.__module__, thing.__qualname__ = "contenders", name
    sys.modules["contenders"] = sys.modules[__name__]
    globals().update(parts)
    return {"pl": pl, **parts}


PARTS: dict[str, Any] = {}
MORE: list[str] = []  # words of a command line


@kind
def barebones(size: str) -> float:
    """Lightning's Trainer with all switched off that can be."""
    pl, clock = PARTS["pl"], PARTS["Clock"](size)
    limits = {"max_epochs": 1, "limit_train_batches": batches(size)}
    trainer = pl.Trainer(barebones=True, accelerator="cpu", devices=1, callbacks=[clock], **limits)
    trainer.fit(PARTS["Sized"](size=size), PARTS["Shaped"]())
    return float(clock.result)


def common(size: str) -> str:
    line = "fit --trainer.accelerator cpu --trainer.devices 1 --trainer.max_epochs 1"
    line += f" --trainer.limit_train_batches {batches(size)}"
    return f"{line} --trainer.callbacks+ contenders.Clock --trainer.callbacks.size {size}"


KEEPERS = (
    " --trainer.callbacks+ ModelCheckpoint --trainer.callbacks.monitor val/acc --trainer.callbacks.mode max"
    " --trainer.callbacks.save_last true --trainer.callbacks+ EarlyStopping --trainer.callbacks.monitor val/acc"
    " --trainer.callbacks.mode max --trainer.callbacks+ LearningRateMonitor"
)
WANDB = " --trainer.logger WandbLogger --trainer.logger.offline true --trainer.logger.save_dir logs"


def with_cli(words: str) -> float:
    from lightning.pytorch.cli import LightningCLI

    LightningCLI(
        args=[*words.split(), *MORE],
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
    )
    import wandb

    wandb.finish()
    return float(PARTS["Clock"].result)


@kind
def usual(size: str) -> float:
    """A plain LightningCLI with W&B offline; model and data as tutorials write them."""
    line = f"{common(size)}{KEEPERS}{WANDB}"
    return with_cli(
        f"{line} --model contenders.Tutorial --model.size {size} --data contenders.Usual"
    )


@kind
def plain(size: str) -> float:
    """A plain LightningCLI with W&B offline and the callbacks, with the project's model and data."""
    line = f"{common(size)}{KEEPERS}{WANDB}"
    return with_cli(f"{line} --model contenders.Sized --model.size {size} --data contenders.Shaped")


@kind
def shipped(size: str) -> float:
    """The generated project with W&B offline."""
    from main import main

    line = f"{common(size)} --trainer.logger.offline true"
    main(
        [
            *f"{line} --model contenders.Sized --model.size {size} --data contenders.Shaped".split(),
            *MORE,
        ]
    )
    return float(PARTS["Clock"].result)


if __name__ == "__main__":
    _, name, size, result, *MORE = sys.argv
    sys.argv = ["main.py"]
    torch.set_num_threads(1)
    if name not in ("raw", "loader"):
        PARTS.update(with_lightning())
    taken = {"ms": KINDS[name](size)}
    if PARTS:
        taken |= {"first": PARTS["Clock"].first, "saving": PARTS["Clock"].saving}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB, on Linux
    Path(result).write_text(json.dumps(taken | {"peak": peak}))
