"""`main.py sync`: sends W&B what it lacks of runs, from their folders alone, each row once.

Each start of a run leaves a log with all that was recorded, a `.wandb` file, whatever W&B got of
it. W&B's own `wandb sync` sends a log as a whole, behind the rows that are there already. So it is
given a copy without those rows, and with the checkpoints that wait in `uploads/`. What is there is
asked of W&B and noted nowhere: all of this may be killed at any time and started again.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL
from tempfile import TemporaryDirectory
from typing import IO

import wandb
from tqdm import tqdm
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

from .errors import UsageError
from .files import display_path
from .metrics_log import update_table
from .run import find_run, runs_root
from .wandb_log import HEADER, TransactionLog, kind_of, read_log, write_log
from .wandb_options import check_variables
from .wandb_session import end_session, own_session, restored_environment, unavailable_reason

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

QUIET = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false", "WANDB_MODE": "online"}
# If W&B goes away meanwhile; its client would try for days.
RETRY_LIMITS = {
    f"WANDB__{part}_RETRY_MAX": "3" for part in ("GRAPHQL", "FILE_STREAM", "FILE_TRANSFER")
}
FAILED_STATES = ("failed", "killed", "preempted")


def sync(argv: list[str]) -> None:
    """Send what W&B lacks of the runs that are named, or of all.

    Raises:
        UsageError: If there is no such run.
        SystemExit: With code 1 if something remains to be sent.
    """
    about = "Sends W&B what it lacks of runs."
    parser = argparse.ArgumentParser("main.py sync", description=about, allow_abbrev=False)
    every = "id or folder of a run; all runs if none is given"
    parser.add_argument("runs", nargs="*", metavar="RUN", help=every)
    root_help = "folder of all runs, %(default)s"
    parser.add_argument("--runs_root", type=Path, default=runs_root(), help=root_help)
    for name in ("entity", "project"):
        parser.add_argument(f"--{name}", help=f"{name} to send to; that of each run if not given")
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        expected = "expected runs, --runs_root, --entity or --project"
        raise UsageError(f"sync: {expected}, got {unknown[0]}")
    check_variables()
    root = given.runs_root.expanduser().absolute()
    named = [find_run(run, root, "sync") for run in given.runs]
    for folder in named:
        update_table(folder)
    recorded = {file.parents[2] for file in root.glob("*/wandb/*run-*/*.wandb")}
    with restored_environment(), own_session():
        os.environ.update(QUIET)
        wandb.setup(wandb.Settings(mode="online", silent=True))  # whatever the caller's is
        remains = sync_folders(named or sorted(recorded), Place(given.entity, given.project))
    if remains:
        raise SystemExit(1)


@dataclass(frozen=True)
class Place:
    """Where in W&B a run is sent; None for what its log says."""

    entity: str | None = None
    project: str | None = None

    def of(self, log: TransactionLog) -> tuple[str | None, str | None]:
        """Return entity and project for a run's log; None for W&B's default."""
        run = log.of_kind("run")[0]
        return self.entity or run.entity or None, self.project or run.project or None

    @property
    def words(self) -> list[str]:
        """What `wandb sync` takes."""
        given = {"--entity": self.entity, "--project": self.project}
        return [word for option, name in given.items() if name for word in (option, name)]


AS_LOGGED = Place()


def sync_folders(folders: list[Path], place: Place) -> list[Path]:
    """Send runs, say of each what came of it, and return those of which something remains."""
    away = unavailable_reason()
    remains = []
    for folder in tqdm(folders, "sync", disable=None):
        left = away or sync_locked(folder, place)
        if left:
            remains.append(folder)
            tqdm.write(f"left     {display_path(folder)}: {left}")
        else:
            tqdm.write(f"sent     {display_path(folder)}")
    return remains


def sync_locked(folder: Path, place: Place) -> str:
    """Send a run unless another process works on it; return what W&B lacks then."""
    with (folder / ".lock").open("a") as lock:
        if not take_lock(lock):
            return "another process is at work on it"
        return sync_run(folder, tries=1, lock=lock, place=place)


def take_lock(lock: IO[str]) -> bool:
    """Take the lock of a run. `wandb sync` inherits it, so that no second one begins before."""
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


class RemoteRun:
    """What W&B has of a run: the number of rows, its end, the digests of its checkpoints."""

    def __init__(self, logs: list[TransactionLog], place: Place) -> None:
        self.rows = 0
        self.ended = False
        self.digests: set[str] = set()
        run, api = logs[-1].of_kind("run")[0], wandb.Api()
        entity, project = place.of(logs[-1])
        path = f"{entity or api.default_entity}/{project or 'uncategorized'}/{run.run_id}"
        try:
            self.run = api.run(path)
        except wandb.errors.CommError as error:
            if "Could not find run" in str(error):
                return
            raise
        remove_empty_folders(Path(self.run.dir))
        self._compare(logs)
        self.digests = {artifact.digest for artifact in self.run.logged_artifacts()}

    def _compare(self, logs: list[TransactionLog]) -> None:
        times = [time for log in logs for time in log.times]
        newest = self._times_from(self.run.lastHistoryStep)[-1:]
        resumed_elsewhere = bool(newest) and newest[0] not in times
        if resumed_elsewhere:
            there = set(self._times_from(0))
        else:
            there = set(times[: times.index(newest[0]) + 1]) if newest else set()
        missing = (number for number, time in enumerate(times) if time not in there)
        self.rows = next(missing, len(times))
        exits = logs[-1].of_kind("exit")  # a process that was killed logs none
        failed = not exits or bool(exits[0].exit_code)
        states = FAILED_STATES if failed else ("finished",)
        known_end = resumed_elsewhere or self.run.state in states
        self.ended = self.rows == len(times) and known_end

    def _times_from(self, step: int) -> list[float]:
        rows = self.run.scan_history(min_step=max(step, 0), use_cache=False)
        return [row["_timestamp"] for row in rows]


def remove_empty_folders(folder: Path) -> None:
    """Remove ENTITY/PROJECT/RUN, which W&B's client makes and does not use."""
    for empty in (folder, *folder.parents[:2]):
        with suppress(OSError):
            empty.rmdir()


