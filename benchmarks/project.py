"""A baked project in which benchmarks run commands."""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bakery import bake, environment

HERE = Path(__file__).parent


class Project:
    """A baked project, and an environment of one thread in which W&B is offline.

    Args:
        place: A folder.
        files: Those of benchmarks/ to copy into the project.
    """

    def __init__(self, place: Path, *files: str) -> None:
        self.place = place
        self.folder = bake(place, place)
        for name in files:
            shutil.copy(HERE / name, self.folder)
        self.env = environment(place / "e") | {
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
            "COLUMNS": "120",
        }
