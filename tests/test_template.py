"""What the template says of itself: the commands, the questions and the tree of its README."""

import re
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest
from bakery import TEMPLATE
from command import Commands
from conftest import ASKED, QUESTIONS, SOURCES, Run, command_lines, copy_template, tracked
from inspection import anchors, links, longest_paragraph

README = (TEMPLATE / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return re.split(r"^## ", README.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


def test_every_make_command_that_a_text_names_exists(run: Run, project: Path) -> None:
    for name in ("README.md", "CONTRIBUTING.md", ".ci/run", ".github/workflows/ci.yml"):
        commands = re.findall(
            r"(?:`|^|run: )make ([a-z -]+)(?:`|$)", (TEMPLATE / name).read_text(), re.MULTILINE
        )
        assert commands, name
        for command in commands:
            where = TEMPLATE if command != "train" else project
            run("make", "--dry-run", *command.split(), cwd=where)


def test_the_readme_sets_everything_up_with_two_commands() -> None:
    assert re.findall(r"^make .*$", section("Set up"), re.MULTILINE) == ["make demo", "make test"]


def test_every_command_of_the_readme_is_one_that_a_test_runs() -> None:
    init = 'cd my-project && git init && git add --all && git commit --message "As it was baked"'
    # Here, in test_ways_in.py and test_project.py, and in test_updates.py.
    bake, update = (
        ["cookiecutter TEMPLATE", "cd my-project && make train"],
        ["cruft check", "cruft update"],
    )
    assert command_lines(README) == [
        "make demo",
        "make test",
        *bake,
        "cruft create TEMPLATE",
        init,
        *update,
    ]


def test_every_page_with_commands_or_code_is_read_by_a_test_that_runs_them() -> None:
    readers = {
        "README.md": "test_template.py",
        "docs/wandb.md": "test_wandb.py",
        f"{SOURCES.name}/README.md": "test_readme.py",
        f"{SOURCES.name}/slurm/README.md": "test_slurm.py",
    }
    pages = [
        name
        for name in tracked()
        if name.endswith(".md") and "```" in (TEMPLATE / name).read_text("utf-8")
    ]
    # The whole folders are read by test_recipes.py, and by test_readme.py and test_walkthrough.py.
    folders = ("docs/recipes/", f"{SOURCES.name}/docs/")
    assert {name for name in pages if not name.startswith(folders)} == readers.keys()
    for (
        page,
        reader,
    ) in (
        readers.items()
    ):  # and those of the recipes by test_recipes.py, which takes the whole folder
        assert f'"{Path(page).name}"' in (TEMPLATE / "tests" / reader).read_text(
            encoding="utf-8"
        ), page


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/decisions.md"])
def test_a_long_page_begins_with_an_index_of_all_its_sections(name: str) -> None:
    page = (TEMPLATE / name).read_text(encoding="utf-8")
    index, _, rest = page.partition("\n## ")
    listed = re.findall(r"^\d+\. \[.*?\]\(#(.*?)\)", index, re.MULTILINE)
    titles = re.findall(r"^## .*", f"\n## {rest}", re.MULTILINE)
    assert [anchors(title).pop() for title in titles] == listed


def test_no_paragraph_of_contributing_is_long() -> None:
    longest = longest_paragraph((TEMPLATE / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(longest.split()) <= 60, longest


def test_links_and_files_that_a_page_names_are_there() -> None:
    baked = [SOURCES, SOURCES / "configs", SOURCES / "{{cookiecutter.package_name}}"]
    for page in [
        TEMPLATE / name for name in tracked() if name.endswith(".md") and SOURCES.name not in name
    ]:
        for link in links(page):
            name, _, anchor = unquote(link).partition("#")
            target = page.parent / name if name else page
            assert target.exists(), f"{page.name} links {link}"
            if anchor:
                assert anchor in anchors(target.read_text(encoding="utf-8")), (
                    f"{page.name} links {link}"
                )
    for name in set(re.findall(r"`([\w/.-]+\.(?:py|yaml|toml|md|json))`", README)) - {
        ".cruft.json"
    }:
        assert any((folder / name).exists() for folder in [TEMPLATE, *baked]), name


def test_the_figures_of_the_readme_are_those_that_were_measured() -> None:
    measured = (TEMPLATE / "benchmarks" / "results" / "speed.md").read_text(encoding="utf-8")
    shown = re.findall(
        r"^\| .*\(`(\w+)`\) \| (\S+) \| (\S+) \| (\S+) \|$",
        section("How it compares"),
        re.MULTILINE,
    )
    found = re.findall(
        r"^\| .*\(`(\w+)`\) \| (\S+) \([^|]+ \| (\S+) \([^|]+ \| (\S+) \(", measured, re.MULTILINE
    )
    assert len(shown) == 4
    assert set(shown) <= set(found), "`make bench` was run since: take its figures over"


def test_the_picture_shows_the_lines_that_a_run_prints_today(command: Commands) -> None:
    drawn = (
        (TEMPLATE / "docs" / "terminal.svg")
        .read_text(encoding="utf-8")
        .replace("\N{NO-BREAK SPACE}", " ")
    )
    lines = [
        unescape(re.sub("<.*?>", "", line))
        for line in drawn.splitlines()
        if line.startswith("<text")
    ]
    printed = command("fit --config @digits --trainer.max_epochs 1").out.splitlines()
    labels = [line[:9] for line in printed if not line.startswith("epoch ")]
    assert lines[0].startswith("$ python main.py fit --config ")
    assert [
        line[:9] for line in lines[1:] if re.match(r"(?!epoch )[a-zWB&]+ ", line) and line[8] == " "
    ] == labels
    assert printed[1] in lines, "the model"


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
    files = {
        path.relative_to(project).as_posix() for path in project.iterdir() if path.name[0] != "."
    }
    assert files == {
        name.rstrip("/")
        for name in shown
        if name.count("/") < 2 and not name.startswith("my_project/e")
    }


@pytest.mark.slow
def test_make_demo_trains_from_a_clean_checkout(run: Run, tmp_path: Path) -> None:
    checkout = copy_template(tmp_path / "checkout")
    printed = run("make", "demo", f"PYTHON={sys.executable}", cwd=checkout)
    assert re.search(r"^runs/\S+/metrics\.csv$", printed.split("What came out")[1], re.MULTILINE)
    assert not re.search("warning", printed.split("Successfully installed")[-1], re.IGNORECASE)