def sync_run(
    folder: Path,
    tries: int,
    lock: IO[str] | None = None,
    checkpoints: bool = True,
    run_id: str | None = None,
    place: Place = AS_LOGGED,
) -> str:
    """Send W&B what it lacks of a run.

    Args:
        folder: The run's folder.
        tries: How often to send; 0 only asks.
        lock: The run's lock, which `wandb sync` inherits.
        checkpoints: Whether to send checkpoints in `uploads/` too.
        run_id: The run; None for all in the folder but those of which that is a copy.
        place: Where to send it.

    Returns:
        What W&B lacks then, in words, and W&B's reason if it said one; "" if it lacks nothing.
    """
    lacks = []
    try:
        *others, last = logs_by_run(folder, run_id) or [[]]
        for logs in others:
            lacks.append(sync_logs(Sending(folder, logs, [], lock, place), tries))
        waiting = sorted(folder.glob("uploads/*.ckpt")) if checkpoints else []
        if last:
            lacks.append(sync_logs(Sending(folder, last, waiting, lock, place), tries))
        return ", ".join(filter(None, lacks))
    except Exception as error:  # W&B raises many kinds
        return str(error).rstrip(".")


def logs_by_run(folder: Path, run_id: str | None = None) -> list[list[TransactionLog]]:
    """Return the logs in a folder that recorded something, of each run those of its starts.

    Args:
        folder: The folder.
        run_id: The run; None for all but those of another folder, of which this is a copy.
    """
    files = folder.glob("wandb/*run-*/run-*.wandb")
    by_run: dict[str, list[TransactionLog]] = {}
    for file in sorted(files, key=lambda file: file.parent.name.partition("run-")[2]):
        log = TransactionLog(file, read_log(file))
        if log.of_kind("history") or log.of_kind("exit"):
            by_run.setdefault(log.of_kind("run")[0].run_id, []).append(log)
    if run_id is not None:
        return [by_run[run_id]] if run_id in by_run else []
    is_here = [name == folder.name or not (folder.parent / name).is_dir() for name in by_run]
    return [logs for logs, here in zip(by_run.values(), is_here, strict=True) if here]


