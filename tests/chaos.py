"""Kill runs at random moments, resume them until they are done, compare with undisturbed ones.

    python tests/chaos.py --rounds 100

A round draws a configuration and moments from its seed, which is printed: `--seed N --rounds 1`
repeats it. The plan is the same then; the exact instant depends on the machine. The configuration
has a kind of training loader, a schedule and at times a callback. Moments follow what the run
shows: a number of steps, a checkpoint that is being written, a validation, or seconds alone. At
times a start is not killed, but ended by `max_steps`, and then resumed without that limit. What
must be equal in the end: every tensor and number in every checkpoint, which files there are, each
row of metrics.csv, config.yaml, W&B's history and its `best/*`.

Most starts are forks of one process that has imported torch, Lightning and wandb, and nothing of
the project: that saves four of five seconds and tests the same. A fork is a separate process that
the kernel kills like any other. The project is imported and `main.py` run in it from its first
line, and no state of an earlier start is in it, since its parent never runs anything. A pool of
threads that only the parent has would be a trap: the parent runs one thread, and says so before the
first start. The rest of the starts, and what they start, are `python main.py`.
"""

import argparse
import atexit
import contextlib
import csv
import functools
import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context, set_start_method
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
from bakery import bake, environment
from loaders import KINDS, PAIRS
from wandb_record import records
from wandb_server import WandbServer

DIGITS = "digits"  # the example's own loader; the other kinds are those of loaders.py
OWN_KINDS = ("own generators", "stream", "steered")  # of the research
# Batches of an epoch, at most, on one device and on two.
BATCHES = {
    DIGITS: (19, 9),
    "an incomplete last batch": (7, 4),
    "drop_last": (6, 3),
    "token budget": (6, 3),
    "single samples": (32, 16),
    "min_size": (3, 1),
}
UNSIZED = ("unsized", "token budget", "stream", "cycle, unsized")
WITHOUT_WORKERS = ("own generators", "stream")  # else they do not resume bit-for-bit, and say so
ACCUMULATION = {0: 1, 1: 2, 3: 3}  # batches for a step, from an epoch on
SCHEDULES = {
    "cycle": "--model.lr_scheduler OneCycleLR --model.lr_scheduler.max_lr 0.02"
    " --model.lr_scheduler.total_steps STEPS",
    "estimated": "--model.estimated true",
    "epochs": "--model.lr_scheduler StepLR --model.lr_scheduler.step_size 1"
    " --model.lr_scheduler.gamma 0.7",
    "plateau": "--model.lr_scheduler lightning.pytorch.cli.ReduceLROnPlateau"
    " --model.lr_scheduler.monitor val/loss --model.lr_scheduler.patience 0",
}
AVERAGES = "--callbacks.averages"
EXTRAS = {
    "hook": "--model.hook true",
    "reload": "--trainer.reload_dataloaders_every_n_epochs 1",
    "accumulation": "--callbacks.accumulation GradientAccumulationScheduler"
    f" --callbacks.accumulation.scheduling {json.dumps(ACCUMULATION).replace(' ', '')}",
    "EMA": f"{AVERAGES} EMAWeightAveraging {AVERAGES}.decay 0.9",
    "SWA": f"{AVERAGES} StochasticWeightAveraging {AVERAGES}.swa_lrs 0.005"
    f" {AVERAGES}.swa_epoch_start 1 {AVERAGES}.annealing_epochs 2",
}
PATIENCE = 120  # seconds that one start may take
# Seconds in which what a killed process leaves must end: a worker looks for its parent every 5.
GRACE = 8

PASSING = ("epoch_loop.scheduler_progress",)  # counts the steps of schedulers, and nothing reads it
TEMPORARY = "t"  # the processes' TMPDIR, beside the run's folder; W&B names a socket in it: short

