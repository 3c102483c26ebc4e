"""Another task in place of the example, as docs/own.md does it: only the listed files change."""

import csv
import re
import sys
from pathlib import Path

import pytest
from conftest import Bake, Run, blocks, texts
from tasks import TASKS

BIN = Path(sys.executable).parent
OWN = "## Your own data and model\n"


def files_that_are_yours(page: str) -> set[str]:
    """Return those in the first column of the table; some stand without their folder."""
    table = page.partition(OWN)[2].partition("\n## ")[0]
    cells = [
        re.findall(r"`([^`]+)`", row) for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    ]
    files = {name for cell in cells for name in cell}
    return {name if "/" in name or name == "Makefile" else f"my_project/{name}" for name in files}


@pytest.mark.slow
def test_the_steps_lead_from_the_example_to_another_task_that_passes_all_checks(
    bake: Bake, run: Run, git: Run, tmp_path: Path
) -> None:
    project = bake(tmp_path)
    git("init", "--quiet", cwd=project)
    git("add", "--all", cwd=project)
    git("commit", "--quiet", "--message", "baked", cwd=project)
    (project / ".venv").mkdir()
    (project / ".venv" / "ready").touch()  # the environment of these tests stands for its own
    printed = {}
    for kind, block in blocks((project / "docs" / "own.md").read_text(encoding="utf-8")):
        if kind == "bash":
            for line in block.splitlines():
                printed[line] = run(
                    "bash", "-c", f"{line} {f'BIN={BIN}' * line.startswith('make')}", cwd=project
                )
        else:
            named = re.fullmatch(r"# (\S+)\n(.*)", block, re.DOTALL)
            assert named, block
            name, content = named.groups()
            (project / name).write_text(content, encoding="utf-8")
    assert {"make train", "make test", "make check"} <= printed.keys()

    git("add", "--all", cwd=project)
    changed = set(git("diff", "--cached", "--name-only", "--no-renames", cwd=project).split())
    assert changed == files_that_are_yours(
        (project / "docs" / "data-and-model.md").read_text(encoding="utf-8")
    ) | {"configs/diabetes.yaml"}

    (trained,) = (path.parent for path in project.glob("runs/*/metrics.csv"))
    assert f"best     val/mae {best(trained):.4g}" in printed["make train"]


def best(trained: Path) -> float:
    with (trained / "metrics.csv").open() as file:
        return min(float(row["val/mae"]) for row in csv.DictReader(file) if row.get("val/mae"))


def test_the_example_stands_in_no_other_file_than_those_that_are_yours(project: Path) -> None:
    yours = files_that_are_yours(
        (project / "docs" / "data-and-model.md").read_text(encoding="utf-8")
    )
    for name, text in texts(project):
        if name.endswith((".py", ".yaml", ".yml")) and name not in yours and "/engine/" not in name:
            code = re.sub(r'(?ms)^ *#.*?$|""".*?"""', "", text)
            assert not re.search(r"digits\.yaml|Classifier|\bDigits|val/acc", code), name


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_target_is_green_with_another_task_in_the_files_that_are_yours(
    task: str, bake: Bake, run: Run, tmp_path: Path
) -> None:
    project = bake(tmp_path)
    (project / ".venv").mkdir()
    (project / ".venv" / "ready").touch()
    written, monitor = TASKS[task]
    for name, text in written.items():
        (project / name).write_text(text)
    for name in ("callbacks.py", "network.py"):
        (project / "my_project" / name).unlink()
    for name in ("configs/media.yaml", "configs/digits.yaml", "tests/test_research.py"):
        (project / name).unlink()
    for name, old, new in (
        ("Makefile", "digits.yaml", "ours.yaml"),
        ("tests/conftest.py", "digits.yaml", "ours.yaml"),
        ("configs/sweep.yaml", "digits.yaml", "ours.yaml"),
        ("configs/sweep.yaml", "val/acc", monitor),
        ("configs/defaults.yaml", "monitor: val/acc", f"monitor: {monitor}"),
        ("configs/defaults.yaml", "val/loss", "val_loss" if "_" in monitor else "val/loss"),
    ):
        file = project / name
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
    sweep = project / "configs" / "sweep.yaml"
    sweep.write_text(re.sub(r"(?s)  model.dropout:.*?(?=  model.width)", "", sweep.read_text()))
    for target in ("fix", "check", "test", "train"):
        printed = run("make", target, f"BIN={BIN}", cwd=project)
    assert re.search(
        rf"^best     .*{monitor} 0\.[89]|^best     .*{monitor} 1", printed, re.MULTILINE
    )
    (trained,) = (path.parent.name for path in project.glob("runs/*/metrics.csv"))
    for verb in ("test", "predict"):
        run(BIN / "python", "main.py", verb, "--ckpt_path", trained, cwd=project)
    predicted = [file.name for file in project.glob("runs/*/predictions.*")]
    assert predicted == ["predictions.csv" if task == "text" else "predictions.pt"]