def sync_logs(sending: "Sending", tries: int) -> str:
    """Send what W&B lacks of a run's logs; see `sync_run`."""
    sent: dict[Path, str] = {}
    rows = -1
    while True:
        remote = RemoteRun(sending.logs, sending.place)
        if rows == 0:  # the client says it only with a row
            remote.run.summary.update({"_step": remote.run.lastHistoryStep})
        remove_uploaded(sent, remote.digests)
        sending.waiting = [file for file in sending.waiting if file.exists()]
        rows = sum(len(log.times) for log in sending.logs) - remote.rows
        lacks = words_for(rows, len(sending.waiting), remote.ended)
        if not lacks:
            for log in sending.logs:
                Path(f"{log.file}.synced").touch()  # nobody's `wandb sync` sends it again
        if not lacks or not tries:
            return f"{lacks} ({sending.reason})" if lacks and sending.reason else lacks
        tries -= 1
        sent = send(sending, remote)


def remove_uploaded(sent: dict[Path, str], digests: set[str]) -> None:
    """Remove checkpoints that W&B has, up to the first that it lacks.

    Those after it are sent again too, because aliases depend on the order.
    """
    for file, digest in sent.items():
        if digest not in digests:
            return
        file.unlink()


def words_for(rows: int, checkpoints: int, ended: bool) -> str:
    """Return what W&B lacks, in words."""
    lacks = [f"{rows} rows"] if rows else []
    if checkpoints:
        lacks.append(f"{checkpoints} checkpoints")
    if not lacks and not ended:
        lacks.append("its end")
    return ", ".join(lacks)


@dataclass
class Sending:
    """What is sent of a run at once."""

    folder: Path
    logs: list[TransactionLog]
    waiting: list[Path]  # checkpoints
    lock: IO[str] | None
    place: Place
    copies: list[Path] = field(default_factory=list)
    reason: str = ""  # why W&B refuses it


def send(sending: Sending, remote: RemoteRun) -> dict[Path, str]:
    """Give W&B's client copies of the logs with what W&B lacks.

    Returns:
        The digests of the checkpoints in them, by file.
    """
    last = sending.logs[-1]
    artifacts, digests = artifact_records(sending) if sending.waiting else ([], {})
    known = remote.rows
    before: list[Record] = []  # summaries of the logs before
    for log in sending.logs:
        skipped = min(known, len(log.times))
        known -= skipped
        if skipped < len(log.times) or log is last:
            extra = before + (artifacts if log is last else [])
            until = seen(log, skipped, remote)
            records = missing_records(log, sending.folder, skipped, until, extra)
            sending.copies.append(write_copy(log, records))
        before = before + [record for record in log.records if kind_of(record) == "summary"]
    run_wandb_sync(sending)
    for copy in sending.copies:
        copy.unlink()
        Path(f"{copy}.synced").unlink(missing_ok=True)
    sending.copies = []
    return digests


def seen(log: TransactionLog, skipped: int, remote: RemoteRun) -> float:
    """Return the time until which W&B has what was printed and measured."""
    if remote.ended:
        return math.inf
    return log.times[skipped - 1] if skipped else 0.0


