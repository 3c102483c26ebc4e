"""What the template says of itself: the commands, the questions and the tree of its README."""

import re
import sys
from pathlib import Path

import pytest
from bakery import TEMPLATE
from conftest import ASKED, QUESTIONS, Run, copy_template

README = (TEMPLATE / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return re.split(r"^## ", README.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


def test_every_make_command_that_a_text_names_exists(run: Run, project: Path) -> None:
    for name in ("README.md", "CONTRIBUTING.md", ".ci/run", ".github/workflows/ci.yml"):
        commands = re.findall(r"(?:`|^|run: )make ([a-z -]+)(?:`|$)", (TEMPLATE / name).read_text(), re.MULTILINE)
        assert commands, name
        for command in commands:
            where = TEMPLATE if command != "train" else project
            run("make", "--dry-run", *command.split(), cwd=where)


def test_the_readme_sets_everything_up_with_two_commands() -> None:
    assert re.findall(r"^make .*$", section("Set up"), re.MULTILINE) == ["make demo", "make test"]


def test_the_readme_lists_every_question_and_no_other() -> None:
    listed = re.findall(r"^\| `(\w+)`", section("Questions"), re.MULTILINE)
    assert listed == [*ASKED]


def test_every_question_is_put_in_words() -> None:
    assert list(QUESTIONS["__prompts__"]) == [*ASKED]
    for name, prompt in QUESTIONS["__prompts__"].items():
        assert isinstance(prompt, str) or set(prompt) == {"__prompt__", *QUESTIONS[name]}


def test_the_tree_in_the_readme_is_that_of_a_bake(project: Path) -> None:
    tree = re.findall(r"^    ( *)([\w./-]+)  ", section("What a project looks like"), re.MULTILINE)
    shown = {name if len(indent) == 2 else f"my_project/{name}" for indent, name in tree}
    assert {name for name in shown if not (project / name).exists()} == set()
    files = {path.relative_to(project).as_posix() for path in project.iterdir() if path.name[0] != "."}
    assert files == {name.rstrip("/") for name in shown if name.count("/") < 2 and not name.startswith("my_project/e")}


@pytest.mark.slow
def test_make_demo_trains_from_a_clean_checkout(run: Run, tmp_path: Path) -> None:
    checkout = copy_template(tmp_path / "checkout")
    printed = run("make", "demo", f"PYTHON={sys.executable}", cwd=checkout)
    assert re.search(r"^runs/\S+/metrics\.csv$", printed.split("What came out")[1], re.MULTILINE)
    assert not re.search("warning", printed.split("Successfully installed")[-1], re.IGNORECASE)
