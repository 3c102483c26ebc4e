"""W&B may be away at the start, on the way or at the end: it costs seconds, and no record."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from command import Commands, Outcome
from lightning.pytorch import Callback, LightningModule, Trainer
from wandb.sdk.lib.asyncio_manager import AsyncioManager
from wandb_server import WandbServer

FIT = "fit --config @digits --trainer.log_every_n_steps 1 --trainer.logger.log_model all"
AWAY = "W&B does not answer"
PATIENCE = 4  # seconds
FAST = [("hang", "start"), ("401", "epoch 2")]


@dataclass
class Watch:
    """The times of a training, and the calls in which its loop waited for W&B."""

    times: dict[str, float] = field(default_factory=dict)
    epochs: list[float] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    events: dict[str, Callable[[], None]] = field(default_factory=dict)
    training: bool = False

    def at(self, event: str) -> None:
        self.times[event] = time.monotonic()
        self.events.get(event, lambda: None)()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Watches the trainings of this test: `--trainer.callbacks+ watching.Watching`."""
    watch = Watch()
    waiting = AsyncioManager.run

    class Watching(Callback):
        def __init__(self) -> None:
            watch.at("made")

        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            watch.training = True
            watch.at("start")

        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            watch.at(f"epoch {trainer.current_epoch}")
            watch.epochs.append(time.monotonic())

        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            watch.epochs.append(time.monotonic())
            watch.training = False
            watch.at("end")

    def run(self: AsyncioManager, fn: Any) -> Any:
        if (
            watch.training
            and threading.current_thread() is threading.main_thread()
            and "._publish." not in repr(fn)
        ):
            watch.waits.append(repr(fn))
        return waiting(self, fn)

    monkeypatch.setattr(AsyncioManager, "run", run)
    watching = types.ModuleType("watching")
    watching.Watching = Watching  # type: ignore[attr-defined]
    Watching.__module__ = "watching"
    sys.modules["watching"] = (
        watching  # for good: jsonargparse looks up all classes that it has ever met
    )
    return watch


def fit(command: Commands, *words: str, epochs: int = 3) -> Outcome:
    line = f"{FIT} --trainer.max_epochs {epochs} --trainer.logger.finish_timeout {PATIENCE}"
    return command(f"{line} --trainer.callbacks+ watching.Watching {' '.join(words)}")


def lines(outcome: Outcome, start: str = "W&B ") -> list[str]:
    return [line for line in outcome.out.splitlines() if line.startswith(start)]


def steps(server: WandbServer, run: Path | None) -> list[int]:
    assert run is not None
    return [int(row["_step"]) for row in server.runs[run.name].history]


def versions(server: WandbServer, run: Path | None) -> list[tuple[int, set[str]]]:
    assert run is not None
    members = server.collections[f"model-{run.name}"].members
    return [(member.artifact.metadata["step"], set(member.aliases)) for member in members]


def rows(run: Path | None) -> int:
    """How many rows were logged, as the run's own file says."""
    assert run is not None
    return len((run / "metrics.csv").read_text().splitlines()) - 1


def shown(run: Path | None) -> str:
    """A path as the commands print it here."""
    return min(str(run), os.path.relpath(str(run)), key=len)


def children() -> list[str]:
    """The processes of W&B's client that this one has started and that have not ended."""
    words = ("ps", "-o", "stat=,comm=", "--ppid", str(os.getpid()))
    listed = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    return [line for line in listed.splitlines() if "wandb" in line and not line.startswith("Z")]


def clients() -> list[int]:
    """The ids of the processes of W&B's client that this one has started."""
    words = ("ps", "-o", "pid=,comm=", "--ppid", str(os.getpid()))
    listed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "wandb" in line]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kind", ["hang", "401", pytest.param("refuse", marks=SLOW), pytest.param("503", marks=SLOW)]
)
def test_wandb_away_at_the_start_is_one_line_after_seconds(
    kind: str, online: WandbServer, command: Commands, watch: Watch
) -> None:
    online.fail(kind)
    outcome = fit(command, epochs=1)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert watch.times["start"] - watch.times["made"] < 15
    first, *_ = lines(outcome)
    assert re.fullmatch(r"W&B      offline \(.+\)", first)
    assert re.search(r"\nsee      wandb leet \S+\nsend     python \S+ sync \S+\n", outcome.out)
    assert (AWAY in first) == (kind != "401")
    assert ("wandb login" in first) == (kind == "401")
    assert not children()


