"""The table of `main.py runs`: columns, filters, the order, and how it is printed."""

import csv
import json
import math
import operator
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from shutil import get_terminal_size
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from .errors import UsageError, did_you_mean
from .run_record import RunFolder
from .screen import is_terminal

COLUMNS: dict[str, Callable[[RunFolder], Any]] = {
    "run": lambda run: run.id,
    "verb": lambda run: run.record.verb,
    "state": lambda run: run.state,
    "epoch": lambda run: run.record.epoch,
    "step": lambda run: run.record.step,
    "monitor": lambda run: run.record.monitor,
    "best": lambda run: run.record.score,
    "seed": lambda run: run.record.options.get("seed_everything"),
    "age": lambda run: max(0.0, time.time() - run.record.began),
    "duration": lambda run: max(0.0, run.record.updated - run.record.began),
    "size": lambda run: run.size,
    "wandb": lambda run: run.wandb,
    "name": lambda run: run.record.options.get("trainer.logger.name"),
    "evaluates": lambda run: run.record.evaluates,
    "options": lambda run: changed_options(run),
    "error": lambda run: run.record.error,
}
SHOWN = ("run", "state", "epoch", "best", "seed", "age", "size", "wandb", "options")
DROPPED_FIRST = ("wandb", "size", "age", "seed")  # in a terminal that is too narrow
OPTIONS_WIDTH = 24  # columns that are kept for the options
GAP = 2  # columns between two cells
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
FILTER = re.compile(r"(.+?)(<=|>=|!=|=|<|>)(.*)")
STYLES = {"training": "bold", "running": "bold", "failed": "red", "killed": "yellow"}
UNITS = (("d", 86400), ("h", 3600), ("min", 60))  # of a time, in seconds


def changed_options(run: RunFolder) -> dict[str, Any]:
    """Return what the command of a run has given over the defaults."""
    record = run.record
    return {name: record.options[name] for name in record.given if name in record.options}


def cell(run: RunFolder, column: str) -> Any:
    """Return a value of a run: a column, a metric of its best validation, or an option."""
    if column in COLUMNS:
        return COLUMNS[column](run)
    record = run.record
    for values in (record.best, record.metrics, record.options):
        if column in values:
            return values[column]
    return None


def find_column(name: str, runs: Sequence[RunFolder], option: str) -> str:
    """Return the full name of a column, which is given by its name or the end of an option's.

    Raises:
        UsageError: If no run has it, with the nearest name, or if it is the end of several.
    """
    options = {one for run in runs for one in run.record.options}
    known = {*COLUMNS, *options}
    for run in runs:
        known.update(run.record.best, run.record.metrics)
    if not runs or name in known:
        return name
    ends = sorted(one for one in options if one.endswith(f".{name}"))
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise UsageError(f"runs {option}: expected one of {', '.join(ends)}; got {name}")
    expected = f"expected {', '.join(COLUMNS)}, a metric, or an option"
    raise UsageError(f"runs {option}: {expected}; got {name}{did_you_mean(name, known)}")


def short_names(names: Collection[str]) -> dict[str, str]:
    """Return for options the ends of their names where these tell them apart."""
    ends = Counter(name.rpartition(".")[2] for name in names)
    return {name: end if ends[end := name.rpartition(".")[2]] == 1 else name for name in names}


@dataclass(frozen=True)
class Filter:
    """A condition such as `val/acc>0.9`, `state=finished` or `model.lr!=0.1`."""

    column: str
    sign: str
    text: str

    def holds(self, run: RunFolder) -> bool:
        """Return whether it holds for a run; `=` and `!=` take `*` for any letters."""
        value = cell(run, self.column)
        number = as_number(self.text)
        if self.sign in COMPARISONS:
            is_number = isinstance(value, int | float) and number is not None
            return is_number and COMPARISONS[self.sign](value, number)
        if isinstance(value, int | float) and number is not None:
            equal = math.isclose(value, number, rel_tol=1e-9)
        else:
            equal = fnmatchcase(as_text(value), self.text)
        return equal == (self.sign == "=")


