"""`main.py runs`: lists runs, shows one, compares, plots and removes them, from folders alone."""

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from rich.filesize import decimal
from rich.text import Text

from .errors import UsageError, did_you_mean
from .files import display_path, python_command, sync_command
from .metrics_log import LOG, read_rows
from .run import find_run, runs_root
from .run_record import RECORD, RunFolder, run_folders
from .runs_table import (
    as_text,
    as_time,
    best_first,
    changed_options,
    default_columns,
    empty_table,
    find_column,
    print_csv,
    print_json,
    print_table,
    print_wide,
    read_filter,
    sort_by,
)
from .screen import is_terminal

ACTIONS = ("list", "show", "diff", "rm", "plot")
RUN_HELP = "id or folder of a run"


class Arguments(argparse.ArgumentParser):
    """A parser whose errors are those of all commands."""

    def error(self, message: str) -> NoReturn:
        """Raise the error instead of printing the usage."""
        raise UsageError(f"{self.prog.removeprefix('main.py ')}: {message}")


def runs(argv: list[str]) -> None:
    """List runs, or do with them what the first word says.

    Raises:
        UsageError: If there is no such action, option or run.
    """
    action = argv[0] if argv and not argv[0].startswith("-") else "list"
    if action not in ACTIONS:
        known = ", ".join(ACTIONS)
        raise UsageError(f"runs: expected {known}, got {action}{did_you_mean(action, ACTIONS)}")
    given = parser_of(action).parse_args(argv[1:] if argv[:1] == [action] else argv)
    given.runs_root = given.runs_root.expanduser().absolute()
    act = {"list": list_runs, "show": show, "diff": diff, "rm": remove, "plot": plot}
    act[action](given)


def parser_of(action: str) -> Arguments:
    """Return the parser of an action."""
    about = {
        "list": "Lists runs, the best first. Further actions: show, diff, rm, plot.",
        "show": "Shows what is known of a run.",
        "diff": "Shows on which options runs differ, and their best values.",
        "rm": "Removes runs.",
        "plot": "Draws metrics of runs into a file.",
    }
    name = "main.py runs" if action == "list" else f"main.py runs {action}"
    parser = Arguments(name, description=about[action], allow_abbrev=False)
    root_help = "folder of all runs, %(default)s"
    parser.add_argument("--runs_root", type=Path, default=runs_root(), help=root_help)
    if action == "list":
        add_list_options(parser)
        return parser
    count = {"show": None, "diff": "+", "rm": "+", "plot": "+"}[action]
    parser.add_argument("runs", nargs=count, metavar="RUN", help=RUN_HELP)
    if action == "rm":
        parser.add_argument("--yes", action="store_true", help="do not ask")
        unsent = "remove also what W&B has not got"
        parser.add_argument("--unsent", action="store_true", help=unsent)
    if action == "plot":
        metric = "a metric; may be given several times; the monitor if not given"
        parser.add_argument("--metric", action="append", default=[], help=metric)
        parser.add_argument("--x", default="step", help="what the x axis shows, %(default)s")
        picture = "picture to write, PNG, SVG or PDF; %(default)s"
        parser.add_argument("--output", type=Path, default=Path("runs.png"), help=picture)
    return parser


def add_list_options(parser: Arguments) -> None:
    """Add the options of the list."""
    parser.add_argument("--sort", help="a column, a metric or an option; best first if not given")
    parser.add_argument("--reverse", action="store_true", help="sort downwards")
    condition = "such as 'val/acc>0.9', state=finished or model.lr=0.1; may be given several times"
    parser.add_argument("--filter", action="append", default=[], help=condition)
    columns = "columns, metrics or options, such as run,best,model.lr"
    parser.add_argument("--columns", help=columns)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--csv", action="store_true", help="print comma-separated values")


