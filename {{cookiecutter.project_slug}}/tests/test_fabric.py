"""The loop in train_fabric.py trains like the Trainer, resumes, and leaves what `main.py` uses."""

import csv
from functools import partial
from pathlib import Path

import pytest
from conftest import CONFIGS, EXPERIMENT, Command

from {{ cookiecutter.package_name }}.engine.fabric import main

from train_fabric import Training

loop = partial(main, Training)
FABRIC = ["--config", str(CONFIGS / "fabric.yaml"), "--trainer.logger", "false"]


def values(run: Path, name: str) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.fixture(scope="module")
def looped(command: Command) -> Path:
    return command(*FABRIC, "--trainer.max_epochs", "2", entry=loop)


def test_the_losses_are_those_of_the_trainer(looped: Path, command: Command) -> None:
    trained = command("fit", *EXPERIMENT, "--trainer.logger", "false", "--trainer.max_epochs", "2")
    for name in ("train/loss", "val/loss", "val/acc"):
        assert values(looped, name) == pytest.approx(values(trained, name), abs=1e-5)


def test_what_it_leaves_can_be_tested(looped: Path, command: Command) -> None:
    tested = command("test", "--ckpt_path", looped.name, "--trainer.logger", "false")
    assert 0 < values(tested, "test/acc")[0] < 1


def test_it_resumes_where_it_was(looped: Path, command: Command) -> None:
    whole = command(*FABRIC, "--trainer.max_epochs", "3", entry=loop)
    command("--resume", looped.name, "--trainer.max_epochs", "3", entry=loop)
    assert values(looped, "train/loss") == values(whole, "train/loss")
