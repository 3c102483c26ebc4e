"""Bake the template in this process; run what it baked in others, far from the user's home."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bakery
import pytest
from bakery import TEMPLATE
from command import Commands
from cookiecutter.generate import generate_context
from cookiecutter.prompt import prompt_for_config
from wandb_server import WandbServer

from hooks.post_gen_project import PARTS

SOURCES = TEMPLATE / "{{cookiecutter.project_slug}}"
EVERY_PART = {option: str(answer) for option, answer in PARTS}  # of a choice, the last
NO_PART = dict.fromkeys(EVERY_PART, "no") | {"ci": "none"}

QUESTIONS = json.loads((TEMPLATE / "cookiecutter.json").read_text(encoding="utf-8"))
ASKED = {name: default for name, default in QUESTIONS.items() if name[0] != "_"}

Bake = Callable[..., Path]
Run = Callable[..., str]


def tracked() -> list[str]:
    """The files of the template that git knows or would take."""
    command = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    listed = subprocess.run(
        command, cwd=TEMPLATE, capture_output=True, check=True, text=True
    ).stdout
    return [name for name in listed.split("\0") if (TEMPLATE / name).is_file()]


def copy_template(folder: Path) -> Path:
    """The template as a checkout of it would be: without what Git ignores."""
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TEMPLATE / name, folder / name)
    return folder


def every_file(package: str = "my_project") -> set[str]:
    """The files of a bake from which no hook has deleted any."""
    ours = (name.partition(f"{SOURCES.name}/") for name in tracked())
    return {
        name.replace("{{cookiecutter.package_name}}", package)
        for outside, _, name in ours
        if name and not outside
    }


def texts(project: Path) -> Iterator[tuple[str, str]]:
    """The files of a project by name, without what Git keeps."""
    for path in sorted(project.rglob("*")):
        name = path.relative_to(project).as_posix()
        if path.is_file() and not name.startswith(".git/"):
            yield name, path.read_bytes().decode()


def blocks(page: str) -> list[tuple[str, str]]:
    """The blocks of code of a page in Markdown: their language and their text."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def command_lines(page: str) -> list[str]:
    """What a page has one type."""
    return [line for kind, block in blocks(page) if kind == "bash" for line in block.splitlines()]


def typed(answers: dict[str, str]) -> dict[str, str]:
    """Return answers as if typed: cookiecutter renders values given as key=value, braces too."""
    return {variable: answer.replace("{", "{{ '{' }}") for variable, answer in answers.items()}


def default_answers(**answers: str) -> dict[str, Any]:
    """What all answers are to somebody who types these and presses Enter at the other prompts."""
    context = generate_context(str(TEMPLATE / "cookiecutter.json"), extra_context=typed(answers))
    return dict(prompt_for_config(context, no_input=True))


@pytest.fixture(scope="session")
def bake(tmp_path_factory: pytest.TempPathFactory) -> Bake:
    """Bakes a project with these answers, once for all tests of a worker: no test may change it."""
    settings = tmp_path_factory.mktemp("cookiecutter")
    baked: dict[frozenset[tuple[str, str]], Path] = {}

    def bake(output_dir: Path | None = None, accept_hooks: bool = True, **answers: str) -> Path:
        key = frozenset(answers.items())
        if output_dir is None and key in baked:
            return baked[key]
        project = bakery.bake(
            output_dir or tmp_path_factory.mktemp("baked"), settings, accept_hooks, **typed(answers)
        )
        if output_dir is None:
            baked[key] = project
        return project

    return bake


@pytest.fixture(scope="session")
def project(bake: Bake) -> Path:
    """The project of someone who presses Enter at every question."""
    return bake()


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """The environment of another process, with its folders in this test's."""
    return bakery.environment(tmp_path / "e")


@pytest.fixture
def run(env: dict[str, str]) -> Run:
    """Runs a command and gives what it printed; fails with all of that if the command does."""

    def run(*command: str | Path, cwd: Path, code: int = 0, **environment: str) -> str:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=env | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        ending = f"ended with {done.returncode}, not {code}"
        assert done.returncode == code, f"{' '.join(map(str, command))} {ending}:\n{done.stdout}"
        return done.stdout

    return run


@pytest.fixture
def git(run: Run) -> Run:
    """Runs Git as somebody who has committed nothing before."""
    who = ("-c", "user.name=Jo", "-c", "user.email=jo@example.com", "-c", "init.defaultBranch=main")
    return lambda *words, cwd: run("git", *who, *words, cwd=cwd)


@pytest.fixture(scope="session")
def command(bake: Bake, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """The command line of a project, run in this process, in a home without a W&B key."""
    home = tmp_path_factory.mktemp("command")
    project = bake(home, package_name="odd_duck", project_slug="Odd.Duck")
    with pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            environment.delenv(name)
        for name in ("HOME", "RUNS_ROOT", "TMPDIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            (home / name).mkdir()
            environment.setenv(name, str(home / name))
        environment.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        environment.syspath_prepend(project)
        yield Commands(importlib.import_module("main").main, project, home / "RUNS_ROOT")
        for name in [
            name for name in sys.modules if name == "main" or name.split(".")[0] == "odd_duck"
        ]:
            del sys.modules[name]


@pytest.fixture
def wandb_server() -> Iterator[WandbServer]:
    """A server that must have understood all that the test's clients sent."""
    server = WandbServer()
    yield server
    server.close()
    server.check()


@pytest.fixture(autouse=True)
def no_session_is_left() -> Iterator[None]:
    """End what a test left of W&B's session: the next one has another server, or none."""
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


@pytest.fixture
def online(command: Commands, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A server to which the commands of this test send their runs."""
    with WandbServer() as server:
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        yield server
