"""A project's own tests and mypy, where data, model and configurations are a team's."""

import re
from pathlib import Path

import pytest
from conftest import Bake, Run
from test_project import MYPY, OWN_TESTS

DATA = '''
"""Images with a class for each pixel."""

import warnings

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset


class Scenes(LightningDataModule):
    def __init__(self, batch_size=8, size: int = 8):
        super().__init__()
        self.batch_size = batch_size
        self.size = size
        warnings.warn("Scenes will be renamed", DeprecationWarning)

    def loader(self, seed):
        images = torch.rand(32, 1, self.size, self.size, generator=torch.manual_seed(seed))
        return DataLoader(TensorDataset(images, (3 * images[:, 0]).long()), self.batch_size)

    def train_dataloader(self):
        return self.loader(0)

    def val_dataloader(self):
        return self.loader(1)

    def test_dataloader(self):
        return self.loader(2)

    def predict_dataloader(self):
        return DataLoader(self.loader(2).dataset, batch_size=self.batch_size)
'''
MODEL = '''
"""Segmentation, as a team writes it."""

from contextlib import suppress

import torch
from lightning.pytorch import LightningModule
from sklearn.metrics import jaccard_score
from torch import Tensor, nn
from torch.nn import functional as F

with suppress(ImportError):
    import timm


class Segmenter(LightningModule):
    def __init__(self, lr=1e-2, width: int = 3):
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Conv2d(1, width, 3, padding=1)
        self.seen = []

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, batch_idx):
        images, masks = batch
        loss = F.cross_entropy(self(images), masks)
        self.log("loss_train", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, masks = batch
        logits = self(images)
        self.seen.append(jaccard_score(masks.ravel(), logits.argmax(1).ravel(), average="micro"))
        self.log("acc_val", (logits.argmax(1) == masks).float().mean())
        return logits

    def on_validation_epoch_end(self) -> None:
        area = self.trainer.datamodule.size ** 2
        self.logger.experiment.log({"jaccard": sum(self.seen) / len(self.seen), "area": area})
        self.seen.clear()

    def on_train_epoch_end(self):
        self.trainer.callback_metrics

    def test_step(self, batch, batch_idx):
        images, masks = batch
        self.log("loss_test", F.cross_entropy(self(images), masks))

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).softmax(1)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr)
        return {"optimizer": optimizer}
'''
FILES = {
    "my_project/data.py": DATA,
    "my_project/model.py": MODEL,
    "my_project/network.py": "",
    "tests/test_research.py": "",
    # The experiment, under the example's name, so that nothing else has to change.
    "configs/digits.yaml": """
        trainer: {max_epochs: 2, log_every_n_steps: 1}
        monitor: acc_val
        data: {class_path: Scenes}
        model: {class_path: Segmenter}
    """,
    "configs/another.yaml": """
        monitor: acc_val
        data: {class_path: Scenes, init_args: {size: 16}}
        model: Segmenter
    """,
    # What is no whole experiment: an overlay, halves of one, and what is for other programs.
    "configs/theirs.yaml": """
        trainer: {devices: 4, accelerator: gpu}
        model: {init_args: {lr: 0.1}}
    """,
    "configs/half.yaml": "data: {class_path: Scenes}",
    "configs/other.yaml": "[sky, road, tree]",
}


@pytest.fixture
def team(bake: Bake, tmp_path: Path) -> Path:
    """A project in which a team does something else than the example."""
    project = bake(tmp_path)
    for name, text in FILES.items():
        (project / name).write_text(text)
    for name in ("my_project/callbacks.py", "configs/media.yaml", "configs/sweep.yaml"):
        (project / name).unlink()  # as README.md says
    return project


def test_mypy_takes_ordinary_lightning_code_and_packages_without_types(
    team: Path, run: Run
) -> None:
    run(*MYPY, cwd=team)


@pytest.mark.slow
def test_its_tests_pass_with_other_names_shapes_files_and_a_warning(team: Path, run: Run) -> None:
    printed = run(*OWN_TESTS, "-rA", cwd=team)
    assert "Scenes will be renamed" in printed
    assert re.findall(r"^PASSED tests/test_configs.py::\w+\[(\w+)\]", printed, re.MULTILINE) == [
        *("another", "digits"),
        *("ddp", "debug", "defaults", "gpu", "theirs"),
    ]
    strict = run(*OWN_TESTS, "-k", "one_folder", cwd=team, code=1, PYTHONWARNINGS="error")
    assert "Scenes will be renamed" in strict
