"""The rows that a run has logged: metrics.jsonl while it runs, and metrics.csv made of it."""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import compress
from pathlib import Path
from typing import Any

from .errors import RunError
from .files import atomic_write, display_path

LOG, TABLE = "metrics.jsonl", "metrics.csv"
NUMBER, STAGE, STEP = "_row", "_stage", "_step"  # of each row, beside its values
HIDDEN = (NUMBER, STAGE, STEP)
FIRST_COLUMNS = ("step", "epoch")
BLOCK = 1 << 16  # bytes


class MetricsLog:
    """Appends rows to `metrics.jsonl`, a line of JSON each, whatever their names are.

    Beside its values a row has `_row`, a number that grows from row to row, `_stage`, the command
    that logged it, and `_step`, the number of training steps before it.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / LOG
        self.next_row = 0
        self._stream: Any = None
        self._size = 0  # bytes of whole rows
        self._table_is_old = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_stream": None}  # a launcher copies it to another process

    def append(self, values: Mapping[str, Any], stage: str, step: int) -> None:
        """Append a row.

        Raises:
            RunError: If it cannot be written; nothing of it is left then.
        """
        self.open()
        row = {NUMBER: self.next_row, STAGE: stage, STEP: step, **values}
        line = json.dumps(row, default=as_number_or_text).encode() + b"\n"
        try:
            self._stream.write(line)
            self._stream.flush()
        except OSError as error:
            self._undo()  # half a row would be read as a row
            message = f"{display_path(self.file)} cannot be written: {error.strerror}"
            raise RunError(message) from error
        self._size += len(line)
        self.next_row += 1
        self._table_is_old = True

    def open(self) -> None:
        """Continue the file of an earlier start, without a row that a kill has cut."""
        if self._stream is not None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if not self.file.exists():
            self._take_over_table()
        self._stream = self.file.open("ab")
        self._size, last = last_line(self.file)
        self._stream.truncate(self._size)
        self.next_row = json.loads(last)[NUMBER] + 1 if last else 0

    def close(self) -> None:
        """Close the file, and write the table if there is another row."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._table_is_old:
            write_table(self.file.parent)
            self._table_is_old = False

    def keep(self, stays: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the rows for which `stays` is false."""
        self.open()
        self.close()
        rows = list(map(stays, read_rows(self.file)))
        if not all(rows):
            # The file is closed when another takes its place, which Windows asks for.
            with atomic_write(self.file) as part, self.file.open("rb") as lines:
                write_lines(part, compress(lines, rows))
            self._table_is_old = True

    def _undo(self) -> None:
        with suppress(OSError):  # it tries to write what is left
            self._stream.close()
        self._stream = None
        os.truncate(self.file, self._size)

    def _take_over_table(self) -> None:
        """Write the rows of a run that an earlier release of the engine has logged."""
        table = self.file.with_name(TABLE)
        if not table.exists():
            return
        with (
            table.open(newline="", encoding="utf-8") as stream,
            atomic_write(self.file) as part,
        ):
            rows = enumerate(csv.DictReader(stream))
            lines = (json.dumps(row_of_table(number, values)) for number, values in rows)
            write_lines(part, (f"{line}\n".encode() for line in lines))


def row_of_table(number: int, values: Mapping[str, str]) -> dict[str, Any]:
    """Return a row of metrics.csv as one of metrics.jsonl."""
    given = {name: as_number(text) for name, text in values.items() if text}
    stage = "test" if any(name.startswith("test/") for name in given) else "fit"
    return {NUMBER: number, STAGE: stage, STEP: given.get("step", -1), **given}


def write_lines(file: Path, lines: Iterable[bytes]) -> None:
    with file.open("wb") as stream:
        stream.writelines(lines)


def write_table(folder: Path) -> None:
    """Write metrics.csv: the columns `step` and `epoch`, then the names in their order."""
    log = folder / LOG
    columns = dict.fromkeys(FIRST_COLUMNS)
    for row in read_rows(log):
        columns |= dict.fromkeys(row)
    for name in HIDDEN:
        columns.pop(name, None)
    with (
        atomic_write(folder / TABLE) as part,
        part.open("w", newline="", encoding="utf-8") as stream,
    ):
        writer = csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(read_rows(log))


def update_table(folder: Path) -> None:
    """Write metrics.csv if the run was killed before it could, or if it still runs."""
    log, table = folder / LOG, folder / TABLE
    try:
        if not table.exists() or table.stat().st_mtime_ns < log.stat().st_mtime_ns:
            write_table(folder)
    except (OSError, RunError):  # nothing was logged, or the folder is another's
        return


def read_rows(log: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a metrics.jsonl, each with its names in order and its hidden values."""
    with log.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield json.loads(line)


def last_line(file: Path) -> tuple[int, bytes]:
    """Return how many bytes of a file are whole lines, and the last of them."""
    with file.open("rb") as stream:
        begin = end = stream.seek(0, os.SEEK_END)
        found = b""
        while begin and found.count(b"\n") < 2:
            size = min(BLOCK, begin)
            begin = stream.seek(begin - size)
            found = stream.read(size) + found
    whole, newline, cut = found.rpartition(b"\n")
    return end - len(cut), whole.rpartition(b"\n")[2] if newline else b""


def as_number_or_text(value: Any) -> Any:
    """Return a tensor or an array of one value as a number, and anything else as a text."""
    try:
        return value.item()
    except (AttributeError, RuntimeError, ValueError):
        return str(value)


def as_number(text: str) -> Any:
    """Return the number that a field of a table says; the text where it is none."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
