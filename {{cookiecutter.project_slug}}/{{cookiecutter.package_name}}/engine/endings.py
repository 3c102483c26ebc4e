"""How a run ends that does not simply succeed: by a signal, by an error, or by the end of another rank.

A first signal in training is agreed on by all ranks at the end of a batch, which is saved and logged before they leave.
Any other ends the run at once. A rank that fails writes why into error.txt in the run's folder; the others, whose own
errors only follow from it, say so. What is left of W&B's run, and of the processes of other ranks, ends here too.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.utils.data import get_worker_info

from . import Failure
from .callbacks import Backup
from .run import DRAWN, LOCKS, shown
from .wandb import PREEMPTED, finish

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
PARENT = "RUN_PARENT"  # environment variable: the process that started those of the other ranks


class Stopped(SystemExit):
    """A signal ended the run. The exit code is what a shell gives for one: 128 and the signal's number."""


def meant(error: BaseException | None) -> bool:
    """Whether a signal has ended what ended, be it only a process that loads data, or W&B's client."""
    return isinstance(error, Stopped | ConnectionError) or "DataLoader worker" in str(error)


class Endings(Callback):
    """The context in which a command runs, and the callback that knows how far it is."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.error_file = Path()
        self.signal = self.leaving = 0
        self.since = 0.0
        self.backups: list[Backup] = []
        self.children: list[subprocess.Popen[bytes]] = []
        self.begun = self.hurried = self.over = False

    def __enter__(self) -> Self:
        if os.environ.get(PARENT) == str(os.getppid()) and sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the one that started it
        os.environ[PARENT] = str(os.getpid())
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                LOCKS.callback(signal.signal, number, signal.signal(number, self.receive))
        return self

    def receive(self, number: int, frame: Any) -> None:
        """Notes a first signal that comes in training; any other ends the run where it is."""
        if get_worker_info():  # a process that loads data: the trainer says when it ends
            return
        again = self.signal > 0
        if again and time.monotonic() - self.since < 1:  # launchers pass on what schedulers send to everyone
            return
        self.signal, self.since, trainer = self.signal or number, time.monotonic(), self.trainer
        fits = trainer is not None and trainer.state.fn == TrainerFn.FITTING and not trainer.interrupted
        if self.begun and fits and not (again or self.over):
            signal.signal(signal.SIGCHLD, lambda *_: None)  # the end of what loads data, which gets the signal as well
            if number == signal.SIGTERM:  # whoever sends it kills after half a minute
                threading.Thread(target=self.remind, args=(20,), daemon=True).start()
            if not self.rank:
                os.write(1, b"\nstops    once it is exact to go on from here; a second signal stops at once\n")
        else:
            self.hurried = again
            raise Stopped(128 + self.signal)

    def remind(self, seconds: float) -> None:
        """Sends the signal once more if the run is not over by then."""
        time.sleep(seconds)
        if not self.over:
            os.kill(os.getpid(), self.signal)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        first, self.trainer = self.trainer is None, trainer
        self.backups = [saved for saved in trainer.checkpoint_callbacks if isinstance(saved, Backup)]
        if first and trainer.world_size > 1 and trainer.is_global_zero:
            started = getattr(trainer.strategy.launcher, "procs", [])
            self.children = [child for child in started if isinstance(child, subprocess.Popen)]
            started.clear()  # or Lightning kills this process as soon as one of them fails
            threading.Thread(target=self.watch, daemon=True).start()

    def listen(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signals back from Lightning, whose handler waits for other ranks wherever they are."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self.receive)

    on_sanity_check_start = on_validation_start = on_test_start = on_predict_start = listen

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.listen(trainer, pl_module)
        self.begun = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Has the last checkpoint written, once any rank has received a signal, where one can go on from exactly."""
        self.leaving = self.signal
        if trainer.world_size > 1:
            flag = torch.tensor(self.signal, device=trainer.strategy.root_device)
            self.leaving = int(trainer.strategy.reduce(flag, reduce_op="max"))
        for backup in self.backups if self.leaving else ():
            backup.wanted = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Leaves, now that what the checkpoint knows is logged."""
        if self.leaving and all(backup.step == trainer.global_step for backup in self.backups):
            raise Stopped(128 + self.leaving)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_batch_end(trainer, pl_module)
        self.on_train_batch_start(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.world_size > 1 and not (self.leaving and meant(exception)):
            time.sleep(2 if trainer.global_rank else 1)  # a killed rank is seen to be gone only after its sockets
            self.note_the_dead()
            self.note(self.rank, "".join(traceback.format_exception(exception)))
        if trainer.world_size > 1 or self.hurried or isinstance(exception, Failure):
            for saved in (c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)):
                saved.save_on_exception = False  # it would wait for ranks that do not come, or save what is not good

    def note(self, rank: int, reason: str) -> None:
        """Writes error.txt, unless a rank has."""
        with suppress(OSError), self.error_file.open("x", encoding="utf-8") as file:
            file.write(f"rank {rank}\n{reason}")

    @property
    def rank(self) -> int:
        return self.trainer.global_rank if self.trainer else rank_zero_only.rank  # type: ignore[attr-defined]

    def note_the_dead(self) -> None:
        for rank, child in enumerate(self.children, 1):
            if child.poll():
                self.note(rank, f"it ended with exit code {child.returncode} and without an error of its own")

    def cause(self) -> str:
        """Why another rank was the first to fail; nothing if none was."""
        with suppress(OSError, ValueError):
            rank, *_, reason = self.error_file.read_text(encoding="utf-8").splitlines()
            if self.trainer and self.trainer.world_size > 1 and rank != f"rank {self.rank}":
                return f"{rank} failed, see {shown(self.error_file)}: {reason}"
        return ""

    def watch(self) -> None:
        """Ends the first rank where it does not notice that another failed: with NCCL it would wait for that one."""
        while not self.over:
            time.sleep(1)
            if not self.leaving:
                self.note_the_dead()
            if cause := self.cause():
                time.sleep(10)
                if not self.over:
                    print(f"error: {cause}", file=sys.stderr, flush=True)
                    finish(1)
                    os._exit(1)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Ends W&B's run and the processes of other ranks, and says what it was that ended the command."""
        self.over = True
        for child in self.children if error is None else ():
            child.wait()
        ending = error
        if meant(error) and (number := self.leaving or self.signal):
            ending = Stopped(128 + number)
        else:
            self.note_the_dead()
            if cause := self.cause():
                ending = SystemExit(1) if self.rank else Failure(cause)
        if isinstance(ending, Stopped) and not self.rank:
            run = self.error_file.parent
            hint = f"; to go on: fit --resume {shown(run)}" if list(run.glob("checkpoints/*.ckpt")) else ""
            print(f"stopped  by {signal.Signals(int(str(ending)) - 128).name}{hint}", flush=True)
        code = 0 if ending is None else getattr(ending, "code", 1)
        code = code if isinstance(code, int) else int(code is not None)
        try:
            finish(code)
        except Stopped as stopped:  # a signal to the uploads; they stay to be sent later
            finish(code)
            ending = ending or stopped
        finally:
            for child in self.children:
                child.kill()
        if code == PREEMPTED and SLURMEnvironment.detect() and not self.rank:
            requeue()
        if ending is not error and ending is not None:
            raise ending
        if isinstance(error, Exception):
            get_error_handler().record_exception(error)  # for torchrun, whose own report comes last on the screen


def requeue() -> None:
    """Asks SLURM to start the job once more, which ends it here, if the next start will go on with this run."""
    if os.environ.get("WANDB_RUN_ID") in DRAWN:
        return print("warning: not requeued, for the job would begin a new run; WANDB_RUN_ID names one", file=sys.stderr)
    array, job = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK")), os.environ["SLURM_JOB_ID"]
    words = ["scontrol", "requeue", "_".join(filter(None, array)) or job]
    try:
        subprocess.run(words, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"warning: {error}", file=sys.stderr)
