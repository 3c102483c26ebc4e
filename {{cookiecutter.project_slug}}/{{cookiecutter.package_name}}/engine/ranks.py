"""What several ranks need and one does not: agreeing on a signal, ending when one of them fails, saying which it was.

A rank that fails writes why into error.txt in the run's folder; the others, whose errors only follow from it, say so.
"""

import copy
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torchmetrics import Metric

from .run import shown


class Ranks(Callback):
    """The ranks of a job, as one of them sees them; added to the callbacks where there are several.

    Args:
        error_file: Where the first rank to fail says why.
        leave: Ends what this rank has open, before it ends itself.
    """

    def __init__(self, trainer: Trainer, error_file: Path, leave: Callable[[], None]) -> None:
        self.trainer, self.error_file, self.leave = trainer, error_file, leave
        self.stopping = self.over = False
        self.kept: dict[Metric, dict[str, Any]] | None = None
        started = getattr(trainer.strategy.launcher, "procs", [])
        self.children = [child for child in started if isinstance(child, subprocess.Popen)]
        started.clear()  # or Lightning kills this process as soon as one of them fails
        if trainer.is_global_zero:
            threading.Thread(target=self._watch, daemon=True).start()

    def agree(self, number: int) -> int:
        """The largest of the numbers that the ranks have; of signals, the one on which all of them leave."""
        largest = torch.tensor(number, device=self.trainer.strategy.root_device)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)  # Lightning's own adds a barrier
        self.stopping = bool(largest)
        return int(largest)

    def failed(self, error: BaseException) -> None:
        """Notes what ended this rank, unless that is the end of another one."""
        time.sleep(2 if self.trainer.global_rank else 1)  # a killed rank is seen to be gone only after its sockets
        self._note_the_dead()
        self._note(self.trainer.global_rank, "".join(traceback.format_exception(error)))

    def _note(self, rank: int, reason: str) -> None:
        """Writes error.txt, unless a rank has."""
        with suppress(OSError), self.error_file.open("x", encoding="utf-8") as file:
            file.write(f"rank {rank}\n{reason}")

    def _note_the_dead(self) -> None:
        for rank, child in enumerate(self.children, 1):
            if child.poll():
                self._note(rank, f"it ended with exit code {child.returncode} and without an error of its own")

    def cause(self) -> str:
        """Why another rank was the first to fail; nothing if none was."""
        self._note_the_dead()
        with suppress(OSError, ValueError):
            rank, *_, reason = self.error_file.read_text(encoding="utf-8").splitlines()
            if rank != f"rank {self.trainer.global_rank}":
                return f"{rank} failed, see {shown(self.error_file)}: {reason}"
        return ""

    def _watch(self) -> None:
        """Ends the first rank where it does not notice that another failed: with NCCL it would wait for that one."""
        while not self.over:
            time.sleep(1)
            if not self.stopping and (cause := self.cause()):
                time.sleep(10)
                if not self.over:
                    print(f"error: {cause}", file=sys.stderr, flush=True)
                    self.leave()
                    os._exit(1)

    def wait(self) -> None:
        """Waits for the other ranks, which have no more to do than this one had."""
        for child in self.children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(60)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        """Keeps the metrics as they are before a sample that `Order` lent to this rank, which has none of its own."""
        if lent(trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders, dataloader_idx):
            metrics = (module for module in pl_module.modules() if isinstance(module, Metric))
            self.kept = {metric: copy.deepcopy(metric.metric_state) for metric in metrics}

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        """Forgets what such a sample has added to metrics and to what was logged, and has means be exact."""
        for metric, state in (self.kept or {}).items():
            vars(metric).update(state)
        for result in (trainer._results or {}).values():
            if result.is_tensor and self.kept is not None and result.meta.dataloader_idx in (None, dataloader_idx):
                Metric.reset(result)  # not its own, after which it would not count as logged
            if result.is_tensor and result.meta.is_mean_reduction:  # else the ranks' mean count is rounded, PR 21859
                result.cumulated_batch_size = result.cumulated_batch_size.float()
        self.kept = None

    on_test_batch_start, on_test_batch_end = on_validation_batch_start, on_validation_batch_end


def lent(loaders: Any, number: int) -> bool:
    """Whether the sample that this rank gets of one of the loaders is another's, for it has none of its own."""
    loader = CombinedLoader(loaders, "sequential").flattened[number]
    return getattr(getattr(getattr(loader, "batch_sampler", None), "sampler", None), "lent", False)


class Nothing:
    """Stands for the W&B run on the ranks that have none: takes every call, attribute and key."""

    def __getattr__(self, name: str) -> "Nothing":
        return self

    def __call__(self, *_: Any, **__: Any) -> "Nothing":
        return self

    __getitem__ = __setitem__ = __call__


NOTHING: Any = Nothing()
