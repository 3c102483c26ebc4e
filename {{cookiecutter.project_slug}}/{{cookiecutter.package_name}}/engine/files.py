"""Atomic writes, redaction of secrets, and paths and commands as one would type them."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import RunError

PROJECT = Path(__file__).resolve().parents[2]  # the folder of main.py
REDACTED = "***"
# Not `pad_token` or `max_tokens`: the words of a vocabulary are no secrets.
SECRET = re.compile(
    r"(?i)(^|_)(pass(word|wd|phrase)|secret|credentials?|(api|access|private|secret)_?key)$"
    r"|^(\w+_)?(auth|access|api|hf|hub|bearer|refresh)_?token$|^token$"
)
URL_PASSWORD = re.compile(r"(://[^/\s:@]*:)[^/\s@]+@")


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Yield a temporary path beside `file`, and rename it to `file` once it is complete.

    Raises:
        RunError: If the file cannot be written; an older version of it stays as it was.
    """
    part = file.with_name(f"{file.name}.part")
    try:
        part.unlink(missing_ok=True)  # a link there could lead anywhere
        yield part
        with part.open("r+b") as written:  # Windows does not sync what is open for reading
            os.fsync(written.fileno())
        part.replace(file)
    except OSError as error:
        message = f"{display_path(file)} cannot be written, and is as it was: {error.strerror}"
        raise RunError(message) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def redact(value: Any, name: str = "") -> Any:
    """Return the value with secrets replaced, judged by the names of options and by URLs."""
    if isinstance(value, dict):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [redact(item, name) for item in value]
    if not isinstance(value, str):
        return value
    if value and SECRET.search(name):
        return REDACTED
    return URL_PASSWORD.sub(rf"\1{REDACTED}@", value)


def redact_command(argv: Sequence[str]) -> str:
    """Return a command line that can be pasted into a shell, without its secrets."""
    parts: list[str] = []
    for word in argv:
        parts += word.split("=", 1) if word.startswith("--") else [word]
    options = ["", *parts]  # the word before each part
    shown = []
    for option, part in zip(options, parts, strict=False):
        is_json = part.startswith("{")
        shown.append("{...}" if is_json else redact(part, option.rpartition(".")[2]))
    return shlex.join(shown)


def display_path(path: Path) -> str:
    """Return the path as one would type it here: absolute or relative, the shorter of the two."""
    candidates = [str(path.absolute())]
    with suppress(ValueError):  # on another drive of Windows
        candidates.append(os.path.relpath(path))
    return shlex.quote(min(candidates, key=len))


def entry_script() -> Path:
    """Return the script that runs, if it belongs to this project, or else its main.py."""
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    script = Path(file or "").resolve()
    return script if script.parent == PROJECT and script.suffix == ".py" else PROJECT / "main.py"


def python_command(*words: str) -> str:
    """Return a command of this project that can be pasted into a shell."""
    return " ".join(["python", display_path(entry_script()), *words])


def sync_command(folder: Path) -> str:
    """Return the command that sends a run to W&B."""
    return python_command("sync", display_path(folder))


def git_commit() -> str | None:
    """Return the commit that the project is at; None outside of git."""
    command = ("git", "-C", str(PROJECT), "rev-parse", "HEAD")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
