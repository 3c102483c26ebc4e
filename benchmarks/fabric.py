"""What the loop in train_fabric.py is worth beside the Trainer: in Markdown.

    python benchmarks/fabric.py

Both train the example with the same seed, in turn, on one thread. The time of a step is that of
additional epochs.
"""

import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bakery import bake, environment

LINES = {
    "Trainer": "main.py fit --config configs/digits.yaml --callbacks.early_stopping null",
    "Fabric": "train_fabric.py --config configs/fabric.yaml",
}
SHORT, LONG, ROUNDS = 2, 62, 3
STEPS = 19  # an epoch


def seconds(project: Path, kind: str, epochs: int, env: dict[str, str]) -> float:
    line = f"{LINES[kind]} --trainer.max_epochs {epochs} --trainer.accelerator cpu"
    line += " --trainer.logger.offline true"
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, *line.split()], cwd=project, env=env, check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - begin


def losses(runs: Path, run: str) -> dict[tuple[str, str], float]:
    with (runs / run / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    names = ("train/loss", "val/loss", "val/acc")
    return {(row["step"], name): float(row[name]) for row in rows for name in names if row[name]}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        project = bake(home, home, fabric="yes")
        env = environment(home / "e") | {"OMP_NUM_THREADS": "1", "RUNS_ROOT": str(home / "runs")}
        times: dict[tuple[str, int], list[float]] = {}
        print(f"Load of the machine before: {os.getloadavg()[0]:.1f}\n")
        for number in range(ROUNDS):
            for kind in LINES:
                for epochs in (SHORT, LONG):
                    run = {"WANDB_RUN_ID": f"{kind}-{epochs}-{number}"}
                    times.setdefault((kind, epochs), []).append(
                        seconds(project, kind, epochs, env | run)
                    )
        print("| | s of 2 epochs | ms a step | samples a second |\n| --- | --- | --- | --- |")
        for kind in LINES:
            short, long = median(times[kind, SHORT]), median(times[kind, LONG])
            step = (long - short) / (LONG - SHORT) / STEPS
            print(f"| {kind} | {short:.1f} | {step * 1e3:.2f} | {64 / step:.0f} |")
        ours, theirs = (losses(home / "runs", f"{kind}-{LONG}-0") for kind in LINES)
        assert ours.keys() == theirs.keys()
        largest = max(abs(ours[key] - theirs[key]) for key in ours)
        print(f"\nLargest difference of a loss: {largest:.2g}")


if __name__ == "__main__":
    main()
