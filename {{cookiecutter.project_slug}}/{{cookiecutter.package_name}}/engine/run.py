"""A command and its run: id, folder, what may be written down of it. Imports no Lightning, which takes seconds."""

import difflib
import os
import re
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from filelock import FileLock, Timeout

VERBS = ("fit", "validate", "test", "predict")
SECTIONS = ("trainer", "callbacks")  # of a configuration, that are options and not a class with options
PROJECT = Path(__file__).resolve().parents[2]  # the folder of main.py
LOCKS = ExitStack()
REDACTED = "***"
# Not `pad_token` or `max_tokens`: the words of a vocabulary are no secrets.
SECRET = re.compile(
    r"(?i)(^|_)(pass(word|wd|phrase)|secret|credentials?|(api|access|private|secret)_?key)$"
    r"|^(\w+_)?(auth|access|api|hf|hub|bearer|refresh)_?token$|^token$"
)


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command: `main(["fit", "--config", "configs/digits.yaml"])` is `python main.py fit --config ...`.

    Args:
        args: What follows `main.py` on the command line; `sys.argv` if None.

    Raises:
        Mistake: If the command is wrong. What the model or the data raise passes through as it is.
    """
    words = list(sys.argv[1:] if args is None else args)
    verb, verbs = words[0] if words else "nothing", (*VERBS, "sync")
    with reported():
        if verb == "sync":
            from .sync import sync

            return sync(words[1:])
        if verb not in (*VERBS, "-h", "--help"):
            got = f"{verb}, which comes after it" if verb.startswith("-") else f"{verb}{nearest(verb, verbs)}"
            raise Mistake(f"expected a verb ({', '.join(verbs)}), got {got}")
        from .cli import CLI, execute  # not before: it imports Lightning, which takes seconds

        execute(words, CLI)


@contextmanager
def reported() -> Iterator[None]:
    """Says a mistake in one line."""
    try:
        yield
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        raise


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


@dataclass(frozen=True)
class Run:
    """One run; `folder` holds config.yaml, checkpoints/, metrics.csv and wandb/."""

    id: str
    folder: Path

    @classmethod
    def start(cls, root: Path) -> "Run":
        """Takes the id from WANDB_RUN_ID or draws one, and tells the processes of other ranks by the environment.

        torchrun and SLURM start all ranks alike, which then have to agree.
        """
        run_id = os.environ.get("WANDB_RUN_ID") or f"r{time.strftime('%y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        if {"TORCHELASTIC_RUN_ID", "SLURM_NTASKS"} & os.environ.keys():
            from .launchers import agreed

            run_id = agreed(run_id)
        if not re.fullmatch(r"\w[\w.-]*", run_id):
            raise Mistake(f"WANDB_RUN_ID: expected letters, digits, dashes, dots and underscores, got {run_id}")
        folder = root / run_id
        os.environ.update(WANDB_RUN_ID=run_id, RUNS_ROOT=str(root))
        # Else W&B stages what it is to send in the user's home, where it is lost when the folder moves.
        os.environ.update(WANDB_DIR=str(folder), WANDB_DATA_DIR=str(folder / "wandb"))
        return cls(run_id, folder)

    def lock(self) -> None:
        """Makes the folder, and keeps other processes from working on the run until LOCKS is closed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            LOCKS.enter_context(FileLock(self.folder / ".lock").acquire(timeout=0))
        except Timeout as error:
            raise Mistake(f"run {self.id}: another process is at work on it") from error
        except (NotImplementedError, OSError):  # a file system without locks
            pass
        for unfinished in self.folder.glob("checkpoints/*.part"):
            unfinished.unlink()
        (self.folder / "error.txt").unlink(missing_ok=True)  # of an earlier start


def runs_root() -> Path:
    """Where runs are kept: RUNS_ROOT, or `runs` beside main.py."""
    return Path(os.environ.get("RUNS_ROOT") or PROJECT / "runs").expanduser().absolute()


def find_run(reference: str, root: Path, option: str) -> Path:
    """Finds the folder of a run by its id or path."""
    for folder in (root / reference, Path(reference)):
        if reference and folder.is_dir():
            return folder.absolute()
    hint = nearest(reference, (folder.name for folder in root.glob("*/")))
    expected = "a run" if option in ("--resume", "sync") else "a checkpoint file, RUN or RUN:last"
    raise Mistake(f"{option}: expected {expected}, got {reference}{hint}")


def refusal() -> str:
    """Why W&B takes nothing from us now, if so: asked in seconds, where W&B's client would try for minutes."""
    import wandb

    wandb.setup()  # before there is a variable that would hold for all that comes after
    given = os.environ.get("WANDB_HTTP_TIMEOUT")
    os.environ["WANDB_HTTP_TIMEOUT"] = given or "5"
    try:
        return "" if wandb.login(prompt=False, verify=True) else "no key; to log in: wandb login"
    except wandb.errors.CommError as error:
        if "did not respond in time" in str(error):
            return "W&B does not answer"
        return f"{str(error).rstrip('.')}; to log in: wandb login"
    finally:
        del os.environ["WANDB_HTTP_TIMEOUT"]
        os.environ |= {"WANDB_HTTP_TIMEOUT": given} if given else {}


def end_session() -> None:
    """Ends W&B's client, which never answers if a request was given up just before, and ends with this process then."""
    import wandb

    def end() -> None:
        with suppress(ConnectionError):  # it has ended
            wandb.teardown()

    ending = Thread(target=end, daemon=True)
    ending.start()
    ending.join(5)


def commit() -> str | None:
    """The commit that the project stands on; None outside of git."""
    try:
        words = ("git", "-C", str(PROJECT), "rev-parse", "HEAD")
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def redacted(value: Any, name: str = "") -> Any:
    """The value without what goes by the name of a secret, and without passwords in URLs."""
    if isinstance(value, dict):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [redacted(item, name) for item in value]
    if isinstance(value, str):
        return REDACTED if value and SECRET.search(name) else re.sub(r"(://[^/\s:@]*:)[^/\s@]+@", r"\1***@", value)
    return value


def command(words: Sequence[str]) -> str:
    """The command line, without secrets."""
    parts = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    return shlex.join(
        "{...}" if part.startswith("{") else redacted(part, before.rpartition(".")[2])
        for before, part in zip(["", *parts], parts, strict=False)
    )


def shown(path: Path) -> str:
    """The path as one would type it here: absolute or relative, whichever is shorter, quoted if need be."""
    return shlex.quote(min(str(path.absolute()), os.path.relpath(path), key=len))


def delivery(folder: Path) -> str:
    """The command that sends a run to W&B."""
    return f"python {shown(PROJECT / 'main.py')} sync {shown(folder)}"


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Gives a place beside the file's to write it, and moves it when it is whole: there is never half of one."""
    part = file.with_name(f"{file.name}.part")
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(file)
    except OSError as error:
        raise Failure(f"{shown(file)} cannot be written, and is as it was: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
