"""How long a run takes, and what is missing afterwards, while W&B is away: a table, in Markdown.

    python benchmarks/away.py

Real runs of a baked project, as processes, online with a server of the tests that fails from the
start of the run or from its second epoch. Times hold for one machine at one time: compare them with
the run that nothing disturbs.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bakery import bake, environment
from wandb_server import WandbServer

CLOCK = """
import os, time
from lightning.pytorch import Callback

class Clock(Callback):
    def tell(self, what):
        with open(os.environ["CLOCK"], "a") as file:
            print(what, time.time(), file=file)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 0:
            self.tell("step")

    def on_train_epoch_start(self, trainer, module):
        self.tell("epoch")

    def on_train_end(self, trainer, module):
        self.tell("end")
"""
FAULTS = ["", "refuse", "503", "hang", "401", "503 graphql", "503 file_stream", "503 storage"]
EPOCHS = 8


def measured(project: Path, home: Path, fault: str, at: str, timeout: float) -> list[str]:
    """The row of the table for one run: `fault` begins `at` the start or in an epoch."""
    clock = home / "clock"
    clock.touch()
    with WandbServer() as server:
        env = environment(home) | server.env()
        env |= {"CLOCK": str(clock), "RUNS_ROOT": str(home / "runs"), "OMP_NUM_THREADS": "1"}
        words = f"fit --config configs/digits.yaml --trainer.max_epochs {EPOCHS}"
        words += " --trainer.log_every_n_steps 1 --trainer.logger.log_model all"
        words += f" --trainer.logger.finish_timeout {timeout}"
        words += " --trainer.callbacks+ clock.Clock --callbacks.early_stopping null"
        if fault and at == "start":
            server.fail(*fault.split())
        begun = time.time()
        with (home / "screen").open("w") as screen:
            run = subprocess.Popen(
                [sys.executable, "main.py", *words.split()],
                cwd=project,
                env=env,
                stdout=screen,
                stderr=screen,
            )
            while run.poll() is None:
                if fault and at != "start" and clock.read_text().count("epoch") > 2:
                    server.fail(*fault.split())
                time.sleep(0.02)
        ended = time.time()
        told = [line.split() for line in clock.read_text().splitlines()]
        times = {
            what: [float(at) for name, at in told if name == what]
            for what in ("step", "epoch", "end")
        }
        marks = [*times["epoch"], *times["end"]]
        epoch = median(b - a for a, b in pairwise(marks[3:]))
        server.recover()
        folder = next((home / "runs").iterdir())
        sync = subprocess.run(
            [sys.executable, "main.py", "sync", folder],
            cwd=project,
            env=env,
            stdout=subprocess.DEVNULL,
            check=False,
        )
        rows = len((folder / "metrics.csv").read_text().splitlines()) - 1
        there = [int(row["_step"]) for row in server.runs[folder.name].history]
        versions = server.collections[f"model-{folder.name}"].members
        missing = (
            len(set(range(rows)) - set(there)),
            len(there) - len(set(there)),
            EPOCHS - len(versions),
        )
        seconds = (
            f"{times['step'][0] - begun:.1f}",
            f"{epoch:.3f}",
            f"{ended - times['end'][0]:.1f}",
        )
    return [
        fault or "none",
        at if fault else "",
        *seconds,
        str(run.returncode),
        str(sync.returncode),
        *map(str, missing),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--finish_timeout", type=float, default=60, help="seconds that the end of a run may take"
    )
    parser.add_argument(
        "--faults", nargs="*", default=FAULTS, help="some of the faults, such as hang '503 storage'"
    )
    given = parser.parse_args()
    head = ["fault", "from", "s to the first step", "s an epoch", "s at the end", "exit code"]
    head += ["of sync", "rows missing", "rows doubled", "versions missing"]
    print("|", " | ".join(head), "|\n|", " | ".join("---" for _ in head), "|")
    with tempfile.TemporaryDirectory() as place:
        project = bake(Path(place), Path(place))
        (project / "clock.py").write_text(CLOCK)
        for number, (fault, at) in enumerate(
            (f, a) for f in given.faults for a in (("start", "an epoch") if f else ("",))
        ):
            home = Path(place, str(number))
            home.mkdir()
            print(
                "|",
                " | ".join(measured(project, home, fault, at, given.finish_timeout)),
                "|",
                flush=True,
            )


if __name__ == "__main__":
    main()
