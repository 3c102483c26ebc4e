"""What two ranks are worth and cost, and how soon the end of one ends the job: in Markdown.

    python benchmarks/ranks.py

Real runs of a baked project on CPUs, by processes of one thread each, which talk by gloo. Times
hold for one machine at one time, whose load is told beside them: two ranks have two cores to
themselves only if nothing else works. Where something does, the fastest tenth of the steps says
what they would take alone.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise, product
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bakery import bake, environment
from test_failures import LAUNCHERS, jobs

CLOCK = """
import os, time
from lightning.pytorch import Callback

class Clock(Callback):
    times = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.times.append(time.time())

    def on_train_end(self, trainer, module):
        if trainer.is_global_zero:
            with open(os.environ["CLOCK"], "w") as file:
                print(*self.times, time.time(), file=file)
"""
FIT = (
    "main.py fit --config configs/digits.yaml --trainer.accelerator cpu"
    " --trainer.callbacks+ clock.Clock --trainer.limit_val_batches 0"
    " --callbacks.summaries null --callbacks.checkpoint null"
    " --callbacks.early_stopping null"
)
KINDS = {"error": "exception", "die": "os._exit", "SIGKILL": "SIGKILL", "SIGTERM": "SIGTERM"}


def table(*head: str) -> None:
    print(f"\nLoad of the machine before: {os.getloadavg()[0]:.1f}\n")
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}", flush=True)


def row(*cells: object) -> None:
    texts = (f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells)
    print("|", " | ".join(texts), "|", flush=True)


def own(home: Path) -> dict[str, str]:
    """Return the environment of a process of one thread with a separate folder for runs."""
    return environment(home) | {"OMP_NUM_THREADS": "1", "RUNS_ROOT": str(home / "runs")}


def steps(project: Path, home: Path, launcher: str, ranks: int, options: str) -> list[float]:
    """When a run was started, when each of its steps began, and when the last one was over."""
    words = [*LAUNCHERS[launcher], *f"{FIT} --trainer.devices {ranks} {options}".split()]
    env = own(home) | {"CLOCK": str(home / "clock")}
    begun = time.time()
    subprocess.run(
        words,
        cwd=project,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return [begun, *map(float, (home / "clock").read_text().split())]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--width", type=int, default=120, help="of the network: with 120 a step takes about 20 ms"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images for a step of a rank")
    parser.add_argument("--steps", type=int, default=120, help="of each run")
    parser.add_argument(
        "--rounds", type=int, default=3, help="runs of each kind, of which the middle one counts"
    )
    parser.add_argument(
        "--deaths",
        type=int,
        default=1,
        help="of each kind, of which the slowest counts; 0 for none",
    )
    given = parser.parse_args()
    options = (
        f"--model.width {given.width} --data.batch_size {given.batch_size} --trainer.max_epochs -1"
    )
    options += f" --trainer.max_steps {given.steps}"
    kinds = [("lightning", 1), ("lightning", 2), ("torchrun", 2)]
    with tempfile.TemporaryDirectory() as place:
        project = bake(Path(place), Path(place))
        (project / "clock.py").write_text(CLOCK)
        head = ("launcher", "ranks", "s to the first step", "ms a step", "of the fastest tenth")
        table(*head, "images/s", "of so many single ones", "by the fastest tenth")
        taken = {
            (number, *kind): steps(
                project, Path(place, f"{number}-{'-'.join(map(str, kind))}"), *kind, options
            )
            for number, kind in product(range(given.rounds), kinds)
        }
        alone = fast_alone = 0.0
        for launcher, ranks in kinds:
            runs = [taken[number, launcher, ranks] for number in range(given.rounds)]
            start = median(times[1] - times[0] for times in runs)
            durations = [sorted(1000 * (b - a) for a, b in pairwise(times[11:])) for times in runs]
            step = median(map(median, durations))
            fast = median(ordered[len(ordered) // 10] for ordered in durations)
            # All told, with the ends of epochs, but without the first steps, which allocate memory.
            rate = median(
                ranks * given.batch_size * (given.steps - 10) / (times[-1] - times[11])
                for times in runs
            )
            alone, fast_alone = alone or rate, fast_alone or fast
            row(
                launcher,
                ranks,
                start,
                step,
                fast,
                f"{rate:.0f}",
                rate / alone / ranks,
                fast_alone / fast,
            )
        table(
            "launcher",
            "rank",
            "what ends it",
            "s to the job's end",
            "exit code",
            "told to W&B",
            "orphans",
        )
        for launcher, rank, what in product(LAUNCHERS, (0, 1), KINDS if given.deaths else ()):
            ends = []
            for number in range(given.deaths):
                home = Path(place, f"{launcher}-{rank}-{what}-{number}")
                ends.append(jobs(project, own(home), home / "runs")(launcher, what, rank))
            slowest = max(ends, key=lambda end: end.seconds)
            told = "nothing" if slowest.told is None else slowest.told
            row(
                launcher,
                rank,
                KINDS[what],
                slowest.seconds,
                slowest.code,
                told,
                sum(len(end.left) for end in ends),
            )


if __name__ == "__main__":
    main()