def list_runs(given: argparse.Namespace) -> None:
    """Print a table of runs."""
    found = run_folders(given.runs_root)
    for text in given.filter:
        condition = read_filter(text, found)
        found = [run for run in found if condition.holds(run)]
    ordered = sort_by(found, given.sort, given.reverse) if given.sort else best_first(found)
    asked = given.columns.split(",") if given.columns else default_columns(ordered)
    columns = [find_column(column.strip(), ordered, "--columns") for column in asked]
    if given.json:
        print_json(ordered)
    elif given.csv:
        print_csv(ordered, columns)
    elif ordered:
        print_table(ordered, columns)
    else:
        where = "that match" if given.filter else f"in {display_path(given.runs_root)}"
        print(f"no runs {where}")


def named(given: argparse.Namespace) -> list[RunFolder]:
    """Return the runs that are named, each once.

    Raises:
        UsageError: If there is no such run.
    """
    names = given.runs if isinstance(given.runs, list) else [given.runs]
    folders = dict.fromkeys(find_run(name, given.runs_root, "runs") for name in names)
    return [RunFolder(folder) for folder in folders]


def show(given: argparse.Namespace) -> None:
    """Print what is known of a run, and what can be done with it."""
    (run,) = named(given)
    record = run.record
    took = as_time(max(0.0, record.updated - record.began))
    began = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.began))
    epochs = f"{record.epoch}/{record.max_epochs}" if record.max_epochs else f"{record.epoch}"
    lines = {
        "run": display_path(run.path),
        "state": f"{record.verb} {run.state}",
        "command": record.command,
        "began": f"{began}, {took}",
        "epoch": f"{epochs}, step {record.step}" if record.verb == "fit" else "",
        "best": as_text(record.best),
        "metrics": as_text(record.metrics),
        "options": as_text(changed_options(run)),
        "of": record.evaluates or "",
        "size": decimal(run.size),
        "W&B": run.wandb,
        "error": record.error,
    }
    for name, text in lines.items():
        if text:
            print(f"{name:<8} {text}")
    for name in sorted(name for name in run.files if name.startswith("checkpoints/")):
        print(f"saved    {display_path(run.path / name)}  {decimal(run.files[name])}")
    for other in run_folders(run.path.parent):
        if other.record.evaluates == run.id:
            values = as_text(other.record.metrics)
            print(f"{other.record.verb:<8} {other.id}  {values}")
    print_next(run)


def print_next(run: RunFolder) -> None:
    """Print the commands that suit the state of a run."""
    folder = display_path(run.path)
    if run.is_live:
        return
    if run.record.verb == "fit" and run.state not in ("finished", "unknown"):
        print(f"resume   {python_command('fit', '--resume', folder)}")
    if run.wandb == "unsent":
        print(f"sync     {sync_command(run.path)}")


def options_of(run: RunFolder) -> dict[str, Any]:
    """Return the options of a run's config.yaml by their names."""
    if run.record.options:
        return run.record.options
    from .provenance import display_name, iter_settings  # imports jsonargparse

    file = run.path / "config.yaml"
    values = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {display_name(name): value for name, value in iter_settings(values)}


def diff(given: argparse.Namespace) -> None:
    """Print the options on which runs differ, and their best values."""
    compared = named(given)
    if len(compared) < 2:
        raise UsageError("runs diff: expected two runs or more, got one")
    table = empty_table()
    table.add_column("")
    for run in compared:
        table.add_column(run.id, overflow="fold")
    for name, values in differing(compared).items():
        table.add_row(*(Text(as_text(text)) for text in (name, *values)))
    print_wide(table)


def differing(compared: Sequence[RunFolder]) -> dict[str, list[Any]]:
    """Return the differing options of runs, and then their state and best values, by name."""
    options = [options_of(run) for run in compared]
    names = dict.fromkeys(name for values in options for name in values)
    rows = {name: [values.get(name) for values in options] for name in names}
    rows = {name: values for name, values in rows.items() if values.count(values[0]) < len(values)}
    rows["state"] = [run.state for run in compared]
    rows["epoch"] = [run.record.epoch for run in compared]
    metrics = dict.fromkeys(name for run in compared for name in sorted(run.record.best))
    for name in metrics:
        rows[f"best {name}"] = [run.record.best.get(name) for run in compared]
    return rows


