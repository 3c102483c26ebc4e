"""What a CPU cannot show: one device and all, 32 bits and mixed precision, compiled, resumed.

    python benchmarks/gpu.py

Trains the example of a baked project in each way, as processes, and prints a table in Markdown: the
test accuracy, which must be that of the example, and the median time of a step of a wider net.
`--accelerator cpu` tries the script itself where there is no GPU.
"""

import argparse
import csv
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bakery import bake, environment

EXTRAS = """
import time
from lightning.pytorch import Callback

class Clock(Callback):
    def on_train_start(self, trainer, module):
        self.times = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.device.type == "cuda":
            import torch
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def on_train_end(self, trainer, module):
        steps = sorted(b - a for a, b in zip(self.times, self.times[1:]))
        if trainer.is_global_zero and steps:
            print(f"\\nstep {1000 * steps[len(steps) // 2]:.3f}", flush=True)
"""
WAYS = {  # by what is tried: the options that ask for it
    "32 bits": "",
    "bf16": "--config configs/gpu.yaml --compile false",
    "32 bits, compiled": "--compile true",
    "bf16, compiled": "--config configs/gpu.yaml",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--accelerator", default="gpu", help="what to train on")
    parser.add_argument("--epochs", type=int, default=20, help="of the example")
    parser.add_argument("--width", type=int, default=256, help="of the net whose steps are timed")
    given = parser.parse_args()
    device = platform.processor() or "a CPU"
    if given.accelerator == "gpu":
        device = torch.cuda.get_device_name()
    print(f"{torch.cuda.device_count()} x {device}, torch {torch.__version__}\n")
    print("| way | devices | test accuracy | resumed bit-for-bit | ms a step, wider |")
    print("|" + " --- |" * 5)
    with tempfile.TemporaryDirectory() as place:
        project = bake(Path(place), Path(place))
        (project / "extras.py").write_text(EXTRAS)

        def run(name: str, words: str) -> tuple[str, Path]:
            """What a command printed, and the folder of its run."""
            words += f" --trainer.accelerator {given.accelerator}"
            command = [sys.executable, "main.py", *words.split()]
            env = environment(Path(place)) | {"WANDB_MODE": "offline", "WANDB_RUN_ID": name}
            done = subprocess.run(
                command, cwd=project, env=env, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
            return done.stdout, project / "runs" / name

        def rows(folder: Path) -> list[dict[str, str]]:
            with (folder / "metrics.csv").open() as file:
                table = [
                    {name: value for name, value in row.items() if value}
                    for row in csv.DictReader(file)
                ]
                return [row for row in table if "test/acc" not in row]

        wide = f"--model.width {given.width} --data.batch_size 256 --trainer.max_epochs 20"
        counts = [1] + [torch.cuda.device_count()] * (torch.cuda.device_count() > 1)
        for number, (way, options, devices) in enumerate(
            (w, o, d) for w, o in WAYS.items() for d in counts
        ):
            fit = f"fit --config configs/digits.yaml {options} --trainer.devices {devices}"
            fit += " --trainer.deterministic warn --trainer.callbacks+ extras.Clock"
            epochs = f"--trainer.max_epochs {given.epochs} --callbacks.early_stopping null"
            _, whole = run(f"whole-{number}", f"{fit} {epochs} --test_after_fit true")
            with (whole / "metrics.csv").open() as file:
                (accuracy,) = [
                    row["test/acc"] for row in csv.DictReader(file) if row.get("test/acc")
                ]
            half = (
                f"--trainer.max_epochs {max(1, given.epochs // 2)} --callbacks.early_stopping null"
            )
            _, again = run(f"again-{number}", f"{fit} {half}")
            run(f"again-{number}", f"fit --resume again-{number} {epochs}")
            exact = "yes" if rows(whole) == rows(again) else "no"
            times = [
                run(f"wide-{number}-{turn}", f"{fit} {wide}")[0].partition("\nstep ")[2]
                for turn in range(3)
            ]
            step = median(float(text.split()[0]) for text in times)
            print(
                f"| {way} | {devices} | {float(accuracy):.4f} | {exact} | {step:.3f} |", flush=True
            )


if __name__ == "__main__":
    main()
