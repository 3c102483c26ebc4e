"""The best checkpoint of a run that ends well is linked to W&B's Registry, by the run itself or later by `sync`."""

import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Commands, Outcome
from lightning.pytorch import Callback
from wandb_server import WandbServer

TARGET = "wandb-registry-model/digits"
FIT = "fit --config @digits --trainer.max_epochs 2 --trainer.log_every_n_steps 1 --trainer.limit_train_batches 3"
LINKED = f"{FIT} --trainer.logger.registry {TARGET} --trainer.logger.finish_timeout 20"
WISH = "uploads/registry"


def trained(command: Commands, line: str = LINKED, code: int = 0) -> tuple[Outcome, Path]:
    outcome = command(line)
    assert (outcome.code, outcome.err) == (code, ""), outcome
    assert outcome.run is not None
    return outcome, outcome.run


def linked(server: WandbServer, collection: str = "digits") -> list[tuple[str, str, int, bytes]]:
    """What a collection of the registry holds: run, project, and step and content of the checkpoint."""
    if collection not in server.collections:
        return []
    portfolio = server.collections[collection]
    assert (portfolio.entity, portfolio.portfolio) == ("organization-entity", True)
    versions = [one.artifact for one in portfolio.members]
    return [
        (one.collection.name, portfolio.project, one.metadata["step"], one.files["model.ckpt"])
        for one in versions
    ]


def best(server: WandbServer, run: Path) -> list[tuple[str, str, int, bytes]]:
    """What is to be found there of a run."""
    (artifact,) = [
        one.artifact
        for one in server.collections[f"model-{run.name}"].members
        if "best" in one.aliases
    ]
    (file,) = run.glob("checkpoints/epoch*.ckpt")
    assert artifact.files["model.ckpt"] == file.read_bytes()
    return [
        (f"model-{run.name}", "wandb-registry-model", artifact.metadata["step"], file.read_bytes())
    ]


def synced(command: Commands, run: Path, code: int = 0) -> str:
    outcome = command(["sync", str(run)])
    assert (outcome.code, outcome.err, outcome.out.count("\n")) == (code, "", 1), outcome
    return outcome.out


def event(name: str, act: Callable[[], None], hook: str = "on_train_end") -> str:
    """Has something happen in the training; gives the option for it."""

    class Event(Callback):
        pass

    setattr(Event, hook, lambda self, trainer, module: act())
    module = types.ModuleType(name)
    module.Event = Event  # type: ignore[attr-defined]
    Event.__module__ = name
    sys.modules[name] = module  # for good: jsonargparse looks up all classes that it has ever met
    return f" --trainer.callbacks+ {name}.Event"


def test_the_best_checkpoint_is_linked_when_a_fit_ends_and_by_no_other_verb(
    online: WandbServer, command: Commands
) -> None:
    outcome, run = trained(command)
    assert linked(online) == best(online, run)
    assert not list(run.glob("uploads/*"))
    assert "warning" not in outcome.out
    assert "registry: wandb-registry-model/digits" in (run / "config.yaml").read_text()
    requests = online.count("LinkArtifact")
    for verb in ("test", "validate", "predict"):
        outcome = command(f"{verb} --ckpt_path {run.name} --trainer.logger.registry {TARGET}")
        assert (outcome.code, outcome.err) == (0, ""), outcome
    synced(command, run)
    assert (online.count("LinkArtifact"), requests) == (1, 1)


def test_an_offline_run_is_linked_once_by_sync(online: WandbServer, command: Commands) -> None:
    _, run = trained(
        command, f"{LINKED} --trainer.logger.offline true --trainer.logger.log_model all"
    )
    assert not online.requests
    assert (run / WISH).read_text() == TARGET
    assert synced(command, run).startswith("sent ")
    assert linked(online) == best(online, run)
    assert not list(run.glob("uploads/*"))
    before = online.dump()
    assert synced(command, run).startswith("sent ")
    assert online.dump() == before
    (run / WISH).write_text(TARGET)  # as after a kill between the two
    synced(command, run)
    assert online.dump() == before
    assert not (run / WISH).exists()


def test_where_wandb_is_away_at_the_end_sync_links(online: WandbServer, command: Commands) -> None:
    away = event("away", lambda: online.fail("hang"))
    outcome, run = trained(command, LINKED.replace("finish_timeout 20", "finish_timeout 4") + away)
    assert "has not all of this run" in outcome.out.splitlines()[-1]
    assert "did not respond" not in outcome.out
    online.recover()
    assert linked(online) == []
    assert synced(command, run).startswith("sent ")
    assert linked(online) == best(online, run)
    assert not list(run.glob("uploads/*"))


