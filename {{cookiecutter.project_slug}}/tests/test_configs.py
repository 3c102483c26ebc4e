"""Every file in configs/ works."""

from pathlib import Path

import pytest
import torch
import yaml
from conftest import CONFIGS, DIGITS, Command

FILES = sorted(CONFIGS.glob("*.yaml"))
EXPERIMENTS = [file for file in FILES if "model" in yaml.safe_load(file.read_text())]
OVERLAYS = [file for file in FILES if file not in EXPERIMENTS]


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_every_experiment_makes_a_step(file: Path, command: Command) -> None:
    command("fit", "--config", str(file), "--trainer.fast_dev_run", "true")


@pytest.mark.parametrize("file", OVERLAYS, ids=lambda file: file.stem)
def test_every_overlay_can_be_laid_over_an_experiment(file: Path, command: Command) -> None:
    if "FSDP" in file.read_text() and not torch.cuda.is_available():
        pytest.skip("Lightning's FSDPStrategy wants a GPU")
    command("fit", *DIGITS, "--config", str(file), "--trainer.fast_dev_run", "true")
