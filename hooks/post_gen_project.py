"""Delete what was not chosen from the new project's folder. Where hooks do not run, all stays."""

from __future__ import annotations

import json
import os
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


if __name__ == "__main__":
    for file in map(Path, unwanted(json.loads(r"""{{ cookiecutter | tojson }}"""))):
        file.unlink(missing_ok=True)
        with suppress(OSError):  # there is more in it
            os.removedirs(file.parent)