@pytest.mark.parametrize(("how", "code"), [("error", 1), ("signal", 130)])
def test_a_run_that_fails_or_is_stopped_links_nothing_even_if_its_start_before_was_to_be_linked(
    how: str, code: int, online: WandbServer, command: Commands
) -> None:
    def fail() -> None:
        if how == "error":
            raise ValueError("in the training")
        signal.raise_signal(signal.SIGINT)

    _, run = trained(command, f"{LINKED} --trainer.logger.offline true")
    assert (run / WISH).exists()
    failing = event(f"failing_by_{how}", fail, "on_train_epoch_start")
    outcome = command(
        f"fit --resume {run.name} --trainer.max_epochs 3 --trainer.logger.offline false{failing}"
    )
    assert outcome.code == code, outcome
    synced(command, run)
    assert "best" in {
        alias for one in online.collections[f"model-{run.name}"].members for alias in one.aliases
    }
    assert online.count("LinkArtifact") == 0


@pytest.mark.parametrize("name", ["model/digits", "missing/digits"])
def test_a_registry_that_refuses_is_one_line_and_sync_tries_again(
    name: str, online: WandbServer, command: Commands
) -> None:
    online.denied.add("digits")
    outcome, run = trained(command, LINKED.replace("model/digits", name))
    reason = "permission denied" if name == "model/digits" else "wandb-registry-missing not found"
    said = rf"W&B did not link model-{run.name}:best to wandb-registry-{name}: [^\n]*{reason}[^\n]*"
    (line,) = [
        line for line in outcome.out.splitlines() if "W&B did not" in line or "has not all" in line
    ]
    assert re.fullmatch(rf"warning: {said}; to try again: python \S+ sync \S+{run.name}", line)
    assert [file.name for file in run.glob("uploads/*")] == ["registry"]
    assert (online.runs[run.name].state, online.runs[run.name].exit_code) == ("finished", 0)
    assert re.fullmatch(rf"left +\S+: {said}\n", synced(command, run, code=1))
    assert linked(online) == []
    online.denied.clear()
    if name == "model/digits":
        synced(command, run)
        assert linked(online) == best(online, run)
        assert not list(run.glob("uploads/*"))


def test_a_target_of_another_form_is_one_line_before_the_training(command: Commands) -> None:
    for target in (
        "digits",
        "wandb-registry-model",
        "model/digits",
        "team/wandb-registry-model/digits",
        "a/b:c",
    ):
        outcome = command(f"{FIT} --trainer.logger.registry {target}")
        said = f"error: trainer.logger.registry: expected wandb-registry-NAME/COLLECTION, got {target}\n"
        assert (outcome.code, outcome.err, outcome.run) == (2, said, None)


@pytest.mark.slow
def test_two_ranks_link_once(online: WandbServer, command: Commands) -> None:
    words = f"{LINKED.replace('@digits', 'configs/digits.yaml')} --trainer.accelerator cpu --trainer.devices 2".split()
    for more in ([], ["--trainer.max_epochs", "3"]):
        done = subprocess.run(
            [sys.executable, "main.py", *words, *more],
            cwd=command.project,
            env=os.environ | {"WANDB_RUN_ID": "two-ranks", "WANDB_SWEEP_ID": "restarts"},
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
        )
        assert (done.returncode, done.stdout.count("warning")) == (0, 0), done
        assert linked(online)[-1:] == best(online, command.runs / "two-ranks")
        assert not list(command.runs.glob("two-ranks/uploads/*"))


@pytest.mark.parametrize("epochs", [2, 3])
def test_the_best_checkpoint_is_linked_even_if_an_earlier_start_saved_it(
    epochs: int, online: WandbServer, command: Commands
) -> None:
    _, run = trained(command, FIT)
    assert not online.collections
    worse = f"--model.lr 1.0 --trainer.max_epochs {epochs}"
    outcome = command(f"fit --resume {run.name} {worse} --trainer.logger.registry {TARGET}")
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert ("nothing was left to train" in outcome.out) == (epochs == 2)
    (expected,) = best(online, run)
    assert linked(online) == [expected]
    steps = [
        one.artifact.metadata["step"] for one in online.collections[f"model-{run.name}"].members
    ]
    assert steps == sorted({expected[2], 3 * epochs})
    (latest,) = [
        one for one in online.collections[f"model-{run.name}"].members if "latest" in one.aliases
    ]
    assert latest.artifact.metadata["step"] == steps[-1]
