"""Read what W&B's client recorded of a run: records of LevelDB's log format, each a `Record`.

The format: https://github.com/google/leveldb/blob/main/doc/log_format.md, after seven bytes that
W&B puts before it.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import MetricRecord, Record  # type: ignore[attr-defined]

HEADER = 7  # bytes, of the file and of each piece alike
BLOCK = 32768  # bytes
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4  # kinds of pieces


def records(file: Path) -> Iterator[Record]:
    """The records of a .wandb file, each piece's checksum proved."""
    content, position, parts = file.read_bytes(), HEADER, b""
    assert content[:4] == b":W&B"
    while position + HEADER <= len(content):
        if BLOCK - position % BLOCK < HEADER:  # a block's tail too short for a piece
            position += BLOCK - position % BLOCK
            continue
        checksum, length, kind = (
            content[position : position + 4],
            content[position + 4 : position + 6],
            content[position + 6],
        )
        piece = content[position + HEADER : position + HEADER + int.from_bytes(length, "little")]
        assert zlib.crc32(bytes([kind]) + piece) == int.from_bytes(checksum, "little")
        position += HEADER + len(piece)
        parts = piece if kind in (FULL, FIRST) else parts + piece
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record


@dataclass
class Recorded:
    """One run as W&B will show it once it is sent."""

    id: str = ""
    project: str = ""
    job_type: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, MetricRecord] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    exit_code: int | None = None


def recorded(run: Path) -> Recorded:
    """Reads the only .wandb file in a run's folder."""
    (file,) = run.glob("wandb/*run-*/*.wandb")
    result = Recorded()
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            result.id, result.project, result.job_type = (
                record.run.run_id,
                record.run.project,
                record.run.job_type,
            )
            result.config |= {
                item.key: json.loads(item.value_json) for item in record.run.config.update
            }
        elif kind == "config":
            result.config |= {
                item.key: json.loads(item.value_json) for item in record.config.update
            }
        elif kind == "history":
            row = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            result.history.append(row)
        elif kind == "summary":
            update = {
                "/".join(i.nested_key) or i.key: json.loads(i.value_json)
                for i in record.summary.update
            }
            result.summary |= update
        elif kind == "metric":
            result.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "artifact":
            result.artifacts.append(record.artifact)
        elif kind == "exit":
            result.exit_code = record.exit.exit_code
    return result
