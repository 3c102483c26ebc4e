"""What a trial of a sweep costs over a bare `fit` of the same settings: a table, in Markdown.

    python benchmarks/sweep.py

Real runs of a baked project, sent to a server of the tests, and W&B's agent, in turn. The agent
looks once in five seconds whether a trial has ended. Times hold for one machine at one time:
compare the rows.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bakery import bake, environment
from wandb_server import WandbServer

FIT = ["main.py", "fit", "--config", "configs/digits.yaml"]
PARAMETERS = {"trainer.max_epochs": 2, "model.lr": 0.002, "model.width": 32, "data.batch_size": 64}


def seconds(words: list[str], project: Path, env: dict[str, str]) -> tuple[float, float]:
    """Return how long a command took, and the newest run that it made (s).

    The time of the run is that from its first file, or from its start, to its last file.
    """
    begun = time.time()
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    subprocess.run([sys.executable, *words], cwd=project, env=env, check=True, **quiet)
    ended = time.time()
    run = max((project / "runs").iterdir(), key=lambda folder: folder.stat().st_ctime)
    given = [file.stat().st_mtime for file in project.glob(f"wandb/sweep-*/config-{run.name}.json")]
    last = max(file.stat().st_mtime for file in run.rglob("*"))
    return ended - begun, last - (given[0] if given else begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=int, default=3, help="how often each is measured")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, WandbServer() as server:
        project = bake(Path(place), Path(place), wandb_entity="team")
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        env = environment(Path(place, "e")) | server.env() | {"PATH": path}
        sweep = yaml.safe_load((project / "configs/sweep.yaml").read_text())
        sweep["parameters"] = {name: {"value": value} for name, value in PARAMETERS.items()}
        (project / "sweep.yaml").write_text(yaml.safe_dump(sweep | {"method": "random"}))
        subprocess.run(
            [sys.executable, "-m", "wandb", "sweep", "sweep.yaml"], cwd=project, env=env, check=True
        )
        (made,) = server.sweeps.values()
        agent = ["-m", "wandb", "agent", f"team/{made.project}/{made.id}", "--count"]
        flags = [f"--{name}={value}" for name, value in PARAMETERS.items()]
        commands = {
            "fit": [*FIT, *flags],
            "agent, one trial": [*agent, "1"],
            "agent, three trials": [*agent, "3"],
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        seconds(commands["fit"], project, env)  # once for the caches
        for _ in range(given.times):
            for name, words in commands.items():
                times[name].append(seconds(words, project, env))
    print("| command | s | s of its last run |\n| --- | --- | --- |")
    for name, taken in times.items():
        whole, run = (median(times) for times in zip(*taken, strict=True))
        print(f"| {name} | {whole:.1f} | {run:.1f} |")


if __name__ == "__main__":
    main()
