"""What a project is installed into: named imports, the lowest versions that work, the image."""

import ast
import json
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from bakery import TEMPLATE
from conftest import EVERY_PART, Bake, Run
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

TORCH = re.search(r"^torch==(.*)$", (TEMPLATE / "requirements.txt").read_text(), re.MULTILINE)


def imported(file: Path) -> Iterator[str]:
    """The modules that a file imports, wherever in it; but for those that it asks for before."""
    text = file.read_text(encoding="utf-8")
    optional = set(re.findall(r'find_spec\("(\w+)"\)', text))
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
        yield from {name.split(".")[0] for name in names} - optional


def named(project: Path) -> tuple[list[Requirement], list[Requirement]]:
    """What pyproject.toml asks for: to train, and besides to work on the project."""
    asked = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*map(Requirement, asked["dependencies"])], [
        *map(Requirement, asked["optional-dependencies"]["dev"])
    ]


def test_nothing_is_imported_that_pyproject_does_not_name(bake: Bake) -> None:
    project = bake(**EVERY_PART)
    train, work = ({canonicalize_name(asked.name) for asked in part} for part in named(project))
    own = sys.stdlib_module_names | {"conftest", "main", "my_project", "train_fabric"}
    distributions = packages_distributions()
    used: set[str] = set()
    for file in project.rglob("*.py"):
        needed = {
            canonicalize_name(distributions[module][0])
            for module in imported(file)
            if module not in own
        }
        assert needed <= train | (work if file.parent.name == "tests" else set()), file
        used |= needed
    assert train <= used, "named, and not needed"


def instructions(project: Path) -> list[tuple[str, str]]:
    text = (project / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    lines = "\n".join(lines).replace("\\\n", "").splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


@pytest.mark.parametrize("version", ["3.11", "3.13"])
def test_the_image_and_the_container_have_the_chosen_python_and_no_secret(
    version: str, bake: Bake, run: Run
) -> None:
    project = bake(docker="yes", python_version=version)
    words = instructions(project)
    assert words[0] == ("FROM", f"python:{version}-slim")
    assert ("USER", "trainer") in words
    assert {word for word, _ in words} == {
        "FROM",
        "RUN",
        "WORKDIR",
        "ARG",
        "COPY",
        "USER",
        "ENV",
        "ENTRYPOINT",
    }
    assert {".env", ".git", ".venv", "runs"} <= {*(project / ".dockerignore").read_text().split()}
    container = json.loads((project / ".devcontainer/devcontainer.json").read_text())
    assert container["image"].endswith(f"/python:{version}")
    printed = run(*container["postCreateCommand"].split(), "--dry-run", cwd=project)
    (index,) = re.findall(r'--index-url "(\S+)"', " ".join(rest for _, rest in words))
    assert index.replace("$TORCH", "cpu") in printed
    assert ("ARG", "TORCH=cpu") in words


def pip_lines(project: Path, run: Run, *words: str) -> list[str]:
    """What `make` would install, if anything."""
    printed = run("make", ".venv/ready", "--dry-run", *words, cwd=project).replace("\\\n", "")
    return [" ".join(line.split()) for line in printed.splitlines() if "pip install" in line]


def test_a_lock_has_versions_alone_and_decides_what_is_installed(
    bake: Bake, tmp_path: Path, run: Run
) -> None:
    project = bake(tmp_path)
    python = project / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')  # stands for a venv
    python.chmod(0o755)
    assert "constraint" not in str(pip_lines(project, run, "TORCH=cpu"))
    assert pip_lines(project, run, "TORCH=cpu")[0].endswith("/cpu torch")
    (project / ".venv/ready").touch()
    run("make", "lock", cwd=project)
    lock = (project / "constraints.txt").read_text().splitlines()
    assert TORCH
    assert f"torch=={TORCH[1]}" in lock
    assert [line for line in lock if not re.fullmatch(r"[\w.-]+==[\w.!]+", line)] == []
    assert not [line for line in lock if re.match("(pip|setuptools|wheel)=", line)]
    assert pip_lines(project, run) == [], "it has just been made of what is installed"
    (project / ".venv/ready").unlink()
    torch, rest = pip_lines(project, run, "TORCH=cpu")
    assert torch.endswith(f"/cpu torch=={TORCH[1]}")
    assert rest.endswith('--constraint constraints.txt --editable ".[dev]"')


def test_a_newer_lock_installs_again_and_one_that_cannot_be_made_changes_nothing(
    bake: Bake, tmp_path: Path, run: Run
) -> None:
    project = bake(tmp_path)
    (project / ".venv/bin").mkdir(parents=True)
    (project / ".venv/ready").touch()
    lock = project / "constraints.txt"
    lock.write_text("torch==2.6.0\n")
    os.utime(lock, (2**32, 2**32))
    assert len(pip_lines(project, run)) == 1
    os.utime(lock, (0, 0))
    os.utime(project / "pyproject.toml", (0, 0))
    run("make", "lock", cwd=project, code=2)  # there is no Python in .venv
    assert lock.read_text() == "torch==2.6.0\n"


@pytest.mark.slow
def test_its_tests_pass_with_the_lowest_versions_in_an_environment_made_as_the_image_is(
    bake: Bake, tmp_path: Path, run: Run
) -> None:
    """The image gets them as a lock. Of torch there is one version here, the rest is not tried."""
    project, image = bake(tmp_path / "baked", **EVERY_PART), tmp_path / "project"
    assert TORCH
    lowest = {
        asked.name: floor.version
        for part in named(project)
        for asked in part
        for floor in asked.specifier
        if floor.operator == ">="
    } | {"torch": TORCH[1]}
    constraints = project / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in lowest.items()))
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    environment = {"PATH": f"{tmp_path / 'venv/bin'}:/usr/bin:/bin"}
    image.mkdir()
    done = ""
    for word, rest in instructions(project):
        if word == "COPY":
            *sources, target = rest.split()  # patterns, one of which may match nothing
            copy = f"cp -r {' '.join(sources)} {image / target}"
            run("bash", "-O", "nullglob", "-c", copy, cwd=project)
        elif word == "RUN" and "pip " in rest:
            done = run(
                "bash", "-c", re.sub(r'--index-url "\S+"', "", rest), cwd=image, **environment
            )
        elif word == "ENTRYPOINT":
            fit = ["fit", "--config", "configs/digits.yaml", "--config", "configs/debug.yaml"]
            assert "saved " in run(*json.loads(rest), *fit, cwd=image, **environment)
    assert "Successfully installed" in done
    install = ("pip", "install", "--constraint", str(constraints), "--editable", ".[dev]")
    run(*install, cwd=image, **environment)
    quiet = environment | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}  # a notice is no JSON
    found = json.loads(run("pip", "list", "--format=json", cwd=image, **quiet))
    installed = {canonicalize_name(one["name"]): Version(one["version"]).public for one in found}
    assert all(
        Version(installed[canonicalize_name(name)]) == Version(version)
        for name, version in lowest.items()
    ), installed
    assert " passed" in run(
        "python", "-m", "pytest", "-q", "-x", "-n", "0", cwd=image, **environment
    )
