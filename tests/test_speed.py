"""What a step costs, counted, not timed: calls, waits, rows and imports, equal on all machines."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from bakery import TEMPLATE, environment, in_terminal
from conftest import Bake, Run

Counts = dict[str, Any]
HEAVY = {
    "IPython",
    "matplotlib",
    "onnx",
    "pandas",
    "pyarrow",
    "rich",
    "scipy",
    "sklearn",
    "tensorboard",
    "torchvision",
}


@pytest.fixture(scope="module")
def counts(bake: Bake, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counts]:
    """Of the generated project and of a plain LightningCLI with the same model, data and so on."""
    home = tmp_path_factory.mktemp("s")
    project = bake(home)
    contenders = (TEMPLATE / "benchmarks").glob("contenders*.py")
    for file in (*contenders, Path(__file__).with_name("probe.py")):
        shutil.copy(file, project)
    results = {}
    for kind in ("barebones", "plain", "shipped"):
        result = home / f"{kind}.json"
        env = environment(home / kind) | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
        in_terminal(["probe.py", kind, result], project, env)
        results[kind] = json.loads(result.read_text())
    return results


def test_a_step_calls_fewer_functions_than_that_of_a_plain_lightning(
    counts: dict[str, Counts],
) -> None:
    assert counts["shipped"]["calls"] < 0.7 * counts["plain"]["calls"]


def test_a_step_calls_few_functions_more_than_that_of_a_trainer_without_anything(
    counts: dict[str, Counts],
) -> None:
    # The rest is what `self.log` and Lightning's and the engine's callbacks do in a step.
    assert counts["shipped"]["calls"] < 1.15 * counts["barebones"]["calls"]


def test_a_logged_value_stays_where_it_is_which_lightning_by_itself_does_not_see(
    counts: dict[str, Counts],
) -> None:
    # Of its issue 20388; once the second line fails, `_ResultMetric.to` can be left alone.
    assert counts["shipped"]["moves"] <= 50 * 3
    assert counts["plain"]["moves"] > 50 * 20


def test_no_step_waits_for_a_value_between_two_that_are_logged(counts: dict[str, Counts]) -> None:
    assert counts["shipped"].get("waits", 0) <= 10  # the bar may be drawn meanwhile


def test_a_logger_is_asked_only_where_something_is_logged(counts: dict[str, Counts]) -> None:
    # 300 steps, each 50th of which is logged: its values and the learning rate; the validation.
    assert counts["shipped"]["rows"] <= 2 * 6 + 2


def test_a_training_imports_nothing_that_it_does_not_need(counts: dict[str, Counts]) -> None:
    ours, theirs = (set(counts[kind]["modules"]) for kind in ("shipped", "plain"))
    assert ours - theirs <= {"main", "filelock", "faulthandler", "_sitebuiltins"}
    assert not ours & (HEAVY - theirs)


@pytest.mark.parametrize("name", ["bench", "growth", "ranks", "start", "gpu"])
def test_a_benchmark_starts(name: str, run: Run, tmp_path: Path) -> None:
    script = TEMPLATE / "benchmarks" / f"{name}.py"
    assert "--help" in run(sys.executable, script, "--help", cwd=tmp_path)


@pytest.mark.slow
def test_the_benchmark_for_gpus_has_its_tables_on_a_cpu_too(run: Run, tmp_path: Path) -> None:
    script, table = TEMPLATE / "benchmarks" / "gpu.py", tmp_path / "gpu.md"
    words = ["--accelerator", "cpu", "--parts", "steps", "--sizes", "tiny", "--output", table]
    run(sys.executable, script, *words, cwd=tmp_path)
    lines = table.read_text().splitlines()
    (head,) = [line for line in lines if "`barebones`: ms a step" in line]
    assert len([line for line in lines if line.startswith("| tiny | ")]) == 4  # eager, compiled
    assert head.count("ms a step") == 4
    assert "| without W&B | " in table.read_text()
