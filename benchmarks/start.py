"""From Enter to the first step, and what of it is whose: benchmarks/results/start.md.

    python benchmarks/start.py

Commands in a baked project, in turn, each a fresh process with one thread; medians. Each is also
run without the bytecode that Python keeps, as after an installation: "first" in the table.

Times hold for one machine at one time: compare the rows.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

from project import HERE, Project

FIRST_STEP = """
import os, time
from lightning.pytorch import Callback

class FirstStep(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        with open(os.environ["FIRST_STEP"], "w") as file:
            file.write(str(time.time()))
"""
PLAIN = """
from lightning.pytorch.cli import LightningCLI
import wandb

LightningCLI(save_config_kwargs={"overwrite": True})
wandb.finish()
"""
BORING = (
    "fit --model lightning.pytorch.demos.boring_classes.BoringModel --trainer.max_steps 1"
    " --trainer.accelerator cpu --trainer.limit_val_batches 0"
    " --trainer.callbacks+ first_step.FirstStep"
)
OFFLINE = " --trainer.logger.offline true"
NO_METRICS = (
    " --callbacks.checkpoint.monitor null --callbacks.early_stopping null"
    " --callbacks.summaries null"
)
COMMANDS = {  # by what is measured: the words after `python`
    "import of lightning.pytorch.cli, without anything": ["-c", "import lightning.pytorch.cli"],
    "a plain LightningCLI, a step without a logger": [
        "plain.py",
        *f"{BORING} --trainer.logger false --trainer.enable_checkpointing false".split(),
    ],
    "a plain LightningCLI, a step with W&B offline": [
        "plain.py",
        *f"{BORING} --trainer.logger WandbLogger {OFFLINE}".split(),
    ],
    "shipped, a step without a logger": [
        "main.py",
        *f"{BORING}{NO_METRICS} --trainer.logger false".split(),
    ],
    "shipped, a step with W&B offline": ["main.py", *f"{BORING}{NO_METRICS}{OFFLINE}".split()],
    "main.py --help": ["main.py", "--help"],
    "main.py runs": ["main.py", "runs"],
    "main.py --version": ["main.py", "--version"],
}


class Bench(Project):
    """A baked project, and what times commands in it."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        (self.folder / "first_step.py").write_text(FIRST_STEP)
        (self.folder / "plain.py").write_text(PLAIN)
        self.env["FIRST_STEP"] = str(place / "first")
        self.env.pop("PYTHONDONTWRITEBYTECODE", None)

    def seconds(self, words: list[str], **env: str) -> tuple[float, float]:
        """Return how long a command takes, and up to its first step; the same without one."""
        first = Path(self.env["FIRST_STEP"])
        first.unlink(missing_ok=True)
        begin = time.time()
        quiet = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
        command = [sys.executable, *words]
        subprocess.run(command, cwd=self.folder, env=self.env | env, check=True, **quiet)
        took = time.time() - begin
        return took, float(first.read_text()) - begin if first.exists() else took

    def compiling(self, words: list[str]) -> float:
        """Return how long a command takes whose bytecode is not there."""
        cache = self.place / "cache"
        took, _ = self.seconds(words, PYTHONPYCACHEPREFIX=str(cache))
        shutil.rmtree(cache, ignore_errors=True)
        return took

    def imports(self, words: list[str]) -> Counter[str]:
        """Return by package how long its modules take to be imported, in milliseconds."""
        command = [sys.executable, "-X", "importtime", *words]
        done = subprocess.run(
            command, cwd=self.folder, env=self.env, check=True, capture_output=True, text=True
        )
        spent: Counter[str] = Counter()
        for own, name in re.findall(r"import time: +(\d+) \| +\d+ \| +(\w+)", done.stderr):
            spent[name] += int(own) / 1000
        return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed")
    given = parser.parse_args()
    lines = [f"# Start\n\n{os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}.\n"]
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place))
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
        for words in COMMANDS.values():
            bench.seconds(words)  # once for the caches
        for _ in range(given.rounds):
            for name, words in COMMANDS.items():
                taken[name].append(bench.seconds(words))
        lines += ["| command | s to the first step | s in all | from to | first: s in all |"]
        lines += ["|" + " --- |" * 5]
        for name, times in taken.items():
            whole, step = (median(one) for one in zip(*times, strict=True))
            least, most = (choose(times)[0] for choose in (min, max))
            compiled = bench.compiling(COMMANDS[name])
            spread = f"{least:.2f} to {most:.2f}"
            lines.append(f"| {name} | {step:.2f} | {whole:.2f} | {spread} | {compiled:.2f} |")
        kinds = (
            "a plain LightningCLI, a step with W&B offline",
            "shipped, a step with W&B offline",
        )
        theirs, ours = (bench.imports(COMMANDS[name]) for name in kinds)
    lines += ["\n| imports of | ms in a plain LightningCLI | shipped |", "|" + " --- |" * 3]
    names = [name for name, _ in (theirs | ours).most_common(14)]
    names += [name for name in ours if name not in theirs and ours[name] >= 1]
    for name in dict.fromkeys(names):
        lines.append(f"| {name} | {theirs[name]:.0f} | {ours[name]:.0f} |")
    lines.append(f"| all | {theirs.total():.0f} | {ours.total():.0f} |")
    (HERE / "results" / "start.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
