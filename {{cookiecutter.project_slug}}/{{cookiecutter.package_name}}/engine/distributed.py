"""Several ranks: one id for their run, the first of them that fails, exact evaluation."""

import copy
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.distributed import TCPStore
from torchmetrics import Metric

from .errors import UsageError, warn_user
from .files import display_path
from .lightning_internals import current_results, reader_of, take_over_launched_ranks
from .run import new_run_id
from .screen import say

PARENT_VARIABLE = "RUN_PARENT"  # tells launched ranks which process launches them
PR_SET_PDEATHSIG = 1  # from prctl(2)
SLOW_STEP = 0.5  # seconds


def die_with_parent() -> None:
    """On Linux, end this process when the one that launched it as a rank ends."""
    by_a_rank = os.environ.get(PARENT_VARIABLE) == str(os.getppid())
    launched = by_a_rank or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ[PARENT_VARIABLE] = str(os.getpid())


def broadcast_run_id(given: str | None, resources: ExitStack) -> tuple[str, bool]:
    """Return the run's id, the same on all ranks, and whether the next start of this job has it.

    Args:
        given: The id that was asked for; None to draw one.
        resources: Keeps a store open until the command ends, if the ranks need one.

    Raises:
        UsageError: If this is a job of several tasks in SLURM, but the command is none of them.
    """
    step = slurm_step()  # even where an id is given: it corrects SLURM's variables
    named = given or step
    run_id = named or new_run_id()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        run_id = rendezvous(run_id, resources)
    return named or run_id, bool(named)


