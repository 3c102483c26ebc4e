"""Only what is a command's is closed: a caller's runs, sessions and variables stay as they were."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
            wandb.config.update({"rows": self.rows}, allow_val_change=True)
            self.rows += 1
        api = self.api or wandb.Api()
        assert api.default_entity == "team"
        assert wandb.Api().viewer.entity == "team"


BEGINS = ("nothing", "setup", "login", "api", "a finished run", "an open run")


@pytest.fixture
def clean(online: WandbServer) -> Iterator[None]:
    """A process without a session of W&B, before and after, while the server is there."""
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("begin", [*BEGINS, "an open run beside another"])
def test_what_a_caller_has_of_wandb_is_usable_between_commands_of_all_kinds(
    begin: str, online: WandbServer, command: Commands
) -> None:
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
def process(
    online: WandbServer, command: Commands, tmp_path: Path
) -> Callable[[list[str]], str]:
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
    import nbformat

    line = FIT.replace("@digits", "configs/digits.yaml")
    cells = [nbformat.v4.new_code_cell(source.format(line=line)) for source in NOTEBOOK]
    notebook = nbformat.v4.new_notebook(cells=cells)
    folder = f"import os, sys\nos.chdir({str(command.project)!r})\nsys.path.insert(0, '.')"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(folder))
    file = tmp_path / "uses.ipynb"
    nbformat.write(notebook, file)
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
    more = command(f"fit --resume {renamed} --trainer.max_epochs 2")
    assert (more.code, more.err) == (0, ""), more
    assert list(online.runs) == [first.name]
    offline = command(f"fit --resume {renamed} --trainer.max_epochs 3 --trainer.logger.offline true")
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
    assert command(f"fit --resume {copy} --trainer.max_epochs 2").code == 0
    assert sorted(online.runs) == sorted([first.name, "a-copy"])
