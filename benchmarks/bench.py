"""`make bench`: what the generated project costs beside less and more: tables, JSON, a picture.

Writes benchmarks/results/. Each contender of `contenders.py` is a separate process in a new
terminal, with one thread, in turn (A B C A B C ...); medians. Times hold for one machine at one
time, ratios for more.
"""

import argparse
import json
import os
import platform
import pstats
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bakery import bake, environment, in_terminal
from contenders import KINDS, SIZES, TRAINED
from matplotlib.figure import Figure
from ranks import CLOCK, steps

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
    " --callbacks.checkpoint.monitor null --callbacks.early_stopping null"
    " --callbacks.summaries null"
)
COLD = {  # by name: a command of Python, and the one that it is compared with
    "plain --help": ["-c", "import lightning.pytorch.cli"],
    "main.py --help": ["main.py", "--help"],
    "plain fit of one step": ["-c", PLAIN],
    "main.py fit of one step": TINY.split(),
}
# By parts of their paths, whose code a step is in; the first that fits.
OWNERS = (
    "lightning",
    "torchmetrics",
    "torch/",
    "wandb",
    "my_project/engine",
    "my_project",
    "contenders",
)
WIDE = "--model.width 120 --trainer.max_steps 60"  # a network of about 20 ms a step
# By name: words that are appended to the commands of `plain` and `shipped`, with the small network.
GROWTH = {
    "as it is": "",
    "16 values logged in a step, not 1": "--model.values 16",
    "10 more callbacks that do something": " --trainer.callbacks+ contenders_lightning.Busy" * 10,
    "an epoch ends each 50 steps": (
        "--trainer.limit_train_batches 50 --trainer.min_epochs 20 --trainer.max_epochs 20"
    ),
}


def seconds(words: Sequence[str | Path], project: Path, env: dict[str, str]) -> float:
    """Return how long a command of Python takes in a new terminal, in seconds."""
    begin = time.perf_counter()
    in_terminal(words, project, env)
    return time.perf_counter() - begin


def measured(rounds: int) -> dict[str, Any]:
    """All medians, as plain data: of contenders, of what grows, of commands and of ranks."""
    packages = ("torch", "lightning", "wandb", "jsonargparse", "torchmetrics", "numpy")
    about = {name: version(name) for name in packages} | {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "load before": round(os.getloadavg()[0], 1),
    }
    taken: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        project = bake(home, home)
        for file in HERE.glob("contenders*.py"):
            (project / file.name).write_text(file.read_text())
        (project / "clock.py").write_text(CLOCK)
        env = environment(home / "e") | {
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
            "COLUMNS": "120",
        }

        def contend(kind: str, size: str, words: str = "") -> dict[str, float]:
            result = home / "result.json"
            seconds(["contenders.py", kind, size, result, *words.split()], project, env)
            return dict(json.loads(result.read_text()))

        env["PROFILE"] = str(home / "profile")
        contend("shipped", "medium")
        about_step = shares(Path(env.pop("PROFILE")))
        for number in range(rounds):
            for size, kind in product(SIZES, KINDS):
                taken[kind, size].append(contend(kind, size))
            for (name, words), kind in product(GROWTH.items(), ("plain", "shipped")):
                taken[kind, name].append(contend(kind, "small", words))
            for name, line in COLD.items():
                taken["cold", name].append({"s": seconds(line, project, env)})
            for ranks in (1, 2):
                at = steps(
                    project,
                    home / f"{number}-{ranks}",
                    "lightning",
                    ranks,
                    f"--trainer.max_epochs -1 {WIDE}",
                )
                taken["ranks", str(ranks)].append(
                    {"ms": 1000 * median(b - a for a, b in pairwise(at[11:]))}
                )
            print(f"round {number + 1} of {rounds} is over", flush=True)
    results: dict[str, Any] = {"about": about, "shares": about_step}
    for (kind, what), of in taken.items():
        results.setdefault(kind, {})[what] = {key: median(one[key] for one in of) for key in of[0]}
    return results