def remove(given: argparse.Namespace) -> None:
    """Remove runs, all of them or none.

    Raises:
        UsageError: If one of them is in use, or has rows that W&B lacks, or nobody agrees.
    """
    removed = named(given)
    for run in removed:
        is_run = any((run.path / name).exists() for name in (RECORD, ".lock"))
        if run.path.is_symlink() or not is_run:
            raise UsageError(f"runs rm: {display_path(run.path)} is no folder of a run")
        if run.is_live:
            raise UsageError(f"runs rm: {run.id}: a process is at work on it")
        if run.wandb == "unsent" and not given.unsent:
            ways = f"{sync_command(run.path)} sends it, --unsent removes it all the same"
            raise UsageError(f"runs rm: {run.id}: W&B has not got all of it; {ways}")
    size = decimal(sum(run.size for run in removed))
    what = f"{len(removed)} run{'s' * (len(removed) > 1)}, {size}"
    if not given.yes and not agreed(
        f"remove {', '.join(display_path(run.path) for run in removed)}: {what}?"
    ):
        raise UsageError("runs rm: nothing was removed")
    for run in removed:
        hidden = run.path.with_name(f".removed-{run.id}")  # half a run would be listed as one
        run.path.rename(hidden)
        shutil.rmtree(hidden)
    print(f"removed  {what}")


def agreed(question: str) -> bool:
    """Ask a question.

    Raises:
        UsageError: If there is nobody to answer.
    """
    if not is_terminal(sys.stdin):
        raise UsageError("runs rm: expected --yes where there is no terminal to answer in")
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def plot(given: argparse.Namespace) -> None:
    """Draw metrics of runs, a line for each run, one diagram for each metric.

    Raises:
        UsageError: If none of the runs has logged a metric, or the picture has no known kind.
    """
    drawn = named(given)
    metrics = given.metric or list(filter(None, dict.fromkeys(r.record.monitor for r in drawn)))
    if not metrics:
        raise UsageError("runs plot: expected --metric NAME; these runs have no monitor")
    names: set[str] = set()
    rows = {run.id: logged(run, (*metrics, given.x), names) for run in drawn}
    for metric in (*metrics, given.x):
        if metric not in names:
            hint = did_you_mean(metric, names)
            raise UsageError(f"runs plot: none of these runs has logged {metric}{hint}")
    draw(rows, metrics, given.x, given.output)
    print(f"wrote    {display_path(given.output)}")


def logged(run: RunFolder, wanted: Sequence[str], names: set[str]) -> list[dict[str, Any]]:
    """Return what a run has logged, row by row, without the values that are not wanted.

    Args:
        run: The run.
        wanted: Names of values.
        names: Is given the names of all values.
    """
    rows = []
    for row in read_rows(run.path / LOG) if (run.path / LOG).exists() else ():
        names.update(row)
        rows.append({name: row[name] for name in wanted if name in row})
    return rows


def draw(
    rows: dict[str, list[dict[str, Any]]], metrics: Sequence[str], x: str, output: Path
) -> None:
    """Write a picture.

    Args:
        rows: What each run has logged of these, by its id.
        metrics: The metrics to draw.
        x: The name of the x axis's values.
        output: The file to write.

    Raises:
        UsageError: If the file's kind is not known, or it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5 * len(metrics)), layout="constrained")
    kinds = FigureCanvasAgg(figure).get_supported_filetypes()
    if output.suffix.lstrip(".") not in kinds:
        expected = f"expected a file with one of the endings {', '.join(sorted(kinds))}"
        raise UsageError(f"runs plot --output: {expected}; got {output}")
    for number, metric in enumerate(metrics, 1):
        axes = figure.add_subplot(len(metrics), 1, number)
        for run, values in rows.items():
            having = [row for row in values if metric in row and x in row]
            points = [row[x] for row in having], [row[metric] for row in having]
            axes.plot(*points, label=run, marker="." if len(having) < 50 else "")
        axes.set(xlabel=x, ylabel=metric)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    try:
        figure.savefig(output, dpi=150)
    except OSError as error:
        raise UsageError(f"runs plot --output: {output}: {error.strerror}") from error
