"""What a CPU cannot show, in some five minutes: tables in Markdown, benchmarks/results/gpu.md.

    python benchmarks/gpu.py [--accelerator cpu] [--parts steps example ranks]

- example: the accuracy of the example in 32 bits, in bf16, and compiled; and whether a run that is
  killed resumes bit-for-bit in each, with deterministic algorithms.
- steps: a small and a large GPT (`gpt.py`) beside a loop of PyTorch alone, Lightning's Trainer
  without anything, and a plain LightningCLI with W&B; what the parts of the engine cost in small
  steps; the pause for a checkpoint; calls that wait for the GPU.
- ranks: the example by DDP and FSDP on what GPUs there are.

Everything runs in fresh processes of a baked project. What is not timed runs side by side. Times
hold for one machine at one time: compare the rows. `--accelerator cpu` tries the script itself.
"""

import argparse
import csv
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bakery import bake, environment, in_terminal
from tables import table

HERE = Path(__file__).parent
KILLER = """
import os, signal
from lightning.pytorch import Callback

class Killer(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
"""
WAYS = {  # by what is tried: the options that ask for it
    "32 bits": "",
    "32 bits, compiled": "--compile true",
    "bf16": "--trainer.precision bf16-mixed --matmul_precision high",
    "bf16, compiled": "--config configs/gpu.yaml",
}
EPOCHS, KILLED_AT = 20, 230  # of the example, and a step within the last but seventh
PARTS_OF_A_STEP = {  # by what is left out: the options that do so
    "without W&B": "--trainer.logger false",
    "without a bar": "--trainer.enable_progress_bar false",
    "without the named callbacks": "--callbacks.checkpoint null --callbacks.early_stopping null"
    " --callbacks.lr_monitor null --callbacks.divergence null",
    "without last.ckpt": "--callbacks.last_checkpoint null",
}
STRATEGIES = {
    "DDP": "--trainer.strategy ddp",
    "FSDP": "--trainer.strategy fsdp --trainer.precision bf16-mixed",
}


