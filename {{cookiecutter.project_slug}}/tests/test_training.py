"""What a run leaves behind, and whether it can be used."""

import csv
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CONFIGS, EXPERIMENT, Command


def logged(run: Path) -> list[str]:
    with (run / "metrics.csv").open() as file:
        return next(csv.reader(file))


def test_a_run_is_one_folder_with_its_parts(trained: Path) -> None:
    parts = {".lock", "checkpoints", "config.yaml", "metrics.csv", "metrics.jsonl", "wandb"}
    assert {path.name for path in trained.iterdir()} == parts


def test_there_is_a_best_and_a_last_checkpoint_and_nothing_else(trained: Path) -> None:
    best, newest = sorted(path.name for path in (trained / "checkpoints").iterdir())
    assert newest == "last.ckpt"
    assert best.startswith("epoch-")


def test_checkpoints_hold_plain_data_only(trained: Path) -> None:
    for file in (trained / "checkpoints").iterdir():
        assert torch.load(file, weights_only=True)["state_dict"]


def test_metrics_are_kept_whatever_the_logger(trained: Path) -> None:
    defaults = yaml.safe_load((CONFIGS / "defaults.yaml").read_text())
    callbacks = defaults["callbacks"]
    assert logged(trained)[:2] == ["step", "epoch"]
    metrics = {*callbacks["summaries"]["metrics"], *callbacks["divergence"]["metrics"]}
    metrics = metrics - {"$monitor"} | {defaults["monitor"]}
    assert metrics <= set(logged(trained))


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
    for verb in ("validate", "test", "predict"):
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


def test_fit_can_end_with_a_test_of_the_best_checkpoint(command: Command) -> None:
    short = ("--trainer.max_epochs", "1", "--trainer.logger", "false")
    run = command("fit", *EXPERIMENT, *short, "--test_after_fit", "true")
    assert [name for name in logged(run) if name.startswith("test/")]