def write_copy(log: TransactionLog, records: Iterator[Record]) -> Path:
    """Write a log beside another one, with other records."""
    copy = log.file.with_name("missing.wandb")
    copy.unlink(missing_ok=True)  # a link there could lead anywhere
    write_log(copy, log.file.read_bytes()[:HEADER], records)
    Path(f"{copy}.syncstate").unlink(missing_ok=True)  # else the first row gets an earlier step
    return copy


def run_wandb_sync(sending: Sending) -> None:
    """Have W&B's client send the copies, and note what it says of a refusal."""
    words = [sys.executable, "-m", "wandb", "sync", "--include-online", "--include-synced"]
    environment = {**os.environ, **QUIET, **RETRY_LIMITS, "WANDB_DIR": str(sending.folder)}
    done = subprocess.run(
        [*words, *sending.place.words, *map(str, sending.copies)],
        env={**environment, "WANDB_SILENT": "false"},
        stdin=sending.lock or DEVNULL,
        stdout=DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    errors = re.findall(r"^wandb: ERROR (.+)$", done.stderr, re.MULTILINE)
    sending.reason = errors[-1] if errors else ""


def missing_records(
    log: TransactionLog, folder: Path, skipped: int, seen: float, extra: list[Record]
) -> Iterator[Record]:
    """Yield the records of a log that W&B lacks, and further ones behind the record of the run.

    Args:
        log: The log.
        folder: The run's folder, which may have moved.
        skipped: Number of its first rows, which W&B has.
        seen: Time of the last of them; what was printed and measured until then is left out.
        extra: Further records.
    """
    run_id = log.of_kind("run")[0].run_id
    rows = 0
    for record in log.records:
        kind = kind_of(record)
        if kind == "history":
            rows += 1
            if rows <= skipped:
                continue
        timed = kind in ("output_raw", "stats")
        if timed and getattr(record, kind).timestamp.ToMicroseconds() <= seen * 1e6:
            continue
        if kind == "artifact":
            relocate_artifact(record, run_id, folder)
        yield record
        if kind == "run":
            yield from extra
            extra = []


def relocate_artifact(record: Record, run_id: str, folder: Path) -> None:
    """Point the files of an artifact of the model's into the run's folder."""
    for entry in record.artifact.manifest.contents:
        _, inside, path = entry.local_path.partition(f"/{run_id}/")
        if inside:
            entry.local_path = str(folder / path)


def artifact_records(sending: Sending) -> tuple[list[Record], dict[Path, str]]:
    """Return what W&B's client records of checkpoints, and their digests by file.

    They are recorded by a run that is never sent.
    """
    from .wandb_uploads import checkpoint_artifact  # not before: it imports torch

    log = sending.logs[-1]
    commit = commit_of(log)
    entity, project = sending.place.of(log)
    digests: dict[Path, str] = {}
    step, digest = -1, ""
    with TemporaryDirectory() as scratch:
        run = wandb.init(
            entity=entity,
            project=project,
            dir=scratch,
            id=log.of_kind("run")[0].run_id,
            mode="offline",
            settings=wandb.Settings(console="off"),
        )
        for file in sending.waiting:
            try:
                artifact, aliases = checkpoint_artifact(file, run.id, commit)
            except UsageError as error:  # the file is broken
                tqdm.write(f"warning: {error}")
                continue
            if "best" in aliases or artifact.metadata["step"] != step:  # else best and last are one
                digest = run.log_artifact(artifact, aliases=aliases).digest
                step = artifact.metadata["step"]
            digests[file] = digest
        run.finish()
        end_session()  # only then is the log sure to be complete
        (file,) = Path(scratch).glob("wandb/*run-*/*.wandb")
        return [one for one in read_log(file) if kind_of(one) == "artifact"], digests


def commit_of(log: TransactionLog) -> str | None:
    """Return the commit that the run's configuration has."""
    updates = [run.config for run in log.of_kind("run")] + log.of_kind("config")
    config = {item.key: item.value_json for update in updates for item in update.update}
    return json.loads(config.get("run", "{}")).get("commit")
