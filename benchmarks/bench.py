"""What a step of the generated project costs beside less and more: tables, JSON, a picture.

Writes benchmarks/results/speed.*. Each contender of `contenders.py` is a separate process in a new
terminal, with one thread, in turn (A B C A B C ...); medians, the least and the most. Times hold
for one machine at one time, ratios for more.
"""

import argparse
import json
import os
import platform
import pstats
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bakery import bake, environment, in_terminal
from contenders import KINDS, SIZES, TRAINED
from matplotlib.figure import Figure

HERE = Path(__file__).parent
RESULTS = HERE / "results"
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


def measured(rounds: int) -> dict[str, Any]:
    """What each contender took in each round, as plain data, and whose code a step is in."""
    packages = ("torch", "lightning", "wandb", "jsonargparse", "torchmetrics", "numpy")
    about = {name: version(name) for name in packages} | {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "load before": round(os.getloadavg()[0], 1),
    }
    taken: dict[str, dict[str, list[dict[str, float]]]] = {
        kind: {size: [] for size in SIZES} for kind in KINDS
    }
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        project = bake(home, home)
        for file in HERE.glob("contenders*.py"):
            (project / file.name).write_text(file.read_text())
        env = environment(home / "e") | {
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
            "COLUMNS": "120",
        }

        def contend(kind: str, size: str) -> dict[str, float]:
            result = home / "result.json"
            in_terminal(["contenders.py", kind, size, result], project, env)
            return dict(json.loads(result.read_text()))

        env["PROFILE"] = str(home / "profile")
        contend("shipped", "medium")
        about_step = shares(Path(env.pop("PROFILE")))
        for number in range(rounds):
            for size, kind in product(SIZES, KINDS):
                taken[kind][size].append(contend(kind, size))
            print(f"round {number + 1} of {rounds} is over", flush=True)
    return {"about": about, "shares": about_step, **taken}


def shares(file: Path) -> dict[str, float]:
    """Return the share of a profiled step's time by the owner of the code, with its calls of C."""
    spent: Counter[str] = Counter()
    profile: Any = pstats.Stats(str(file))
    for (path, _, _), (_, _, own, _, _) in profile.stats.items():
        owner = next((name for name in OWNERS if f"/{name}" in path), "Python")
        spent[owner] += own
    return {owner.rstrip("/"): time / spent.total() for owner, time in spent.most_common()}


def middle(data: dict[str, Any], kind: str, size: str, key: str = "ms") -> float:
    """The median of what a contender took."""
    return median(one[key] for one in data[kind][size])


def ratios(data: dict[str, Any], kind: str, size: str) -> list[float]:
    """How many times as long as a contender's the steps of `shipped` took, by round."""
    pairs = zip(data["shipped"][size], data[kind][size], strict=True)
    return [ours["ms"] / theirs["ms"] for ours, theirs in pairs]


def table(data: dict[str, Any]) -> str:
    """The results in Markdown."""
    about = ", ".join(f"{name} {value}" for name, value in data["about"].items())
    lines = [f"# Speed\n\n{TRAINED:,} images of 28 x 28, batches of 64, one thread. {about}.\n"]

    def rows(*head: str, of: Iterable[Sequence[str]]) -> None:
        nonlocal lines
        lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        lines += ["| " + " | ".join(cells) + " |" for cells in of] + [""]

    def contender(kind: str) -> list[str]:
        cells = [f"{(KINDS[kind].__doc__ or '').rstrip('.')} (`{kind}`)"]
        for size in SIZES:
            times = [one["ms"] for one in data[kind][size]]
            cells.append(f"{median(times):.2f} ({min(times):.2f} to {max(times):.2f})")
        at = data[kind]["large"]
        for key in ("first", "saving"):
            cells.append(f"{middle(data, kind, 'large', key):.2f}" if at[0].get(key) else "")
        return [*cells, f"{middle(data, kind, 'large', 'peak'):.0f}"]

    sizes = [f"{size}: ms a step (from to)" for size in SIZES]
    rest = ("large: first step, s", "a checkpoint, s", "peak, MiB")
    rows("", *sizes, *rest, of=map(contender, KINDS))
    of = []
    for kind in [*KINDS][:-1]:
        cells = [f"a step of `shipped` to one of `{kind}`"]
        for size in SIZES:
            found = ratios(data, kind, size)
            cells.append(f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f})")
        of.append(cells)
    rows("", *SIZES, of=of)
    shared = [[owner, f"{share:.1%}"] for owner, share in data["shares"].items()]
    rows("whose code a step of `shipped` is in, medium, profiled", "share of its time", of=shared)
    return "\n".join(lines)


def picture(data: dict[str, Any]) -> Figure:
    """Samples a second of each contender, one panel for each size."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for size, panel in zip(SIZES, figure.subplots(1, len(SIZES)), strict=True):
        names = [*KINDS][::-1]
        colors = ["C1" if name == "shipped" else "C0" for name in names]
        panel.barh(names, [64 / middle(data, name, size) for name in names], color=colors)
        title = f"{size} network, {middle(data, 'raw', size):.1f} ms a step"
        panel.set(title=title, xlabel="thousand samples a second")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each contender is timed")
    data = measured(parser.parse_args().rounds)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "speed.json").write_text(json.dumps(data, indent=2) + "\n")
    (RESULTS / "speed.md").write_text(table(data))
    picture(data).savefig(RESULTS / "speed.png", dpi=120)
    print(table(data))


if __name__ == "__main__":
    main()
