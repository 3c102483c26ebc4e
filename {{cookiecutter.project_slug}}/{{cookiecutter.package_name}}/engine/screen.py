"""Lines on the screen: above a bar that is drawn there, in colour in a terminal."""

import os
import re
import sys
import textwrap
from typing import Any, TextIO

LABEL = re.compile(r"error:|warning:|\S+(?= {2})")  # what a line of the engine begins with
UNBROKEN = ("error:", "warning:", "see", "send", "resume", "test", "read")
INDENT = " " * 9
WRAPPING: Any = {
    "subsequent_indent": INDENT,
    "break_long_words": False,
    "break_on_hyphens": False,
}
COLOURS = {"error:": 31, "warning:": 33}  # by the codes of ANSI
CYAN, GREEN = 36, 32
LOADING = "loading  torch, lightning"  # shorter than the first line of a traceback
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


def say(line: str, stream: TextIO | None = None) -> None:
    """Print a line, above a bar of tqdm's if one is drawn.

    A terminal breaks long lines anywhere, so they are broken between words, except for commands and
    errors: those are pasted.
    """
    stream = stream or sys.stdout
    if stream is None:  # a program without a console
        return
    if label := LABEL.match(line):
        word, width = label.group(), columns(stream)
        longest = max(map(len, line.split()))
        if width and word not in UNBROKEN and longest + len(INDENT) <= width:
            line = "\n".join(textwrap.wrap(line, width, **WRAPPING))
        line = paint(word, COLOURS.get(word, CYAN), stream) + line[label.end() :]
    tqdm: Any = sys.modules.get("tqdm")
    if tqdm:
        tqdm.tqdm.write(line, file=stream)
    else:
        print(line, file=stream)
    stream.flush()


def has_colours(stream: TextIO) -> bool:
    """Return True for a terminal, unless its user wants no colours."""
    refused = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return is_terminal(stream) and not refused


def is_terminal(stream: Any) -> bool:
    """Return True for a terminal; False for what is none, or does not say."""
    return bool(getattr(stream, "isatty", bool)())


def write_at_once(line: str) -> None:
    """Write a line from a signal handler, in a terminal over a bar.

    `print` raises where the signal came during another one.
    """
    width = columns(sys.__stdout__) if sys.__stdout__ else None
    before = f"\r{' ' * (width - 1)}\r" if width else "\n"
    os.write(1, f"{before}{line}\n".encode())


def paint(text: str, colour: int, stream: TextIO) -> str:
    """Return the text in bold and in a colour, where the stream has colours."""
    return f"\033[1;{colour}m{text}\033[0m" if has_colours(stream) else text


def columns(stream: TextIO) -> int | None:
    """Return the width of a terminal, now; None for what is no terminal, or does not know."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError, AttributeError):
        return None


def show_loading() -> None:
    """Say in a terminal what takes seconds, until `clear_loading`.

    The cursor goes back to where the line begins, so that an error is written over it.
    """
    is_first = all(os.environ.get(name, "0") == "0" for name in RANKS)
    if is_first and "lightning" not in sys.modules and is_terminal(sys.stderr):
        print(paint(LOADING, CYAN, sys.stderr), end="\r", file=sys.stderr, flush=True)


def clear_loading() -> None:
    """Remove the line of `show_loading`."""
    if is_terminal(sys.stderr):
        print(" " * len(LOADING), end="\r", file=sys.stderr, flush=True)
