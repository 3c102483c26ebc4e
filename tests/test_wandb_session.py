"""Only what is a command's is closed: a caller's runs, sessions and variables stay as they were."""

import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import outages
import pytest
import wandb
from bakery import environment
from command import Commands
from wandb_server import WandbServer

SHORT = (
    " --trainer.max_epochs 1 --trainer.limit_train_batches 1 --trainer.limit_val_batches 1"
    " --trainer.log_every_n_steps 1"
)
FIT = f"fit --config @digits{SHORT}"
COMMANDS = {
    "fit": (FIT, 0),
    "a mistake": (f"{FIT} --trainer.max_epoch 3", 2),
    "an error": (f"{FIT} --model.num_classes 2", 1),
    "without W&B": (f"{FIT} --trainer.logger false", 0),
    "offline": (f"{FIT} --trainer.logger.offline true", 0),
    "sync": ("sync", 0),
}


class User:
    """Somebody who uses W&B in the process in which the commands run."""

    def __init__(self, begin: str) -> None:
        self.run: Any = None
        self.api: Any = None
        self.other: Any = None
        self.rows = 0
        if begin == "setup":
            wandb.setup()
        elif begin == "login":
            assert wandb.login()
        elif begin == "api":
            self.api = wandb.Api()
        elif begin == "a finished run":
            wandb.init(project="mine", id="before").finish()
        elif begin in ("an open run", "an open run beside another"):
            self.run = wandb.init(project="mine", id="open")
            if begin != "an open run":
                self.other = wandb.init(project="mine", id="beside", reinit="create_new")
        self.session = wandb.setup() if begin not in ("nothing", "a finished run") else None

    def check(self, server: WandbServer) -> None:
        """Use everything that was begun, and a new run."""
        if self.session is not None:
            assert wandb.setup() is self.session
        assert wandb.run is self.run
        if self.run is None:
            with wandb.init(project="mine", id=f"new-{len(server.runs)}") as run:
                run.log({"a": 1})
            assert wandb.run is None
        else:
            wandb.log({"a": self.rows})
            config: Any = wandb.config
            config.update({"rows": self.rows}, allow_val_change=True)
            self.rows += 1
        api = self.api or wandb.Api()
        assert api.default_entity == "team"
        assert wandb.Api().viewer.entity == "team"


BEGINS = ("nothing", "setup", "login", "api", "a finished run", "an open run")