RESEARCH = '''
"""What the chaos test trains: the example, but each step draws from every generator."""

import os
import random
import shutil
import time
from contextlib import suppress
from functools import partial

import loaders
import numpy
import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable
from lightning.pytorch.loggers.logger import DummyLogger
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics.classification import MulticlassAccuracy

from PACKAGE.data import Digits, Images
from PACKAGE.model import Classifier


def mark(what):
    if os.environ.get("CHAOS_MARKS") and os.environ.get("LOCAL_RANK", "0") == "0":
        with open(os.environ["CHAOS_MARKS"], "a") as file:
            file.write(f"{time.time()} {what}\\n")


class NoisyImages(Images):
    def __getitems__(self, indices):
        images, labels = super().__getitems__(indices)
        return images + 0.1 * torch.randn_like(images), labels


class Shares(loaders.Shares):
    """Knows of ranks itself, and how many samples one of them reads."""

    def __len__(self):
        return self.n // self.num_replicas


def kinds(workers, ranks, rank):
    """Return what makes each kind of loader: of a sample's index, and random numbers."""
    data = loaders.Numbers()
    load = partial(DataLoader, batch_size=loaders.SIZE)
    shares = Shares()
    shares.num_replicas, shares.rank = ranks, rank
    distributed = DistributedSampler(data, ranks, rank)
    return loaders.loaders(workers) | {
        "own generators": lambda: load(loaders.Noisy(), shuffle=True),
        "stream": lambda: load(loaders.Counted()),
        "steered": lambda: load(data, sampler=loaders.Steered(), num_workers=workers),
        "shares": lambda: load(data, sampler=shares, num_workers=workers),
        "a distributed sampler": lambda: load(data, sampler=distributed, num_workers=workers),
    }


class NoisyDigits(Digits):
    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        noise: bool = False,
        kind: str = "digits",
    ):
        super().__init__(batch_size, num_workers)
        self.noise = noise
        self.kind = kind

    def train_dataloader(self):
        if self.kind == "digits":
            return super().train_dataloader()
        ranks = self.trainer.world_size, self.trainer.global_rank
        return kinds(self.num_workers, *ranks)[self.kind]()

    def val_dataloader(self):
        if self.kind == "digits":
            return super().val_dataloader()
        sampler = loaders.Shuffles(len(self.val))
        return DataLoader(self.val, self.batch_size, sampler=sampler, collate_fn=tuple)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        """Makes images of the indices and random numbers that a loader of another kind yields."""
        if isinstance(batch, tuple | list):
            return batch
        parts = batch.values() if isinstance(batch, dict) else [batch]
        rows = torch.cat([part.reshape(-1, 4) for part in parts if part is not None])
        images, labels = self.train[rows[:, 0].long()]
        noise = 0.1 * rows[:, 1:].sum(1).float() if self.noise else torch.zeros(len(rows))
        return images + noise.view(-1, 1, 1, 1), labels

    def setup(self, stage):
        super().setup(stage)
        if self.noise:
            self.train = NoisyImages(*self.train.tensors)


class Restless(Classifier):
    def __init__(
        self,
        num_classes: int,
        width: int = 4,
        lr: float = 0.01,
        lr_scheduler: LRSchedulerCallable | None = None,
        ballast: int = 0,
        pace: float = 0.0,
        hook: bool = False,
        estimated: bool = False,
    ):
        super().__init__(num_classes, width, 0.25, lr, None, lr_scheduler)
        # So that writing takes a while.
        self.ballast = torch.nn.Parameter(torch.zeros(ballast), requires_grad=False)
        self.pace, self.hook, self.estimated = pace, hook, estimated
        # What the hook of an epoch's start sets.
        self.temperature, self.mask = 1.0, torch.ones(())
        self.register_buffer("factor", torch.ones(()))
        self.train_acc = MulticlassAccuracy(num_classes, average="micro")

    def training_step(self, batch, batch_idx):
        time.sleep(self.pace)
        images, labels = batch
        images = images.flip(-1) if random.random() < 0.5 else images
        logits = self(self.mask * images + 0.1 * float(numpy.random.rand()))
        logits = self.factor * logits / self.temperature
        loss = F.cross_entropy(logits, labels)
        self.train_acc.update(logits, labels)
        self.log("train/loss", loss)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        if self.estimated:
            steps = int(self.trainer.estimated_stepping_batches)
            self.lr_scheduler = partial(OneCycleLR, max_lr=0.02, total_steps=steps)
        return super().configure_optimizers()

    def on_train_epoch_start(self):
        if self.hook:
            self.temperature = 1.0 + 0.2 * self.current_epoch
            self.mask = (torch.rand(1, 8, 8) < 0.8).float()
            self.factor.mul_(0.9)

    def on_train_batch_start(self, batch, batch_idx):
        sampler = getattr(self.trainer.train_dataloader, "sampler", None)
        if hasattr(sampler, "only"):
            sampler.only = batch_idx if batch_idx % 3 else None
        if os.environ.get("CHAOS_FROZEN"):  # what is in a copy does not depend on the disk
            self.trainer.strategy.checkpoint_io.writer.wait_for_released()
        mark(f"step {self.trainer.global_step} {batch_idx + 1}/{self.trainer.num_training_batches}")

    def on_validation_start(self):
        mark("validation")

    def on_save_checkpoint(self, checkpoint):
        mark("save")

    def on_train_end(self):
        mark("end")


class Frozen(DummyLogger):
    """Keeps the run's folder as it is before each row: what a kill would leave there."""

    def __init__(self, run: str):
        super().__init__()
        self.run = run

    def log_metrics(self, metrics, step=None):
        if os.environ.get("CHAOS_FROZEN"):
            copies = os.environ["CHAOS_FROZEN"]
            names = "+".join(sorted(metrics)).replace("/", "-")
            copy = f"{copies}/{len(os.listdir(copies)):03d}-step-{step}-{names}"
            copy_at_one_moment(self.run, f"{copy}/{os.path.basename(self.run)}")


def copy_at_one_moment(run, copy):
    """Copies a run's folder again if a checkpoint came, grew or went meanwhile."""
    for _ in range(100):
        before = checkpoints_of(run)
        with suppress(shutil.Error):
            shutil.copytree(run, copy)
            if checkpoints_of(run) == before:
                return
        shutil.rmtree(copy)
    raise AssertionError(f"{run} never stands still")


def checkpoints_of(run):
    found = {}
    for folder, _, names in os.walk(os.path.join(run, "checkpoints")):
        for name in names:
            with suppress(FileNotFoundError):
                file = os.stat(os.path.join(folder, name))
                found[folder, name] = (file.st_ino, file.st_size, file.st_mtime_ns)
    return found


class Cost(Callback):
    """Says what a checkpoint costs, all told."""

    def on_train_end(self, trainer, pl_module):
        file = os.path.join(trainer.default_root_dir, "cost.ckpt")
        for _ in range(5):
            began = time.perf_counter()
            trainer.save_checkpoint(file)
            print(f"cost {time.perf_counter() - began} {os.path.getsize(file)}")
            os.remove(file)
'''


