"""What checks a push or a commit, here and in a project: safe workflows, the same commands."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from bakery import TEMPLATE
from conftest import QUESTIONS, Bake, Run

BIN = Path(sys.executable).parent
PLAIN = ("--color", "never")  # which it would show where there is a variable CI
STRICT = ("--offline", "--persona", "pedantic", "--strict-collection", "--quiet", "--no-exit-codes")
ZIZMOR = (BIN / "zizmor", *STRICT, *PLAIN)
WORKFLOW = ".github/workflows/ci.yml"


def parsed(file: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(file.read_text(encoding="utf-8")))


def commands(project: Path) -> list[str]:
    return [
        step["run"] for step in parsed(project / WORKFLOW)["jobs"]["test"]["steps"] if "run" in step
    ]


@pytest.fixture
def workflows(project: Path, tmp_path: Path) -> list[Path]:
    """The folders .github of the template and of a project, to be changed."""
    copies = [tmp_path / "template", tmp_path / "project"]
    for origin, copy in zip((TEMPLATE, project), copies, strict=True):
        shutil.copytree(origin / ".github", copy / ".github")
    return copies


def test_zizmor_and_actionlint_find_nothing_in_any_workflow(
    workflows: list[Path], run: Run
) -> None:
    for copy in workflows:
        assert run(*ZIZMOR, ".", cwd=copy) == "No findings to report. Good job!\n"
        files = sorted((copy / ".github/workflows").iterdir())
        assert not run(BIN / "actionlint", *files, cwd=copy)
        run(BIN / "check-jsonschema", "--builtin-schema=vendor.github-workflows", *files, cwd=copy)
        run(
            BIN / "check-jsonschema",
            "--builtin-schema=vendor.dependabot",
            copy / ".github/dependabot.yml",
            cwd=copy,
        )


@pytest.mark.parametrize(
    ("pattern", "planted", "finding"),
    [
        (r"(actions/checkout)@\w+  # (v[\d.]+)", r"\1@\2", "unpinned-uses"),
        (
            r"run: make test|run: .ci/run",
            "run: echo ${{ github.event.pull_request.title }}",
            "template-injection",
        ),
        (r"permissions: {}\n", "", "excessive-permissions"),
        (r"persist-credentials: false", "fetch-depth: 1", "artipacked"),
        (r"concurrency:\n.*\n.*\n", "", "concurrency-limits"),
        (r"default-days: 7", "default-days: 1", "dependabot-cooldown"),
        (r"runs-on: ubuntu-latest", "runs-on: ubuntu-latests", "runner-label"),
        (r"matrix\.", "matrix.no_", "expression"),
    ],
)
def test_a_planted_fault_is_found_in_the_template_and_in_a_project(
    pattern: str, planted: str, finding: str, workflows: list[Path], run: Run
) -> None:
    for copy in workflows:
        for file in (copy / WORKFLOW, copy / ".github/dependabot.yml"):
            file.write_text(re.sub(pattern, planted, file.read_text()))
        if finding in ("runner-label", "expression"):
            assert f"[{finding}]" in run(BIN / "actionlint", copy / WORKFLOW, cwd=copy, code=1)
        else:
            assert f"[{finding}]" in run(*ZIZMOR, ".", cwd=copy)


def test_an_action_has_one_version_everywhere_so_that_an_update_here_is_not_forgotten_there(
    project: Path,
) -> None:
    uses = [
        re.findall(r"uses: (.*)", (root / WORKFLOW).read_text()) for root in (TEMPLATE, project)
    ]
    assert set(uses[0]) == set(uses[1])
    assert all(
        re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", use) for use in uses[0]
    )


@pytest.mark.parametrize("oldest", QUESTIONS["python_version"])
def test_github_and_gitlab_run_the_same_commands_on_every_python_from_the_chosen_one(
    oldest: str, bake: Bake
) -> None:
    supported = QUESTIONS["python_version"][QUESTIONS["python_version"].index(oldest) :]
    github, gitlab = bake(python_version=oldest), bake(python_version=oldest, ci="gitlab")
    (job,) = parsed(github / WORKFLOW)["jobs"].values()
    assert job["strategy"]["matrix"] == {"python": supported}
    other = parsed(gitlab / ".gitlab-ci.yml")["test"]
    assert other["parallel"]["matrix"] == [{"VERSION": supported}]
    assert other["script"] == commands(github)
    assert job["env"]["TORCH"] == other["variables"]["TORCH"] == "cpu"


def test_the_file_for_gitlab_has_no_key_that_gitlab_does_not_know(
    bake: Bake, tmp_path: Path, run: Run
) -> None:
    file = tmp_path / ".gitlab-ci.yml"
    check = (
        BIN / "check-jsonschema",
        "--builtin-schema=vendor.gitlab-ci",
        "--data-transform=gitlab-ci",
        file,
    )
    file.write_text((bake(ci="gitlab") / file.name).read_text())
    run(*check, cwd=tmp_path)
    file.write_text(file.read_text().replace("interruptible: true", "interruptable: true"))
    assert "interruptable" in run(*check, cwd=tmp_path, code=1)


def test_the_tests_of_bakes_start_on_windows_which_lacks_modules(run: Run) -> None:
    missing = ["fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"]
    tests = re.findall(
        r"tests/(\w+)\.py", str(parsed(TEMPLATE / WORKFLOW)["jobs"]["bake"]["steps"])
    )
    assert tests
    block = f"import sys; sys.modules |= dict.fromkeys({missing}); sys.path.insert(0, 'tests')"
    run(sys.executable, "-B", "-c", f"{block}; import {', '.join(tests)}", cwd=TEMPLATE)


def test_hooks_import_nothing_but_pythons_own_library() -> None:
    for hook in (TEMPLATE / "hooks").glob("*.py"):
        imported = set(re.findall(r"^\s*(?:import|from) (\w+)", hook.read_text(), re.MULTILINE))
        assert imported <= sys.stdlib_module_names | {"__future__"}, hook


@pytest.mark.slow
def test_pre_commit_and_prek_pass_what_is_right_and_mend_or_refuse_the_rest(
    bake: Bake, tmp_path: Path, run: Run
) -> None:
    project = bake(tmp_path)
    (project / ".venv/bin").mkdir(parents=True)
    for tool in ("ruff", "mypy"):
        (project / ".venv/bin" / tool).symlink_to(BIN / tool)
    run("git", "init", "--quiet", cwd=project)
    run("git", "add", "--all", cwd=project)
    commit = (
        "git",
        "-c",
        "user.name=Jo",
        "-c",
        "user.email=jo@example.com",
        "commit",
        "--all",
        "--message",
        "try",
    )
    main = project / "main.py"
    right = main.read_text()
    for tool in ("pre-commit", "prek"):
        run(BIN / tool, "validate-config", ".pre-commit-config.yaml", cwd=project)
        assert run(BIN / tool, "run", "--all-files", cwd=project).count("Passed") == 3
        run(BIN / tool, "install", "--overwrite", cwd=project)
        main.write_text("import os\n" + right + "\n\n\n")
        assert run(*commit, cwd=project, code=1).count("Failed") == 2
        assert main.read_text() == right
        main.write_text(right + '\nanswer: int = "42"\n')
        assert "[assignment]" in run(*commit, cwd=project, code=1)
        main.write_text(right)
