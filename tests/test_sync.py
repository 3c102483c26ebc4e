"""`main.py sync` brings W&B, from a run's folder alone, what an undisturbed run leaves there."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from command import Commands, Outcome
from filelock import FileLock
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from wandb_record import records
from wandb_server import Run as Sent
from wandb_server import WandbServer

FIT = (
    "fit --config @digits --trainer.max_epochs 2 --trainer.log_every_n_steps 1"
    " --trainer.logger.log_model all"
)
OFFLINE = "--trainer.logger.offline true"


def trained(command: Commands, line: str) -> Path:
    outcome = command(line)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    if outcome.run is None:
        return command.runs / str(re.findall(r"run +\S*?([^/\s]+)\n", outcome.out)[0])
    return outcome.run


class Tables(Callback):
    """Make a model log a table as an artifact."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(trainer.loggers[0], WandbLogger)
        trainer.loggers[0].log_table(key="table", columns=["a"], data=[[1]])


def told(sent: Sent) -> dict[str, Any]:
    """What W&B knows of a run, without the times."""
    rows = [
        {name: value for name, value in row.items() if name not in ("_timestamp", "_runtime")}
        for row in sent.history
    ]
    summary = {
        name: value
        for name, value in sent.summary.items()
        if name not in ("_timestamp", "_runtime", "_wandb")
    }
    config = {name: value for name, value in sent.config.items() if name != "run"}
    metrics = {name: vars(metric) for name, metric in sent.metrics.items()}
    return {
        "rows": rows,
        "summary": summary,
        "config": config,
        "metrics": metrics,
        "state": (sent.state, sent.exit_code),
    }


def versions(server: WandbServer, run: Path) -> list[tuple[Any, ...]]:
    members = server.collections[f"model-{run.name}"].members
    return [
        (one.index, set(one.aliases), one.artifact.metadata, one.artifact.state) for one in members
    ]


def rows(run: Path) -> int:
    """How many rows were logged, as the run's own file says."""
    return len((run / "metrics.csv").read_text().splitlines()) - 1


def synced(command: Commands, *runs: Path, code: int = 0) -> Outcome:
    outcome = command(["sync", *map(str, runs)])
    assert (outcome.code, outcome.err) == (code, ""), outcome
    assert outcome.out.count("\n") == len(runs) or not runs
    return outcome


