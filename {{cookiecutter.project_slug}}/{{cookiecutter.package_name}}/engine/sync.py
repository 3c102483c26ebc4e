"""`main.py sync`: brings W&B what it does not have of runs, from their folders alone, each row once.

Whatever W&B got of it, each start of a run leaves a log with all that was recorded, a `.wandb` file. W&B's own
`wandb sync` sends a log whole, behind the rows that are there already. So it is given a copy, without those rows and
with the checkpoints that wait in `uploads/`. What is there is asked of W&B and noted nowhere: all of this may be killed
at any time and begun again. A log is one of LevelDB, https://github.com/google/leveldb/blob/main/doc/log_format.md,
after seven bytes of W&B's own; each record in it is a message of W&B's client.
"""

import argparse
import json
import math
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from subprocess import DEVNULL
from tempfile import TemporaryDirectory
from typing import IO, Any

import wandb
from tqdm import tqdm  # type: ignore[import-untyped]
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

from .run import Mistake, end_session, find_run, refusal, runs_root, shown

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

HEADER, BLOCK = 7, 32768  # bytes: of a log and of each piece in it; that no piece crosses
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4  # kinds of pieces
QUIET = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false", "WANDB_MODE": "online"}
# If W&B goes away meanwhile; its client would try for days.
BRIEF = {f"WANDB__{part}_RETRY_MAX": "3" for part in ("GRAPHQL", "FILE_STREAM", "FILE_TRANSFER")}


def sync(words: list[str]) -> None:
    """Sends what W&B lacks of the runs that are named, or of all; the exit code is 1 if something remains."""
    parser = argparse.ArgumentParser("main.py sync", description="Sends to W&B what it lacks of runs.")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="id or folder of a run; all runs if none is given")
    parser.add_argument("--runs_root", type=Path, default=runs_root(), help="folder of all runs, %(default)s")
    given, unknown = parser.parse_known_args(words)
    if unknown:
        raise Mistake(f"sync: expected runs or --runs_root, got {unknown[0]}")
    root = given.runs_root.expanduser().absolute()
    recorded = {file.parents[2] for file in root.glob("*/wandb/*run-*/*.wandb")}
    folders = [find_run(run, root, "sync") for run in given.runs] or sorted(recorded)
    environment, remains = dict(os.environ), 0
    os.environ |= QUIET
    try:
        away = refusal()
        for folder in tqdm(folders, "sync", disable=None):
            with (folder / ".lock").open("a") as lock:
                left = away or ("" if locked(lock) else "another process is at work on it") or deliver(folder, 1, lock)
            remains += bool(left)
            tqdm.write(f"left     {shown(folder)}: {left}" if left else f"sent     {shown(folder)}")
        end_session()
    finally:
        os.environ.clear()
        os.environ.update(environment)
    if remains:
        raise SystemExit(1)


def locked(lock: IO[str]) -> bool:
    """Takes the lock of a run. As `wandb sync` gets it too, no second one begins before the first has ended."""
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


@dataclass
class Log:
    """What W&B's client recorded of one start of a run."""

    file: Path
    records: list[Record]

    def of(self, kind: str) -> list[Any]:
        return [getattr(record, kind) for record in self.records if record.WhichOneof("record_type") == kind]

    @cached_property
    def times(self) -> list[float]:
        """When each row was logged, which tells it from all others."""
        rows = [{(item.key or item.nested_key[0]): item.value_json for item in row.item} for row in self.of("history")]
        return [float(row["_timestamp"]) for row in rows]


