"""What grows with a run, and what does not: tables in Markdown, benchmarks/results/growth.md.

    python benchmarks/growth.py [--rows 100000]

A tiny network (`growing.py`) is trained by a plain LightningCLI with W&B offline and the usual
callbacks (stock), and by the command line of a baked project (shipped), in turn, each in a fresh
process with one thread. One thing grows: logged rows, values in a step, callbacks, validation
loaders, epochs, files in the run's folder, runs beside it. Times are medians, of all steps or
epochs in a window.

Times hold for one machine at one time: compare the columns.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bakery import in_terminal
from project import HERE, Project
from tables import table

KINDS = ("plain", "shipped")
RESUMED, MANY = "resumed", 1_000  # id of a run that resumes; epochs, runs, and files of a run
KEEP_ALL = {
    "plain": "--trainer.callbacks.save_top_k=-1",
    "shipped": "--callbacks.checkpoint.save_top_k=-1",
}


class Bench(Project):
    """A baked project, and what trains in it."""

    def train(self, kind: str, words: str) -> dict[str, Any]:
        """Train in a new terminal; return the times that `growing.py` noted."""
        result = self.place / "result.json"
        in_terminal(["growing.py", kind, result, *words.split()], self.folder, self.env)
        return dict(json.loads(result.read_text()))

    def seconds(self, *words: str) -> float:
        """Return how long a command of the project takes."""
        begin = time.perf_counter()
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
        command = [sys.executable, "main.py", *words]
        subprocess.run(command, cwd=self.folder, env=self.env, check=True, **quiet)
        return time.perf_counter() - begin


def window(times: list[float], end: int) -> float:
    """Return the median of the last fifth before the step or epoch `end`, in milliseconds."""
    durations = [1000 * (b - a) for a, b in pairwise(times[: end + 1])]
    return median(durations[-max(1, end // 5) :])


def shown(number: float) -> str:
    """Return a number with three digits, or as a whole one if it has more."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


three_digits = partial(table, shown=shown)


def rows(bench: Bench, most: int) -> str:
    """What a step costs that is logged, and the memory, as rows become more."""
    words = f"--trainer.max_epochs 1 --data.batches {most + 1} --trainer.log_every_n_steps 1"
    taken = {kind: bench.train(kind, words) for kind in KINDS}
    counts = [count for count in (100, 1_000, 10_000, 100_000) if count <= most]
    of = []
    for count in counts:
        times = [window(taken[kind]["steps"], count) for kind in KINDS]
        memory = [taken[kind]["memory"].get(str(count), "") for kind in KINDS]
        of.append((f"{count:,}", *times, *memory))
    ends = [taken[kind]["end"] for kind in KINDS]
    head = ("rows so far", "stock: ms a step", "shipped", "stock: MiB", "shipped")
    last = f"At the end, to its last file: stock {ends[0]:.2f} s, shipped {ends[1]:.2f} s."
    return f"{three_digits(*head, of=of)}\n\n{last}"


def values(bench: Bench) -> str:
    """What a step and a validation cost that log more values."""
    of = []
    for count in (1, 10, 100, 1_000):
        words = f"--trainer.max_epochs 3 --data.batches 60 --model.values {count}"
        taken = [bench.train(kind, words) for kind in KINDS]
        times = [window(one["steps"], 60) for one in taken]
        validations = [1000 * median(one["validations"]) for one in taken]
        of.append((count, *times, *validations))
    head = ("values in a step", "stock: ms a step", "shipped")
    return three_digits(*head, "stock: ms a validation of 10 batches", "shipped", of=of)


def callbacks(bench: Bench) -> str:
    """What a step costs with more callbacks, each of which is called in it."""
    of = []
    for count in (1, 10, 50):
        words = "--trainer.max_epochs 1 --data.batches 2000"
        words += " --trainer.callbacks+ growing.Idle" * count
        of.append((count, *(window(bench.train(kind, words)["steps"], 2000) for kind in KINDS)))
    return three_digits("more callbacks", "stock: ms a step", "shipped", of=of)


def loaders(bench: Bench) -> str:
    """What a validation costs with more loaders."""
    of = []
    for count in (1, 2, 4, 8):
        words = f"--trainer.max_epochs 10 --data.batches 10 --data.loaders {count}"
        taken = [bench.train(kind, words) for kind in KINDS]
        of.append((count, *(1000 * median(one["validations"]) for one in taken)))
    head = ("validation loaders, of 10 batches each", "stock: ms a validation", "shipped")
    return three_digits(*head, of=of)


def epochs(bench: Bench, keep: dict[str, str]) -> str:
    """What an epoch of two steps costs, with its validation and checkpoints, after many."""
    words = f"--trainer.max_epochs {MANY} --data.batches 2"
    taken = {kind: bench.train(kind, f"{words} {keep.get(kind, '')}") for kind in KINDS}
    of = [
        (count, *(window(taken[kind]["epochs"], count) for kind in KINDS))
        for count in (10, 100, MANY)
    ]
    head = "files in the run's folder" if keep else "epochs so far"
    return three_digits(head, "stock: ms an epoch", "shipped", of=of)


def folders(bench: Bench) -> str:
    """What commands cost beside a thousand runs, or in a run of a thousand files."""
    bench.env |= {"RUNS_ROOT": str(bench.place / "few"), "WANDB_RUN_ID": RESUMED}
    line = "--model growing.Tiny --data growing.Numbers --trainer.accelerator cpu"
    line += " --data.batches 2 --callbacks.early_stopping null"
    bench.seconds("fit", *f"{line} --trainer.max_epochs 2".split())
    del bench.env["WANDB_RUN_ID"]
    resume = ("fit", "--resume", RESUMED, "--trainer.max_epochs")
    of = [("1 run of 2 files", bench.seconds("runs"), bench.seconds(*resume, "3"))]
    few, many = bench.place / "few", bench.place / "many"
    for number in range(MANY):
        shutil.copytree(few / RESUMED, many / f"run-{number:04}", copy_function=os.link)
    shutil.copytree(few / RESUMED, many / RESUMED)
    bench.env["RUNS_ROOT"] = str(many)
    of += [(f"{MANY:,} runs", bench.seconds("runs"), bench.seconds(*resume, "4"))]
    bench.env["RUNS_ROOT"] = str(few)
    checkpoints = few / RESUMED / "checkpoints"
    for number in range(MANY):
        os.link(checkpoints / "last.ckpt", checkpoints / f"kept-{number:04}.ckpt")
    of += [(f"1 run of {MANY:,} files", bench.seconds("runs"), bench.seconds(*resume, "4"))]
    return three_digits("what there is", "s for `runs`", "s for `fit --resume` of an epoch", of=of)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000, help="rows that are logged at most")
    given = parser.parse_args()
    texts = [f"# Growth\n\n{os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}."]
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place), "growing.py")
        parts: list[Callable[[], str]] = [
            lambda: values(bench),
            lambda: callbacks(bench),
            lambda: loaders(bench),
            lambda: epochs(bench, {}),
            lambda: epochs(bench, KEEP_ALL),
            lambda: folders(bench),
            lambda: rows(bench, given.rows),
        ]
        for part in parts:
            texts.append(part())
            print(texts[-1], end="\n\n", flush=True)
    (HERE / "results" / "growth.md").write_text("\n\n".join(texts) + "\n")


if __name__ == "__main__":
    main()