def test_a_checkpoint_that_wandb_takes_late_does_not_take_an_alias_from_a_newer_one(
    online: WandbServer, command: Commands, watch: Watch
) -> None:
    def refused_twice() -> None:  # the best one and last.ckpt, or the best one again
        online.wait(lambda server: sum(request.status == 403 for request in server.requests) > 1)
        online.denied.clear()

    def refuse() -> None:
        online.denied.add(f"model-{os.environ['WANDB_RUN_ID']}")

    watch.events = {"start": refuse, "epoch 2": refused_twice}
    outcome = fit(command, "--trainer.logger.finish_timeout", "60")
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert [step for step, _ in versions(online, outcome.run)] == [19, 38, 57]
    assert "latest" in versions(online, outcome.run)[-1][1]


@pytest.mark.slow
def test_no_rank_waits_for_wandb_and_the_process_ends(
    online: WandbServer, command: Commands
) -> None:
    line = FIT.replace("@digits", "configs/digits.yaml").split()
    more = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    with online.failing("hang"):
        done = subprocess.run(
            [sys.executable, "main.py", *line, *more],
            cwd=command.project,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    assert done.returncode == 0, done
    assert done.stdout.count(AWAY) == 1


FAULTS = ["hang", "refuse", "503 graphql", "503 file_stream", "503 storage", "401"]


@pytest.mark.parametrize(
    ("fault", "event"),
    [
        pytest.param(fault, event, marks=() if (fault, event) in FAST else SLOW)
        for fault in FAULTS
        for event in ("start", "epoch 2")
    ],
)
def test_wandb_away_in_the_middle_slows_nothing_and_loses_nothing(
    fault: str, event: str, online: WandbServer, command: Commands, watch: Watch
) -> None:
    watch.events[event] = lambda: online.fail(*fault.split())
    outcome = fit(command)
    took = time.monotonic() - watch.times["end"]
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert not watch.waits
    assert took < PATIENCE + 10, "the end waited for W&B"
    assert outcome.out.count("warning: W&B did not take a checkpoint") <= 1
    assert "has not all of this run (" in lines(outcome)[-1]
    assert outcome.out.endswith(f" sync {shown(outcome.run)}\n")
    assert not children()
    online.recover()
    synced = command(f"sync {outcome.run}")
    assert (synced.code, synced.out) == (0, f"sent     {shown(outcome.run)}\n"), synced
    assert [step for step, _ in versions(online, outcome.run)] == [19, 38, 57]
    assert steps(online, outcome.run) == list(range(rows(outcome.run)))


@pytest.mark.parametrize("offline", [True, False])
def test_a_client_that_was_killed_is_begun_again_and_no_row_is_lost(
    offline: bool, online: WandbServer, command: Commands, watch: Watch
) -> None:
    def kill() -> None:
        for process in clients():
            os.kill(process, signal.SIGKILL)

    watch.events["epoch 1"] = kill
    outcome = fit(command, f"--trainer.logger.offline {offline}".lower())
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert not children()
    assert command(f"sync {outcome.run}").code == 0
    (run,) = online.runs.values()
    assert (run.state, run.exit_code) == ("finished", 0)
    assert {row["epoch"] for row in run.history if "val/loss" in row} == {0, 1, 2}
    lost = rows(outcome.run) - len(run.history)
    assert lost <= 1, "more than what the client was given in its last moment"


def test_a_client_that_never_answers_does_not_hold_the_end(
    online: WandbServer, command: Commands, watch: Watch
) -> None:
    stopped: list[int] = []

    def stop() -> None:
        stopped.extend(clients())
        for process in stopped:
            os.kill(process, signal.SIGSTOP)

    watch.events["end"] = stop
    try:
        outcome = fit(command, epochs=1)
        took = time.monotonic() - watch.times["end"]
        left = children()
    finally:
        for process in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    assert stopped
    assert not left
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert "(W&B does not answer" in lines(outcome)[-1]
    assert took < PATIENCE + 10 + 5, "the end waited for W&B's client"


def test_a_signal_while_the_end_waits_for_wandb_ends_the_waiting(
    online: WandbServer, command: Commands, watch: Watch
) -> None:
    def hang() -> None:
        online.fail("hang")
        threading.Timer(2, os.kill, (os.getpid(), signal.SIGINT)).start()

    watch.events["end"] = hang
    outcome = fit(command, "--trainer.logger.finish_timeout", "17", epochs=1)
    took = time.monotonic() - watch.times["end"]
    assert outcome.code == 130, outcome
    assert "stops" not in outcome.out
    assert took < 2 + 6 + 5 + 3, "the checkpoints, too, were waited for until the timeout"
    assert not children()
    online.recover()
    assert command(f"sync {outcome.run}").code == 0
    assert [step for step, _ in versions(online, outcome.run)] == [19]