def write_research(project: Path, folder: Path) -> None:
    """Writes `chaotic.py` and the loaders that it reads, for a project, into a folder."""
    package = next(file.parent.parent.name for file in project.glob("*/engine/__init__.py"))
    (folder / "chaotic.py").write_text(RESEARCH.lstrip().replace("PACKAGE", package))
    shutil.copy(Path(__file__).with_name("loaders.py"), folder)


# Starts


def is_alone() -> None:
    """Runs in a fork: whether the process it came from has no other thread."""
    assert len(os.listdir(f"/proc/{os.getppid()}/task")) == 1


@functools.cache
def nursery() -> ForkServerContext:
    """Brings up the process that has imported what takes long, and from which starts are forked."""
    context = get_context("forkserver")
    libraries = (
        "lightning.pytorch.cli",
        "wandb",
        "sklearn.datasets",
        "torchmetrics.classification",
        "torch._dynamo",
    )
    context.set_forkserver_preload(list(libraries))
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        process = context.Process(target=is_alone)
        process.start()
        process.join()
        assert process.exitcode == 0
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        os.environ |= {"OMP_NUM_THREADS": before} if before else {}
    return context


def run_forked(words: list[str], project: str, env: dict[str, str], log: str) -> None:
    """Makes this fork what `python WORDS` would be in that folder and environment."""
    os.setsid()
    screen = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(screen, 1)
    os.dup2(screen, 2)
    os.chdir(project)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    set_start_method("fork", force=True)  # Linux's own in 3.11, and not what this fork came by
    sys.path[:] = [project, *(path for path in sys.path if path != os.path.dirname(__file__))]
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
    atexit._run_exitfuncs()  # which a fork of multiprocessing leaves out


def processes(sessions: set[int], mark: str) -> dict[int, str]:
    """Return what lives of these sessions, or began with this text in its environment.

    Names by process id.
    """
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name, state, _, _, session, *_ = re.split(
                r"[()] ?| ", (folder / "stat").read_text().split(" ", 1)[1]
            )[1:]
            if state != "Z" and (
                int(session) in sessions or mark.encode() in (folder / "environ").read_bytes()
            ):
                found[int(folder.name)] = name
    return found


class Start:
    """One start of the command line, with all its processes.

    Args:
        words: What follows `python`.
        marks: File for the marks of the model.
        ranks: How many processes to start here, as a launcher would; else Lightning does.
        real: Whether as `python main.py`, instead of a fork.
    """

    def __init__(
        self,
        words: list[str],
        project: Path,
        env: dict[str, str],
        log: Path,
        ranks: int = 1,
        real: bool = False,
    ) -> None:
        self.log = log
        self.marks_file = log.with_suffix(".marks")
        self.mark = f"CHAOS_MARKS={self.marks_file}"
        self.real = real
        self.began = time.time()
        env = env | {"CHAOS_MARKS": str(self.marks_file)}
        self.popen: list[subprocess.Popen[bytes]] = []
        self.forks: list[Any] = []
        if real:
            with log.open("ab") as screen:
                python = [sys.executable, *words]
                options: dict[str, Any] = {"cwd": project, "env": env, "start_new_session": True}
                options |= {"stdin": subprocess.DEVNULL, "stdout": screen, "stderr": screen}
                self.popen.append(subprocess.Popen(python, **options))
        else:
            together = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()),
                "NODE_RANK": "0",
            }
            for rank in range(ranks):
                own = env | together | {"LOCAL_RANK": str(rank)} if ranks > 1 else env
                fork = nursery().Process(
                    target=run_forked, args=(words, str(project), own, str(log))
                )
                fork.start()
                self.forks.append(fork)
        self.ids = [process.pid for process in (*self.popen, *self.forks)]

    @property
    def codes(self) -> list[int | None]:
        return [process.poll() for process in self.popen] + [
            process.exitcode for process in self.forks
        ]

    @property
    def over(self) -> bool:
        return all(code is not None for code in self.codes)

    @property
    def marks(self) -> list[str]:
        """What the model has said so far: each line a time and an event."""
        return self.marks_file.read_text().splitlines() if self.marks_file.exists() else []

    @property
    def seconds_to_first_step(self) -> float | None:
        steps = [mark for mark in self.marks if " step " in mark]
        return float(steps[0].split()[0]) - self.began if steps else None

    def living(self) -> dict[int, str]:
        return processes(set(self.ids), self.mark)

    def kill(self, whom: str) -> list[str]:
        """Kill the first process, another rank, or all at once; then wait and end the rest.

        Returns the names of what was left.
        """
        if whom == "all":
            self.end()
        else:
            ranks = self.ids[1:]
            if self.real:  # then the second rank is a child of the first
                first = self.ids[0]
                ranks = [
                    i
                    for i, name in self.living().items()
                    if i != first and "python" in name and parent(i) == first
                ]
            victim = ranks[0] if whom == "rank" and ranks else self.ids[0]
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        limit = time.monotonic() + GRACE
        while (left := self.living()) and time.monotonic() < limit:
            time.sleep(0.05)
        self.end()
        return sorted(left.values())

    def end(self) -> None:
        """Kills all processes of this start, and waits until they are gone."""
        limit = time.monotonic() + 10
        while time.monotonic() < limit and (living := self.living()):
            for process in living:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.005)
        for process in (*self.popen, *self.forks):
            process.wait() if isinstance(process, subprocess.Popen) else process.join()


