"""Subcommands that need neither torch nor Lightning, whose import takes seconds."""

import sys
from collections.abc import Sequence
from typing import Any

from .errors import UsageError, did_you_mean, print_usage_errors
from .screen import show_loading
from .version import __version__

SUBCOMMANDS = ("fit", "validate", "test", "predict")
OTHERS = ("sync", "runs")


def command(args: Any = None, also: Sequence[str] = ()) -> bool:
    """Run `sync`, `runs` or `--version`, and refuse an unknown subcommand.

    Args:
        args: What follows the script on the command line, or a dict as LightningCLI takes it;
            `sys.argv` if None.
        also: Further subcommands that the project's CLI has.

    Returns:
        Whether LightningCLI has to run.

    Raises:
        UsageError: If there is no such subcommand.
    """
    argv = sys.argv[1:] if args is None else args
    if not isinstance(argv, list | tuple):
        return True
    subcommand = argv[0] if argv else "nothing"
    with print_usage_errors():
        if subcommand == "--version":
            print(__version__)
            return False
        if subcommand == "sync":
            from .wandb_sync import sync

            sync(list(argv[1:]))
            return False
        if subcommand == "runs":
            from .runs import runs

            runs(list(argv[1:]))
            return False
        known = (*SUBCOMMANDS, *also)
        if subcommand not in (*known, "-h", "--help"):
            raise UsageError(unknown(subcommand, (*known, *OTHERS)))
    show_loading()
    return True


def unknown(subcommand: str, known: Sequence[str]) -> str:
    """Return the sentence about a subcommand that is not there."""
    expected = f"expected a subcommand ({', '.join(known)})"
    if subcommand.startswith("-"):
        return f"{expected}, got {subcommand}, which comes after it"
    return f"{expected}, got {subcommand}{did_you_mean(subcommand, known)}"
