"""How a command ends: signals, exit codes, and what is left of W&B's run and of other ranks.

All ranks agree on a first signal in training at the end of a batch, which is saved and logged
before they exit. Any other signal ends the run at once.
"""

import os
import signal
import threading
import time
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.utils.data import get_worker_info

from .checkpoints import LastCheckpoint
from .distributed import ExactEvaluation, RankMonitor, requeue
from .errors import RunError, UsageError
from .files import display_path, python_command
from .lightning_internals import skip_sigterm_broadcast
from .recorder import RunRecorder
from .run import Run
from .screen import say, write_at_once
from .train_state import validation_follows
from .wandb_ending import PREEMPTED
from .wandb_logger import finish_wandb

NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
ECHO_SECONDS = 1  # launchers pass on the signals that schedulers send to every process
ESCALATION_SECONDS = 20  # SLURM (KillWait) and Kubernetes kill 30 s after SIGTERM
FIRST_SIGNAL = "stopping after this batch; press Ctrl-C again to stop now"


class ExitBySignal(SystemExit):
    """A signal ended the run. The exit code is a shell's: 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


def caused_by_signal(error: BaseException | None) -> bool:
    """Return True if a signal may have caused this error.

    Either in this process, or in a DataLoader worker or W&B's client, which receive it too.
    """
    return isinstance(error, ExitBySignal | ConnectionError) or "DataLoader worker" in str(error)


class GracefulShutdown(Callback):
    """Receives signals: in training, a first one ends the run after the batch."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.run: Run | None = None
        self.recorder: RunRecorder | None = None
        self.repeatable = False  # whether another start of this job would resume the run
        self.rank_monitor: RankMonitor | None = None  # of several ranks
        self.first_signal = 0  # that this rank received
        self.received_at = 0.0
        self.exit_signal = 0  # on which all ranks have agreed
        self.forced = False  # by a second signal
        self.training_began = False
        self.made_folder: bool | None = None  # None: the folder's lock is not this command's
        self.trained = False  # whether a batch was trained
        self.ended = False
        self.last_checkpoints: list[LastCheckpoint] = []
        self.replaced_handlers: dict[int, Any] = {}

    def install_handlers(self) -> None:
        """Receive signals from now on, if this is the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._replace_handler(number, self.receive)

    def restore_handlers(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self.replaced_handlers.items():
            signal.signal(number, handler)
        self.replaced_handlers = {}

    def _replace_handler(self, number: int, handler: Any) -> None:
        before = signal.getsignal(number)
        if before is not None:  # a handler in C cannot be put back
            self.replaced_handlers.setdefault(number, before)
            signal.signal(number, handler)

    def receive(self, number: int, frame: Any) -> None:
        """Note a first signal in training, and raise ExitBySignal on any other."""
        if get_worker_info():  # a DataLoader worker, which the trainer ends
            return
        again = self.first_signal > 0
        if again and time.monotonic() - self.received_at < ECHO_SECONDS:
            return
        self.first_signal = self.first_signal or number
        self.received_at = time.monotonic()
        if again or self.ended or not self._in_training():
            self.forced = again
            raise ExitBySignal(self.first_signal)
        self._wait_for_batch(number)

    def _in_training(self) -> bool:
        trainer = self.trainer
        if trainer is None or trainer.interrupted or not self.training_began:
            return False
        return trainer.state.fn == TrainerFn.FITTING

    def _wait_for_batch(self, number: int) -> None:
        if hasattr(signal, "SIGCHLD"):  # by which torch reports workers that the signal ended
            self._replace_handler(signal.SIGCHLD, lambda *_: None)
        if number == signal.SIGTERM:
            threading.Thread(target=self.escalate_after, daemon=True).start()
        if self.trainer is not None and self.trainer.is_global_zero:
            write_at_once(FIRST_SIGNAL)

    def escalate_after(self, seconds: float = ESCALATION_SECONDS) -> None:
        """Send the signal again unless the run ends in time: its sender would kill it."""
        time.sleep(seconds)
        if not self.ended:
            os.kill(os.getpid(), self.first_signal)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.trainer = trainer
        saving = trainer.checkpoint_callbacks
        self.last_checkpoints = [saved for saved in saving if isinstance(saved, LastCheckpoint)]
        if trainer.world_size > 1 and self.run and not self.rank_monitor:
            on_failure = partial(finish_wandb, trainer.loggers, 1)
            self.rank_monitor = RankMonitor(trainer, self.run.error_file, on_failure)
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
            callbacks.append(ExactEvaluation())
        skip_sigterm_broadcast(trainer, skip=self.rank_monitor is not None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        skip_sigterm_broadcast(trainer, skip=False)

    def replace_lightnings_handlers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take signals back from Lightning, whose handler waits for ranks that may not come."""
        for number in list(self.replaced_handlers):  # a signal may add one meanwhile
            handler = signal.getsignal(number)
            if type(handler).__module__.startswith("lightning."):
                signal.signal(number, self.receive)

    on_sanity_check_start = on_validation_start = replace_lightnings_handlers
    on_test_start = on_predict_start = replace_lightnings_handlers

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.replace_lightnings_handlers(trainer, pl_module)
        self.training_began = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Note that a batch was trained, and agree on a signal."""
        self.trained = True
        self.agree(at_once=self.rank_monitor is not None and nothing_is_saved_next(trainer))

    def agree(self, at_once: bool = False) -> None:
        """Agree on a signal that any rank has received, and request last.ckpt if there is one.

        Args:
            at_once: Whether to wait for the other ranks; else fast steps are one step late.
        """
        agreed = self.first_signal
        if self.rank_monitor:
            agreed = self.rank_monitor.signal.reached(agreed, at_once)
            self.rank_monitor.leaving = agreed > 0
        self.exit_signal = agreed
        if agreed:
            for saved in self.last_checkpoints:
                saved.save_requested = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Exit once last.ckpt is saved, and what it knows of is logged."""
        if not self.exit_signal:
            return
        if all(saved.step == trainer.global_step for saved in self.last_checkpoints):
            raise ExitBySignal(self.exit_signal)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.rank_monitor:
            self.rank_monitor.signal.settle()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.agree(at_once=True)
        self.on_train_batch_start(trainer, pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.trainer = trainer  # an error may come before `setup`
        monitor = self.rank_monitor
        agreed = self.exit_signal and caused_by_signal(exception)
        if monitor and not agreed:
            monitor.record_failure(exception)
        if monitor or self.forced or isinstance(exception, RunError):
            for saved in trainer.checkpoint_callbacks:
                if isinstance(saved, ModelCheckpoint):
                    # It would wait for ranks that do not come, or save what is not good.
                    saved.save_on_exception = False


def nothing_is_saved_next(trainer: Trainer) -> bool:
    """Return True if last.ckpt cannot be saved at the next batch's end: a validation follows it."""
    next_is_last = trainer.fit_loop.batch_idx + 2 == trainer.num_training_batches
    return next_is_last or validation_follows(trainer, later=1)


def end_command(shutdown: GracefulShutdown, error: BaseException | None) -> BaseException | None:
    """Finish W&B's run and the processes of other ranks, and say what ended the command.

    Returns:
        What to raise: `error`, or the reason behind it; None if the command succeeded.
    """
    shutdown.ended = True
    monitor, first = shutdown.rank_monitor, not rank_zero_only.rank  # type: ignore[attr-defined]
    try:
        if monitor:
            monitor.end(wait=error is None)
    except ExitBySignal as signaled:
        error = signaled
    ending = reason_to_end(shutdown, error)
    if isinstance(ending, ExitBySignal) and first:
        say(f"stopped  by {ending.name}")
        say_how_to_resume(shutdown.run)
    code = exit_code(ending)
    loggers = shutdown.trainer.loggers if shutdown.trainer else []
    try:
        finish_wandb(loggers, code)
    except ExitBySignal as signaled:  # in the uploads, which `sync` can send later
        finish_wandb(loggers, code)
        ending = ending or signaled
    finally:
        if monitor:
            monitor.kill_launched()
        if first and shutdown.run:
            leave_folder(shutdown, shutdown.run, ending)
    if code == PREEMPTED and first and "SLURM_JOB_ID" in os.environ:
        requeue(shutdown.repeatable)
    if ending is error and isinstance(error, Exception):
        get_error_handler().record_exception(error)  # for torchrun's report, the last on the screen
    return ending


def leave_folder(shutdown: GracefulShutdown, run: Run, ending: BaseException | None) -> None:
    """Note in run.json how the command ended; remove a new folder in which nothing was done."""
    if ending and shutdown.made_folder and not shutdown.trained and run.remove_unused():
        say(f"removed  {display_path(run.folder)}: it has nothing to keep")
        return
    first_line = str(ending or "").partition("\n")[0]
    is_message = isinstance(ending, UsageError | ExitBySignal) or ending is None
    error = first_line if is_message else f"{type(ending).__name__}: {first_line}"
    if shutdown.recorder and shutdown.made_folder is not None:
        shutdown.recorder.note_end(exit_code(ending), error)


def reason_to_end(shutdown: GracefulShutdown, error: BaseException | None) -> BaseException | None:
    """Return what ended the command: a signal, another rank that failed, or else `error`."""
    number = shutdown.exit_signal or shutdown.first_signal
    if number and caused_by_signal(error):
        return ExitBySignal(number)
    failure = shutdown.rank_monitor.failure() if shutdown.rank_monitor else ""
    if not failure:
        return error
    return SystemExit(1) if rank_zero_only.rank else RunError(failure)  # type: ignore[attr-defined]


def say_how_to_resume(run: Run | None) -> None:
    """Print the command that resumes the run, if it has a checkpoint."""
    if run is not None and any(run.checkpoints.glob("*.ckpt")):
        say(f"resume   {python_command('fit', '--resume', display_path(run.folder))}")


def exit_code(error: BaseException | None) -> int:
    """Return the exit code of a process that ends by an error, or by none."""
    if not isinstance(error, SystemExit):
        return int(error is not None)
    return error.code if isinstance(error.code, int) else int(error.code is not None)