@pytest.fixture
def clean(online: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process without a session of W&B, before and after, while the server is there."""
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("begin", [*BEGINS, "an open run beside another"])
def test_what_a_caller_has_of_wandb_is_usable_between_commands_of_all_kinds(
    begin: str,
    online: WandbServer,
    command: Commands,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "runs"))  # sync sends all runs that are there
    command = dataclasses.replace(command, runs=tmp_path / "runs")
    user = User(begin)
    variables = {name: value for name, value in os.environ.items() if "WANDB" in name}
    trained = []
    for name, (line, code) in COMMANDS.items():
        outcome = command(line)
        assert outcome.code == code, (name, outcome)
        trained += [outcome.run.name] if name in ("fit", "offline") and outcome.run else []
        now = {name: value for name, value in os.environ.items() if "WANDB" in name}
        assert now == variables, name
        user.check(online)
        variables = {name: value for name, value in os.environ.items() if "WANDB" in name}
    assert command("sync").code == 0
    assert [online.runs[run].state for run in trained] == ["finished", "finished"]
    assert all("a" not in row for run in trained for row in online.runs[run].history)
    if user.other is not None:
        user.other.finish()
    if user.run is not None:
        user.run.finish()
        assert [row["a"] for row in online.runs["open"].history] == list(range(user.rows))
        assert not online.runs["open"].config.keys() & {"model", "trainer"}


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("way", ["variable", "flag"])
def test_an_open_run_is_joined_where_it_is_named_and_left_open(
    way: str, online: WandbServer, command: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = wandb.init(project="mine", id=f"joined-{way}")
    run.log({"a": 1})
    if way == "variable":
        monkeypatch.setenv("WANDB_RUN_ID", run.id)
    outcome = command(f"{FIT} --run_id {run.id}" if way == "flag" else FIT)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert wandb.run is run
    run.log({"a": 2})
    run.finish()
    assert list(online.runs) == [run.id]
    sent = online.runs[run.id]
    assert {"model", "run"} <= sent.config.keys()
    assert "val/loss" in {name for row in sent.history for name in row}
    assert [row["a"] for row in sent.history if "a" in row] == [1, 2]


def test_settings_that_a_caller_has_set_up_count(
    online: WandbServer, command: Commands, clean: None
) -> None:
    wandb.setup(wandb.Settings(run_group="folds", project="ignored"))
    for fold in range(2):
        assert command(f"{FIT} --trainer.logger.name fold-{fold}").code == 0
    assert {run.group for run in online.runs.values()} == {"folds"}
    assert [run.name for run in online.runs.values()] == ["fold-0", "fold-1"]
    assert {run.project for run in online.runs.values()} == {"Odd.Duck"}  # of defaults.yaml


@pytest.mark.usefixtures("clean")
def test_what_a_caller_sets_in_python_counts_over_variables_and_what_it_read_before_does_not(
    online: WandbServer, command: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.setup(wandb.Settings(mode="offline"))
    assert "W&B      offline\n" in command(FIT).out
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.setup()
    monkeypatch.delenv("WANDB_MODE")
    assert online.url in command(FIT).out


@pytest.mark.usefixtures("clean")
def test_sync_sends_also_where_the_callers_session_is_offline(
    online: WandbServer, command: Commands
) -> None:
    wandb.setup(wandb.Settings(mode="offline"))
    run = command(FIT).run
    assert run is not None
    assert command(f"sync {run}").code == 0
    assert list(online.runs) == [run.name]


@pytest.mark.usefixtures("clean")
def test_the_key_of_a_callers_login_stays_in_force(online: WandbServer, command: Commands) -> None:
    os.environ["WANDB_API_KEY"] = "f" * 40  # the fixture puts it back
    for _ in range(2):
        assert wandb.login(key=online.key, verify=True)
        outcome = command(FIT)
        assert (outcome.code, outcome.err) == (0, ""), outcome
        assert online.url in outcome.out
        assert wandb.Api().default_entity == "team"


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("flags", ["--trainer.fast_dev_run true", "--trainer.logger false"])
def test_a_models_calls_in_a_dry_run_leave_a_callers_open_run_alone(
    flags: str,
    online: WandbServer,
    command: Commands,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = CALLS.replace("OFFLINE", "True").replace("FOLDER", str(tmp_path))
    (tmp_path / "beside_calls.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    run = wandb.init(project="mine", id="alone")
    outcome = command(f"{FIT} --model beside_calls.Calls {flags}")
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert wandb.run is run
    run.finish()
    sent = online.runs["alone"]
    assert not sent.history
    assert "by_config" not in sent.config


@pytest.mark.usefixtures("clean")
def test_the_end_of_a_joined_run_is_bounded(online: WandbServer, command: Commands) -> None:
    run = wandb.init(project="mine", id="joined-away")
    online.fail("503", "storage")
    began = time.monotonic()
    line = f"{FIT} --run_id {run.id} --trainer.logger.log_model true"
    outcome = command(f"{line} --trainer.logger.finish_timeout 9")
    assert outcome.code == 0, outcome
    assert time.monotonic() - began < 9 + 5 + 20
    online.recover()
    run.finish()


@pytest.mark.usefixtures("clean")
def test_a_refusal_is_offline_also_where_the_command_has_asked_wandb_before(
    online: WandbServer, command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "asks.py").write_text(
        "import wandb\n"
        "from odd_duck.model import Classifier\n"
        "class Asks(Classifier):\n"
        "    def __init__(self, num_classes: int):\n"
        "        super().__init__(num_classes)\n"
        "        assert wandb.Api().default_entity\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    outcome = command(f"{FIT} --model asks.Asks --trainer.logger.entity nobody")
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert "W&B      offline (entity nobody" in outcome.out


@pytest.mark.usefixtures("clean")
def test_a_run_that_a_model_leaves_open_stays_open(
    online: WandbServer, command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaves_open.py").write_text(
        "import wandb\n"
        "from lightning.pytorch import Callback\n"
        "class Leaves(Callback):\n"
        "    run = None\n"
        "    def on_train_start(self, trainer, pl_module):\n"
        "        Leaves.run = wandb.init(project='mine', id='left', reinit='create_new')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    outcome = command(f"{FIT} --trainer.callbacks+ leaves_open.Leaves")
    assert (outcome.code, outcome.err) == (0, ""), outcome
    run = sys.modules["leaves_open"].Leaves.run
    run.log({"late": 1})
    run.finish()
    assert [row["late"] for row in online.runs["left"].history] == [1]


# Each way in which one process runs several commands, in a separate process.

AGENT = """
import os, sys
import wandb
from main import main

def train():
    JOIN
    main({line!r}.split())

sweep = wandb.sweep(
    {{
        "method": "grid",
        "metric": {{"name": "best/val/acc", "goal": "maximize"}},
        "parameters": {{"model.lr": {{"values": [0.5, 0.25]}}}},
    }},
    project="swept",
)
wandb.agent(sweep, function=train, count=2)
print("AFTER", wandb.run, wandb.Api().default_entity)
"""
NOTEBOOK = (
    "import wandb\nwandb.Api().default_entity",
    "from main import main\ncli = main({line!r}.split())\ncli.metrics['val/acc'] >= 0",
    "cli = main({line!r}.split())\ncli.metrics['val/acc'] >= 0",
    "run = wandb.init(project='mine', id='mine', settings=wandb.Settings(silent=True))\n"
    "run.log({{'a': 1}})",
    "cli = main({line!r}.split())\nwandb.run is run",
    "run.log({{'a': 2}})\nrun.finish()\nwandb.Api().default_entity",
)


@pytest.fixture
def process(online: WandbServer, command: Commands, tmp_path: Path) -> Callable[[list[str]], str]:
    """Runs Python in the project, in an separate environment."""

    def run(words: list[str]) -> str:
        env = environment(tmp_path / "e") | online.env() | {"RUNS_ROOT": str(tmp_path / "runs")}
        done = subprocess.run(
            words,
            cwd=command.project,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize("joins", [False, True])
def test_an_agents_function_trains_a_trial_with_its_parameters_in_each_thread(
    joins: bool, online: WandbServer, process: Callable[[list[str]], str], tmp_path: Path
) -> None:
    script = tmp_path / "agent.py"
    line = FIT.replace("@digits", "configs/digits.yaml")
    code = AGENT.format(line=line).replace("JOIN", "wandb.init()" if joins else "pass")
    script.write_text(f"import sys\nsys.path.insert(0, '.')\n{code}")
    said = process([sys.executable, str(script)])
    assert "AFTER None team" in said
    runs = list(online.runs.values())
    assert [run.state for run in runs] == ["finished"] * 2
    assert {run.project for run in runs} == {"swept"}
    assert {run.config["model"]["init_args"]["lr"] for run in runs} == {0.5, 0.25}
    assert {run.config["model.lr"] for run in runs} == {0.5, 0.25}
    assert all("best/val/acc" in run.summary for run in runs)
    assert {folder.name for folder in (tmp_path / "runs").iterdir()} == {run.id for run in runs}


@pytest.mark.slow
def test_a_notebook_uses_wandb_before_between_and_after_its_trainings(
    online: WandbServer,
    process: Callable[[list[str]], str],
    command: Commands,
    tmp_path: Path,
) -> None:
    line = FIT.replace("@digits", "configs/digits.yaml")
    cells = [source.format(line=line) for source in NOTEBOOK]
    folder = f"import os, sys\nos.chdir({str(command.project)!r})\nsys.path.insert(0, '.')"
    about: dict[str, Any] = {"cell_type": "code", "metadata": {}, "outputs": []}
    about["execution_count"] = None
    notebook = {
        "cells": [about | {"id": f"c{n}", "source": s} for n, s in enumerate([folder, *cells])],
        "metadata": {},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    file = tmp_path / "uses.ipynb"
    file.write_text(json.dumps(notebook))
    jupyter = str(Path(sys.executable).with_name("jupyter"))
    process([jupyter, "execute", "--inplace", "--timeout=300", str(file)])
    results = [
        "".join(output["data"]["text/plain"])
        for cell in json.loads(file.read_text())["cells"]
        for output in cell.get("outputs", ())
        if output["output_type"] == "execute_result"
    ]
    assert results == ["'team'", "True", "True", "True", "'team'"]
    assert sorted(run.state for run in online.runs.values()) == ["finished"] * 4
    assert [row["a"] for row in online.runs["mine"].history] == [1, 2]


# What belongs to a run.


def test_a_folder_that_was_renamed_stays_the_same_run(
    online: WandbServer, command: Commands
) -> None:
    first = command(FIT).run
    assert first is not None
    renamed = first.rename(first.with_name("a-better-name"))
    online_again = command(f"fit --resume {renamed} --trainer.max_epochs 2")
    assert (online_again.code, online_again.err) == (0, ""), online_again
    assert list(online.runs) == [first.name]
    offline = command(
        f"fit --resume {renamed} --trainer.max_epochs 3 --trainer.logger.offline true"
    )
    again = renamed.rename(first.with_name("the-best-name"))
    synced = command(f"sync {again}")
    assert (offline.code, synced.code) == (0, 0), (offline, synced)
    assert list(online.runs) == [first.name]
    steps = [row["_step"] for row in online.runs[first.name].history]
    assert steps == list(range(len(steps)))
    tested = command(f"test --ckpt_path {again} --run_id {again.name}")
    assert tested.code == 0, tested
    assert list(online.runs) == [first.name]


def test_a_copy_of_a_folder_is_another_run(online: WandbServer, command: Commands) -> None:
    first = command(FIT).run
    assert first is not None
    copy = shutil.copytree(first, first.with_name("a-copy"))
    rows = len(online.runs[first.name].history)
    offline = "--trainer.max_epochs 2 --trainer.logger.offline true"
    assert command(f"fit --resume {copy} {offline}").code == 0
    synced = command(f"sync {copy} {first}")
    assert synced.code == 0, synced
    assert sorted(online.runs) == sorted([first.name, "a-copy"])
    assert len(online.runs[first.name].history) == rows
    renamed = copy.rename(copy.with_name("a-renamed-copy"))
    assert command(f"fit --resume {renamed} --trainer.max_epochs 3").code == 0
    assert sorted(online.runs) == sorted([first.name, "a-copy"])
    assert len(online.runs[first.name].history) == rows


def test_a_copy_does_not_send_the_run_that_has_its_folder(
    online: WandbServer, command: Commands
) -> None:
    first = command(f"{FIT} --trainer.logger.offline true").run
    assert first is not None
    copy = shutil.copytree(first, first.with_name("another-copy"))
    offline = "--trainer.max_epochs 2 --trainer.logger.offline true"
    assert command(f"fit --resume {copy} {offline}").code == 0
    assert command(f"sync {copy}").code == 0
    assert list(online.runs) == [copy.name]  # a process may be at work on the other


def test_runs_that_share_a_folder_are_each_sent_once(
    online: WandbServer, command: Commands, tmp_path: Path
) -> None:
    shared = f"{FIT} --trainer.logger.save_dir {tmp_path}"
    names = []
    for flags in ("--trainer.logger.offline true", "", "--trainer.logger.offline true"):
        run = command(f"{shared} {flags}").run
        names.append(run.name if run else "")
    for _ in range(2):
        assert command(f"sync {tmp_path}").code == 0
    assert sorted(online.runs) == sorted(names)
    assert len({len(online.runs[name].history) for name in names}) == 1


# On other ranks, and without W&B.

CALLS = """
import wandb
from odd_duck.model import Classifier


class Calls(Classifier):
    def on_fit_start(self):
        run = self.logger.experiment
        run.config.update({"pool": "north"})
        run.summary["begun"] = True
        wandb.config.update({"by_config": 1})
        wandb.config["by_key"] = 2
        wandb.run.summary["by_summary"] = 3
        wandb.summary["by_module"] = 4
        wandb.define_metric("by_log", summary="max")
        wandb.run.define_metric("by_log", summary="max")
        wandb.watch(self)
        wandb.unwatch(self)
        wandb.run.tags = (*wandb.run.tags, "called")
        with open("FOLDER/saved.txt", "w") as file:
            file.write("saved")
        wandb.save("FOLDER/saved.txt", base_path="FOLDER", policy="now")
        if OFFLINE:
            wandb.alert("title", "text")

    def training_step(self, batch, batch_idx):
        wandb.log({"by_log": batch_idx})
        wandb.run.log({"by_run": batch_idx})
        return super().training_step(batch, batch_idx)
"""


@pytest.mark.parametrize("flags", ["--trainer.fast_dev_run true", "--config @debug"])
def test_a_models_calls_of_wandb_do_nothing_in_a_dry_run(
    flags: str, command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = CALLS.replace("OFFLINE", "True").replace("FOLDER", str(tmp_path))
    (tmp_path / "dry_calls.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    outcome = command(f"{FIT} --model dry_calls.Calls {flags}")
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert wandb.run is None
    with pytest.raises(wandb.Error):
        wandb.log({"a": 1})  # as before
    assert not (tmp_path / "wandb").exists()


@pytest.mark.parametrize("flags", ["--trainer.fast_dev_run true", "--trainer.logger false"])
def test_a_logger_that_outlives_its_command_leaves_wandbs_calls_alone(
    flags: str, command: Commands
) -> None:
    made = []
    replace = dataclasses.replace(command, main=lambda words: made.append(command.main(words)))
    assert replace(f"{FIT} {flags}").code == 0
    for logger in made[0].trainer.loggers:
        run: Any = logger.experiment
        run.log({"a": 1})
    assert wandb.run is None
    with pytest.raises(wandb.Error):
        wandb.log({"a": 1})


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_models_calls_of_wandb_act_on_the_first_rank_and_do_nothing_on_others(
    ranks: int, online: WandbServer, process: Callable[[list[str]], str], tmp_path: Path
) -> None:
    code = CALLS.replace("OFFLINE", "False").replace("FOLDER", str(tmp_path))
    (tmp_path / "ranks_calls.py").write_text(code)
    line = FIT.replace("@digits", "configs/digits.yaml")
    devices = f"--trainer.accelerator cpu --trainer.devices {ranks} --model ranks_calls.Calls"
    path = f"PYTHONPATH={tmp_path}"
    process(["env", path, sys.executable, "main.py", *line.split(), *devices.split()])
    (run,) = online.runs.values()
    called = {name: run.config[name] for name in ("pool", "by_config", "by_key")}
    assert called == {"pool": "north", "by_config": 1, "by_key": 2}
    assert (run.summary["begun"], run.summary["by_summary"], run.summary["by_module"]) == (
        True,
        3,
        4,
    )
    assert [row["by_log"] for row in run.history if "by_log" in row] == [0]
    assert [row["by_run"] for row in run.history if "by_run" in row] == [0]
    assert run.metrics["by_log"].summary == ["max"]
    assert run.tags == ["called"]
    assert run.files["saved.txt"] == b"saved"


def test_an_end_that_waits_says_for_what_and_how_to_leave_it(
    online: WandbServer, command: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending = importlib.import_module("odd_duck.engine.wandb_ending")
    monkeypatch.setattr(ending, "SILENT_SECONDS", 0.5)
    line = f"{FIT} --trainer.logger.log_model true --trainer.logger.finish_timeout 9"
    online.fail("503", "storage")
    outcome = command(line)
    assert outcome.code == 0, outcome
    send = r"send     python \S+main.py sync \S+"
    waits = r"W&B      waits at most 9 s for \d checkpoints? to be sent; Ctrl-C leaves it to:"
    lacks = r"W&B      has not all of this run \(.+\)"
    assert re.search(f"\n{waits}\n{send}\n{lacks}\n{send}\n$", outcome.out), outcome.out


@pytest.mark.slow
def test_outages_at_random_moments_beside_busy_processes_do_not_hold_the_end(
    command: Commands, tmp_path: Path
) -> None:
    with outages.busy(2):
        rounds = [outages.outage(command.project, tmp_path, seed) for seed in range(4)]
    assert all(one.is_good for one in rounds), "\n".join(map(str, rounds))
