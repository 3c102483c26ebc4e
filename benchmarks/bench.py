"""`make bench`: what the generated project costs beside less and more, in a table, as JSON and as a picture.

Writes benchmarks/results/. Each contender of `contenders.py` is a process of its own in a terminal of its own, one
thread, in turn (A B C A B C ...); medians. Times hold for one machine at one time, ratios for more.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bakery import bake, environment, in_terminal
from contenders import KINDS, SIZES, TRAINED
from matplotlib.figure import Figure

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PLAIN = """
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

line = "fit --trainer.max_steps 1 --trainer.accelerator cpu --trainer.limit_val_batches 0"
line += " --trainer.logger WandbLogger --trainer.logger.offline true"
LightningCLI(BoringModel, args=line.split(), save_config_kwargs={"overwrite": True})
"""  # the least that trains a step with W&B's logger offline
TINY = (
    "main.py fit --model lightning.pytorch.demos.boring_classes.BoringModel --trainer.max_steps 1"
    " --trainer.accelerator cpu --trainer.logger.offline true --trainer.limit_val_batches 0"
    " --callbacks.checkpoint.monitor null --callbacks.early_stopping null --callbacks.summaries null"
)
COLD = {  # by name: a command of Python, and the one that it is compared with
    "plain --help": ["-c", "import lightning.pytorch.cli"],
    "main.py --help": ["main.py", "--help"],
    "plain fit of one step": ["-c", PLAIN],
    "main.py fit of one step": TINY.split(),
}


def seconds(words: Sequence[str | Path], project: Path, env: dict[str, str]) -> float:
    """How long a command of Python takes, in a terminal of its own."""
    begin = time.perf_counter()
    in_terminal(words, project, env)
    return time.perf_counter() - begin


def measured(rounds: int) -> dict[str, Any]:
    """Everything, as plain data."""
    packages = ("torch", "lightning", "wandb", "jsonargparse", "torchmetrics", "numpy")
    about = {name: version(name) for name in packages} | {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "load before": os.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        project = bake(home, home)
        (project / "contenders.py").write_text((HERE / "contenders.py").read_text())
        env = environment(home / "e") | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "COLUMNS": "120"}
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in KINDS}
        cold: dict[str, list[float]] = {name: [] for name in COLD}
        for number in range(rounds):
            for name in KINDS:
                result = home / "result.json"
                seconds(["contenders.py", name, result], project, env)
                results[name].append(json.loads(result.read_text()))
                print(f"round {number + 1} of {rounds}: {name}", flush=True)
            for name, words in COLD.items():
                cold[name].append(seconds(words, project, env))
    steps = {name: {size: median(one["ms"][size] for one in of) for size in SIZES} for name, of in results.items()}
    others = {name: {key: median(one[key] for one in of) for key in ("first", "peak")} for name, of in results.items()}
    return {"about": about, "ms": steps, "start": others, "cold": {name: median(of) for name, of in cold.items()}}


def table(data: dict[str, Any]) -> str:
    """The results in Markdown."""
    ms, lines = data["ms"], []
    sizes = [f"{size}: ms a step" for size in SIZES]
    lines += ["| | " + " | ".join(f"{size} | of the limit" for size in sizes) + " | first step, s | peak, MiB |"]
    lines += ["|" + " --- |" * (2 * len(SIZES) + 3)]
    for name, of in ms.items():
        cells = [f"{of[size]:.2f} | {ms['raw'][size] / of[size]:.2f}" for size in SIZES]
        first = f"{data['start'][name]['first']:.1f}" if data["start"][name]["first"] else ""
        about = (KINDS[name].__doc__ or "").rstrip(".")
        lines += [f"| {about} (`{name}`) | " + " | ".join(cells) + f" | {first} | {data['start'][name]['peak']:.0f} |"]
    lines += ["", "| what is asked | ratio |", "| --- | --- |"]
    for size in SIZES:
        lines += [f"| speed of `shipped` to `plain`, {size} | {ms['plain'][size] / ms['shipped'][size]:.2f} |"]
        lines += [f"| speed of `shipped` to `usual`, {size} | {ms['usual'][size] / ms['shipped'][size]:.2f} |"]
    cold = data["cold"]
    lines += ["", "| from the command to its end | s |", "| --- | --- |"]
    lines += [f"| {name} | {value:.2f} |" for name, value in cold.items()]
    for ours, theirs in (("main.py --help", "plain --help"), ("main.py fit of one step", "plain fit of one step")):
        lines += [f"| `{ours}` to `{theirs}` | {cold[ours] / cold[theirs]:.2f} times |"]
    about = ", ".join(f"{name} {value}" for name, value in data["about"].items())
    return "\n".join([f"# Speed\n\n{TRAINED:,} images of 28 x 28, batches of 64, one thread. {about}.\n", *lines, ""])


def picture(data: dict[str, Any]) -> Figure:
    """Samples a second of each contender, one panel for each size."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for size, panel in zip(SIZES, figure.subplots(1, len(SIZES)), strict=True):
        names = [*data["ms"]][::-1]
        colors = ["C1" if name == "shipped" else "C0" for name in names]
        panel.barh(names, [64 / data["ms"][name][size] for name in names], color=colors)
        panel.set(title=f"{size} network, {data['ms']['raw'][size]:.1f} ms a step", xlabel="thousand samples a second")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="how often each contender is timed")
    data = measured(parser.parse_args().rounds)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "speed.json").write_text(json.dumps(data, indent=2) + "\n")
    (RESULTS / "speed.md").write_text(table(data))
    picture(data).savefig(RESULTS / "speed.png", dpi=120)
    print(table(data))


if __name__ == "__main__":
    main()
