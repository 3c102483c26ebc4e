"""What a checkpoint costs the training: a table in Markdown, and JSON.

    python benchmarks/checkpoints.py [--megabytes 100 1000] [--json FILE] [--before PROJECT]

A module with a large state, all of which changes in each step, is saved every four steps under two
names, of which one is always last.ckpt. Stock is Lightning's ModelCheckpoint with `save_last`, and
with its AsyncCheckpointIO; `before` is a project that was baked from the release 0.9.0.

A pause is the time between two steps with a save in between, less the median of the other steps.
Each figure is of a fresh process, in turn; medians. Memory is the peak of the process, read from
/proc, so on Linux only. Times hold for one machine and one disk at one time: compare the rows.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from bakery import bake
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch.utils.data import DataLoader

EVERY, SAVES = 4, 6
STEPS = EVERY * SAVES + 2
PARTS = 20  # tensors of the state


class Large(LightningModule):
    """Has a state of so many megabytes, and notes when its steps begin."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        for number in range(PARTS):
            self.register_buffer(f"part{number}", torch.zeros(megabytes * 250_000 // PARTS))
        self.begun: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.begun.append(time.perf_counter())
        for buffer in self.buffers():
            buffer.add_(1)
        time.sleep(0.1)  # as on a GPU: the host has little to do
        return self.layer(torch.ones(1, 1)).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def trainer_options(contender: str, folder: str) -> dict[str, Any]:
    """Return how the trainer saves."""
    each = {"dirpath": folder, "every_n_train_steps": EVERY}
    if contender == "no saving":
        return {"enable_checkpointing": False}
    if contender in ("stock", "stock, AsyncCheckpointIO"):
        plugins = [AsyncCheckpointIO()] if "Async" in contender else []
        return {"callbacks": [ModelCheckpoint(**each, save_last=True)], "plugins": plugins}
    from my_project.engine import checkpoint_io, checkpoints

    saving: list[Callback] = [ModelCheckpoint(**each), checkpoints.LastCheckpoint(**each)]
    if contender == "before":
        return {"callbacks": saving, "plugins": [checkpoint_io.AtomicCheckpointIO()]}
    from my_project.engine.background_saves import BackgroundSaves

    first = BackgroundSaves((ModelCheckpoint, checkpoints.LastCheckpoint))
    return {
        "callbacks": [first, *saving],
        "plugins": [checkpoint_io.BackgroundCheckpointIO()],
    }


def trained(contender: str, megabytes: int, project: str, folder: str) -> dict[str, float]:
    """Train, and return what saving cost; to be called in a fresh process."""
    sys.path.insert(0, project)
    module = Large(megabytes)
    begin = time.perf_counter()
    trainer = Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer_options(contender, folder),
    )
    trainer.fit(module, DataLoader(torch.zeros(STEPS, 1)))
    seconds = time.perf_counter() - begin
    gaps = [later - earlier for earlier, later in zip(module.begun, module.begun[1:], strict=False)]
    saved = [gap for step, gap in enumerate(gaps, 1) if step % EVERY == 0]
    step = median(gap for step, gap in enumerate(gaps, 1) if step % EVERY == 2)
    after = median(gap for step, gap in enumerate(gaps, 1) if step % EVERY == 1)
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    if contender != "no saving":
        content = torch.load(Path(folder) / "last.ckpt", weights_only=True)
        assert float(content["state_dict"]["part0"][0]) == content["global_step"] >= EVERY * SAVES
    return {
        "first pause, s": saved[0] - step,
        "median pause, s": median(saved) - step,
        "longest pause, s": max(saved) - step,
        "a step just after a save / another": after / step,
        "in all, s": seconds,
        "peak memory, MB": peak / 1000,
    }


def measured(sizes: list[int], rounds: int, before: str | None) -> dict[str, Any]:
    """Return the medians by size and contender."""
    contenders = ["no saving", "stock", "stock, AsyncCheckpointIO", "engine"]
    taken: dict[tuple[int, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as home:
        project = str(bake(Path(home), Path(home)))
        projects = dict.fromkeys(contenders, project) | ({"before": before} if before else {})
        for number, size, name in product(range(rounds), sizes, projects):
            folder = tempfile.mkdtemp(dir=home)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found = pool.submit(trained, name, size, projects[name], folder).result()
            taken.setdefault((size, name), []).append(found)
            print(f"round {number}, {size} MB, {name}", file=sys.stderr, flush=True)
            for file in Path(folder).iterdir():
                file.unlink()
    results: dict[str, Any] = {"about": {"cores": os.cpu_count(), "torch": torch.__version__}}
    for (size, name), found in taken.items():
        figures = {figure: median(one[figure] for one in found) for figure in found[0]}
        results.setdefault(f"{size} MB", {})[name] = figures
    return results


def table(results: dict[str, Any]) -> str:
    """Return the results as tables in Markdown."""
    lines = []
    for size, by_contender in results.items():
        if size == "about":
            continue
        figures = list(next(iter(by_contender.values())))
        lines += ["", f"| {size} | {' | '.join(figures)} |", "| --- |" + " --- |" * len(figures)]
        for name, values in by_contender.items():
            lines.append(f"| {name} | {' | '.join(f'{value:.2f}' for value in values.values())} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", help="a project baked from 0.9.0")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    results = measured(given.megabytes, given.rounds, given.before)
    print(table(results))
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
