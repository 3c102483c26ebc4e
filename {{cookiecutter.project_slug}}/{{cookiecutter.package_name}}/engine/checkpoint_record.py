"""The engine's record in a checkpoint: what can be read of one without unpickling anything.

It is an entry in the zip archive that torch.save writes; torch.load does not mind it.
"""

import json
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

NAME = "archive/engine.json"  # torch.save writes into `archive` where it is given an open file


def append_record(file: Path, record: dict[str, Any]) -> None:
    """Add the record to a checkpoint that torch.save has written."""
    with ZipFile(file, "a") as archive:
        archive.writestr(NAME, json.dumps(record))


def read_record(file: Path) -> dict[str, Any] | None:
    """Return the record in a checkpoint; None if it has none, or is not complete."""
    try:
        with ZipFile(file) as archive:
            record: dict[str, Any] = json.loads(archive.read(NAME))
    except (BadZipFile, EOFError, KeyError, OSError, ValueError):
        return None
    return record


def in_json(values: dict[str, Any]) -> dict[str, Any]:
    """Return those of the values that JSON holds without a change."""
    return {name: value for name, value in values.items() if survives(value)}


def survives(value: Any) -> bool:
    """Return True for a value that is the same when it is written as JSON and read."""
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False


def record_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a checkpoint's content.

    Its keys: `version` of the engine, `run_id`, `epoch`, `step`, `best` (the name of the best
    checkpoint's file, `null` without one), `monitor` and `score` (of this checkpoint), `config`
    (the run's configuration), `model_class` and `hyper_parameters` (those that JSON holds;
    `omitted` has the names of the others).
    """
    engine = dict(checkpoint.get("engine") or {})
    engine.setdefault("best", best_name(checkpoint))  # earlier releases do not say it
    options = checkpoint.get("hyper_parameters") or {}
    kept = in_json(options)
    return {
        **in_json(engine),
        "epoch": checkpoint.get("epoch"),
        "step": checkpoint.get("global_step"),
        "hyper_parameters": kept,
        "omitted": sorted(str(name) for name in options.keys() - kept.keys()),
    }


def best_name(checkpoint: dict[str, Any]) -> str | None:
    """Return the name of the best checkpoint's file, by the states of callbacks."""
    states = (checkpoint.get("callbacks") or {}).values()
    paths = [state.get("best_model_path") for state in states if isinstance(state, dict)]
    return next((Path(path).name for path in paths if path), None)
