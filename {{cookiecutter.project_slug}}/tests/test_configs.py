"""Every file in configs/ works."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CONFIGS, EXPERIMENT, Command

FILES = sorted(CONFIGS.glob("*.yaml"))
EXPERIMENTS = [file for file in FILES if "model" in yaml.safe_load(file.read_text())]
SWEEPS = [file for file in FILES if "parameters" in yaml.safe_load(file.read_text())]
OVERLAYS = [file for file in FILES if file not in EXPERIMENTS + SWEEPS]


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_every_experiment_makes_a_step(file: Path, command: Command) -> None:
    command("fit", "--config", str(file), "--trainer.fast_dev_run", "true")


@pytest.mark.parametrize("file", OVERLAYS, ids=lambda file: file.stem)
def test_every_overlay_can_be_laid_over_an_experiment(file: Path, command: Command) -> None:
    if "FSDP" in file.read_text() and not torch.cuda.is_available():
        pytest.skip("Lightning's FSDPStrategy wants a GPU")
    words = ("--config", str(file), "--trainer.fast_dev_run", "true", "--compile", "false")
    command("fit", *EXPERIMENT, *words)


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_a_trial_of_every_sweep_makes_a_step(file: Path, command: Command, tmp_path: Path) -> None:
    sweep, trial = yaml.safe_load(file.read_text()), tmp_path / "trial.json"
    drawn = {}
    for key, one in sweep["parameters"].items():
        drawn[key] = one.get("values", [one.get("value", one.get("min"))])[0]
    trial.write_text(json.dumps(drawn))
    words = [str(trial) if word == "${args_json_file}" else word for word in sweep["command"]]
    words = [word.replace("configs/", f"{CONFIGS}/") for word in words[words.index("fit") :]]
    command(*words, "--trainer.fast_dev_run", "true")
