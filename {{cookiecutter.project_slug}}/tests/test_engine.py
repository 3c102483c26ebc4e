"""The engine trains modules that it never saw."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from lightning.pytorch import LightningModule
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from torch import Tensor
from torch.utils.data import DataLoader


class TwoOptimizers(BoringModel):
    """Optimizes by hand, as adversarial training does."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(self.step(batch))
            optimizer.step()

    def configure_optimizers(self) -> tuple[list[Any], list[Any]]:
        first = torch.optim.SGD(self.parameters(), lr=0.1)
        return [first, torch.optim.Adam(self.parameters(), lr=0.1)], []


class NoValidation(BoringModel):
    """Only trains."""

    validation_step = LightningModule.validation_step
    val_dataloader = LightningModule.val_dataloader


class LateLayers(BoringModel):
    """Makes its layers in `configure_model`, as sharded models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer: Any = None

    def configure_model(self) -> None:
        if self.layer is None:
            self.layer = torch.nn.Linear(32, 2)


class TwoLoaders(BoringModel):
    """Validates on two sets."""

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val/loss", self.step(batch))


class TwoSets(BoringDataModule):
    def val_dataloader(self) -> list[DataLoader[Tensor]]:  # type: ignore[override]
        return [super().val_dataloader(), super().val_dataloader()]


class Logs(BoringModel):
    """Logs under other names than the example."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.step(batch)
        self.log("loss_train", loss, on_step=False, on_epoch=True)
        return loss


NOTHING_WATCHED = [
    *("--callbacks.checkpoint.monitor", "null"),
    *("--callbacks.early_stopping", "null"),
    *("--callbacks.summaries", "null"),
]
SECOND = "--callbacks.checkpoint.monitor val/loss/dataloader_idx_1 --callbacks.checkpoint.mode min"
STEPS = "--trainer.max_steps 20 --trainer.val_check_interval 5"
SUMMARY = "--callbacks.summaries.metrics '{loss_train: min}' --trainer.check_val_every_n_epoch 2"
CASES: dict[str, tuple[type, type | None, str]] = {
    "its data inside": (BoringModel, None, ""),
    "two optimizers, by hand": (TwoOptimizers, BoringDataModule, ""),
    "no validation": (NoValidation, None, ""),
    "layers made late": (LateLayers, BoringDataModule, ""),
    "two validation sets": (TwoLoaders, TwoSets, SECOND),
    "by steps": (BoringModel, BoringDataModule, STEPS),
    "gradients accumulated": (BoringModel, BoringDataModule, "--trainer.accumulate_grad_batches 4"),
    "another logger": (BoringModel, BoringDataModule, "--trainer.logger CSVLogger"),
    "a metric of the training watched": (Logs, None, "--callbacks.checkpoint.monitor loss_train"),
    "a summary of the training": (Logs, None, SUMMARY),
}


@pytest.mark.parametrize("case", CASES)
def test_any_module_trains_and_leaves_a_checkpoint(case: str, command: Command) -> None:
    model, data, line = CASES[case]
    words = shlex.split(line)
    names = ["--model", f"{model.__module__}.{model.__name__}"]
    names += ["--data", f"{data.__module__}.{data.__name__}"] if data else []
    logger = [] if "--trainer.logger" in words else ["--trainer.logger", "false"]
    names += ["--trainer.max_epochs", "2"]
    run: Path = command("fit", *names, *logger, *NOTHING_WATCHED, *words)
    assert (run / "checkpoints" / "last.ckpt").stat().st_size > 0
    assert (run / "config.yaml").exists()