def read_filter(text: str, runs: Sequence[RunFolder]) -> Filter:
    """Return the filter that a text says.

    Raises:
        UsageError: If it says none.
    """
    found = FILTER.fullmatch(text)
    if not found:
        expected = "expected such as val/acc>0.9, state=finished or model.lr!=0.1"
        raise UsageError(f"runs --filter: {expected}; got {text or 'nothing'}")
    name, sign, value = (part.strip() for part in found.groups())
    made = Filter(find_column(name, runs, "--filter"), sign, value)
    if made.sign in COMPARISONS and as_number(made.text) is None:
        raise UsageError(f"runs --filter: expected a number after {made.sign}; got {text}")
    return made


def as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def best_first(runs: Sequence[RunFolder]) -> list[RunFolder]:
    """Order runs by their best value; those with the monitor that most have come first.

    Each is followed by the runs that evaluate it. Runs without a value are behind, the newest
    first.
    """
    monitors = Counter(run.record.monitor for run in runs if run.record.score is not None)

    def place(run: RunFolder) -> tuple[Any, ...]:
        record, score = run.record, run.record.score
        if score is None or is_nan(score):
            return (1, 0, "", 0.0, -record.began)
        value = -score if record.mode == "max" else score
        return (0, -monitors[record.monitor], str(record.monitor), value, -record.began)

    return with_evaluations(sorted(runs, key=place))


def is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def with_evaluations(runs: Sequence[RunFolder]) -> list[RunFolder]:
    """Put the runs that evaluate another one behind that."""
    ids = {run.id for run in runs}
    behind: dict[str, list[RunFolder]] = {}
    for run in runs:
        if run.record.evaluates in ids - {run.id}:
            behind.setdefault(str(run.record.evaluates), []).append(run)
    ordered: list[RunFolder] = []
    evaluations = {run.id for group in behind.values() for run in group}

    def add(run: RunFolder) -> None:
        ordered.append(run)
        for evaluation in sorted(behind.get(run.id, []), key=lambda one: one.record.began):
            add(evaluation)

    for run in runs:
        if run.id not in evaluations:
            add(run)
    return ordered


def sort_by(runs: Sequence[RunFolder], column: str, downwards: bool) -> list[RunFolder]:
    """Order runs by a column; those without a value come last."""
    name = find_column(column, runs, "--sort")
    rest = [run for run in runs if cell(run, name) in (None, "") or is_nan(cell(run, name))]
    having = [run for run in runs if run not in rest]

    def place(run: RunFolder) -> tuple[bool, float, str]:
        value = cell(run, name)
        is_number = isinstance(value, int | float)
        return not is_number, value if is_number else 0.0, as_text(value)

    return sorted(having, key=place, reverse=downwards) + rest


def distinguishing(runs: Sequence[RunFolder]) -> set[str]:
    """Return the names of given options that are not the same in all of the trainings."""
    trained = [run.record for run in runs if run.record.verb == "fit"]
    names = {name for record in trained for name in record.given}
    if len(trained) < 2:
        return names
    first = trained[0].options
    return {
        name
        for name in names
        if any(record.options.get(name) != first.get(name) for record in trained)
    }


def default_columns(runs: Sequence[RunFolder]) -> list[str]:
    """Return the columns that are shown: seeds if they differ, W&B if it lacks something.

    In a narrow terminal some make room for the options.
    """
    trained = [run for run in runs if run.record.verb == "fit"]
    left_out = set()
    if len({as_text(cell(run, "seed")) for run in trained}) < 2:
        left_out.add("seed")
    if all(run.wandb != "unsent" for run in runs):
        left_out.add("wandb")
    columns = [name for name in SHOWN if name not in left_out]
    for name in DROPPED_FIRST if is_terminal(sys.stdout) else ():
        widths = [width_of(one, runs) + GAP for one in columns if one != "options"]
        if sum(widths) + OPTIONS_WIDTH > get_terminal_size().columns:
            columns = [one for one in columns if one != name]
    return columns


