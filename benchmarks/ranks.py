"""What two ranks are worth and cost, and how soon the end of one ends the job: in Markdown.

    python benchmarks/ranks.py

Real runs of a baked project on CPUs, by processes of one thread each, which talk by gloo, beside a
plain LightningCLI and a loop of PyTorch alone with the same network and data, in turn. Writes
benchmarks/results/ranks.md.

Times hold for one machine at one time, whose load is told beside them: two ranks have two cores to
themselves only if nothing else works. Where something does, the fastest tenth of the steps says
what they would take alone.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from itertools import pairwise, product
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bakery import bake, environment
from tables import table
from test_failures import LAUNCHERS, jobs

HERE = Path(__file__).parent
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
STOCK = """
from lightning.pytorch.cli import LightningCLI

LightningCLI(save_config_callback=None)
"""
COMMON = (
    " --trainer.accelerator cpu --trainer.callbacks+ clock.Clock --trainer.limit_val_batches 0"
    " --model.width {width} --data.batch_size {batch_size} --trainer.max_epochs -1"
    " --trainer.max_steps {steps} --trainer.devices {ranks}"
)
LOOP = "loop.py {width} {batch_size} {steps}"
PLAIN = (
    "stock.py fit --model my_project.model.Classifier --model.num_classes 10"
    " --data my_project.data.Digits --trainer.strategy ddp --trainer.logger false"
    " --trainer.enable_checkpointing false --trainer.enable_progress_bar false" + COMMON
)
SHIPPED = (
    "main.py fit --config configs/digits.yaml --callbacks.summaries null"
    " --callbacks.checkpoint null --callbacks.early_stopping null" + COMMON
)
# By what trains, and on how many ranks: what starts it, and its command.
KINDS = {
    ("a loop of PyTorch alone", 1): ("lightning", LOOP),
    ("a loop of PyTorch alone", 2): ("torchrun", LOOP),
    ("a plain LightningCLI without a logger", 1): ("lightning", PLAIN),
    ("a plain LightningCLI without a logger", 2): ("torchrun", PLAIN),
    ("shipped", 1): ("lightning", SHIPPED),
    ("shipped", 2): ("torchrun", SHIPPED),
}
DEATHS = {"error": "exception", "die": "os._exit", "SIGKILL": "SIGKILL", "SIGTERM": "SIGTERM"}
WARM = 10  # steps that are not timed: the first ones allocate memory


def own(home: Path) -> dict[str, str]:
    """Return the environment of a process of one thread with a separate folder for runs."""
    return environment(home) | {"OMP_NUM_THREADS": "1", "RUNS_ROOT": str(home / "runs")}


def steps(project: Path, home: Path, launcher: str, command: str) -> list[float]:
    """When each step of a run began, and when the last one was over (s)."""
    env = own(home) | {"CLOCK": str(home / "clock")}
    quiet = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
    words = [*LAUNCHERS[launcher], *command.split()]
    subprocess.run(words, cwd=project, env=env, check=True, timeout=300, **quiet)
    return list(map(float, (home / "clock").read_text().split()))


def worth(project: Path, place: Path, given: argparse.Namespace) -> str:
    """Train in each way in turn; return what two ranks are worth."""
    taken: dict[tuple[str, int], list[list[float]]] = {kind: [] for kind in KINDS}
    values = {"width": given.width, "batch_size": given.batch_size, "steps": given.steps}
    for number, (kind, (launcher, command)) in product(range(given.rounds), KINDS.items()):
        home = place / f"{number}-{list(KINDS).index(kind)}"
        line = command.format(**values, ranks=kind[1])
        taken[kind].append(steps(project, home, launcher, line)[WARM:])
    rows = []
    alone: dict[str, tuple[float, float]] = {}
    for (name, ranks), runs in taken.items():
        durations = [sorted(1000 * (b - a) for a, b in pairwise(times)) for times in runs]
        step = median(map(median, durations))
        fast = median(ordered[len(ordered) // 10] for ordered in durations)
        # All told, with the ends of epochs.
        rate = median((len(times) - 1) * ranks / (times[-1] - times[0]) for times in runs)
        rates, fastest = alone.setdefault(name, (rate, fast))
        rows.append((name, ranks, step, fast, rate * given.batch_size))
        rows[-1] += (rate / rates / ranks, fastest / fast)
    head = ("what trains", "ranks", "ms a step", "of the fastest tenth", "images/s")
    return table(*head, "of so many single ones", "by the fastest tenth", of=rows)


def deaths(project: Path, place: Path, times: int) -> str:
    """End one rank in each way; return how soon the job has ended."""
    rows = []
    for launcher, rank, what in product(LAUNCHERS, (0, 1), DEATHS):
        ends = []
        for number in range(times):
            home = place / f"{launcher}-{rank}-{what}-{number}"
            ends.append(jobs(project, own(home), home / "runs")(launcher, what, rank))
        slowest = max(ends, key=lambda end: end.seconds)
        told = "nothing" if slowest.told is None else slowest.told
        left = sum(len(end.left) for end in ends)
        rows.append((launcher, rank, DEATHS[what], slowest.seconds, slowest.code, told, left))
    head = ("launcher", "rank", "what ends it", "s to the job's end", "exit code")
    return table(*head, "told to W&B", "orphans", of=rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--width", type=int, default=120, help="of the network: with 120 a step takes about 10 ms"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images for a step of a rank")
    parser.add_argument("--steps", type=int, default=300, help="of each run")
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
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        project = bake(place, place)
        (project / "clock.py").write_text(CLOCK)
        (project / "stock.py").write_text(STOCK)
        (project / "loop.py").write_text((HERE / "ddp_loop.py").read_text())
        texts = [f"# Ranks\n\n{os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}."]
        texts.append(f"{given.batch_size} images a step and a rank, {given.rounds} rounds in turn.")
        texts += [worth(project, place, given)]
        if given.deaths:
            texts.append(deaths(project, place, given.deaths))
    (HERE / "results" / "ranks.md").write_text("\n\n".join(texts) + "\n")
    print("\n\n".join(texts))


if __name__ == "__main__":
    main()
