"""What logged rows and predictions cost: a table in Markdown, and JSON.

    python benchmarks/files.py [--samples 1000000] [--json FILE]

Rows: one value per name, written one by one and then as a table, beside Lightning's CSVLogger,
which writes after each 100 rows, as it does by default. In `new names` each of 800 rows has one
that is new.
Predictions: batches of 1,000 probabilities (B, 10), and maps (B, 3, 16, 16) for a fiftieth of the
samples; stock keeps them in a list. Memory is what the process takes beyond its start, without
pages of files, read from /proc, so on Linux only. Each figure is of a fresh process.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from threading import Event, Thread
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from bakery import bake
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, Dataset

BATCH, NEW_NAMES = 1000, 800


class Counted(Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class Predicts(LightningModule):
    def __init__(self, maps: bool) -> None:
        super().__init__()
        self.maps = maps

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.maps:
            return torch.rand(len(batch), 3, 16, 16)
        return torch.rand(len(batch), 10).softmax(dim=1)


def memory() -> int:
    """Return the anonymous memory of this process, in bytes."""
    fields = Path("/proc/self/status").read_text().split()
    return int(fields[fields.index("RssAnon:") + 1]) * 1024


def measured(work: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds and the megabytes at most that a piece of work takes."""
    before = peak = memory()
    over = Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.02):
            peak = max(peak, memory())

    watching = Thread(target=watch)
    watching.start()
    began = time.perf_counter()
    kept = work()
    seconds = time.perf_counter() - began
    over.set()
    watching.join()
    del kept
    return seconds, (peak - before) / 1e6


def log_rows(project: str, ours: bool, rows: list[dict[str, float]], folder: str) -> Any:
    sys.path.insert(0, project)
    from my_project.engine.metrics_log import MetricsLog

    def work() -> None:
        if ours:
            log = MetricsLog(Path(folder))
            for step, row in enumerate(rows):
                log.append({"step": step, **row}, "fit", step)
            return log.close()
        logger = CSVLogger(folder)
        for step, row in enumerate(rows):
            logger.log_metrics(row, step)
            if (step + 1) % 100 == 0:
                logger.save()
        logger.finalize("success")

    return measured(work)


def predict(project: str, ours: bool, samples: int, maps: bool, folder: str) -> Any:
    sys.path.insert(0, project)
    from my_project.engine.predictions import PredictionWriter

    callbacks = [PredictionWriter(f"{folder}/predictions.csv")] if ours else []
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", callbacks=callbacks, **quiet)  # type: ignore[arg-type]
    loader = DataLoader(Counted(samples), batch_size=BATCH)
    return measured(lambda: trainer.predict(Predicts(maps), loader, return_predictions=not ours))


def rows_of(kind: str) -> list[dict[str, float]]:
    if kind == "new names":
        return [{"loss": 0.1 * step, f"new{step}": 1.0} for step in range(NEW_NAMES)]
    names, count = (10, 20_000) if kind == "10 names" else (1000, 500)
    return [{f"name{k}": step + 0.1 * k for k in range(names)} for step in range(count)]


def all_measured(project: str, samples: int) -> dict[str, Any]:
    results: dict[str, Any] = {"about": {"cores": os.cpu_count(), "torch": torch.__version__}}
    context = get_context("spawn")

    def fresh(function: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
        with (
            tempfile.TemporaryDirectory() as folder,
            ProcessPoolExecutor(1, mp_context=context) as pool,
        ):
            found: tuple[float, float] = pool.submit(function, *arguments, folder).result()
            return found

    for kind in ("10 names", "1000 names", "new names"):
        rows = rows_of(kind)
        for name, ours in (("ours", True), ("CSVLogger", False)):
            seconds, megabytes = fresh(log_rows, project, ours, rows)
            figures = {"rows a second": len(rows) / seconds, "MB": megabytes}
            results.setdefault(kind, {})[name] = figures
    for kind, maps, count in (
        (f"{samples:,} probabilities", False, samples),
        (f"{samples // 50:,} maps", True, samples // 50),
    ):
        for name, ours in (("ours", True), ("stock", False)):
            seconds, megabytes = fresh(predict, project, ours, count, maps)
            results.setdefault(kind, {})[name] = {"seconds": seconds, "MB": megabytes}
    return results


def table(results: dict[str, Any]) -> str:
    """Return the results as tables in Markdown."""
    lines = []
    for kind, by_contender in results.items():
        if kind == "about":
            continue
        figures = list(next(iter(by_contender.values())))
        lines += ["", f"| {kind} | {' | '.join(figures)} |", "| --- |" + " --- |" * len(figures)]
        for name, values in by_contender.items():
            lines.append(f"| {name} | {' | '.join(f'{value:,.0f}' for value in values.values())} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        results = all_measured(str(bake(Path(home), Path(home))), given.samples)
    print(table(results))
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