class There:
    """What W&B has of a run: the number of rows, the end, the digests of its checkpoints."""

    def __init__(self, logs: list[Log]) -> None:
        run, api = logs[-1].of("run")[0], wandb.Api()
        self.rows, self.ended, self.digests = 0, False, set[str]()
        try:
            self.run = api.run(f"{run.entity or api.default_entity}/{run.project or 'uncategorized'}/{run.run_id}")
        except wandb.errors.CommError as error:
            if "Could not find run" in str(error):
                return
            raise
        place = Path(self.run.dir)
        for empty in (place, *place.parents[:2]):  # W&B's client makes ENTITY/PROJECT/RUN, for nothing
            with suppress(OSError):
                empty.rmdir()
        times, newest = [time for log in logs for time in log.times], self._times(self.run.lastHistoryStep)[-1:]
        elsewhere = bool(newest) and newest[0] not in times  # the run went on in another folder
        there = set(self._times(0)) if elsewhere else set(times[: times.index(newest[0]) + 1] if newest else ())
        self.rows = next((n for n, time in enumerate(times) if time not in there), len(times))
        failed = not (exits := logs[-1].of("exit")) or exits[0].exit_code  # a process that was killed logs no end
        states = ("failed", "killed", "preempted") if failed else ("finished",)
        self.ended = self.rows == len(times) and (elsewhere or self.run.state in states)
        self.digests = {artifact.digest for artifact in self.run.logged_artifacts()}

    def _times(self, step: int) -> list[float]:
        return [row["_timestamp"] for row in self.run.scan_history(min_step=max(step, 0), use_cache=False)]


def deliver(folder: Path, tries: int, lock: IO[str] | None = None, checkpoints: bool = True) -> str:
    """Brings W&B what it lacks of a run, and returns what it lacks then, in words."""
    try:
        files = sorted(folder.glob("wandb/*run-*/run-*.wandb"), key=lambda file: file.parent.name.partition("run-")[2])
        logs = [log for log in (Log(file, read(file)) for file in files) if log.of("history") or log.of("exit")]
        sent, rows = dict[Path, str](), -1
        while logs:
            there = There(logs)
            if rows == 0:  # the client says it only with a row
                there.run.summary.update({"_step": there.run.lastHistoryStep})
            for file, digest in sent.items():
                if digest not in there.digests:
                    break  # and those after it once more, for aliases hang on the order
                file.unlink()
            waiting = sorted(folder.glob("uploads/*.ckpt")) if checkpoints else []
            rows = sum(len(log.times) for log in logs) - there.rows
            lacks = [f"{rows} rows"] * bool(rows) + [f"{len(waiting)} checkpoints"] * bool(waiting)
            lacks += ["its end"] * (not there.ended and not lacks)
            if not lacks:
                for log in logs:
                    Path(f"{log.file}.synced").touch()  # so that nobody's `wandb sync` sends it once more
                if lock and (wish := folder / "uploads" / "registry").exists():
                    from .artifacts import link  # not before: it imports torch

                    return link(wish, there.run)
            if not lacks or not tries:
                return ", ".join(lacks)
            tries -= 1
            sent = send(folder, logs, there, waiting, lock)
    except Exception as error:  # of W&B, of whatever kind
        return str(error).rstrip(".")
    return ""


def send(folder: Path, logs: list[Log], there: There, waiting: list[Path], lock: IO[str] | None) -> dict[Path, str]:
    """Gives W&B's client copies of the logs with what W&B lacks; returns the digests of the checkpoints in them."""
    known, before, copies = there.rows, list[Record](), list[Path]()
    artifacts, digests = versions(waiting, logs[-1]) if waiting else ([], {})
    for log in logs:
        skipped = min(known, len(log.times))
        known -= skipped
        if skipped < len(log.times) or log is logs[-1]:
            seen = math.inf if there.ended else log.times[skipped - 1] if skipped else 0
            copies.append(log.file.with_name("missing.wandb"))
            extra = before + artifacts * (log is logs[-1])
            write(copies[-1], log.file.read_bytes()[:HEADER], lacked(log, folder, skipped, seen, extra))
            Path(f"{copies[-1]}.syncstate").unlink(missing_ok=True)  # else the first row gets an earlier one's step
        before += [record for record in log.records if record.WhichOneof("record_type") == "summary"]
    words = [sys.executable, "-m", "wandb", "sync", "--include-online", "--include-synced", *map(str, copies)]
    environment = {**os.environ, **QUIET, **BRIEF, "WANDB_DIR": str(folder)}
    subprocess.run(words, env=environment, stdin=lock or DEVNULL, stdout=DEVNULL, stderr=DEVNULL, check=False)
    for copy in copies:
        copy.unlink()
        Path(f"{copy}.synced").unlink(missing_ok=True)
    return digests