def test_an_offline_run_on_another_machine_becomes_what_an_online_run_is_and_stays_it(
    online: WandbServer, command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables: Any = types.ModuleType("tables")
    tables.Tables = type("Tables", (Tables,), {"__module__": "tables"})
    sys.modules["tables"] = tables
    fit = f"{FIT} --trainer.callbacks+ tables.Tables"
    undisturbed, offline = trained(command, fit), trained(command, f"{fit} {OFFLINE}")
    assert list(online.runs) == [undisturbed.name]
    moved = tmp_path / "elsewhere" / offline.name
    shutil.move(offline, moved)
    synced(command, moved)
    first, second = told(online.runs[undisturbed.name]), told(online.runs[moved.name])
    first["config"]["trainer"]["logger"]["init_args"]["offline"] = True
    for known in (first, second):
        for row in (*known["rows"], known["summary"]):
            row.pop("table", None)  # names files by the run
    assert second == first
    (table,) = online.collections[f"run-{moved.name}-table"].members
    assert (table.artifact.state, len(table.artifact.files)) == ("COMMITTED", 1)
    assert len(second["rows"]) == rows(moved) + 1  # the table, which no file of metrics holds
    assert versions(online, moved) == versions(online, undisturbed)
    assert not list(moved.glob("uploads/*"))
    before = online.dump()
    synced(command, moved, undisturbed)
    assert online.dump() == before


def test_the_starts_of_a_resumed_run_are_sent_in_their_order(
    online: WandbServer, command: Commands
) -> None:
    run = trained(command, f"{FIT} {OFFLINE}")
    trained(command, f"fit --resume {run.name} --trainer.max_epochs 3")
    no_better = f"fit --resume {run.name} --trainer.max_epochs 4 --model.lr 1.0"
    trained(command, no_better)
    synced(command, run)
    sent = online.runs[run.name]
    assert [row["_step"] for row in sent.history] == list(range(rows(run)))
    assert [row["trainer/global_step"] for row in sent.history if "val/acc" in row] == [
        18,
        37,
        56,
        75,
    ]
    accuracies = [row["val/acc"] for row in sent.history if "val/acc" in row]
    assert sent.summary["best/val/acc"] == max(accuracies) > accuracies[-1]
    assert set(sent.metrics) >= {"*", "val/acc", "val/loss"}
    assert [metadata["step"] for _, _, metadata, _ in versions(online, run)] == [19, 38, 57, 76]
    ((_, aliases, *_),) = [version for version in versions(online, run) if "latest" in version[1]]
    assert aliases == {"latest"}


def test_a_run_that_goes_on_online_first_sends_what_earlier_starts_left(
    online: WandbServer, command: Commands
) -> None:
    run = trained(command, f"{FIT} {OFFLINE}")
    trained(
        command, f"fit --resume {run.name} --trainer.max_epochs 3 --trainer.logger.offline false"
    )
    sent = online.runs[run.name]
    assert [row["_step"] for row in sent.history] == list(range(rows(run)))
    assert [metadata["step"] for _, _, metadata, _ in versions(online, run)] == [19, 38, 57]
    before = online.dump()
    synced(command, run)
    assert online.dump() == before


@pytest.mark.slow
def test_whatever_part_of_a_run_wandb_has_it_gets_the_rest(
    online: WandbServer, command: Commands
) -> None:
    run = trained(command, FIT)
    trained(command, f"fit --resume {run.name} --trainer.max_epochs 3")
    trained(command, f"fit --resume {run.name} --trainer.max_epochs 4 {OFFLINE}")
    synced(command, run)
    sent = online.runs[run.name]
    whole, rows = told(sent), list(sent.history)
    starts = [n for n, row in enumerate(rows) if row["trainer/global_step"] in (0, 38, 57)]
    for had in (
        1,
        starts[-2] + 3,
        starts[-1] - 1,
        starts[-1] + 2,
        len(rows),
    ):  # all of them, but not its end
        sent.history, sent.state, sent.exit_code = rows[:had], "running", None
        sent.summary = {"_step": had - 1}
        synced(command, run)
        assert told(sent) == whole


def start(command: Commands, *words: str) -> subprocess.Popen[bytes]:
    """Start a command in another process."""
    line = [sys.executable, "main.py", *words]
    return subprocess.Popen(
        line, cwd=command.project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "part",
    ["file_stream", pytest.param("storage", marks=SLOW), pytest.param("graphql", marks=SLOW)],
)
def test_a_sync_that_is_killed_and_run_again_is_exact(
    part: str, online: WandbServer, command: Commands
) -> None:
    run = trained(command, f"{FIT} {OFFLINE}")
    reference = command.runs / f"{run.name}-again"
    online.fail("hang", part)
    process = start(command, "sync", str(run))
    try:
        if part == "graphql":
            time.sleep(2)
        else:
            online.wait(
                lambda server: any(
                    "storage" in one.path or "file_stream" in one.path for one in server.requests
                )
            )
    finally:
        process.kill()
        process.wait()
    assert not reference.exists()
    online.recover()
    deadline = time.monotonic() + 120
    while (outcome := command(f"sync {run}")).code and time.monotonic() < deadline:
        assert "another process is at work on it" in outcome.out  # the client of the killed one
        time.sleep(1)
    assert outcome.code == 0, outcome
    sent = online.runs[run.name]
    assert [row["_step"] for row in sent.history] == list(range(rows(run)))
    assert sent.state == "finished"
    assert [metadata["step"] for _, _, metadata, _ in versions(online, run)] == [19, 38]
    assert not list(run.glob("uploads/*"))


@pytest.mark.slow
def test_what_cannot_be_sent_is_listed_and_ends_with_1(
    online: WandbServer, command: Commands
) -> None:
    run = trained(command, f"{FIT} {OFFLINE}")
    with FileLock(run / ".lock"):
        assert "another process is at work on it" in synced(command, run, code=1).out
    assert not online.runs
    with online.failing("503"):
        assert "W&B does not answer" in synced(command, run, code=1).out
    with online.failing("503", "storage"):
        assert re.search(r"left +\S+: \d checkpoints", synced(command, run, code=1).out)
    (run / "uploads" / "1-best.ckpt").write_bytes(b"broken")
    out = command(f"sync {run}").out
    broken = r"warning: \S+1-best.ckpt: not a checkpoint that can be read "
    assert re.search(rf"{broken}.*\nleft +\S+: 1 checkpoints\n", out)
    (run / "uploads" / "1-best.ckpt").unlink()
    synced(command, run)
    assert online.runs[run.name].summary["_step"] == rows(run) - 1
    assert [row["_step"] for row in online.runs[run.name].history] == list(range(rows(run)))
    outcome = command("sync no-such-run")
    assert (outcome.code, outcome.err) == (2, "error: sync: expected a run, got no-such-run\n")
    outcome = command("sync --all")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)


@pytest.mark.slow
def test_a_run_that_was_killed_is_sent_to_its_last_row(
    online: WandbServer, command: Commands
) -> None:
    words = [word.replace("@digits", "configs/digits.yaml") for word in FIT.split()]
    endless = [
        "--trainer.max_epochs",
        "-1",
        "--callbacks.early_stopping",
        "null",
        "--runs_root",
        str(command.runs),
    ]
    process = start(command, *words, *endless)
    online.wait(lambda server: any(run.history for run in server.runs.values()), 60)
    (sent,) = online.runs.values()
    run = command.runs / sent.id
    online.fail("401")  # for good: the client drops all that it has from then on
    online.wait(
        lambda server: any("stream" in one.path and one.status == 401 for one in server.requests),
        60,
    )
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)
    online.recover()
    had = len(sent.history)
    logged = sum(
        record.WhichOneof("record_type") == "history"
        for file in run.glob("wandb/run-*/*.wandb")
        for record in records(file)
    )
    assert had < logged
    synced(command, run)
    assert [row["_step"] for row in sent.history] == list(range(logged))
    assert (sent.state, sent.exit_code) == ("failed", 1)
    epochs = [int(epoch) for epoch in re.findall(r"^epoch (\d+) ", sent.output, re.MULTILINE)]
    assert sorted(set(epochs)) == list(range(len(set(epochs))))
    before = online.dump()
    synced(command, run)
    assert online.dump() == before


def test_all_runs_are_sent_at_once_and_lightning_is_not_imported(
    online: WandbServer, command: Commands, tmp_path: Path
) -> None:
    names = [trained(command, f"{FIT} {OFFLINE} --runs_root {tmp_path}").name for _ in range(2)]
    script = "import sys; from main import main; main(['sync']); print('lightning' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=command.project,
        env=os.environ | {"RUNS_ROOT": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done
    assert re.fullmatch(rf"sent +\S+{names[0]}\nsent +\S+{names[1]}\nFalse\n", done.stdout)
    assert {run.state for run in online.runs.values()} == {"finished"}
    assert "sync" in command("--help").out
