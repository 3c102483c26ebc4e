"""All ways to a project give the same one, and the template needs no particular system."""

import ast
import json
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from bakery import TEMPLATE, in_terminal
from conftest import ASKED, SOURCES, Bake, Run, copy_template, every_file, texts, tracked

ANSWERS = {"project_name": "Odd Duck", "license": "Apache-2.0", "slurm": "yes"}
COOKIECUTTER = ("-m", "cookiecutter", "--output-dir", "out")
NO_TEXT = {".png"}


@dataclass(frozen=True)
class Released:
    """The template as released: a tag `v1` with a newer commit, as a repository and as a zip."""

    url: str
    archive: Path


@pytest.fixture
def released(git: Run, tmp_path: Path) -> Released:
    work, bare = copy_template(tmp_path / "work"), tmp_path / "template.git"
    for words in ("init", "add --all", "commit --quiet --message first", "tag v1"):
        git(*words.split(), cwd=work)
    (work / "{{cookiecutter.project_slug}}" / "main.py").write_text("newer than v1")
    for words in ("commit --quiet --all --message next", f"clone --quiet --bare . {bare}"):
        git(*words.split(), cwd=work)
    git("archive", "--prefix", "template/", "--output", tmp_path / "template.zip", "v1", cwd=bare)
    return Released(f"file://{bare}", tmp_path / "template.zip")


@pytest.fixture
def first(run: Run, tmp_path: Path) -> Bake:
    """Run a command of Python in a fresh home, and return the project that it made."""

    def first(*words: str | Path, stdin: str = "") -> Path:
        command = shlex.join(map(str, (sys.executable, *words)))
        run(
            "bash",
            "-c",
            f"set -o pipefail; printf %s {shlex.quote(stdin)} | {command}",
            cwd=tmp_path,
        )
        (project,) = (tmp_path / "out").iterdir()
        return project

    return first


def pairs(answers: dict[str, str]) -> list[str]:
    return [f"{name}={answer}" for name, answer in answers.items()]


def test_a_tag_of_a_git_url(first: Bake, bake: Bake, released: Released) -> None:
    made = first(*COOKIECUTTER, "--no-input", "--checkout", "v1", released.url, *pairs(ANSWERS))
    assert dict(texts(made)) == dict(texts(bake(**ANSWERS)))


def test_a_zip(first: Bake, bake: Bake, released: Released) -> None:
    made = first(*COOKIECUTTER, "--no-input", released.archive, *pairs(ANSWERS))
    assert dict(texts(made)) == dict(texts(bake(**ANSWERS)))


def test_answers_typed_at_the_prompts_in_which_braces_mean_nothing(first: Bake, bake: Bake) -> None:
    answers = {
        "description": "{{ cookiecutter.license }} {% raw %}",
        "license": "Apache-2.0",
        "slurm": "yes",
    }
    choices = {name: default for name, default in ASKED.items() if isinstance(default, list)}
    lines = [
        str(choices[name].index(answers[name]) + 1)
        if name in choices and name in answers
        else answers.get(name, "")
        for name in ASKED
    ]
    made = first(*COOKIECUTTER, TEMPLATE, stdin="".join(f"{line}\n" for line in lines))
    assert dict(texts(made)) == dict(texts(bake(**answers)))


def shown(screen: str) -> list[str]:
    """The lines of a terminal without colours and what was typed into it."""
    return re.sub(r"\x1b\[[0-9;?]*\w", "", screen).replace("\r", "").splitlines()


def test_in_a_terminal_the_last_lines_are_what_to_type_next_and_they_work(
    env: dict[str, str], run: Run, tmp_path: Path
) -> None:
    here = tmp_path / "work of Jo's"
    here.mkdir()
    command = ("-m", "cookiecutter", TEMPLATE)
    screen = in_terminal(command, here, env | {"PWD": str(here)}, 200, typed=[""] * len(ASKED))
    *_, title, enter, train = shown(screen)
    assert [title, enter, train] == [
        "Next, to train the example:",
        "  cd my-project",
        "  make train",
    ]
    assert "main.py fit" in run("bash", "-c", f"{enter}; {train} --dry-run", cwd=here)
    elsewhere = run(
        "bash",
        "-c",
        shlex.join(
            (
                sys.executable,
                *COOKIECUTTER[:2],
                "--no-input",
                "--output-dir",
                str(here / "o o"),
                str(TEMPLATE),
            )
        ),
        cwd=TEMPLATE,
    )
    enter = elsewhere.splitlines()[-2]
    assert len(elsewhere.splitlines()) == 3
    assert "main.py fit" in run("bash", "-c", f"{enter}; {train} --dry-run", cwd=TEMPLATE)


