"""The plumbing between command line, Lightning and W&B. Updates of the template replace it: build beside it."""

import difflib
import sys
from collections.abc import Iterable, Sequence

VERBS = ("fit", "validate", "test", "predict")
SECTIONS = ("trainer", "callbacks")  # of a configuration, that are options and not a class with options


class Mistake(SystemExit):
    """What is wrong with a command: shown as one line without a traceback; the exit code is 2."""

    code = 2

    def __str__(self) -> str:
        return " ".join(str(self.args[0]).split())


class Failure(Mistake):
    """What ends a run, though the command was right: one line as well; the exit code is 1."""

    code = 1


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns "; did you mean X?" for the one of `names` that is most like `name`, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command: `main(["fit", "--config", "configs/digits.yaml"])` is `python main.py fit --config ...`.

    Args:
        args: What follows `main.py` on the command line; `sys.argv` if None.

    Raises:
        Mistake: If the command is wrong. What the model or the data raise passes through as it is.
    """
    words = list(sys.argv[1:] if args is None else args)
    verb, verbs = words[0] if words else "nothing", (*VERBS, "sync")
    try:
        if verb == "sync":
            from .sync import sync

            return sync(words[1:])
        if verb not in (*VERBS, "-h", "--help"):
            got = f"{verb}, which comes after it" if verb.startswith("-") else f"{verb}{nearest(verb, verbs)}"
            raise Mistake(f"expected a verb ({', '.join(verbs)}), got {got}")
        from .cli import execute  # not before: it imports Lightning, which takes seconds

        execute(words)
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        raise
