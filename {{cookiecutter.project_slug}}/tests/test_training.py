"""What a run leaves behind, and whether it can be used."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import EXPERIMENT, Command
from lightning.pytorch import LightningModule

from {{ cookiecutter.package_name }}.engine import load


def logged(run: Path) -> list[str]:
    with (run / "metrics.csv").open() as file:
        return next(csv.reader(file))


def has(run: Path, *steps: str) -> bool:
    """Return whether the model of a run defines one of these methods."""
    model = type(load(run.name))
    return any(getattr(model, step) is not getattr(LightningModule, step) for step in steps)


def test_a_run_is_one_folder_with_its_parts(trained: Path) -> None:
    parts = {".lock", "checkpoints", "config.yaml", "metrics.csv", "metrics.jsonl"}
    assert parts <= {path.name for path in trained.iterdir()}


def test_there_is_a_best_and_a_last_checkpoint(trained: Path) -> None:
    files = [*(trained / "checkpoints").iterdir()]
    assert "last.ckpt" in {file.name for file in files}
    assert len(files) > 1
    for file in files:  # `weights_only=False`, because a team's may hold more than plain values
        assert torch.load(file, weights_only=False)["state_dict"]


def test_metrics_are_kept_whatever_the_logger(trained: Path) -> None:
    assert logged(trained)[:2] == ["step", "epoch"]
    monitor = yaml.safe_load((trained / "config.yaml").read_text()).get("monitor")
    assert monitor is None or monitor in logged(trained)


def test_the_configuration_of_a_run_can_be_run_again_and_gives_the_same_numbers(
    command: Command,
) -> None:
    short = ("--trainer.max_epochs", "2", "--trainer.logger", "false")
    first = command("fit", *EXPERIMENT, *short, "--seed_everything", "1")
    second = command("fit", "--config", str(first / "config.yaml"))
    assert second != first
    assert (second / "metrics.csv").read_text() == (first / "metrics.csv").read_text()
    assert (second / "config.yaml").read_text() == (first / "config.yaml").read_text()


def test_the_configuration_names_no_folder_of_the_run(trained: Path) -> None:
    assert trained.name not in (trained / "config.yaml").read_text()


def test_testing_leaves_the_trained_run_as_it_was(trained: Path, command: Command) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}

    before = times()
    steps = {"validate": ["validation_step"], "test": ["test_step"]}
    steps["predict"] = ["predict_step", "forward"]
    for verb in [verb for verb, names in steps.items() if has(trained, *names)]:
        assert command(verb, "--ckpt_path", str(trained), "--trainer.logger", "false") != trained
    assert times() == before


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_random_weights_are_never_evaluated(
    verb: str, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command(verb, *EXPERIMENT)
    assert ended.value.code == 2
    assert "--ckpt_path" in capsys.readouterr().err


def test_fit_can_end_with_a_test_of_the_best_checkpoint(trained: Path, command: Command) -> None:
    if not has(trained, "test_step"):
        pytest.skip("the model has no test_step")
    short = ("--trainer.max_epochs", "1", "--trainer.logger", "false")
    run = command("fit", *EXPERIMENT, *short, "--test_after_fit", "true")
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert "test" in {row["_stage"] for row in rows}
