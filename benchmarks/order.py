"""What the engine's order of data costs beside torch's own: tables in Markdown, and JSON.

    python benchmarks/order.py [--json FILE]

The same DataLoader is read as torch reads it (stock), and as `main.py fit` reads it (engine). The
data cost nothing: a dataset gives back the indices, of which a batch is only the number.

The first table is measured in one process, by passes in turn (stock, engine, stock, ...); medians.
A batch is one after the first of a pass, which is beside it. Workers persist, and have started.

The second table is about long epochs. Each figure is of a fresh process, in turn; medians. Memory
is the peak of the process less what it had before the loader was made. It is read from /proc, so on
Linux only: `ru_maxrss` would begin at the peak of the process that started this one.

Times hold for one machine at one time: compare the columns.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from itertools import count, product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import torch
from bakery import bake
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, WeightedRandomSampler

SIZE, BATCHES = 64, 1_000
SAMPLES = SIZE * BATCHES
READERS = ("stock", "engine")
FIGURES = ("us a batch", "us to the first batch", "ms to the first batch", "MiB added")


class Numbers(Dataset[int]):
    """Sample i is the number i; a whole batch is read at once."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitems__(self, indices: list[int]) -> list[int]:
        return indices


class Own(Sampler[int]):
    """Shuffles by its own generator."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[int]:
        yield from self.generator.permutation(SAMPLES).tolist()


class Unsized(Sampler[int]):
    """Does not say how many indices it has."""

    def __iter__(self) -> Iterator[int]:
        yield from range(SAMPLES)


class OwnBatches(Sampler[list[int]]):
    """Batches of neighbours, shuffled by its own generator."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[list[int]]:
        for number in self.generator.permutation(BATCHES).tolist():
            yield list(range(number * SIZE, (number + 1) * SIZE))


AHEAD = "unsized sampler, a batch read ahead"  # Lightning does so where there is no length
# By name: what a DataLoader is given.
KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "shuffle": lambda: {"shuffle": True},
    "in order": dict,
    "custom sampler": lambda: {"sampler": Own()},
    "unsized sampler": lambda: {"sampler": Unsized()},
    AHEAD: lambda: {"sampler": Unsized()},
    "custom batch sampler": lambda: {"batch_sampler": OwnBatches(), "batch_size": 1},
    "weighted": lambda: {"sampler": WeightedRandomSampler([1.0] * SAMPLES, SAMPLES)},
    "shuffle, two workers": lambda: {
        "shuffle": True,
        "num_workers": 2,
        "persistent_workers": True,
    },
}
# By name: samples, and what a DataLoader is given.
LONG: dict[str, tuple[int, Callable[[], dict[str, Any]]]] = {
    "30 million draws with replacement": (
        10_000_000,
        lambda: {"sampler": RandomSampler(range(10_000_000), True, 30_000_000)},
    ),
    "10 million samples, shuffled": (10_000_000, lambda: {"shuffle": True}),
    "10 million samples, in order": (10_000_000, dict),
}


def made(samples: int, options: dict[str, Any], reader: str, ahead: bool = False) -> DataLoader:
    """Return a loader that is read by stock or by the engine of the bake in `sys.path`."""
    given = {"batch_size": SIZE, "collate_fn": len, **options}
    loader: DataLoader = DataLoader(Numbers(samples), **given)
    if reader == "engine":
        from my_project.engine.batches import Position, SharedBatches
        from my_project.engine.lightning_internals import read_by

        epochs = count()  # another one whenever it is asked for

        def position() -> Any:
            return Position((0, "train_dataloader", 0, next(epochs)), reads_ahead=ahead)

        read_by(loader, SharedBatches(loader, position, (0, 1)))
    return loader


def one_pass(loader: DataLoader) -> dict[str, float]:
    """Read a loader to its end, and return what the first batch and the others took."""
    begin = time.perf_counter()
    batches = iter(loader)
    next(batches)
    first = time.perf_counter()
    others = sum(1 for _ in batches)
    end = time.perf_counter()
    assert others == BATCHES - 1
    return {FIGURES[0]: 1e6 * (end - first) / others, FIGURES[1]: 1e6 * (first - begin)}


def memory(name: str) -> float:
    """Return VmRSS or VmHWM of this process, its memory and the peak of it, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def first_batch(name: str, reader: str) -> dict[str, float]:
    """Return what the first batch of a long epoch takes; to be called in a fresh process."""
    torch.set_num_threads(1)
    import my_project.engine.lightning_internals  # noqa: F401  stock has its memory too

    one_pass(made(SAMPLES, {"shuffle": True}, reader))  # what is imported and made only once
    samples, options = LONG[name]
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what there is
    before = memory("VmRSS")
    begin = time.perf_counter()
    batches = iter(made(samples, options(), reader))
    next(batches)
    end = time.perf_counter()
    return {FIGURES[2]: 1e3 * (end - begin), FIGURES[3]: memory("VmHWM") - before}


def in_fresh_process(*arguments: Any) -> dict[str, float]:
    """Return `first_batch` of a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(first_batch, *arguments).result()


def measured(passes: int, rounds: int) -> dict[str, Any]:
    """Return all medians, as plain data: by kind of loader, figure and reader."""
    packages = ("torch", "lightning", "numpy")
    results: dict[str, Any] = {
        "about": {one: version(one) for one in packages}
        | {"cores": os.cpu_count(), "load before": round(os.getloadavg()[0], 1)}
    }
    taken: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for name, options in KINDS.items():
        loaders = {one: made(SAMPLES, options(), one, name == AHEAD) for one in READERS}
        for loader in loaders.values():  # not timed: workers start
            one_pass(loader)
        for _, reader in product(range(passes), READERS):
            taken[name, reader].append(one_pass(loaders[reader]))
    for _, name, reader in product(range(rounds), LONG, READERS):
        taken[name, reader].append(in_fresh_process(name, reader))
    for (name, reader), of in taken.items():
        for figure in of[0]:
            by_reader = results.setdefault(name, {}).setdefault(figure, {})
            by_reader[reader] = median(one[figure] for one in of)
    return results


def table(data: dict[str, Any], names: dict[str, Any], figures: tuple[str, ...]) -> str:
    """Return some figures in Markdown, and those of the engine as times of those of stock."""
    head = ["", *(part for figure in figures for part in (f"stock: {figure}", "engine", "times"))]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for name in names:
        cells = [name]
        for figure in figures:
            stock, engine = (data[name][figure][reader] for reader in READERS)
            times = f"{engine / stock:.2f}" if stock >= 0.1 else ""  # of nearly nothing
            cells += [f"{stock:,.2f}", f"{engine:,.2f}", times]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--passes", type=int, default=15, help="of each loader of the first table")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each long epoch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the medians too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        project = bake(Path(place), Path(place))  # before the next line: it replaces sys.path
        sys.path.insert(0, str(project))
        data = measured(given.passes, given.rounds)
    about = ", ".join(f"{name} {value}" for name, value in data["about"].items())
    print(f"{BATCHES:,} batches of {SIZE} in a pass. {about}.\n")
    print(table(data, KINDS, FIGURES[:2]), end="\n\n")
    print(table(data, LONG, FIGURES[2:]))
    if given.json:
        given.json.write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
