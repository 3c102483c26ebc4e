"""Sweeps, by W&B's commands: a trial trains with exactly what it was given, and is a normal run."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bakery import environment
from conftest import Bake, blocks
from wandb_server import Run as Sent
from wandb_server import Sweep, WandbServer

BRIEF = {"trainer.max_epochs": 2, "trainer.log_every_n_steps": 1, "trainer.limit_train_batches": 3}
EXACT = {
    **BRIEF,
    "seed_everything": 7,
    "model.lr": 0.00001,  # 1e-05 in JSON, which YAML takes for a word
    "model.optimizer": None,
    "callbacks.early_stopping": None,
    "callbacks.checkpoint.save_last": None,
    "callbacks.checkpoint.save_on_train_epoch_end": True,
    "trainer.logger.tags": ["small", "1", "null"],
    "trainer.logger.notes": "false",
    "trainer.use_distributed_sampler": True,
    "trainer.enable_progress_bar": False,
    "trainer.accelerator": "cpu",
    "trainer.devices": 2,
}
NOISE = re.compile(r"(wandb: |\d{4}-\d\d-\d\d .* - wandb.wandb_agent - |\t)")  # what the agent says
LINE = re.compile(r"(run|model|device|batch|W&B|see|send|epoch|best|saved|test) ")


@dataclass(frozen=True)
class Machine:
    """A project on a machine with a key of W&B."""

    project: Path
    env: dict[str, str]
    server: WandbServer

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            (sys.executable, *words),
            cwd=self.project,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, *words: str, code: int = 0) -> str:
        return ended(self.start(*words), code)

    def sweep(self, file: str = "configs/sweep.yaml") -> Sweep:
        """Registers a sweep."""
        screen = self("-m", "wandb", "sweep", file)
        (path,) = re.findall(r"wandb agent team/Odd.Duck/(\w+)\n", screen)
        return self.server.sweeps[path]

    def varied(self, name: str, parameters: Mapping[str, Any], **changes: Any) -> Sweep:
        """Register a sweep like the one that is there, but over all combinations of values."""
        config = yaml.safe_load((self.project / "configs" / "sweep.yaml").read_text())
        given = {
            key: {"values" if isinstance(value, tuple) else "value": value}
            for key, value in parameters.items()
        }
        given = {
            key: {kind: [*v] if kind == "values" else v for kind, v in one.items()}
            for key, one in given.items()
        }
        file = self.project / f"{name}.yaml"
        file.write_text(
            yaml.safe_dump({**config, "method": "grid", "parameters": given, **changes})
        )
        return self.sweep(file.name)

    def agent(self, sweep: Sweep, count: int = 1) -> subprocess.Popen[str]:
        return self.start(
            "-m", "wandb", "agent", "--count", str(count), f"team/Odd.Duck/{sweep.id}"
        )

    def trials(self, sweep: Sweep) -> list[Sent]:
        return [self.server.runs[run] for run in sweep.runs]

    def folder(self, run: str) -> Path:
        return self.project / "runs" / run


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    """What a process printed until it ended."""
    try:
        screen, _ = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == code, screen
    return screen


def of_the_project(screen: str) -> list[str]:
    """The lines on an agent's screen that are not the agent's own."""
    return [line for line in screen.splitlines() if line and not NOISE.match(line)]


@pytest.fixture(scope="module")
def machine(bake: Bake, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    home = tmp_path_factory.mktemp("s")
    project = bake(home, package_name="odd_duck", project_slug="Odd.Duck", wandb_entity="team")
    digits = project / "configs" / "digits.yaml"
    digits.write_text(digits.read_text().replace("max_epochs: 20", "max_epochs: 2"))
    # The agent starts the first `python` in PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with WandbServer() as server:
        yield Machine(project, environment(home / "e") | server.env() | {"PATH": path}, server)


@dataclass(frozen=True)
class Swept:
    """Two sweeps, each after a trial, and the screen of their agents.

    The sweep as it stands, and one of exact values on two ranks.
    """

    sweep: Sweep
    exact: Sweep
    screens: list[str]


@pytest.fixture(scope="module")
def swept(machine: Machine) -> Swept:
    sweep, exact = machine.sweep(), machine.varied("exact", EXACT)
    agents = [machine.agent(sweep), machine.agent(exact)]
    return Swept(sweep, exact, [ended(agent) for agent in agents])


def test_the_sweep_as_it_stands_trains_with_what_is_drawn_and_reports_its_target(
    swept: Swept, machine: Machine
) -> None:
    written = yaml.safe_load((machine.project / "configs" / "sweep.yaml").read_text())
    assert swept.sweep.config == written
    (run,) = machine.trials(swept.sweep)
    assert (run.sweep, run.entity, run.project, run.state) == (
        swept.sweep.id,
        "team",
        "Odd.Duck",
        "finished",
    )
    drawn = {name: value for name, value in run.config.items() if "." in name}
    assert drawn.keys() == written["parameters"].keys()
    saved = yaml.safe_load((machine.folder(run.id) / "config.yaml").read_text())
    for name, value in drawn.items():
        section, option = name.split(".")
        assert (
            saved[section]["init_args"][option] == run.config[section]["init_args"][option] == value
        )
    target = written["metric"]["name"]
    assert run.summary[target] == max(row["val/acc"] for row in run.history if "val/acc" in row)
    assert written["metric"]["goal"] == "maximize"


def test_null_lists_booleans_and_numbers_arrive_as_they_stand_on_two_ranks(
    swept: Swept, machine: Machine
) -> None:
    (run,) = machine.trials(swept.exact)
    assert (run.sweep, run.state, run.exit_code) == (swept.exact.id, "finished", 0)
    assert {name: run.config[name] for name in EXACT} == EXACT
    saved = yaml.safe_load((machine.folder(run.id) / "config.yaml").read_text())
    for config in (run.config, saved):
        for name, value in EXACT.items():
            here = config
            for part in name.split("."):
                here = here.get("init_args", here) if part not in here else here
                here = here[part]
            assert (here, type(here)) == (value, type(value)), name
    assert (run.tags, run.notes) == (["small", "1", "null"], "false")
    assert re.search("device +2 x CPU", swept.screens[1])
    assert "best/val/acc" in run.summary


@pytest.mark.slow
def test_the_grid_of_the_projects_page_trains_its_combinations(machine: Machine) -> None:
    page = (machine.project / "docs" / "sweeps.md").read_text(encoding="utf-8")
    (grid,) = [block for kind, block in blocks(page) if kind == "yaml"]
    assert grid.startswith("# configs/grid.yaml\n")
    (machine.project / "configs" / "grid.yaml").write_text(grid, encoding="utf-8")
    sweep = machine.sweep("configs/grid.yaml")
    ended(machine.agent(sweep, count=4))
    drawn = [(run.config["model.lr"], run.config["model.width"]) for run in machine.trials(sweep)]
    values = [sweep.config["parameters"][name]["values"] for name in ("model.lr", "model.width")]
    assert sorted(drawn) == sorted(product(*values))


def test_each_trial_has_one_folder_by_its_id_in_wandb_and_the_screen_is_ours(
    swept: Swept, machine: Machine
) -> None:
    known = {run.id for run in (*machine.trials(swept.sweep), *machine.trials(swept.exact))}
    assert {folder.name for folder in (machine.project / "runs").iterdir()} >= known
    assert len(known) == 2
    for screen in swept.screens:
        lines = of_the_project(screen)
        assert len(lines) > 5
        assert [line for line in lines if not LINE.match(line)] == []


@pytest.mark.slow
def test_a_parameter_that_does_not_exist_or_has_a_wrong_type_is_one_line_and_leaves_no_folder(
    machine: Machine,
) -> None:
    before = sorted(machine.project.glob("runs/*"))
    wrong: dict[str, dict[str, Any]] = {
        "model.lrr: no such option; did you mean lr?": {"model.lrr": 0.1},
        "model.width: expected int, got wide": {"model.width": "wide"},
    }
    command = yaml.safe_load((machine.project / "configs" / "sweep.yaml").read_text())["command"]
    tells = {"command": ["sh", "-c", '"$@"; echo "exit code $?"', "sh", *command]}
    sweeps = {
        said: machine.varied(f"wrong-{len(said)}", parameters, **tells)
        for said, parameters in wrong.items()
    }
    agents = {said: machine.agent(sweep) for said, sweep in sweeps.items()}
    for said, sweep in sweeps.items():
        lines = of_the_project(ended(agents[said]))
        (run,) = sweep.runs
        assert lines == [f"error: the sweep: {said}", "exit code 2"]
        assert run not in machine.server.runs
    assert sorted(machine.project.glob("runs/*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_a_trial_that_was_killed_goes_on_in_its_run_and_its_sweep(
    whole: bool, machine: Machine
) -> None:
    sweep = machine.varied(
        f"killed-{whole}", {**BRIEF, "trainer.max_epochs": -1, "callbacks.early_stopping": None}
    )
    agent = machine.agent(sweep)
    machine.server.wait(
        lambda server: any(run.sweep == sweep.id and run.history for run in server.runs.values()),
        90,
    )
    (run,) = machine.trials(sweep)
    last = machine.folder(run.id) / "checkpoints" / "last.ckpt"
    (trial,) = children(agent.pid, "main.py")
    if whole:
        agent.kill()
    os.kill(trial, signal.SIGKILL)
    ended(agent, -signal.SIGKILL if whole else 0)
    # W&B may have some that came after it: they are short.
    epochs = torch.load(last, weights_only=True)["epoch"] + 10
    screen = machine("main.py", "fit", "--resume", run.id, "--trainer.max_epochs", str(epochs))
    assert run.id in screen
    assert (machine.server.runs[run.id], run.sweep, run.state) == (run, sweep.id, "finished")
    assert [row["_step"] for row in run.history] == list(range(len(run.history)))
    assert {row["epoch"] for row in run.history if "val/acc" in row} == set(range(epochs))
    assert run.summary["best/val/acc"] == max(
        row["val/acc"] for row in run.history if "val/acc" in row
    )
    assert run.config["trainer.max_epochs"] == run.config["trainer"]["max_epochs"] == epochs


def children(parent: int, name: str) -> list[int]:
    """The processes that another has started, by what is in their command."""
    words = ("ps", "-o", "pid=,args=", "--ppid", str(parent))
    listed = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if name in line]
