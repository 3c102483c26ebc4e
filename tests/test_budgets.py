"""What a team edits stays small; the engine, which outgrew its budgets, grows no further. See docs/decisions.md."""

import json
import sys
from pathlib import Path

import pytest
from conftest import Bake, Run


def lines(*files: Path) -> int:
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


@pytest.fixture(scope="module")
def fresh(bake: Bake, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bake(tmp_path_factory.mktemp("budget"))


def test_what_a_team_edits_is_at_most_350_lines(fresh: Path) -> None:
    names = ["main.py", "configs/digits.yaml", "configs/defaults.yaml"]
    research = [f"my_project/{name}.py" for name in ("data", "model", "network")]
    assert lines(*(fresh / name for name in names + research)) <= 350


def test_all_python_but_the_tests_grows_no_further_and_1400_lines_were_meant(fresh: Path) -> None:
    files = [file for file in fresh.rglob("*.py") if "tests" not in file.relative_to(fresh).parts]
    assert lines(*files) <= 3105


def test_what_a_default_fit_executes_grows_no_further_and_9_files_of_1000_lines_were_meant(
    fresh: Path, run: Run
) -> None:
    report = fresh.parent / "coverage.json"
    coverage = (sys.executable, "-m", "coverage")
    command = (*coverage, "run", f"--source={fresh}", f"--data-file={report}.data", "main.py")
    run(*command, "fit", "--config", "configs/digits.yaml", "--trainer.max_epochs", "1", cwd=fresh)
    run(*coverage, "json", f"--data-file={report}.data", "-o", report, cwd=fresh)
    files = json.loads(report.read_text())["files"]
    executed = [
        fresh / name
        for name, file in files.items()
        if file["executed_lines"] and file["summary"]["num_statements"]
    ]
    assert "main.py" in {file.name for file in executed}
    assert len(executed) <= 10, executed
    assert lines(*executed) <= 1696