def shares(file: Path) -> dict[str, float]:
    """Return the share of a profiled step's time by the owner of the code, with its calls of C."""
    spent: Counter[str] = Counter()
    profile: Any = pstats.Stats(str(file))
    for (path, _, _), (_, _, own, _, _) in profile.stats.items():
        owner = next((name for name in OWNERS if f"/{name}" in path), "Python")
        spent[owner] += own
    return {owner.rstrip("/"): time / spent.total() for owner, time in spent.most_common()}


def table(data: dict[str, Any]) -> str:
    """The results in Markdown."""
    about = ", ".join(f"{name} {value}" for name, value in data["about"].items())
    lines = [f"# Speed\n\n{TRAINED:,} images of 28 x 28, batches of 64, one thread. {about}.\n"]

    def rows(*head: str, of: Iterable[Sequence[str | float]]) -> None:
        nonlocal lines
        lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for cells in of:
            texts = [cell if isinstance(cell, str) else f"{cell:.2f}" for cell in cells]
            lines += ["| " + " | ".join(texts) + " |"]
        lines += [""]

    def speed(ours: str, theirs: str, size: str) -> float:
        return float(data[theirs][size]["ms"] / data[ours][size]["ms"])

    def contender(kind: str) -> list[str | float]:
        cells = [
            part for size in SIZES for part in (data[kind][size]["ms"], speed(kind, "raw", size))
        ]
        at = data[kind]["large"]
        rest = [f"{at[key]:.2f}" if at.get(key) else "" for key in ("first", "saving")]
        return [
            f"{(KINDS[kind].__doc__ or '').rstrip('.')} (`{kind}`)",
            *cells,
            *rest,
            f"{at['peak']:.0f}",
        ]

    sizes = [part for size in SIZES for part in (f"{size}: ms a step", "of the limit")]
    rest = ("large: first step, s", "a checkpoint, s", "peak, MiB")
    rows("", *sizes, *rest, of=map(contender, KINDS))
    of = [
        [f"speed of `shipped` to `{kind}`", *(speed("shipped", kind, size) for size in SIZES)]
        for kind in KINDS
    ]
    rows("", *SIZES, of=of[:-1])
    of = [[name, *(data[kind][name]["ms"] for kind in ("plain", "shipped"))] for name in GROWTH]
    rows("small: ms a step", "`plain`", "`shipped`", of=of)
    cold = {name: values["s"] for name, values in data["cold"].items()}
    rows("from the command to its end", "s", of=cold.items())
    pairs = (
        ("main.py --help", "plain --help"),
        ("main.py fit of one step", "plain fit of one step"),
    )
    rows(
        "",
        "times",
        of=[(f"`{ours}` to `{theirs}`", cold[ours] / cold[theirs]) for ours, theirs in pairs],
    )
    alone, both = (data["ranks"][ranks]["ms"] for ranks in ("1", "2"))
    rows(
        "ranks of `shipped`",
        "ms a step",
        "samples a second",
        of=[("1", alone, f"{64e3 / alone:.0f}"), ("2", both, f"{128e3 / both:.0f}")],
    )
    shared = [[owner, f"{share:.1%}"] for owner, share in data["shares"].items()]
    rows("whose code a step of `shipped` is in, medium, profiled", "share of its time", of=shared)
    return "\n".join(lines)


def picture(data: dict[str, Any]) -> Figure:
    """Samples a second of each contender, one panel for each size."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for size, panel in zip(SIZES, figure.subplots(1, len(SIZES)), strict=True):
        names = [*KINDS][::-1]
        colors = ["C1" if name == "shipped" else "C0" for name in names]
        panel.barh(names, [64 / data[name][size]["ms"] for name in names], color=colors)
        title = f"{size} network, {data['raw'][size]['ms']:.1f} ms a step"
        panel.set(title=title, xlabel="thousand samples a second")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help="how often each contender is timed")
    data = measured(parser.parse_args().rounds)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "speed.json").write_text(json.dumps(data, indent=2) + "\n")
    (RESULTS / "speed.md").write_text(table(data))
    picture(data).savefig(RESULTS / "speed.png", dpi=120)
    print(table(data))


if __name__ == "__main__":
    main()
