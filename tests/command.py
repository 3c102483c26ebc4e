"""Run a baked project's command line in this process: as true as in another, six seconds faster."""

import contextlib
import io
import os
import shlex
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a command printed, how it ended, and the folder of the run it made, if it made one."""

    code: int
    out: str
    err: str
    run: Path | None
    error: BaseException | None = None


@dataclass(frozen=True)
class Commands:
    """The command line of a project."""

    main: Callable[[list[str]], Any]
    project: Path
    runs: Path

    def __call__(self, line: str | list[str]) -> Outcome:
        """Run one line; `@x` stands for `configs/x.yaml`."""
        words = [
            f"{self.project}/configs/{word[1:]}.yaml" if word.startswith("@") else word
            for word in (shlex.split(line) if isinstance(line, str) else line)
        ]
        before = set(self.runs.glob("*"))
        code, error = 0, None
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(record=True) as caught,  # pytest would hide them
        ):
            warnings.resetwarnings()
            for kind in (DeprecationWarning, ResourceWarning):
                warnings.simplefilter("ignore", kind)  # as Python does by itself
            try:
                self.main(words)
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 1
            except BaseException as raised:
                code, error = 1, raised
        err.writelines(f"{warning.category.__name__}: {warning.message}\n" for warning in caught)
        made = sorted(set(self.runs.glob("*")) - before, key=os.path.getmtime)
        return Outcome(code, out.getvalue(), err.getvalue(), made[-1] if made else None, error)