class Bench:
    """A baked project, and what runs commands in it.

    Args:
        place: A folder.
        accelerator: What to train on: gpu or cpu.
    """

    def __init__(self, place: Path, accelerator: str) -> None:
        self.place, self.accelerator = place, accelerator
        self.project = bake(place, place)
        (self.project / "killer.py").write_text(KILLER)
        shutil.copy(HERE / "gpt.py", self.project)

    def env(self, name: str) -> dict[str, str]:
        """Return the environment of a run of that name."""
        return environment(self.place / "e") | {
            "WANDB_MODE": "offline",
            "WANDB_RUN_ID": name,
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "TORCHINDUCTOR_CACHE_DIR": str(self.place / "inductor"),
        }

    def python(self, words: list[str], name: str, codes: tuple[int, ...] = (0,)) -> str:
        """Run a command of Python in the project; return what it printed.

        Raises:
            SystemExit: If it ends with another code.
        """
        done = subprocess.run(
            [sys.executable, *words],
            cwd=self.project,
            env=self.env(name),
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )
        if done.returncode not in codes:
            raise SystemExit(f"{' '.join(words)}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        return done.stdout

    def fit(self, name: str, options: str, codes: tuple[int, ...] = (0,)) -> Path:
        """Train the example; return the run's folder."""
        words = f"main.py fit {options} --trainer.accelerator {self.accelerator}"
        self.python(words.split(), name, codes)
        return self.project / "runs" / name

    def step(self, kind: str, size: str, how: str, more: str = "") -> dict[str, float]:
        """Train a GPT in one way; return its times."""
        result = self.place / "result.json"
        words = ["gpt.py", kind, size, self.accelerator, how, str(result), *more.split()]
        try:
            in_terminal(words, self.project, self.env(f"gpt-{time.time_ns()}"), columns=120)
        except SystemExit as error:  # the other rows count all the same
            print(str(error)[-2000:], flush=True)
            return {}
        return dict(json.loads(result.read_text()))


def rows(folder: Path) -> list[dict[str, str]]:
    """Return what a run has logged, without empty values."""
    with (folder / "metrics.csv").open() as file:
        return [{key: one for key, one in row.items() if one} for row in csv.DictReader(file)]


def example(bench: Bench) -> str:
    """Train the example in each way, whole, and killed and resumed."""

    def one(way: str) -> tuple[object, ...]:
        try:
            return way, *trained(way)
        except (SystemExit, subprocess.TimeoutExpired) as error:
            print(str(error)[-2000:], flush=True)
            return way, "failed", ""

    def trained(way: str) -> tuple[str, str]:
        name = way.replace(" ", "-").replace(",", "")
        fit = f"--config configs/digits.yaml {WAYS[way]} --trainer.devices 1"
        fit += f" --trainer.deterministic true --trainer.max_epochs {EPOCHS}"
        fit += " --callbacks.early_stopping null"
        whole = rows(bench.fit(f"whole-{name}", f"{fit} --test_after_fit true"))
        accuracy = next(float(row["test/acc"]) for row in whole if "test/acc" in row)
        kill = f"--trainer.callbacks+ killer.Killer --trainer.callbacks.step {KILLED_AT}"
        bench.fit(f"again-{name}", f"{fit} {kill}", codes=(-9,))
        resume = f"--resume again-{name} --trainer.callbacks null"
        again = rows(bench.fit(f"again-{name}", resume))
        same = [row for row in whole if "test/acc" not in row] == again
        return f"{accuracy:.4f}", "yes" if same else "no"

    with ThreadPoolExecutor(len(WAYS)) as threads:
        results = list(threads.map(one, WAYS))
    head = ("the example in", "test accuracy", "killed and resumed bit-for-bit")
    return table(*head, of=results)


def steps(bench: Bench, sizes: list[str]) -> str:
    """Train GPTs in each way; return tables of a step, and of what the engine does beside it.

    Compiled, only the two are compared between which the rest lies.
    """
    all_kinds = ("raw", "barebones", "plain", "shipped")
    of, beside = [], []
    for size, how in product(sizes, ("eager", "compiled")):
        kinds = all_kinds if how == "eager" else ("raw", "shipped")
        taken = {kind: bench.step(kind, size, how) for kind in kinds}
        of.append((size, how, *(taken.get(kind, {}).get("ms", "") for kind in all_kinds)))
        names = ("waits", "first pause", "later pause", "writing")
        beside.append((size, how, *(taken["shipped"].get(name, "") for name in names)))
        print(*of[-1], *beside[-1][2:], flush=True)
    parts = [("as it is", bench.step("shipped", sizes[0], "eager").get("ms", ""))]
    for name, words in PARTS_OF_A_STEP.items():
        parts.append((name, bench.step("shipped", sizes[0], "eager", words).get("ms", "")))
    heads = [
        ("GPT", "", *(f"`{kind}`: ms a step" for kind in all_kinds)),
        ("GPT", "", "calls that wait, in 50 steps", "ms of the first pause", "later", "writing"),
        (f"{sizes[0]}: what is left out", "ms a step"),
    ]
    tables = zip(heads, (of, beside, parts), strict=True)
    return "\n\n".join(table(*head, of=some) for head, some in tables)


def ranks(bench: Bench) -> str:
    """Train the example on all devices."""
    devices = max(1, torch.cuda.device_count()) if bench.accelerator == "gpu" else 2
    of = []
    for name, words in STRATEGIES.items():
        if name == "FSDP" and bench.accelerator != "gpu":
            continue
        fit = f"--config configs/digits.yaml {words} --trainer.devices {devices}"
        begin = time.perf_counter()
        logged = rows(bench.fit(f"ranks-{name}", f"{fit} --trainer.max_epochs 10"))
        best = max(float(row["val/acc"]) for row in logged if "val/acc" in row)
        of.append((name, devices, f"{best:.4f}", time.perf_counter() - begin))
    return table("strategy", "devices", "best val/acc in 10 epochs", "s", of=of)


def about(accelerator: str) -> str:
    device = platform.processor() or "a CPU"
    if accelerator == "gpu":
        device = torch.cuda.get_device_name()
    names = ("torch", "lightning", "wandb")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    count = torch.cuda.device_count() if accelerator == "gpu" else 1
    return f"# On a GPU\n\n{count} x {device}, {versions}, Python {platform.python_version()}."


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--accelerator", default="gpu", choices=("gpu", "cpu"))
    parts: dict[str, Any] = {"steps": steps, "example": example, "ranks": ranks}
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=list(parts))
    parser.add_argument("--sizes", nargs="+", default=["small", "large"], help="of the GPT")
    parser.add_argument("--output", type=Path, help="file; benchmarks/results/gpu.md if all is run")
    given = parser.parse_args()
    texts = [about(given.accelerator)]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place), given.accelerator)
        for name in given.parts:
            texts.append(parts[name](*([bench, given.sizes] if name == "steps" else [bench])))
            print(texts[-1], end="\n\n", flush=True)
        is_whole = len(given.parts) == len(parts) and given.accelerator == "gpu"
        output = given.output or (HERE / "results" / "gpu.md" if is_whole else None)
        if output:
            output.write_text("\n\n".join(texts) + "\n")
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
