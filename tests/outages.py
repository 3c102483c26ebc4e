"""W&B goes away at random moments of runs that upload each checkpoint; each must end in time.

    python tests/outages.py --rounds 50 --busy 2

A round draws a fault of the server and a moment from its seed, trains in a separate process, and
measures how long that lives after its training has ended. Busy processes run beside it.
"""

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bakery import bake, environment
from wandb_server import WandbServer

FAULTS = ("hang", "refuse", "cut", "503", "503 graphql", "503 file_stream", "503 storage", "401")
FINISH_SECONDS = 10
CLIENT_SECONDS = 5  # that the engine waits for W&B's client beyond that
SLACK = 10  # of a machine that is busy
MOMENTS = (2.0, 16.0)  # seconds after the start, between which W&B goes away
LINE = (
    "main.py fit --config configs/digits.yaml --trainer.max_epochs 4"
    f" --trainer.logger.log_model all --trainer.logger.finish_timeout {FINISH_SECONDS}"
)
ENDED = "test     python"  # the last line of a training


@dataclass(frozen=True)
class Round:
    """What came of one outage."""

    seed: int
    fault: str
    moment: float
    code: int
    seconds: float  # from the training's end to that of the process
    left: str  # processes that outlived it
    lines: list[str]

    @property
    def is_good(self) -> bool:
        in_time = self.seconds < FINISH_SECONDS + CLIENT_SECONDS + SLACK
        return self.code == 0 and in_time and not self.left

    def __str__(self) -> str:
        what = f"seed {self.seed}: {self.fault} after {self.moment:.1f} s"
        return (
            f"{what}: code {self.code}, ended {self.seconds:.1f} s after the training {self.left}"
        )


def outage(project: Path, home: Path, seed: int) -> Round:
    """Train once, and let W&B go away meanwhile."""
    drawn = random.Random(seed)
    fault, moment = drawn.choice(FAULTS), drawn.uniform(*MOMENTS)
    with WandbServer() as server:
        timer = threading.Timer(moment, server.fail, fault.split())
        process = subprocess.Popen(
            [sys.executable, *LINE.split()],
            cwd=project,
            env=environment(home / str(seed)) | server.env() | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        timer.start()
        assert process.stdout is not None
        lines, ended = [], time.monotonic()
        with process.stdout:
            for line in process.stdout:
                lines.append(line.rstrip())
                if line.startswith(ENDED):
                    ended = time.monotonic()
        code = process.wait()
        seconds = time.monotonic() - ended
        timer.cancel()
        time.sleep(0.5)
        left = processes_of_session(process.pid)
    return Round(seed, fault, moment, code, seconds, left, lines)


def processes_of_session(session: int) -> str:
    """The commands of a session's processes that are there, and ended ones that nobody awaits."""
    words = ("ps", "-o", "stat=,comm=", "-s", str(session))
    listed = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    return ", ".join(line for line in listed.splitlines() if not line.startswith("Z"))


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep processors busy."""
    words = [sys.executable, "-c", "while True: pass"]
    started = [subprocess.Popen(words) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--busy", type=int, default=2)
    given = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as folder, busy(given.busy):
        home = Path(folder)
        project = bake(home, home, package_name="odd_duck", project_slug="Odd.Duck")
        for seed in range(given.seed, given.seed + given.rounds):
            rounds.append(outage(project, home, seed))
            print(rounds[-1], flush=True)
            if not rounds[-1].is_good:
                print("\n".join(f"    {line}" for line in rounds[-1].lines), flush=True)
    seconds = [one.seconds for one in rounds]
    bad = sum(not one.is_good for one in rounds)
    middle = statistics.median(seconds)
    print(
        f"{len(rounds)} outages, {bad} bad; the end took {middle:.1f} s, {max(seconds):.1f} at most"
    )
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    main()