def test_in_a_terminal_wrong_answers_are_told_when_all_are_given_a_line_each(
    env: dict[str, str], tmp_path: Path
) -> None:
    answers = {"package_name": "torch", "author_email": "jo at home"}
    typed = [answers.get(name, "") for name in ASKED]
    command = ("-m", "cookiecutter", TEMPLATE)
    lines = shown(in_terminal(command, tmp_path, env, 200, typed, code=1))
    told = [number for number, line in enumerate(lines) if line.endswith(" instead.")]
    assert lines[told[0] :] == [
        "package_name 'torch' is a package that the project needs: type 'torch_project' instead.",
        "author_email 'jo at home' is no address: type one like jo@example.com, or nothing.",
    ]
    assert not (tmp_path / "my-project").exists()


def test_the_config_file_of_a_user(first: Bake, bake: Bake, tmp_path: Path) -> None:
    config = tmp_path / "cookiecutter.yaml"
    config.write_text(
        "default_context: {project_name: Odd Duck, license: Apache-2.0, slurm: true, of_others: 1}"
    )
    made = first(*COOKIECUTTER, "--no-input", "--config-file", config, TEMPLATE)
    assert dict(texts(made)) == dict(texts(bake(**ANSWERS)))


def test_the_same_answers_once_more(first: Bake, bake: Bake) -> None:
    first(*COOKIECUTTER, "--no-input", TEMPLATE, *pairs(ANSWERS))
    made = first(*COOKIECUTTER, "--replay", "--overwrite-if-exists", TEMPLATE)
    assert dict(texts(made)) == dict(texts(bake(**ANSWERS)))


def test_cruft_which_knows_the_release_afterwards(
    first: Bake, run: Run, bake: Bake, released: Released
) -> None:
    create = (
        "-m",
        "cruft",
        "create",
        "--output-dir",
        "out",
        "--no-input",
        "--checkout",
        "v1",
        released.url,
    )
    made = first(*create, "--extra-context", json.dumps(ANSWERS))
    files = dict(texts(made))
    known = json.loads(files.pop(".cruft.json"))
    assert files == dict(texts(bake(**ANSWERS)))
    assert known["checkout"] == "v1"
    cruft = (sys.executable, "-m", "cruft")
    # What to do next is said by cookiecutter's bakes alone: `diff` prints a patch, here none.
    assert "up to date" in run(*cruft, "check", "--checkout", "v1", cwd=made)
    assert "out of date" in run(*cruft, "check", "--checkout", "main", cwd=made, code=1)
    assert not run(*cruft, "diff", "--exit-code", cwd=made).strip()


def test_no_hooks_after_which_every_part_is_there_and_the_licence_is_the_chosen_one(
    first: Bake, bake: Bake
) -> None:
    made = first(*COOKIECUTTER, "--no-input", "--accept-hooks", "no", TEMPLATE, *pairs(ANSWERS))
    files = dict(texts(made))
    assert files.keys() == every_file("odd_duck")
    chosen = dict(texts(bake(**ANSWERS)))
    assert {name: files[name] for name in chosen} == chosen


def test_line_ends_are_the_same_in_a_zip_and_in_a_checkout_that_turns_them_for_windows(
    git: Run, released: Released, first: Bake, tmp_path: Path
) -> None:
    git(
        "clone",
        "--quiet",
        "--branch",
        "v1",
        "--config",
        "core.autocrlf=true",
        released.url,
        "windows",
        cwd=tmp_path,
    )
    checkout = tmp_path / "windows"
    git("config", "core.autocrlf", "true", cwd=checkout)
    git(
        "archive",
        "--prefix",
        "windows/zipped/",
        "--output",
        tmp_path / "crlf.zip",
        "HEAD",
        cwd=checkout,
    )
    first("-m", "zipfile", "--extract", tmp_path / "crlf.zip", "out")
    for name in tracked():
        for copy in (checkout / name, tmp_path / "out" / "windows" / "zipped" / name):
            assert copy.read_bytes() == (TEMPLATE / name).read_bytes(), copy
        assert Path(name).suffix in NO_TEXT or b"\r" not in (TEMPLATE / name).read_bytes(), name


def test_there_is_no_symlink(project: Path) -> None:
    for folder in (SOURCES, TEMPLATE / "hooks", TEMPLATE / "templates", project):
        assert not [path for path in folder.rglob("*") if path.is_symlink()]


def test_what_a_bake_executes_imports_nothing_else_and_starts_no_other_program() -> None:
    allowed = sys.stdlib_module_names - {
        "subprocess",
        "socket",
        "urllib",
        "http",
        "ssl",
        "multiprocessing",
        "ctypes",
    }
    allowed |= {"cookiecutter", "jinja2"}  # by which they are run
    for hook in (*(TEMPLATE / "hooks").glob("*.py"), TEMPLATE / "check_answers.py"):
        for node in ast.walk(ast.parse(hook.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += (
                ["." * node.level + str(node.module)] if isinstance(node, ast.ImportFrom) else []
            )
            assert {name.split(".")[0] for name in names} <= allowed, hook