def rendezvous(run_id: str, resources: ExitStack) -> str:
    """Return the id that the first of torchrun's ranks has put into its store.

    Ranks that may be restarted get one more store for each start: in torchrun's they may find
    addresses of the start before.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False)
    run_id = store.compare_set("run_id", "", run_id).decode()
    if os.environ["TORCHELASTIC_MAX_RESTARTS"] == "0":
        return run_id
    if os.environ["RANK"] == "0":
        own = TCPStore(host, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        resources.enter_context(nullcontext(own))  # torch joins it by its port while it is there
        store.set("port", str(own.port))
    join_store_of_this_start(store, host)
    return run_id


def join_store_of_this_start(store: TCPStore, host: str) -> None:
    """Have torch use the store that answers.

    Its number would not tell which start it is for: torchrun counts starts on each machine apart.
    """
    while True:
        time.sleep(0.1)
        port = int(store.get("port"))
        with suppress(OSError), socket.create_connection((host, port), timeout=1):
            os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")
            return


def slurm_step() -> str:
    """Return a name for the step of srun whose tasks are the ranks of this run, or "".

    Lightning ignores a job of salloc, requires an option of srun that it could do without, and
    gives all steps of a job one port. This corrects the environment for it.
    """
    tasks, step = os.environ.get("SLURM_NTASKS"), os.environ.get("SLURM_STEP_ID")
    in_shell = step is None or "SLURM_PTY_PORT" in os.environ  # of salloc, or of `srun --pty`
    alone = in_shell and SLURMEnvironment.job_id() is None
    if tasks in (None, "1") or alone or "TORCHELASTIC_RUN_ID" in os.environ:
        return ""
    if step is None:
        reason = f"this job has {tasks} tasks, and this command is none of them"
        raise UsageError(f"SLURM: {reason}; begin it with srun")
    job = os.environ["SLURM_JOB_ID"]
    tasks_per_node = os.environ["SLURM_STEP_TASKS_PER_NODE"].partition("(")[0]
    os.environ.update(SLURM_JOB_NAME="srun", SLURM_NTASKS_PER_NODE=tasks_per_node)
    os.environ.setdefault("MASTER_PORT", str(15000 + (31 * int(job) + int(step)) % 10000))
    return f"{os.environ['SLURM_CLUSTER_NAME']}-{job}-{step}"


def requeue(repeatable: bool) -> None:
    """Put this SLURM job back into the queue, which ends it here.

    Args:
        repeatable: Whether the next start has the same run id, and so resumes the run.
    """
    if not SLURMEnvironment.detect():
        return
    if not repeatable:
        warn_user("not requeued: without WANDB_RUN_ID the job would begin a new run")
        return
    array = [os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")]
    job = "_".join(filter(None, array)) or os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        warn_user(f"not requeued: {error}")


class Agreement:
    """The largest number that any rank has given so far, known on all ranks at the same step.

    It is asked for at each step's end, and answered at the next one's: no rank waits for another,
    and no GPU's queue runs empty. Where steps are slow on any rank, the wait costs nothing, so the
    answer comes at once.

    Args:
        device: Where the ranks exchange numbers.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.largest = 0  # as all ranks know it
        self.is_slow = False  # as all ranks know it
        self.asked_at = 0.0  # seconds, as time.monotonic
        self.answer: Callable[[], list[int]] | None = None  # to what is asked

    def reached(self, number: int, at_once: bool = False) -> int:
        """Return the largest number of all ranks; where steps are fast, up to the last call.

        Args:
            number: That of this rank; not negative.
            at_once: Whether to wait for the other ranks.
        """
        now = time.monotonic()
        slow = self.asked_at > 0 and now - self.asked_at > SLOW_STEP
        self.asked_at = now
        self.settle()
        self.answer = self._ask([number, int(slow)])
        if at_once or self.is_slow or self.largest:
            self.settle()
        return self.largest

    def settle(self) -> None:
        """Wait until the other ranks have asked what this one has, and take the answer."""
        if self.answer is not None:
            number, slow = self.answer()
            self.answer, self.is_slow = None, bool(slow)
            self.largest = max(self.largest, number)

    def _ask(self, numbers: list[int]) -> Callable[[], list[int]]:
        given = torch.zeros(len(numbers), dtype=torch.int64, device=self.device)
        for place, number in enumerate(numbers):
            if number:
                given[place].fill_(number)  # a kernel: a copy from the CPU waits for the GPU
        # Not the strategy's `reduce`, which adds a barrier.
        work = torch.distributed.all_reduce(given, torch.distributed.ReduceOp.MAX, async_op=True)
        if self.device.type != "cuda":
            return partial(finished, work, given)
        work.wait()  # on the GPU: what is queued later comes after it
        copied = torch.empty(given.shape, dtype=given.dtype, device="cpu", pin_memory=True)
        copied.copy_(given, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return partial(copied_by, event, copied)


def finished(work: Any, numbers: torch.Tensor) -> list[int]:
    """Return the numbers once all ranks have given theirs."""
    work.wait()
    return numbers.tolist()


def copied_by(event: torch.cuda.Event, numbers: torch.Tensor) -> list[int]:
    """Return the numbers once a GPU has copied them."""
    event.synchronize()
    return numbers.tolist()


class RankMonitor:
    """Finds the first rank that fails; the others refer to it, since their errors only follow.

    Args:
        trainer: The trainer of this rank.
        error_file: Where the first rank that fails says why.
        on_failure: Finishes what this process has open, before it is ended.
    """

    def __init__(self, trainer: Trainer, error_file: Path, on_failure: Callable[[], None]) -> None:
        self.trainer = trainer
        self.error_file = error_file
        self.on_failure = on_failure
        self.leaving = False  # all ranks have agreed to end
        self.ended = False  # this rank has ended its work
        self.launched = take_over_launched_ranks(trainer)
        self.signal = Agreement(trainer.strategy.root_device)
        if trainer.is_global_zero:
            threading.Thread(target=self._watch, daemon=True).start()

    def record_failure(self, error: BaseException) -> None:
        """Write why this rank failed, unless another one failed before it."""
        # A killed process is seen as ended only after its connections, which fail first.
        time.sleep(2 if self.trainer.global_rank else 1)
        self._record_exits()
        self._record(self.trainer.global_rank, "".join(traceback.format_exception(error)))

    def failure(self) -> str:
        """Return which other rank was the first to fail, and why; "" if none did."""
        self._record_exits()
        try:
            rank, *_, reason = self.error_file.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):  # not there, or not written yet
            return ""
        if rank == f"rank {self.trainer.global_rank}":
            return ""
        return f"{rank} failed, see {display_path(self.error_file)}: {reason}"

    def end(self, wait: bool) -> None:
        """Stop watching, and wait for the other ranks if they have the same work to do."""
        self.ended = True
        for process in self.launched if wait else ():
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)

    def kill_launched(self) -> None:
        """End the processes of other ranks that this one has launched."""
        for process in self.launched:
            process.kill()

    def _record(self, rank: int, reason: str) -> None:
        """Write error.txt, unless it is there."""
        with suppress(OSError), self.error_file.open("x", encoding="utf-8") as file:
            file.write(f"rank {rank}\n{reason}")

    def _record_exits(self) -> None:
        for rank, process in enumerate(self.launched, self.trainer.global_rank + 1):
            if process.poll():
                code = process.returncode
                self._record(rank, f"its process ended with exit code {code} and no error message")

    def _watch(self) -> None:
        """End this process if it does not notice a failure, for NCCL would wait for that rank."""
        while not self.ended:
            time.sleep(1)
            failure = "" if self.leaving else self.failure()
            if failure:
                time.sleep(10)
                if not (self.ended or self.leaving):
                    self._abort(failure)

    def _abort(self, failure: str) -> None:
        say(f"error: {failure}", sys.stderr)
        self.on_failure()
        self.kill_launched()
        os._exit(1)  # the main thread may wait in C, where no exception reaches it


