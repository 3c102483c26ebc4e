"""What may happen to a run: a callback that does it at a step, in a hook, on a rank."""

import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Act(Callback):
    """Do `what` when the trainer has made `step` steps.

    Args:
        what: A signal by its name, or one of this class's methods.
    """

    def __init__(
        self, what: str, hook: str = "on_train_batch_start", step: int = 25, rank: int = 0
    ) -> None:
        self.what, self.step, self.rank = what, step, rank
        setattr(self, hook, self.act)

    def act(self, trainer: Trainer, module: LightningModule, *_: Any, **__: Any) -> None:
        acted = Path(trainer.default_root_dir, f"acted-{self.what}")
        here = trainer.global_step == self.step and trainer.global_rank == self.rank
        if not here or trainer.sanity_checking or acted.exists():
            return
        acted.parent.mkdir(exist_ok=True)
        acted.write_text(str(time.time()))
        if self.what.startswith("SIG"):
            signal.raise_signal(getattr(signal, self.what))
        else:
            getattr(self, self.what)(module)

    def group_sigint(self, _: LightningModule) -> None:
        """As a terminal does for Ctrl-C: to every process, those that load data too."""
        from_elsewhere(signal.SIGINT)

    def group_sigterm(self, _: LightningModule) -> None:
        """As a scheduler does."""
        from_elsewhere(signal.SIGTERM)

    def echo(self, _: LightningModule) -> None:
        """As where a launcher passes on what a scheduler sends to everyone."""
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    def sigterm_and_hang(self, _: LightningModule) -> None:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(60)

    def twice(self, _: LightningModule) -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(1.5)
        signal.raise_signal(signal.SIGINT)
        time.sleep(30)

    def error(self, _: LightningModule) -> None:
        raise ValueError("the original error")

    def leave(self, _: LightningModule) -> None:
        sys.exit(3)

    def die(self, _: LightningModule) -> None:
        os._exit(7)

    def kill_the_launcher(self, _: LightningModule) -> None:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(1000)

    def hang(self, _: LightningModule) -> None:
        time.sleep(1000)

    def diverge(self, module: LightningModule) -> None:
        with torch.no_grad():
            next(module.parameters()).fill_(math.nan)

    def fill_the_disk(self, _: LightningModule) -> None:
        """Lets no file become larger than 20 kB: a checkpoint is, a table is not."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    def fill_the_table(self, module: LightningModule) -> None:
        """Leaves room for ten bytes more in metrics.jsonl, which is less than a row."""
        size = Path(module.trainer.default_root_dir, "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))


def from_elsewhere(number: int) -> None:
    """Send a signal to all of this job from another process.

    A process that loads data takes a signal from its parent otherwise.
    """
    # torchrun starts ranks in another group of processes.
    launched = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0
    code = f"import os; os.killpg({os.getpgid(launched)}, {int(number)})"
    subprocess.run([sys.executable, "-c", code], start_new_session=True, check=True)
    time.sleep(0.5)