def parent(process: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()[1])
    return 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Comparison


def unlike(expected: Any, got: Any, place: str = "") -> Iterator[str]:
    """Where two values differ, by a single bit or number."""
    if type(expected) is not type(got):
        yield f"{place}: {type(expected).__name__} became {type(got).__name__}"
    elif isinstance(expected, dict):
        yield from unlike_dicts(expected, got, place)
    elif isinstance(expected, list | tuple):
        if len(expected) != len(got):
            yield f"{place}: {len(expected)} items became {len(got)}"
        for n, (one, other) in enumerate(zip(expected, got, strict=False)):
            yield from unlike(one, other, f"{place}[{n}]")
    elif isinstance(expected, torch.Tensor):
        yield from unlike_tensors(expected, got, place)
    elif isinstance(expected, float) and math.isnan(expected) and math.isnan(got):
        return
    elif expected != got:
        yield f"{place}: {expected!r:.60} became {got!r:.60}"


def unlike_dicts(expected: dict[Any, Any], got: dict[Any, Any], place: str) -> Iterator[str]:
    for key in dict.fromkeys([*expected, *got]):
        if key in expected and key in got:
            yield from unlike(expected[key], got[key], f"{place}.{key}".lstrip("."))
        else:
            yield f"{place}.{key}: {'lost' if key in expected else 'new'}".lstrip(".")


def unlike_tensors(expected: torch.Tensor, got: torch.Tensor, place: str) -> Iterator[str]:
    if expected.dtype != got.dtype or not torch.equal(expected, got):
        apart = "in shape"
        if expected.shape == got.shape:
            apart = f"by {(expected - got).abs().max():.2g}"
        yield f"{place}: a tensor differs {apart}"


def anonymous(value: Any, run: str) -> Any:
    """Return a checkpoint's content without PASSING, the run's id, and the folder of the run."""
    if isinstance(value, dict):
        return {
            anonymous(key, run): anonymous(item, run)
            for key, item in value.items()
            if key not in PASSING
        }
    if isinstance(value, list | tuple):
        return [anonymous(item, run) for item in value]
    return re.sub(rf"(/.*/)?{run}", "RUN", value) if isinstance(value, str) else value