def lacked(log: Log, folder: Path, skipped: int, seen: float, extra: list[Record]) -> Iterator[Record]:
    """The records of a log without its first rows and what was printed and measured meanwhile, and with others."""
    for record in log.records:
        kind = record.WhichOneof("record_type")
        skipped -= kind == "history"
        if kind == "history" and skipped >= 0:
            continue
        if kind in ("output_raw", "stats") and getattr(record, kind).timestamp.ToMicroseconds() <= seen * 1e6:
            continue
        if kind == "artifact":  # of the model's own; the folder may have been moved
            for entry in record.artifact.manifest.contents:
                _, inside, path = entry.local_path.partition(f"/{record._info.stream_id}/")
                entry.local_path = str(folder / path) if inside else entry.local_path
        yield record
        if kind == "run":
            yield from extra
            extra = []


def versions(waiting: list[Path], log: Log) -> tuple[list[Record], dict[Path, str]]:
    """What W&B's client records of checkpoints, by a run that is never sent; and their digests."""
    from .artifacts import version  # not before: it imports torch

    config = {item.key: item.value_json for run in log.of("run") for item in run.config.update}
    config |= {item.key: item.value_json for more in log.of("config") for item in more.update}
    commit, step, digest, digests = json.loads(config.get("run", "{}")).get("commit"), -1, "", dict[Path, str]()
    with TemporaryDirectory() as scratch:
        of = log.of("run")[0]
        quiet, project = wandb.Settings(console="off"), of.project or None
        run = wandb.init(of.entity or None, project, scratch, of.run_id, mode="offline", settings=quiet)
        for file in waiting:
            try:
                artifact, aliases = version(file, run.id, commit)
            except Exception as error:  # of torch, of whatever kind: a file that is broken
                tqdm.write(f"warning: {shown(file)}: not a checkpoint that can be read ({type(error).__name__})")
                continue
            if "best" in aliases or artifact.metadata["step"] != step:  # else it is the best one once more
                digest, step = run.log_artifact(artifact, aliases=aliases).digest, artifact.metadata["step"]
            digests[file] = digest
        run.finish()
        wandb.teardown()  # only then is the log sure to be whole
        (file,) = Path(scratch).glob("wandb/*run-*/*.wandb")
        return [record for record in read(file) if record.WhichOneof("record_type") == "artifact"], digests


def read(file: Path) -> list[Record]:
    """The records of a log, up to the first that is not whole: its writer may have been killed."""
    content, position, parts, records = file.read_bytes(), HEADER, b"", list[Record]()
    while position + HEADER <= len(content):
        if BLOCK - position % BLOCK < HEADER:
            position += BLOCK - position % BLOCK
            continue
        start = position + HEADER
        checksum, length, kind = struct.unpack_from("<IHB", content, position)
        piece = content[start : start + length]
        if zlib.crc32(bytes([kind]) + piece) != checksum:
            break
        parts = piece if kind in (FULL, FIRST) else parts + piece
        if kind in (FULL, LAST):
            records.append(Record.FromString(parts))
        position = start + length
    return records


def write(file: Path, head: bytes, records: Iterable[Record]) -> None:
    """Writes a log."""
    log = bytearray(head)
    for record in records:
        content, first = record.SerializeToString(), True
        while first or content:
            log.extend(bytes(BLOCK - len(log) % BLOCK) if BLOCK - len(log) % BLOCK < HEADER else b"")
            room = BLOCK - len(log) % BLOCK - HEADER
            piece, content = content[:room], content[room:]
            kind = (MIDDLE, LAST, FIRST, FULL)[2 * first + (not content)]
            log += struct.pack("<IHB", zlib.crc32(bytes([kind]) + piece), len(piece), kind) + piece
            first = False
    file.write_bytes(log)
