"""Every file in configs/ works.

A file that gives the class of a model and of its data is an experiment, one with `parameters` a
sweep of W&B, one with neither class an overlay. One with a single class is a part of an experiment,
and needs its other half: test that in a file of your own.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CONFIGS, EXPERIMENT, Command


def kind(file: Path) -> str:
    """Return what a file is for."""
    content: Any = yaml.safe_load(file.read_text())
    if not isinstance(content, dict):
        return "other"
    if "parameters" in content:
        return "sweep"
    sections = [content.get(name) for name in ("model", "data")]
    classes = [isinstance(one, str) or "class_path" in (one or {}) for one in sections]
    return {0: "overlay", 1: "part", 2: "experiment"}[sum(classes)]


FILES = sorted(CONFIGS.glob("*.yaml"))
EXPERIMENTS, OVERLAYS, SWEEPS = (
    [file for file in FILES if kind(file) == wanted]
    for wanted in ("experiment", "overlay", "sweep")
)
# Whatever an overlay asks for: what this machine has.
ONE_DEVICE = [
    *("--trainer.accelerator", "auto"),
    *("--trainer.devices", "1"),
    *("--trainer.num_nodes", "1"),
]


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_every_experiment_makes_a_step(file: Path, command: Command) -> None:
    command("fit", "--config", str(file), "--trainer.fast_dev_run", "true")


@pytest.mark.parametrize("file", OVERLAYS, ids=lambda file: file.stem)
def test_every_overlay_can_be_laid_over_an_experiment(file: Path, command: Command) -> None:
    if "FSDP" in file.read_text() and not torch.cuda.is_available():
        pytest.skip("Lightning's FSDPStrategy wants a GPU")
    words = ("--config", str(file), "--trainer.fast_dev_run", "true", "--compile", "false")
    command("fit", *EXPERIMENT, *words, *ONE_DEVICE)


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_a_trial_of_every_sweep_makes_a_step(file: Path, command: Command, tmp_path: Path) -> None:
    sweep, trial = yaml.safe_load(file.read_text()), tmp_path / "trial.json"
    drawn = {}
    for key, one in sweep["parameters"].items():
        values = [
            *one.get("values", []),
            *(one[name] for name in ("value", "min", "mu") if name in one),
        ]
        if values:
            drawn[key] = values[0]
    trial.write_text(json.dumps(drawn))
    if "fit" not in sweep.get("command", []):
        pytest.skip("its trials are no `fit`")
    words = [str(trial) if word == "${args_json_file}" else word for word in sweep["command"]]
    words = [word.replace("configs/", f"{CONFIGS}/") for word in words[words.index("fit") :]]
    command(*words, "--trainer.fast_dev_run", "true")
