"""Deletes what was not chosen, from the new project's folder. Where hooks do not run, all of it is there."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

PARTS = {  # the files that are there for an option alone; no folders, for a team's own files may lie in them
    "slurm": ["slurm/README.md", "slurm/train.sbatch"],
    "fabric": ["train_fabric.py", "configs/fabric.yaml", "{package_name}/engine/fabric.py", "tests/test_fabric.py"],
}


def unwanted(answers: dict[str, object]) -> list[str]:
    return [file.format(**answers) for option, files in PARTS.items() if not answers[option] for file in files]


if __name__ == "__main__":
    for file in map(Path, unwanted(json.loads(r"""{{ cookiecutter | tojson }}"""))):
        file.unlink(missing_ok=True)
        with suppress(OSError):  # there is more in it
            os.removedirs(file.parent)
