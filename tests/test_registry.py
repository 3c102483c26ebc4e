"""The recipe docs/recipes/registry.md: the best checkpoint of a run, linked to W&B's Registry."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bakery import TEMPLATE
from command import Commands
from conftest import blocks
from wandb_server import WandbServer

PAGE = TEMPLATE / "docs" / "recipes" / "registry.md"
TARGET = "wandb-registry-model/digits"
FIT = (
    "fit --config @digits --trainer.max_epochs 2 --trainer.limit_train_batches 3"
    " --trainer.log_every_n_steps 1 --trainer.logger.log_model true"
    " --trainer.logger.finish_timeout 20"
)


@pytest.fixture
def script(command: Commands, tmp_path: Path) -> Path:
    """The script as the page has it, for the project of the tests."""
    (text,) = [block for kind, block in blocks(PAGE.read_text()) if kind == "python"]
    file = tmp_path / "link.py"
    file.write_text(text.replace("my_project", "odd_duck"))
    return file


def link(script: Path, command: Commands, *words: str, code: int = 0) -> str:
    """Run the script with the environment of this test, and return what it printed."""
    env = os.environ | {"PYTHONPATH": str(command.project)}
    done = subprocess.run(
        (sys.executable, script, *words),
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def trained(command: Commands, line: str = FIT) -> Path:
    outcome = command(line)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert outcome.run is not None
    return outcome.run


def linked(server: WandbServer) -> list[tuple[str, bytes]]:
    """Return the run and the checkpoint of each version in the collection."""
    if "digits" not in server.collections:
        return []
    portfolio = server.collections["digits"]
    assert (portfolio.project, portfolio.portfolio) == ("wandb-registry-model", True)
    versions = [member.artifact for member in portfolio.members]
    return [(one.collection.name, one.files["model.ckpt"]) for one in versions]


def best(run: Path) -> tuple[str, bytes]:
    (file,) = run.glob("checkpoints/epoch*.ckpt")
    return f"model-{run.name}", file.read_bytes()


def test_the_best_checkpoints_of_runs_are_linked_once(
    command: Commands, online: WandbServer, script: Path
) -> None:
    first, second = trained(command), trained(command, f"{FIT} --seed_everything 1")
    out = link(script, command, first.name, second.name, TARGET)
    expected = [f"linked   model-{run.name}:best to {TARGET}" for run in (first, second)]
    assert out.splitlines() == expected
    assert sorted(linked(online)) == sorted([best(first), best(second)])
    link(script, command, first.name, TARGET)
    assert sorted(linked(online)) == sorted([best(first), best(second)])


def test_a_run_that_was_offline_is_linked_after_sync(
    command: Commands, online: WandbServer, script: Path
) -> None:
    run = trained(command, f"{FIT} --trainer.logger.offline true")
    refused = link(script, command, run.name, TARGET, code=1)
    assert f"error: model-{run.name}:best is not linked to {TARGET}: " in refused
    assert linked(online) == []
    assert command(["sync", str(run)]).code == 0
    link(script, command, run.name, TARGET)
    assert linked(online) == [best(run)]


def test_a_run_or_a_collection_that_is_not_there_is_one_line(
    command: Commands, online: WandbServer, script: Path
) -> None:
    run = trained(command)
    for words in ((run.name, "wandb-registry-missing/digits"), ("nothing", TARGET)):
        out = link(script, command, *words, code=1)
        assert out.startswith(f"error: model-{words[0]}:best is not linked to {words[1]}: ")
        assert "Traceback" not in out
    assert "expected wandb-registry-NAME" in link(script, command, run.name, "digits", code=1)
    assert linked(online) == []
