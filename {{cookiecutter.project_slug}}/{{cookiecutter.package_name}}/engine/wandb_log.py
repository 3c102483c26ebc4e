"""The log that W&B's client writes of a run, a `.wandb` file. Imports wandb's messages.

A log is one of LevelDB, https://github.com/google/leveldb/blob/main/doc/log_format.md, after seven
bytes of W&B's; each record in it is a message of W&B's client.
"""

import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

HEADER = 7  # bytes: of W&B's at the start of a log, and of each piece
BLOCK = 32768  # bytes, which no piece crosses
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4  # kinds of pieces


@dataclass
class TransactionLog:
    """What W&B's client recorded of one start of a run."""

    file: Path
    records: list[Record]

    def of_kind(self, kind: str) -> list[Any]:
        """Return the contents of all records of one kind, such as `history`."""
        return [getattr(one, kind) for one in self.records if kind_of(one) == kind]

    @cached_property
    def times(self) -> list[float]:
        """When each row was logged, in seconds; no two rows of a run have the same time."""
        times = []
        for row in self.of_kind("history"):
            values = {item.key or item.nested_key[0]: item.value_json for item in row.item}
            times.append(float(values["_timestamp"]))
        return times


def kind_of(record: Record) -> str:
    return str(record.WhichOneof("record_type"))


class GrowingLog:
    """The log of a run that is being written.

    Args:
        file: The log.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.position = HEADER  # up to which the log is read
        self.row = -1

    def last_row(self) -> int:
        """Return the number of the last row (`_step`) in the file; -1 without one."""
        if not self.file.exists():
            return self.row
        for record, end in complete_records(self.file, self.position):
            self.position = end
            if kind_of(record) == "history":
                self.row = max(self.row, record.history.step.num)
        return self.row


class RowsWritten:
    """Says whether the rows are in a run's log that were logged when it was first asked.

    Args:
        run: The W&B run.
        log: Its log.
        first_row: Number of the first row that this start of the run may log.
    """

    def __init__(self, run: Any, log: GrowingLog, first_row: int) -> None:
        self.run, self.log, self.first_row = run, log, first_row
        self.last: int | None = None

    def __call__(self) -> bool:
        try:
            if self.last is None:
                self.last = self.run.step - 1
        except Exception:  # W&B raises many kinds; of a run that has ended nothing is missing
            return True
        return self.last < self.first_row or self.log.last_row() >= self.last


def read_log(file: Path) -> list[Record]:
    """Return the records of a log, up to the first that is not complete."""
    return [record for record, _ in complete_records(file, HEADER)]


def complete_records(file: Path, begin: int) -> Iterator[tuple[Record, int]]:
    """Yield each complete record of a log, and where it ends, from the position `begin`."""
    with file.open("rb") as stream:
        stream.seek(begin)
        content = stream.read()
    position, parts, end = begin, b"", begin + len(content)
    while position + HEADER <= end:
        room = BLOCK - position % BLOCK
        if room < HEADER:  # filled up with zeros
            position += room
            continue
        start = position + HEADER - begin
        checksum, length, kind = struct.unpack_from("<IHB", content, position - begin)
        piece = content[start : start + length]
        if zlib.crc32(bytes([kind]) + piece) != checksum:  # its writer was killed, or is writing
            break
        position += HEADER + length
        parts = piece if kind in (FULL, FIRST) else parts + piece
        if kind in (FULL, LAST):
            yield Record.FromString(parts), position


def write_log(file: Path, head: bytes, records: Iterable[Record]) -> None:
    """Write a log that begins with the bytes `head`."""
    log = bytearray(head)
    for record in records:
        append_record(log, record.SerializeToString())
    file.write_bytes(log)


def append_record(log: bytearray, content: bytes) -> None:
    """Append a record to a log, in as many pieces as the blocks ask for."""
    first = True
    while first or content:
        left = BLOCK - len(log) % BLOCK
        if left < HEADER:
            log.extend(bytes(left))
        room = BLOCK - len(log) % BLOCK - HEADER
        piece, content = content[:room], content[room:]
        begins, ends = (FIRST, FULL) if first else (MIDDLE, LAST)
        kind = begins if content else ends
        log += struct.pack("<IHB", zlib.crc32(bytes([kind]) + piece), len(piece), kind) + piece
        first = False