def width_of(column: str, runs: Sequence[RunFolder]) -> int:
    """Return the width of a column that is not wrapped, in letters."""
    return max(
        len(text) for text in (title(column, runs), *(shown(r, column, set()) for r in runs))
    )


def title(column: str, runs: Sequence[RunFolder]) -> str:
    """Return what stands above a column: above the best values their metric, if it is one."""
    monitors = {run.record.monitor for run in runs if run.record.score is not None}
    return str(next(iter(monitors))) if column == "best" and len(monitors) == 1 else column


def as_text(value: Any) -> str:
    """Return a value as it is shown."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        items = {name: "null" if item is None else as_text(item) for name, item in value.items()}
        return "  ".join(f"{name}={text}" for name, text in items.items())
    return value if isinstance(value, str) else json.dumps(value)


def as_time(seconds: float) -> str:
    """Return a time with its largest unit, such as `3 h`."""
    for unit, length in UNITS:
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def shown(run: RunFolder, column: str, options: set[str]) -> str:
    """Return the text of a cell."""
    value = cell(run, column)
    record = run.record
    if column == "run" and record.evaluates:
        return f"  {value}"
    if column == "options" and record.verb != "fit":
        return f"{record.verb}  {as_text(record.metrics)}"
    if column == "options":
        names = short_names(options)
        return as_text({names[name]: item for name, item in value.items() if name in options})
    if column in ("age", "duration"):
        return as_time(value)
    if column == "size":
        return decimal(value)
    if column == "epoch" and record.verb != "fit":
        return ""
    if column == "epoch" and record.max_epochs:
        return f"{value}/{record.max_epochs}"
    return as_text(value)


def print_table(runs: Sequence[RunFolder], columns: Sequence[str]) -> None:
    """Print a table as wide as the terminal, or as wide as it needs where there is none."""
    options = distinguishing(runs)
    table = empty_table()
    for column in columns:
        wraps = column in ("options", "error")
        justify: Any = "left" if wraps or column in ("run", "state", "name", "wandb") else "right"
        table.add_column(title(column, runs), no_wrap=not wraps, overflow="fold", justify=justify)
    for run in runs:
        texts = [shown(run, column, options) for column in columns]
        table.add_row(*map(Text, texts), style=STYLES.get(run.state))
    print_wide(table)


def empty_table() -> Table:
    """Return a table without lines."""
    return Table(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))


def print_wide(table: Table) -> None:
    """Print a table, in a terminal as wide as that, else as wide as it needs."""
    Console(width=None if is_terminal(sys.stdout) else 1000).print(table)


def as_values(run: RunFolder) -> dict[str, Any]:
    """Return all that is known of a run, as JSON can hold it."""
    values = {column: cell(run, column) for column in COLUMNS}
    record = run.record
    values |= {"folder": str(run.path), "metrics": record.metrics, "best_metrics": record.best}
    return dict(without_nan(values))


def without_nan(value: Any) -> Any:
    """Return values with None in place of what JSON cannot hold."""
    if isinstance(value, dict):
        return {name: without_nan(item) for name, item in value.items()}
    is_number = not isinstance(value, float) or math.isfinite(value)
    return value if is_number else None


def print_json(runs: Sequence[RunFolder]) -> None:
    """Print a list with a dict for each run."""
    print(json.dumps([as_values(run) for run in runs], indent=2))


def print_csv(runs: Sequence[RunFolder], columns: Sequence[str]) -> None:
    """Print a table with commas; each option that tells runs apart has its own column."""
    names: list[str] = []
    for column in columns:
        names += sorted(distinguishing(runs)) if column == "options" else [column]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(names)
    for run in runs:
        values = [cell(run, name) for name in names]
        writer.writerow([json.dumps(one) if isinstance(one, dict) else one for one in values])
