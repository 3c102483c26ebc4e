"""Errors for users: one line on the screen and an exit code, without a traceback."""

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from .screen import say


class UsageError(SystemExit):
    """A wrong option, file or name. Shown as one line; the exit code is 2."""

    code = 2

    def __str__(self) -> str:
        return " ".join(str(self.args[0]).split())


class RunError(UsageError):
    """A correct command that cannot continue, such as on a full disk. One line; exit code 1."""

    code = 1


@contextmanager
def print_usage_errors() -> Iterator[None]:
    """Print a UsageError as one line before it ends the process.

    Raises:
        UsageError: The same error again, for a caller in Python.
    """
    try:
        yield
    except UsageError as error:
        say(f"error: {error}", sys.stderr)
        raise


def warn_user(message: str) -> None:
    """Print one line that does not end the run. Call it on the first rank only."""
    say(f"warning: {message}", sys.stderr)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean X?" for the closest of `names`, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""
