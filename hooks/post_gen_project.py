"""Delete what was not chosen, and say what to do next. Where hooks do not run, all stays."""

from __future__ import annotations

import json
import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path

# The files that belong to one answer. No folders, since a team's files may lie in them.
PARTS = {
    ("ci", "github"): [".github/workflows/ci.yml", ".github/dependabot.yml"],
    ("ci", "gitlab"): [".gitlab-ci.yml"],
    ("slurm", True): ["slurm/README.md", "slurm/train.sbatch"],
    ("fabric", True): [
        "train_fabric.py",
        "docs/fabric.md",
        "configs/fabric.yaml",
        "{package_name}/engine/fabric.py",
        "tests/test_fabric.py",
    ],
    ("docker", True): ["Dockerfile", ".dockerignore", ".devcontainer/devcontainer.json"],
}


def unwanted(answers: dict[str, object]) -> list[str]:
    return [
        file.format(**answers)
        for (option, answer), files in PARTS.items()
        if answers[option] != answer
        for file in files
    ]


def next_steps(project: Path) -> str:
    """Return what to type now, in the folder in which a shell started cookiecutter."""
    with suppress(KeyError, ValueError):  # no shell, or the project is elsewhere: its whole path
        project = project.relative_to(os.environ["PWD"])
    folder = f'"{project}"' if os.name == "nt" else shlex.quote(str(project))
    return f"Next, to train the example:\n  cd {folder}\n  make train"


if __name__ == "__main__":
    answers = json.loads(r"""{{ cookiecutter | tojson }}""")
    for file in map(Path, unwanted(answers)):
        file.unlink(missing_ok=True)
        with suppress(OSError):  # there is more in it
            os.removedirs(file.parent)
    # Of cookiecutter only: cruft bakes into temporary folders, and its `diff` prints a patch.
    if "_output_dir" in answers:
        if hasattr(sys.stdout, "reconfigure"):  # a console may lack a letter of the folder's name
            sys.stdout.reconfigure(errors="backslashreplace")
        print(next_steps(Path.cwd()))
