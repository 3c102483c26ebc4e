"""How a run ends that does not simply succeed: by a signal, by an error, or by the end of another rank.

A first signal in training is agreed on by all ranks at the end of a batch, which is saved and logged before they leave.
Any other ends the run at once. What is left of W&B's run, and of the processes of other ranks, ends here too.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.utils.data import get_worker_info

from .resume import Backup
from .run import LOCKS, Failure, shown
from .wandb import PREEMPTED, finish

if TYPE_CHECKING:
    from .ranks import Ranks

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
        self.ranks: Ranks | None = None  # where there are several
        self.begun = self.hurried = self.over = False

    def __enter__(self) -> Self:
        launched = os.environ.get(PARENT) == str(os.getppid()) or "TORCHELASTIC_RUN_ID" in os.environ
        if launched and sys.platform == "linux":
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
            if trainer is not None and trainer.is_global_zero:
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
        self.trainer = trainer
        self.backups = [saved for saved in trainer.checkpoint_callbacks if isinstance(saved, Backup)]
        if trainer.world_size > 1 and not self.ranks:
            from .ranks import Ranks

            self.ranks = Ranks(trainer, self.error_file, lambda: finish(1))
            trainer.callbacks.append(self.ranks)  # type: ignore[attr-defined]

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
        self.leaving = self.ranks.agree(self.signal) if self.ranks else self.signal
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
        if self.ranks and not (self.leaving and meant(exception)):
            self.ranks.failed(exception)
        if self.ranks or self.hurried or isinstance(exception, Failure):
            for saved in (c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)):
                saved.save_on_exception = False  # it would wait for ranks that do not come, or save what is not good

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Ends W&B's run and the processes of other ranks, and says what it was that ended the command."""
        self.over, first, ending = True, not rank_zero_only.rank, error  # type: ignore[attr-defined]
        if self.ranks:
            self.ranks.over = True
            if error is None:
                self.ranks.wait()
        if meant(error) and (number := self.leaving or self.signal):
            ending = Stopped(128 + number)
        elif self.ranks and (cause := self.ranks.cause()):
            ending = Failure(cause) if first else SystemExit(1)
        if isinstance(ending, Stopped) and first:
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
            for child in self.ranks.children if self.ranks else ():
                child.kill()
        if code == PREEMPTED and first and "SLURM_JOB_ID" in os.environ:
            from .launchers import requeue

            requeue()
        if ending is not error and ending is not None:
            raise ending
        if isinstance(error, Exception):
            get_error_handler().record_exception(error)  # for torchrun, whose own report comes last on the screen
