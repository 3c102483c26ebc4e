"""A tiny training of which one thing grows, in a separate process; see `growth.py`.

    python growing.py KIND RESULT [WORDS ...], in the folder of a baked project

KIND is `plain`, a LightningCLI with W&B offline and the usual callbacks, or `shipped`, the
project's command line. The words are appended to its own. RESULT is given times as JSON.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

PLAIN = (
    "--trainer.logger WandbLogger --trainer.logger.offline true --trainer.logger.save_dir logs"
    " --trainer.callbacks+ LearningRateMonitor"
    " --trainer.callbacks+ EarlyStopping --trainer.callbacks.monitor val/acc"
    " --trainer.callbacks.mode max --trainer.callbacks.patience 1000000"
    " --trainer.callbacks+ ModelCheckpoint --trainer.callbacks.monitor val/acc"
    " --trainer.callbacks.mode max --trainer.callbacks.save_last true"
)
SHIPPED = "--trainer.logger.offline true --callbacks.early_stopping.patience 1000000"
FIT = (
    "fit --model growing.Tiny --data growing.Numbers --trainer.accelerator cpu --trainer.devices 1"
    " --trainer.num_sanity_val_steps 0 --trainer.callbacks+ growing.Clock"
)


class Tiny(pl.LightningModule):
    """Logs `values` values in a step, and in a validation as many again."""

    def __init__(self, values: int = 1) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)
        self.names = [f"value{number}" for number in range(1, values)]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.layer(batch[0]).square().mean()
        self.log("train/loss", loss)
        for name in self.names:
            self.log(f"train/{name}", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        loss = self.layer(batch[0]).mean()
        if dataloader_idx == 0:
            self.log("val/acc", -loss, add_dataloader_idx=False)
            for name in self.names:
                self.log(f"val/{name}", loss, add_dataloader_idx=False)
        self.log("val/loss", loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


class Numbers(pl.LightningDataModule):
    """Batches of one sample, and several validation loaders of ten."""

    def __init__(self, batches: int = 100, loaders: int = 1) -> None:
        super().__init__()
        self.batches, self.loaders = batches, loaders

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(self.batches, 8)), 1, shuffle=True)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [DataLoader(TensorDataset(torch.randn(10, 8)), 1) for _ in range(self.loaders)]


class Idle(pl.Callback):
    """A callback that is called in each step, and does nothing."""

    def on_train_batch_end(self, *_: Any) -> None:
        pass


class Clock(pl.Callback):
    """Notes when steps, epochs and validations begin (s), and the memory at some steps (MiB)."""

    newest: "Clock"

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.epochs: list[float] = []
        self.validations: list[float] = []  # how long each took
        self.memory: dict[int, float] = {}
        Clock.newest = self

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int
    ) -> None:
        self.steps.append(time.perf_counter())
        if len(self.steps) in (1_000, 10_000, 100_000):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.memory[len(self.steps)] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def on_train_epoch_start(self, *_: Any) -> None:
        self.epochs.append(time.perf_counter())

    def on_validation_start(self, *_: Any) -> None:
        self.began = time.perf_counter()

    def on_validation_end(self, *_: Any) -> None:
        self.validations.append(time.perf_counter() - self.began)

    def on_train_end(self, *_: Any) -> None:
        self.steps.append(time.perf_counter())
        self.epochs.append(time.perf_counter())


def train(kind: str, words: list[str]) -> None:
    """Run the whole command."""
    line = [*FIT.split(), *(PLAIN if kind == "plain" else SHIPPED).split(), *words]
    if kind == "shipped":
        from main import main

        main(line)
        return
    import wandb
    from lightning.pytorch.cli import LightningCLI

    LightningCLI(args=line, save_config_kwargs={"overwrite": True}, auto_configure_optimizers=False)
    wandb.finish()


if __name__ == "__main__":
    sys.modules["growing"] = sys.modules[__name__]
    _, kind, result, *words = sys.argv
    sys.argv = ["main.py"]
    torch.set_num_threads(1)
    train(kind, words)
    clock = Clock.newest
    times = {name: getattr(clock, name) for name in ("steps", "epochs", "validations", "memory")}
    times["end"] = time.perf_counter() - clock.steps[-1]
    Path(result).write_text(json.dumps(times))
