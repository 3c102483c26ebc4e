"""Every command in the README of a baked project works as it stands."""

import re
import shlex
from pathlib import Path

import pytest
from command import Commands
from conftest import SOURCES, Run, command_lines

README = (SOURCES / "README.md").read_text(encoding="utf-8")
LINES = command_lines(README)
TRAINING = [line for line in LINES if line.startswith("python main.py fit")]
FLAGS = [
    code
    for code in re.findall(r"`(--[^`]+)`", README)
    if not re.search("config|ckpt_path|init_from|resume|help", code)
]
VALUES = {
    "--model.lr": "0.1",
    "--data.num_workers": "1",
    "--runs_root": ".",
    "--trainer.max_time": "00:00:01:00",
}
INSTALLATION = ["python3 -m venv .venv", ". .venv/bin/activate", 'pip install --editable ".[dev]"']


def test_there_is_no_command_of_a_kind_that_no_test_runs() -> None:
    kinds = [
        line
        for line in LINES
        if line not in (*TRAINING, *INSTALLATION) and not line.startswith("make ")
    ]
    test_wandb = "python main.py test --config configs/digits.yaml"
    test_wandb += " --ckpt_path wandb:ENTITY/PROJECT/model-RUN:best"
    syncs = ["python main.py sync", "python main.py sync RUN"]
    sweeps = ["wandb sweep configs/sweep.yaml", "wandb agent ENTITY/PROJECT/SWEEP"]
    several = [line for line in kinds if line.startswith("torchrun --nnodes 2 ")]
    loops = [line for line in kinds if line.startswith("python train_fabric.py")]
    # In test_wandb.py, test_sync.py, test_sweeps.py, test_hosts.py, test_fabric.py and
    # test_updates.py.
    tested = "python main.py test --ckpt_path RUN"
    updates = ["pip install cruft", "cruft check", "cruft update"]
    assert kinds == [tested, test_wandb, *syncs, *sweeps, *several, *loops, tested, *updates]
    assert len(TRAINING) > 5
    assert len(FLAGS) > 5


@pytest.mark.parametrize("line", TRAINING)
def test_a_training_command_trains(
    line: str, command: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(command.project)
    short = [
        "--trainer.limit_train_batches",
        "2",
        "--trainer.max_epochs",
        "1",
        "--trainer.log_every_n_steps",
        "1",
    ]
    outcome = command([*shlex.split(line)[2:], *short])
    assert (outcome.code, outcome.err) == (0, ""), outcome.err
    assert (outcome.run is None) == ("--print_config" in line)


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_in_the_text_is_an_option(flag: str, command: Commands) -> None:
    words = shlex.split(flag) if " " in flag else [flag, VALUES[flag]]
    outcome = command(["fit", "--config", "@digits", *words, "--trainer.fast_dev_run", "true"])
    assert (outcome.code, outcome.err) == (0, ""), outcome.err


def test_a_run_is_tested_and_run_again_as_the_text_says(command: Commands) -> None:
    trained = command("fit --config @digits --config @debug")
    assert trained.run is not None
    for reference in (
        trained.run.name,
        f"{trained.run.name}:last",
        str(trained.run),
        trained.run / "checkpoints/last.ckpt",
    ):
        for verb in ("test", "validate", "predict"):
            outcome = command(f"{verb} --ckpt_path {reference}")
            assert (outcome.code, outcome.err) == (0, ""), outcome.err
            assert outcome.run not in (None, trained.run)
    for way in ("--resume", "--ckpt_path", "--init_from"):
        outcome = command(f"fit {way} {trained.run.name} --trainer.max_epochs 3")
        assert (outcome.code, outcome.err) == (0, ""), outcome.err
        assert (outcome.run is None) == (way == "--resume")
    trained = command("fit --config @digits --config @debug")
    assert trained.run is not None
    again = command(f"fit --config {trained.run}/config.yaml")
    assert again.run is not None
    assert (again.run / "metrics.csv").read_text() == (trained.run / "metrics.csv").read_text()


def test_the_tree_of_a_run_is_true(command: Commands) -> None:
    tree = set(re.findall(r"^      ([\w.]+)/?  ", README, re.MULTILINE))
    run = command("fit --config @digits --trainer.max_epochs 1").run
    assert run is not None
    assert {path.name for path in run.iterdir()} == tree


def test_every_make_target_that_the_text_names_exists(
    command: Commands, run: Run, tmp_path: Path
) -> None:
    targets = {line.split()[1] for line in LINES if line.startswith("make ")}
    assert targets == {"train", "test", "check", "fix", "lock"}
    for target in targets:
        run("make", "--dry-run", target, cwd=command.project)