def rows(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, without the empty cells."""
    with (run / "metrics.csv").open(newline="") as file:
        return [
            {name: value for name, value in row.items() if value} for row in csv.DictReader(file)
        ]


def recorded_history(run: Path) -> Iterator[dict[str, Any]]:
    """The history in all that W&B's client wrote of a run on disk, start by start."""
    for file in sorted(run.glob("wandb/*run-*/*.wandb")):
        with contextlib.suppress(AssertionError):  # a killed client may leave a piece at the end
            for record in records(file):
                if record.WhichOneof("record_type") == "history":
                    items = record.history.item
                    yield {
                        "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                        for item in items
                    }


Kind = tuple[float, tuple[str, ...]]  # a row's step, and what it tells of


def by_kind(
    history: Iterator[dict[str, Any]] | list[dict[str, Any]],
) -> dict[Kind, list[dict[str, Any]]]:
    """Rows of W&B, each value with the trainer's step, by step and names."""
    found: dict[Kind, list[dict[str, Any]]] = {}
    for row in history:
        values = {name: value for name, value in row.items() if name[0] != "_"}
        if (step := values.pop("trainer/global_step", None)) is not None:
            found.setdefault((step, tuple(sorted(values))), []).append(values)
    return found


@dataclass
class Verdict:
    """What differs from the undisturbed run, and what W&B's history lost or has more often."""

    differences: list[str] = field(default_factory=list)
    lost: int = 0
    doubled: int = 0
    late: int = 0  # which only a sync brought

    def history(
        self,
        what: str,
        expected: dict[Kind, Any],
        got: dict[Kind, Any],
        limits: Sequence[int] = (),
    ) -> None:
        """Compare the rows of W&B: none may be missing, a repeated row must be equal."""
        lost = [kind for kind in expected if len(got.get(kind, ())) < len(expected[kind])]
        wrong = [
            kind
            for kind in got
            if any(row not in expected.get(kind, ()) for row in got[kind])
            and not is_of_cut(*kind, limits)
        ]
        if what == "W&B's files":
            self.lost += len(lost)
            self.doubled += sum(
                max(0, len(got.get(kind, ())) - len(expected[kind])) for kind in expected
            )
        for kinds, said in ((lost, "lost"), (wrong, "wrong")):
            if kinds:
                shown = "; ".join(f"step {step:g} {'+'.join(names)}" for step, names in kinds[:3])
                self.differences.append(f"{what}: {len(kinds)} rows {said}, {shown}")


def compare(reference: Path, run: Path, limits: Sequence[int] = ()) -> Verdict:
    """Compare all that two runs left on the disk.

    Args:
        reference: The folder of the undisturbed run.
        run: The folder of the other.
        limits: Each `max_steps` at which the other was ended, to be resumed.
    """
    verdict = Verdict()
    verdict.differences += unlike_files(reference, run)
    for file in sorted(run.glob("checkpoints/*.ckpt")):
        if (same := reference / "checkpoints" / file.name).exists():
            verdict.differences += unlike_checkpoints(same, file, bool(limits))
    if (reference / "config.yaml").read_bytes() != (run / "config.yaml").read_bytes():
        verdict.differences.append("config.yaml: differs")
    verdict.differences += unlike_rows(rows(reference), rows(run), limits)
    expected = by_kind(recorded_history(reference))
    got = by_kind(recorded_history(run))
    verdict.history("W&B's files", expected, got, limits)
    return verdict


def unlike_files(reference: Path, run: Path) -> Iterator[str]:
    """Which files one of two runs has alone."""
    for folder in (".", "checkpoints"):
        expected, got = (
            {file.name for file in (root / folder).iterdir()} for root in (reference, run)
        )
        for name in sorted(expected ^ got):
            yield f"{name}: {'lost' if name in expected else 'left over'}"
    for file in unfinished(run):
        if TEMPORARY in file:
            yield f"{Path(file).relative_to(run.parent)}: left over"


def unlike_checkpoints(same: Path, file: Path, limited: bool) -> Iterator[str]:
    """Where two checkpoints differ, save in what follows from an end by `max_steps`."""
    expected, got = (
        anonymous(torch.load(path, weights_only=True), path.parents[1].name)
        for path in (same, file)
    )
    if limited:
        got["engine"]["config"]["trainer"]["max_steps"] = -1
        got["engine"]["rows"] = expected["engine"]["rows"]  # a cut epoch has a row of its means
    for part in dict.fromkeys([*expected, *got]):
        if texts := list(unlike(expected.get(part), got.get(part))):
            yield f"{file.name}, {part}: {texts[0]}, and {len(texts) - 1} more differences"


def unlike_rows(
    expected: list[dict[str, str]], got: list[dict[str, str]], limits: Sequence[int]
) -> Iterator[str]:
    """How the rows of metrics.csv differ, save for the means of epochs that were cut."""
    more = [row for row in got if row not in expected and is_of_cut(row["step"], row, limits)]
    got = [row for row in got if row not in more]
    counts = [
        Counter(json.dumps(row, sort_keys=True) for row in table) for table in (expected, got)
    ]
    lost, wrong = (sum((one - other).values()) for one, other in itertools.permutations(counts))
    if lost or wrong:
        yield f"metrics.csv: {lost} rows lost, {wrong} wrong or repeated"
    elif expected != got:
        yield "metrics.csv: order"


def is_of_cut(step: Any, names: Iterable[str], limits: Sequence[int]) -> bool:
    """Whether a row has the means of an epoch up to where `max_steps` ended it."""
    return int(step) + 1 in limits and "epoch" in names and "train/acc" in names


# Rounds


@dataclass(frozen=True)
class Setup:
    """The configuration of a round; `every` is the number of steps between checkpoints."""

    devices: int = 1
    workers: int = 0
    schedule: str = ""  # of SCHEDULES
    halves: bool = False  # validate in the middle of an epoch, too
    noise: bool = False  # drawn where the data is loaded
    every: int = 3
    online: bool = False
    kind: str = DIGITS  # of the training loader
    extra: str = ""  # of EXTRAS

    @classmethod
    def drawn(cls, draw: random.Random) -> "Setup":
        devices, workers = draw.choice([1, 1, 2]), draw.choice([0, 2])
        halves, noise, online = (draw.random() < 0.5 for _ in range(3))
        every = draw.choice([2, 5])
        others = [one for one in (*KINDS, *OWN_KINDS) if devices == 1 or one not in PAIRS]
        kind = draw.choice(others) if draw.random() < 0.8 else DIGITS
        extra = draw.choice([*EXTRAS]) if draw.random() < 0.6 else ""
        # Lightning does not estimate the steps of these.
        unknown = kind in UNSIZED or extra == "accumulation"
        schedules = [one for one in SCHEDULES if one != "estimated" or not unknown]
        schedule = draw.choice(["", *schedules])
        workers = 0 if kind in WITHOUT_WORKERS else workers
        return cls(devices, workers, schedule, halves, noise, every, online, kind, extra)

    @property
    def batches(self) -> int:
        """Batches of an epoch, at most."""
        return BATCHES.get(self.kind, (8, 4))[self.devices - 1]

    @property
    def epochs(self) -> int:
        return 3 if self.batches > 8 else 5

    @property
    def steps(self) -> int:
        """Batches of the whole training, at most."""
        return self.epochs * self.batches

    @property
    def optimizer_steps(self) -> int:
        """Steps of the optimizer in the whole training, at least."""
        fewest = self.batches - (self.kind == "token budget")
        found, summed = 0, 1
        for epoch in range(self.epochs):
            summed = ACCUMULATION.get(epoch, summed) if self.extra == "accumulation" else 1
            found += -(-fewest // summed)
        return found

    @property
    def words(self) -> list[str]:
        half = 0.5 if self.kind == DIGITS else max(1, self.batches // 2)
        line = (
            "main.py fit --config configs/digits.yaml"
            " --model chaotic.Restless --data chaotic.NoisyDigits"
            f" --data.num_workers {self.workers} --data.noise {str(self.noise).lower()}"
            f" --model.ballast 3000000 --model.pace 0.01"
            f" --trainer.max_epochs {self.epochs} --trainer.log_every_n_steps 1"
            f" --trainer.accelerator cpu --trainer.devices {self.devices}"
            f" --trainer.val_check_interval {half if self.halves else 1.0}"
            f" --callbacks.last_checkpoint.every_n_train_steps {self.every}"
        )
        if self.kind == "endless":
            line += f" --trainer.limit_train_batches {self.batches}"
        schedule = SCHEDULES.get(self.schedule, "").replace("STEPS", str(self.steps))
        more = f"{line} {schedule} {EXTRAS.get(self.extra, '')}"
        return [*more.split(), "--data.kind", self.kind]

    def __str__(self) -> str:
        parts = [
            self.kind,
            f"{self.devices} rank{'s' * (self.devices > 1)}",
            f"{self.workers} workers",
            f"every {self.every}",
        ]
        parts += [f"schedule {self.schedule}"] * bool(self.schedule)
        parts += [self.extra] * bool(self.extra)
        parts += [name for name in ("halves", "noise", "online") if getattr(self, name)]
        return ", ".join(parts)


@dataclass(frozen=True)
class Strike:
    """A moment to kill at: `delay` seconds after the run has shown something `count` times.

    With "limit" nothing is killed: `max_steps` ends the start `count` steps after all before it.
    """

    after: str  # "start", "step", "save", "write", "validation", "end", "limit"
    count: int
    delay: float
    whom: str  # "first", "rank", "all"

    @classmethod
    def drawn(cls, draw: random.Random, setup: Setup) -> "Strike":
        # An estimate of all steps is another one where their number is limited.
        limits = 0 if setup.schedule == "estimated" else 3
        after = draw.choices(
            ["start", "step", "save", "write", "validation", "end", "limit"],
            [2, 5, 2, 5, 2, 1, limits],
        )[0]
        half = setup.steps // 2
        most = {"step": half, "limit": half, "save": 6, "write": 6, "validation": 4}.get(after, 1)
        longest = {"start": 4.0, "end": 1.0, "write": 0.03}.get(after, 0.06)
        whom = draw.choices(["all", "first", "rank" if setup.devices > 1 else "all"], [2, 1, 1])[0]
        return cls(after, draw.randint(1, most), draw.uniform(0, longest), whom)

    def limit(self, setup: Setup, folder: Path) -> int:
        """Return `max_steps` of the start; 0 for none, as where too few steps are left for it."""
        if self.after != "limit":
            return 0
        marks = "".join(file.read_text() for file in folder.parent.glob("*.marks"))
        steps = [int(step) + 1 for step in re.findall(" step ([0-9]+)", marks)]
        found = max(steps, default=0) + self.count
        return found if found < setup.optimizer_steps else 0

    def awaited(self, start: Start, folder: Path) -> Iterator[bool]:
        """Says at each look whether the run has shown it so often; then the delay begins."""
        seen, before = 0, unfinished(folder).items()
        while True:
            if self.after == "write":
                now = unfinished(folder).items()
                seen, before = seen + bool(now - before), now
            elif self.after == "start":
                seen = 1
            else:
                seen = sum(mark.split()[1] == self.after for mark in start.marks)
            yield seen >= self.count


def unfinished(folder: Path) -> dict[str, int]:
    """Return the files of checkpoints that are being written, or were at a kill: inodes by path."""
    found: dict[str, int] = {}
    for where in (folder / "checkpoints", folder.parent / TEMPORARY):
        with contextlib.suppress(FileNotFoundError), os.scandir(where) as files:
            names = [
                file
                for file in files
                if file.is_file() and not re.match(r"wandb-|.*\.ckpt$", file.name)
            ]
            found |= {file.path: file.inode() for file in names}
    return found


def place(marks: Sequence[str], writing: bool) -> str:
    """In what a kill struck."""
    events = [mark.split()[1:] for mark in marks]
    steps = [event[2].split("/") for event in events if event[0] == "step"]
    middle = bool(steps) and steps[-1][0] != steps[-1][1] and ["end"] not in events
    if not events or events == [["validation"]]:
        where = "starting"
    else:
        where = {"step": "step", "save": "saving", "validation": "validating", "end": "ending"}[
            events[-1][0]
        ]
    return f"{where}{', mid-epoch' * middle}{', mid-write' * writing}"


@dataclass
class Round:
    """What a round was, and what came of it."""

    seed: int
    setup: Setup
    verdict: Verdict = field(default_factory=Verdict)
    kills: list[str] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)  # steps at which `max_steps` ended a start
    left: list[str] = field(default_factory=list)
    first_steps: dict[str, list[float]] = field(default_factory=dict)
    starts: int = 0
    seconds: float = 0

    def __str__(self) -> str:
        kills = "; ".join(self.kills) or "none"
        kills += f"; ended at step {', '.join(map(str, self.limits))}" if self.limits else ""
        ending = "ok" if not self.verdict.differences else "FAILED"
        text = f"seed {self.seed:<6} {ending:<6} {self.setup}; {self.seconds:.0f} s; kills: {kills}"
        return "\n    ".join([text, *self.verdict.differences])


class Lab:
    """A project in a separate folder, whose runs are killed, and their undisturbed counterparts."""

    def __init__(self, home: Path, project: Path) -> None:
        self.home, self.project = home, project
        write_research(project, project)
        self.env = environment(home) | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        self.server = WandbServer()
        self.references: dict[Setup, Path] = {}
        self.lock = threading.Lock()
        self.starts: list[Start] = []

    def __enter__(self) -> "Lab":
        return self

    def __exit__(self, *_: object) -> None:
        for start in self.starts:
            start.end()
        self.server.close()

    def start(
        self,
        words: list[str],
        folder: Path,
        env: dict[str, str] | None = None,
        ranks: int = 1,
        real: bool = False,
    ) -> Start:
        """Starts a command whose run is, or will be, in a folder."""
        earlier = len(list(folder.parent.glob(f"{folder.name}.*.log")))
        log = folder.parent / f"{folder.name}.{earlier}.log"
        own = {
            "RUNS_ROOT": str(folder.parent),
            "WANDB_RUN_ID": folder.name,
            "TMPDIR": str(folder.parent / TEMPORARY),
        }
        os.makedirs(own["TMPDIR"], exist_ok=True)
        env = self.env | own | (env or {})
        start = Start(words, self.project, env, log, ranks, real)
        self.starts.append(start)
        return start

    def finished(self, start: Start, deadline: float | None = None) -> str:
        """Waits for a start to end by itself; says what was wrong, if so."""
        limit = deadline or time.monotonic() + PATIENCE
        while not start.over and time.monotonic() < limit:
            time.sleep(0.01)
        if not start.over:
            start.end()
            return f"{start.log.name}: still at work after {PATIENCE} s"
        if any(start.codes):
            last = start.log.read_text(errors="replace").strip().splitlines()[-1:]
            return f"{start.log.name}: ended with {start.codes}: {' '.join(last)}"
        return ""

    def reference(self, setup: Setup) -> Path:
        """The undisturbed run of a configuration."""
        with self.lock:
            if setup not in self.references:
                folder = self.home / "undisturbed" / f"undisturbed-{len(self.references)}"
                folder.parent.mkdir(exist_ok=True)
                wrong = self.finished(self.start(setup.words, folder, ranks=setup.devices))
                assert not wrong, wrong
                self.references[setup] = folder
            return self.references[setup]

    def play(self, seed: int, most: int = 5) -> Round:
        """Plays a round of at most so many kills."""
        draw = random.Random(seed)
        setup = Setup.drawn(draw)
        strikes = [Strike.drawn(draw, setup) for _ in range(draw.randint(1, most))]
        return self.disturb(seed, setup, strikes, [draw.random() < 0.2 for _ in range(most + 1)])

    def disturb(
        self, seed: int, setup: Setup, strikes: Sequence[Strike], real: Sequence[bool] = ()
    ) -> Round:
        """Runs a configuration, killed at these moments, to its end, and compares."""
        began = time.monotonic()
        result = Round(seed, setup)
        try:
            reference = self.reference(replace(setup, online=False))
        except AssertionError as error:
            result.verdict.differences.append(str(error))
            return result
        folder = self.home / f"{seed}" / f"chaos-{seed}"
        folder.parent.mkdir()
        env = self.server.env() | {"WANDB_MODE": "online"} if setup.online else {}
        for n, strike in itertools.zip_longest(range(len(strikes) + 1), strikes):
            resumes = bool(list(folder.glob("checkpoints/*.ckpt")))
            words = ["main.py", "fit", "--resume", folder.name] if resumes else setup.words
            limit = strike.limit(setup, folder) if strike else 0
            if limit or result.limits:
                words = [*words, f"--trainer.max_steps={limit or -1}"]
            as_main = n < len(real) and real[n]
            start = self.start(words, folder, env, 1 if as_main else setup.devices, as_main)
            result.starts += 1
            if strike and strike.after != "limit":
                over = self.strike(start, strike, folder, result)
            else:
                over = self.finished(start)
            if limit and not over:
                result.limits.append(limit)
                over = None
            if (seconds := start.seconds_to_first_step) is not None:
                kind = f"{'resume' if resumes else 'fresh'}, {'process' if as_main else 'fork'}"
                result.first_steps.setdefault(kind, []).append(seconds)
            if over is not None:
                result.verdict.differences += [over] * bool(over)
                break
        if not result.verdict.differences:
            counted = compare(reference, folder, result.limits)
            self.judge_wandb(reference, folder, counted, result.limits)
            result.verdict = counted
        result.seconds = time.monotonic() - began
        return result

    def strike(self, start: Start, strike: Strike, folder: Path, result: Round) -> str | None:
        """Kill a start at its moment; if it ends before, say how as `finished` does."""
        limit, before = time.monotonic() + PATIENCE, unfinished(folder).items()
        awaited = strike.awaited(start, folder)
        while not start.over and not next(awaited) and time.monotonic() < limit:
            time.sleep(0.001)
        time.sleep(strike.delay)
        if start.over or time.monotonic() > limit:
            return self.finished(start, limit)
        result.left += start.kill(strike.whom)
        where = place(start.marks, writing=bool(unfinished(folder).items() - before))
        result.kills.append(f"{where} ({strike.whom})")
        return None

    def judge_wandb(
        self, reference: Path, folder: Path, verdict: Verdict, limits: Sequence[int]
    ) -> None:
        """Compare what W&B shows of the run with the undisturbed one, before and after a sync.

        Before it `best/*` as they came, if they did; after one sync of what lies here, all.
        """
        expected, history = best(reference), by_kind(recorded_history(reference))
        if folder.name in self.server.runs:
            sent = self.server.runs[folder.name]
            verdict.differences += [
                f"W&B's summary: {text}" for text in unlike(expected, best_of(sent.summary))
            ]
            verdict.late = len(history.keys() - by_kind(sent.history).keys())
        words = ["main.py", "sync", folder.name]
        wrong = self.finished(
            self.start(words, folder, self.server.env() | {"WANDB_MODE": "online"})
        )
        if wrong or folder.name not in self.server.runs:
            verdict.differences.append(f"sync: {wrong or 'no such run'}")
            return
        sent = self.server.runs[folder.name]
        verdict.history("W&B, synced", history, by_kind(sent.history), limits)
        texts = unlike(expected, best_of(sent.summary))
        verdict.differences += [f"W&B's summary, synced: {text}" for text in texts]

    def cost(self, *words: str) -> tuple[float, float]:
        """What one checkpoint costs: the median of five, in seconds, and its size in megabytes."""
        folder = self.home / f"cost-{len(words)}" / "run-1"
        folder.parent.mkdir()
        line = "main.py fit --config configs/digits.yaml --trainer.max_steps 3"
        line += " --trainer.callbacks+ chaotic.Cost"
        start = self.start([*line.split(), *words], folder)
        wrong = self.finished(start)
        assert not wrong, wrong
        found = [
            tuple(map(float, text))
            for text in re.findall(r"^cost (\S+) (\d+)$", start.log.read_text(), re.M)
        ]
        return statistics.median(seconds for seconds, _ in found), found[0][1] / 1e6


def best_of(summary: dict[str, Any]) -> dict[str, Any]:
    """What a summary in W&B says of the best validation."""
    return {name: value for name, value in summary.items() if name.startswith("best/")}


def best(run: Path) -> dict[str, float]:
    """The `best/*` of a run, as its last checkpoint has it."""
    states = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    found: dict[str, float] = next(
        state["best"] for name, state in states.items() if name.startswith("Summaries")
    )
    return found


# The program


def summary(rounds: Sequence[Round], lab: Lab, seconds: float) -> dict[str, Any]:
    """The figures of all rounds."""
    kills = [kill for one in rounds for kill in one.kills]
    firsts: dict[str, list[float]] = {}
    for one in rounds:
        for kind, times in one.first_steps.items():
            firsts.setdefault(kind, []).extend(times)
    costs = {
        "example": lab.cost(),
        "100 MB": lab.cost("--model", "chaotic.Restless", "--model.ballast", "25000000"),
    }
    return {
        "rounds": len(rounds),
        "survived": sum(not one.verdict.differences for one in rounds),
        "failed_seeds": [one.seed for one in rounds if one.verdict.differences],
        "seconds": round(seconds),
        "starts": sum(one.starts for one in rounds),
        "kills": len(kills),
        "kills_mid_epoch": sum("mid-epoch" in kill for kill in kills),
        "kills_mid_write": sum("mid-write" in kill for kill in kills),
        "ended_by_max_steps": sum(len(one.limits) for one in rounds),
        "rounds_by_kind": dict(Counter(one.setup.kind for one in rounds)),
        "rounds_by_extra": dict(Counter(one.setup.extra or "none" for one in rounds)),
        "kills_by_place": dict(Counter(kill.split(",")[0].split(" (")[0] for kill in kills)),
        "kills_by_victim": dict(Counter(kill.rpartition("(")[2].rstrip(")") for kill in kills)),
        "rows_lost": sum(one.verdict.lost for one in rounds),
        "rows_that_only_a_sync_brought": sum(one.verdict.late for one in rounds),
        "rows_doubled": sum(one.verdict.doubled for one in rounds),
        "processes_ended_by_us": dict(Counter(name for one in rounds for name in one.left)),
        "seconds_to_first_step": {
            kind: round(statistics.median(times), 2) for kind, times in sorted(firsts.items())
        },
        "checkpoint_milliseconds": {name: round(1000 * cost) for name, (cost, _) in costs.items()},
        "checkpoint_megabytes": {name: round(size, 1) for name, (_, size) in costs.items()},
    }


def main() -> int:
    """Plays rounds and says what came of them; 1 if one failed."""
    parser = argparse.ArgumentParser(description="Kill runs, resume them, and compare.")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument(
        "--seed", type=int, help="of the first round; the others count on (default: drawn)"
    )
    parser.add_argument("--kills", type=int, default=5, help="at most, in a round (default: 5)")
    parser.add_argument("--jobs", type=int, default=2, help="rounds at a time (default: 2)")
    parser.add_argument(
        "--project", type=Path, help="a baked project; its copy is run (default: a fresh bake)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument(
        "--keep", action="store_true", help="leave the runs of failed rounds on the disk"
    )
    given = parser.parse_args()
    seed = random.randrange(10**6) if given.seed is None else given.seed
    print(f"{given.rounds} rounds from seed {seed}", flush=True)
    began, rounds = time.monotonic(), []
    home = Path(tempfile.mkdtemp(prefix="chaos"))
    try:
        project = (
            shutil.copytree(given.project, home / "project") if given.project else bake(home, home)
        )
        pool = ThreadPoolExecutor(given.jobs)
        with Lab(home, Path(project)) as lab, contextlib.ExitStack() as pool_ends:
            nursery()
            pool_ends.callback(pool.shutdown, cancel_futures=True)  # on Ctrl-C
            for one in pool.map(
                lambda n: lab.play(n, given.kills), range(seed, seed + given.rounds)
            ):
                rounds.append(one)
                print(one, flush=True)
                if not (given.keep and one.verdict.differences):
                    shutil.rmtree(home / str(one.seed), ignore_errors=True)
            figures = summary(rounds, lab, time.monotonic() - began)
    finally:
        if not (given.keep and any(one.verdict.differences for one in rounds)):
            shutil.rmtree(home, ignore_errors=True)
        else:
            print(f"kept {home}")
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<24} {value}")
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if figures["survived"] == len(rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
