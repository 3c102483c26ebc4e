"""What `cruft update` does to a project that a team changed: ours arrives, theirs stays."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bakery import TEMPLATE
from conftest import QUESTIONS, Bake, Run, copy_template, texts
from test_project import OWN_TESTS, RUFF_CHECK

PROJECT, ENGINE = (
    "{{cookiecutter.project_slug}}",
    "{{cookiecutter.project_slug}}/{{cookiecutter.package_name}}/engine",
)
CRUFT = (sys.executable, "-m", "cruft")
Edit = Callable[[str], str]


def edit(file: Path, *changes: tuple[str, str]) -> None:
    text = file.read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text, f"{file.name} has no {old!r}"
        text = text.replace(old, new, 1)
    file.write_text(text, encoding="utf-8")


def make_older(template: Path) -> None:
    """Turns the template into what an earlier release of it may have been."""
    engine, project = template / ENGINE, template / PROJECT
    (engine / "retired.py").write_text('"""Gone since."""\n')
    (engine / "placeholders.py").unlink()
    edit(engine / "wandb_logger.py", ('"""', '"""In other words: '))
    edit(project / "configs/defaults.yaml", ("seed_everything: 42", "seed_everything: 7"))
    edit(project / "pyproject.toml", ('"numpy>=2,<3"', '"numpy>=1,<3"'))
    edit(project / "README.md", ("## Pages", "## Contents"))
    edit(project / "docs" / "runs.md", ("## How a run ends", "## Endings"))
    for name in ("data", "model", "network"):
        edit(project / "{{cookiecutter.package_name}}" / f"{name}.py", ('"""', '"""Once: '))
    # without the question for `fabric`, its files and its mentions
    questions = {name: value for name, value in QUESTIONS.items() if name != "fabric"}
    questions["__prompts__"] = {
        name: text for name, text in QUESTIONS["__prompts__"].items() if name != "fabric"
    }
    (template / "cookiecutter.json").write_text(json.dumps(questions))
    hook = template / "hooks/post_gen_project.py"
    entry = re.search(r'^    \(?"fabric".*?\],\n', hook.read_text(), re.MULTILINE | re.DOTALL)
    assert entry
    edit(hook, (entry[0], ""))
    for name in re.findall(r'"([^"]+\.\w+)"', entry[0]):
        (project / name.replace("{package_name}", "{{cookiecutter.package_name}}")).unlink()
    for file in [file for file in project.rglob("*") if file.is_file()]:
        file.write_text(
            file.read_text(encoding="utf-8").replace("cookiecutter.fabric", "false"),
            encoding="utf-8",
        )


def change_as_a_team_does(project: Path) -> None:
    package = project / "my_project"
    edit(
        package / "data.py",
        ("batch_size: int = 64", "batch_size: int = 48"),
        ("Handwritten digits", "Our digits"),
    )
    edit(package / "model.py", ("dropout: float = 0.25", "dropout: float = 0.2"))
    network = (package / "network.py").read_text()
    (package / "network.py").write_text(
        f'"""All of it written by the team."""\n{network.partition(chr(10))[2]}'
    )
    edit(project / "configs/digits.yaml", ("batch_size: 64", "batch_size: 48"))
    edit(project / "configs/defaults.yaml", ("patience: 10", "patience: 12"))
    edit(project / "README.md", ("# My Project", "# Our Project\n\nAsk Jo."))
    edit(project / "docs" / "runs.md", ("# Runs\n", "# Our runs\n"))
    edit(project / "pyproject.toml", ("dependencies = [", 'dependencies = [\n  "einops>=0.8",'))
    (project / "configs/ours.yaml").write_text("trainer:\n  max_epochs: 3\n")
    (project / "configs/sweep.yaml").unlink()


@pytest.fixture
def template(git: Run, tmp_path: Path) -> Path:
    """A repository of the template with an older release, `v1`, and the present one, `v2`."""
    work = tmp_path / "template"
    git("init", "--quiet", work, cwd=tmp_path)
    for release in ("v1", "v2"):
        git("rm", "-r", "-q", "--ignore-unmatch", ".", cwd=work)
        copy_template(work)
        if release == "v1":
            make_older(work)
        for words in ("add --all", f"commit --quiet --message {release}", f"tag {release}"):
            git(*words.split(), cwd=work)
    return work


@pytest.fixture
def old(template: Path, run: Run, git: Run, tmp_path: Path) -> Path:
    """A project of the older release, committed as it was baked."""
    run(*CRUFT, "create", "--no-input", "--checkout", "v1", template, cwd=tmp_path)
    project = tmp_path / "my-project"
    assert (project / "my_project/engine/retired.py").exists()
    for words in ("init --quiet", "add --all", "commit --quiet --message baked"):
        git(*words.split(), cwd=project)
    return project


def update(project: Path, run: Run, git: Run) -> str:
    """Commits what the team did, and updates; gives the names of files in conflict."""
    git("add", "--all", cwd=project)
    git("commit", "--quiet", "--allow-empty", "--message", "ours", cwd=project)
    run(*CRUFT, "check", "--checkout", "v2", cwd=project, code=1)
    printed = run(*CRUFT, "update", "--skip-apply-ask", "--checkout", "v2", cwd=project)
    assert "make train" not in printed, "the next step of a bake, in a folder that is gone"
    run(*CRUFT, "check", "--checkout", "v2", cwd=project)
    assert not [*project.rglob("*.rej"), *project.rglob("*.orig")]
    return git("diff", "--name-only", "--diff-filter=U", cwd=project)


def ours(project: Path) -> dict[str, str]:
    return {name: text for name, text in texts(project) if name.startswith("my_project/engine/")}


def test_an_update_brings_ours_and_leaves_theirs(old: Path, bake: Bake, run: Run, git: Run) -> None:
    change_as_a_team_does(old)
    theirs = {
        name: text
        for name, text in texts(old)
        if name.startswith(("my_project/", "configs/digits"))
    }
    assert not update(old, run, git)
    fresh = bake()
    assert ours(old) == ours(fresh)
    now = dict(texts(old))
    assert {name: now[name] for name in theirs if "/engine/" not in name} == {
        name: text for name, text in theirs.items() if "/engine/" not in name
    }
    for name, arrived, kept in (
        ("configs/defaults.yaml", "seed_everything: 42", "patience: 12"),
        ("pyproject.toml", '"numpy>=2,<3"', '"einops>=0.8"'),
        ("README.md", "## Pages", "Ask Jo."),
        ("docs/runs.md", "## How a run ends", "# Our runs"),
    ):
        assert arrived in now[name], name
        assert kept in now[name], name
    assert "configs/ours.yaml" in now
    assert "configs/sweep.yaml" not in now
    assert not [name for name in now if "fabric" in name], (
        "a new question is answered by its default"
    )
    assert json.loads(now[".cruft.json"])["context"]["cookiecutter"]["fabric"] is False
    run(*RUFF_CHECK, cwd=old)


@pytest.mark.slow
def test_an_updated_project_passes_its_own_tests(old: Path, run: Run, git: Run) -> None:
    change_as_a_team_does(old)
    assert not update(old, run, git)
    assert " passed" in run(*OWN_TESTS, cwd=old)


def test_a_line_that_both_changed_is_marked_as_in_any_merge_and_the_rest_arrives(
    old: Path, bake: Bake, run: Run, git: Run
) -> None:
    edit(old / "configs/defaults.yaml", ("seed_everything: 7", "seed_everything: 8"))
    assert update(old, run, git).split() == ["configs/defaults.yaml"]
    assert "<<<<<<< ours\nseed_everything: 8" in (old / "configs/defaults.yaml").read_text()
    assert ours(old) == ours(bake())


def test_a_part_can_be_taken_later_and_given_back(old: Path, run: Run, git: Run) -> None:
    update(old, run, git)
    for answer in ("true", "false"):
        git("add", "--all", cwd=old)
        git("commit", "--quiet", "--message", "updated", cwd=old)
        changed = ("--variables-to-update", json.dumps({"slurm": answer}))
        run(*CRUFT, "update", "--skip-apply-ask", "--checkout", "v2", *changed, cwd=old)
        assert (old / "slurm/train.sbatch").exists() == (answer == "true")
        assert ("slurm/README.md" in (old / "README.md").read_text()) == (answer == "true")


def test_a_project_that_cookiecutter_made_can_be_linked_and_then_updates(
    template: Path, run: Run, git: Run, tmp_path: Path
) -> None:
    run(
        sys.executable,
        "-m",
        "cookiecutter",
        "--no-input",
        "--checkout",
        "v1",
        f"git+file://{template}",
        cwd=tmp_path,
    )
    project = tmp_path / "my-project"
    git("init", "--quiet", cwd=project)
    run(*CRUFT, "link", "--no-input", "--checkout", "v1", template, cwd=project)
    assert not update(project, run, git)


def test_a_version_is_a_heading_of_the_changelog_and_a_tag_and_stands_nowhere_else(
    git: Run,
) -> None:
    headings = re.findall(
        r"^## (.*)$", (TEMPLATE / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    versions = [
        re.fullmatch(r"(\d+\.\d+\.\d+) \(\d{4}-\d\d-\d\d\)", title) for title in headings[1:]
    ]
    assert headings[0] == "Unreleased"
    assert None not in versions, headings
    numbers = [tuple(map(int, version[1].split("."))) for version in versions if version]
    assert numbers == sorted(set(numbers), reverse=True)
    tagged = [tag for tag in git("tag", cwd=TEMPLATE).split() if re.match(r"v?\d", tag)]
    assert set(tagged) <= {f"v{'.'.join(map(str, number))}" for number in numbers}
    settings = (TEMPLATE / "pyproject.toml").read_text(encoding="utf-8")
    assert not re.search(r"^version *=", settings, re.MULTILINE)
    assert [name for name in QUESTIONS if "version" in name] == ["python_version"]
