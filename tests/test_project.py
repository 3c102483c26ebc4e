"""A baked project is what it says: its checks can fail, they and its tests pass, it trains."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from bakery import TEMPLATE
from conftest import EVERY_PART, NO_PART, Bake, Run

RUFF_CHECK = (sys.executable, "-m", "ruff", "check", ".")
RUFF_FORMAT = (sys.executable, "-m", "ruff", "format", "--check", ".")
OWN_TESTS = (sys.executable, "-m", "pytest", "-q", "-x", "-n", "0")
MYPY = (sys.executable, "-m", "mypy")
# What `make check` adds here: a project is strict for its engine alone.
STRICT = re.search(r"^STRICT := (.*)$", (TEMPLATE / "Makefile").read_text(), re.MULTILINE)


@pytest.fixture
def fresh(bake: Bake, tmp_path: Path) -> Path:
    """The default project, in a separate folder that a test may change."""
    return bake(tmp_path)


@pytest.fixture
def whole(bake: Bake, tmp_path: Path) -> Path:
    """A project with all options."""
    return bake(tmp_path, **EVERY_PART)


@pytest.mark.parametrize("package", ["a", "my_project", "z" * 60])
@pytest.mark.parametrize("parts", [EVERY_PART, NO_PART], ids=["every part", "no part"])
def test_ruff_passes_under_any_package_name(
    package: str, parts: dict[str, str], bake: Bake, tmp_path: Path, run: Run
) -> None:
    project = bake(tmp_path, package_name=package, **parts)
    run(*RUFF_CHECK, cwd=project)
    run(*RUFF_FORMAT, cwd=project)


def test_mypy_passes_as_strict_as_for_the_engine_also_for_the_rest(whole: Path, run: Run) -> None:
    assert STRICT
    run(*MYPY, *STRICT[1].split(), cwd=whole)
    (whole / "tests" / "planted.py").write_text('def untyped(x):\n    return 1 + "1"\n')
    assert "[operator]" in run(*MYPY, *STRICT[1].split(), cwd=whole, code=1)


def test_a_planted_fault_fails_each_check(fresh: Path, run: Run) -> None:
    planted = fresh / "tests" / "planted.py"
    planted.write_text("import os\n")
    assert "F401" in run(*RUFF_CHECK, cwd=fresh, code=1)
    planted.write_text("from pytorch_lightning import Trainer\n\nTrainer()\n")
    assert "Import lightning.pytorch" in run(*RUFF_CHECK, cwd=fresh, code=1)
    planted.write_text("x = 'single quotes'\n")
    run(*RUFF_FORMAT, cwd=fresh, code=1)
    planted.write_text('answer: int = "42"\n\n\ndef typed(x: int) -> int:\n    return x + "1"\n')
    complaints = run(*MYPY, "--follow-imports=skip", planted, cwd=fresh, code=1)
    assert "[assignment]" in complaints
    assert "[operator]" in complaints
    planted = fresh / "my_project" / "engine" / "planted.py"
    planted.write_text('def untyped(x):\n    return 1 + "1"\n\n\nlist_of = []\nprint("".no)\n')
    complaints = run(*MYPY, "--follow-imports=skip", planted, cwd=fresh, code=1)
    for code in ("operator", "var-annotated", "attr-defined"):
        assert f"[{code}]" in complaints


def test_its_own_tests_pass_without_a_warning(whole: Path, run: Run) -> None:
    assert " passed" in run(*OWN_TESTS, cwd=whole, PYTHONWARNINGS="error")


def assert_a_lock_is_kept(project: Path, run: Run) -> None:
    """What `make lock` writes is what the next environment gets, here another version of one."""
    run("make", "lock", cwd=project)
    lock = (project / "constraints.txt").read_text()
    assert re.search(r"^torch==[\d.]+$", lock, re.MULTILINE)
    assert not re.search(r"^my.project|[@/+]", lock, re.MULTILINE)
    (project / "constraints.txt").write_text(re.sub("(?m)^tqdm==.*$", "tqdm==4.66.6", lock))
    run("make", ".venv/ready", cwd=project)
    listed = run(project / ".venv/bin/python", "-m", "pip", "list", cwd=project)
    assert re.search(r"^tqdm +4\.66\.6$", listed, re.MULTILINE)


@pytest.mark.slow
def test_it_installs_into_a_fresh_environment_and_its_own_commands_work_there(
    bake: Bake, run: Run, tmp_path: Path
) -> None:
    hostile = dict.fromkeys(
        ("project_name", "description", "author_name"), 'Jo\'s "best", {{ x }} \\\nof C:\\new'
    )
    fresh = bake(tmp_path, project_slug="my-project", package_name="my_project", **hostile)
    torch = re.search(r"^torch==.*$", (TEMPLATE / "requirements.txt").read_text(), re.MULTILINE)
    assert torch
    constraints = fresh.parent / "constraints.txt"  # the torch that is tested here, not the newest
    constraints.write_text(torch[0])
    make = ("make", f"PYTHON={sys.executable}")
    assert "test" in run(*make, "train", cwd=fresh, PIP_CONSTRAINT=str(constraints))
    python = fresh / ".venv/bin/python"
    run(python, "-m", "pip", "check", cwd=fresh)
    assert_a_lock_is_kept(fresh, run)
    steps = yaml.safe_load((fresh / ".github/workflows/ci.yml").read_text())["jobs"]["test"][
        "steps"
    ]
    check, test, train = [
        run("bash", "-ec", step["run"], cwd=fresh) for step in steps if "run" in step
    ]
    assert "Success: no issues found" in check
    assert " passed" in test
    assert "--config configs/debug.yaml" in train
    run("git", "init", "--quiet", cwd=fresh)
    run("git", "add", "--all", cwd=fresh)
    run(*make, "fix", cwd=fresh)
    assert not run("git", "diff", "--name-only", cwd=fresh), (
        "`make fix` changed what `make check` had passed"
    )
    assert not run("git", "ls-files", "--others", "--exclude-standard", cwd=fresh), (
        "a command left files behind"
    )
