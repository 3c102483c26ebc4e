"""What a team edits and what the engine weighs stay small. See CONTRIBUTING.md, Budgets."""

import json
import sys
from pathlib import Path

import pytest
from bakery import TEMPLATE
from conftest import Bake, Run

EDITED = (
    "main.py",
    "my_project/cli.py",
    "my_project/callbacks.py",
    "my_project/data.py",
    "my_project/model.py",
    "my_project/network.py",
    "configs/digits.yaml",
    "configs/defaults.yaml",
)
EDITED_LINES = 400
# The engine exceeds what is meant for it. What it has now may only go down.
ENGINE_BYTES, MEANT_BYTES = 466_000, 125_000
EXECUTED_FILES, MEANT_FILES = 52, 14
FABRIC_BYTES = 14_100  # of the engine, besides


def engine_bytes(project: Path) -> int:
    return sum(file.stat().st_size for file in (project / "my_project" / "engine").glob("*.py"))


@pytest.fixture(scope="module")
def fresh(bake: Bake, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bake(tmp_path_factory.mktemp("budget"))


def test_what_a_team_edits_is_at_most_400_lines(fresh: Path) -> None:
    lines = {name: len((fresh / name).read_text().splitlines()) for name in EDITED}
    assert sum(lines.values()) <= EDITED_LINES, lines


def test_the_engine_does_not_grow(fresh: Path, bake: Bake) -> None:
    plain = engine_bytes(fresh)
    assert plain <= ENGINE_BYTES
    assert engine_bytes(bake(fabric="yes")) - plain <= FABRIC_BYTES


def test_contributing_states_these_budgets() -> None:
    page = (TEMPLATE / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"| {MEANT_BYTES // 1000} kB | {ENGINE_BYTES // 1000} kB |" in page
    assert f"executes | {MEANT_FILES} | {EXECUTED_FILES} |" in page
    assert f"`defaults.yaml` | {EDITED_LINES} |" in page


def test_a_default_fit_executes_no_more_files(fresh: Path, run: Run) -> None:
    report = fresh.parent / "coverage.json"
    coverage = (sys.executable, "-m", "coverage")
    command = (*coverage, "run", f"--source={fresh}", f"--data-file={report}.data", "main.py")
    run(*command, "fit", "--config", "configs/digits.yaml", "--trainer.max_epochs", "1", cwd=fresh)
    run(*coverage, "json", f"--data-file={report}.data", "-o", report, cwd=fresh)
    files = json.loads(report.read_text())["files"]
    executed = [
        name
        for name, file in files.items()
        if file["executed_lines"] and file["summary"]["num_statements"]
    ]
    assert "main.py" in executed
    assert len(executed) <= EXECUTED_FILES, executed