class ExactEvaluation(Callback):
    """Counts each sample once when several ranks evaluate.

    A rank that has no sample gets a padding batch, since all ranks have to take part. Its effect
    on metrics and on logged values is undone.
    """

    def __init__(self) -> None:
        self.in_padding = False
        self.states: list[tuple[Metric, dict[str, Any]]] = []  # before a padding batch

    def on_validation_batch_start(
        self, trainer, pl_module, batch, batch_idx, dataloader_idx=0
    ) -> None:
        loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        self.in_padding = is_padding_batch(loaders, dataloader_idx, batch_idx)
        if self.in_padding:
            metrics = [item for item in pl_module.modules() if isinstance(item, Metric)]
            metrics += current_results(trainer)
            self.states = [(metric, copy.deepcopy(metric.metric_state)) for metric in metrics]

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        for metric, state in self.states:
            vars(metric).update(state)
        known = {id(metric) for metric, _ in self.states}
        self.states = []
        for result in current_results(trainer):
            of_this_loader = result.meta.dataloader_idx in (None, dataloader_idx)
            if self.in_padding and of_this_loader and id(result) not in known:
                Metric.reset(result)  # the subclass's reset would forget that it was logged
            size = result.cumulated_batch_size if result.meta.is_mean_reduction else None
            if size is not None and not size.is_floating_point():
                # As an integer it would have the mean of the ranks' sizes rounded.
                result.cumulated_batch_size = size.float()

    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end


def is_padding_batch(loaders: Any, number: int, batch: int) -> bool:
    """Return True if this rank's batch of the loader with this number is padding."""
    reader = reader_of(CombinedLoader(loaders, "sequential").flattened[number])
    return reader is not None and reader.is_padding(batch)


class DummyRun:
    """In the place of a W&B run: takes any call, attribute and key, and does nothing."""

    def __getattr__(self, name: str) -> "DummyRun":
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> "DummyRun":
        return self

    __getitem__ = __setitem__ = __delitem__ = __enter__ = __add__ = __radd__ = __call__

    def __exit__(self, *_: Any) -> None:
        pass

    def get(self, key: Any, default: Any = None) -> Any:
        return default

    def __contains__(self, key: Any) -> bool:
        return False

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __lt__(self, other: Any) -> bool:
        return False

    __le__ = __gt__ = __ge__ = __lt__

    def __format__(self, spec: str) -> str:
        return ""

    def __bool__(self) -> bool:
        return True


DUMMY_RUN: Any = DummyRun()
