"""Count what a training does in a step, for `test_speed.py`.

    python probe.py KIND RESULT, in a baked project's folder

Beside it lie `contenders.py` and `contenders_lightning.py` of benchmarks/, whose KIND is trained.
Counts are the same on any machine.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import contenders  # type: ignore[import-not-found]
import contenders_lightning as classes  # type: ignore[import-not-found]
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

WINDOWS = {101: "calls", 151: "", 202: "waits", 248: ""}  # by step: what is counted from there on
# Methods of a tensor that empty a GPU's queue.
WAITS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")
counted: Counter[str] = Counter()


class Probe(Callback):
    """Count calls of functions in fifty steps, and waiting for values between logged steps.

    One of the fifty steps is logged.
    """

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, step: int
    ) -> None:
        if step not in WINDOWS:
            return
        sys.setprofile(None)
        for name in WAITS:
            setattr(torch.Tensor, name, METHODS[name])
        if WINDOWS[step] == "waits":
            for name in WAITS:
                setattr(torch.Tensor, name, counting(name))
        if WINDOWS[step] == "calls":
            sys.setprofile(called)


METHODS = {name: getattr(torch.Tensor, name) for name in WAITS}


def counting(name: str) -> Any:
    def method(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        counted["waits"] += 1
        return METHODS[name](tensor, *args, **options)

    return method


def called(frame: FrameType, event: str, argument: Any) -> None:
    counted["calls"] += event in ("call", "c_call")
    counted["moves"] += event == "call" and frame.f_code.co_name == "_apply_to_collection_slow"


def logging(kind: type) -> None:
    """Make a class of loggers count how often it is given values."""
    log = kind.log_metrics  # type: ignore[attr-defined]

    def log_metrics(self: Any, *args: Any, **options: Any) -> Any:
        counted["rows"] += 1
        return log(self, *args, **options)

    kind.log_metrics = log_metrics  # type: ignore[attr-defined]


if __name__ == "__main__":
    _, name, result = sys.argv
    sys.argv = ["main.py"]
    classes.Clock.on_train_batch_start = Probe.on_train_batch_start
    contenders.MORE += ["--trainer.limit_train_batches", "300"]
    contenders.SIZES["small"] = (24, 1, 60, 239)  # 300 steps, for the Trainer without a line
    # AdamW asks its own step for values.
    classes.Sized.configure_optimizers = lambda model: torch.optim.SGD(model.parameters(), 1e-3)
    from lightning.pytorch.loggers import WandbLogger

    logging(WandbLogger)
    if name == "barebones":
        contenders.MORE.clear()
    contenders.KINDS[name]("small")
    modules = sorted({module.partition(".")[0] for module in sys.modules})
    Path(result).write_text(json.dumps({**counted, "modules": modules}))
