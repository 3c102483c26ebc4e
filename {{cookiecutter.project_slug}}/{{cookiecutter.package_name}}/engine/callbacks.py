"""The callbacks of every run, and the logger of its metrics.csv."""

import copy
import csv
import io
import math
import os
import random
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, field
from datetime import timedelta
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, Literal
from weakref import proxy

import numpy as np
import torch
import yaml
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import BatchSampler, DistributedSampler, IterableDataset, Sampler
from torchmetrics import Metric

from . import Failure, Mistake, nearest
from .run import Run, commit, redacted, replacing, shown
from .wandb import FLUSH, Wandb

Rule = Literal["min", "max", "mean", "last"]


@dataclass(eq=False)
class Summaries(Callback):
    """Has W&B's summary show best values, and keeps all values of the best validation in it as `best/<metric>`.

    The best validation is the best in what the checkpoint callback monitors or, without one, in the first of `metrics`.
    A checkpoint holds what was best so far, for the same run to go on with.

    Args:
        metrics: By the metric's name what to show: "min", "max", "mean", "last", or a list of several.
    """

    metrics: dict[str, Rule | list[Rule]] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict, init=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, Wandb):
                logger.define(self.metrics)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, Wandb) and self.best:  # that of an earlier start too: a summary is its last start's
                logger.experiment.summary.update(self.best)

    on_train_start = on_fit_start  # FSDP restores its state only between the two

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        monitor, mode = next(
            ((c.monitor, c.mode) for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor),
            next(
                ((n, rule) for n, rules in self.metrics.items() for rule in ("max", "min") if rule in rules), ("", "")
            ),
        )
        values = {name: value.item() for name, value in trainer.callback_metrics.items()}
        now, before = values.get(monitor, math.nan), self.best.get(f"best/{monitor}")
        if trainer.sanity_checking or math.isnan(now):
            return
        if before is None or (now > before if mode == "max" else now < before):
            stage = monitor.partition("/")[0]
            names = sorted(name for name in values if name in self.metrics or name.startswith(f"{stage}/"))
            self.best = {f"best/{name}": values[name] for name in dict.fromkeys((monitor, *names))}
            self.best["best/epoch"] = trainer.current_epoch
            self.on_fit_start(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "run": os.environ.get("WANDB_RUN_ID")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["run"] == os.environ.get("WANDB_RUN_ID"):
            self.best = state_dict["best"]


@dataclass(eq=False)
class Divergence(Callback):
    """Ends a run that no longer computes with numbers, before it puts a checkpoint in the place of a good one.

    No step waits for it: it looks at values that have just been logged, and at weights that are about to be saved.

    Args:
        metrics: Names of metrics that must be finite.
    """

    metrics: list[str] = field(default_factory=list)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        logged = trainer.callback_metrics.keys() if every and trainer.global_step % every == 0 else set()
        for name in logged & set(self.metrics):
            if not math.isfinite(value := trainer.callback_metrics[name].item()):
                raise Failure(f"{name} is {value} at step {trainer.global_step}; it is not saved")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for name, value in checkpoint["state_dict"].items():
            if isinstance(value, Tensor) and value.isnan().any():
                raise Failure(f"{name} has values that are no numbers at step {trainer.global_step}; it is not saved")


class Backup(ModelCheckpoint):
    """Keeps last.ckpt, with which a run goes on as if it had never ended: of each epoch's end, and of steps between.

    A checkpoint takes the place of the one before only when what was logged up to its step is written too.

    Args:
        dirpath: Folder of last.ckpt.
        every_n_train_steps: Optimizer steps from one to the next within an epoch, if any.
        train_time_interval: Time from one to the next within an epoch, if any.
        save_on_exception: Whether to write one when the training fails.
    """

    def __init__(
        self,
        dirpath: str,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        save_on_exception: bool = False,
    ) -> None:
        super().__init__(dirpath, save_top_k=0, save_on_exception=save_on_exception, enable_version_counter=False)
        self.every = every_n_train_steps
        self.interval = train_time_interval
        self.wanted = False  # at the next moment from which one can go on exactly
        self.waiting: Path | None = None
        self.step = -1  # of the last one, once the training has begun
        self.time = self.delay = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step, self.time = trainer.global_step, time.monotonic()
        self.delay = 3 * FLUSH if any(isinstance(logger, Wandb) for logger in trainer.loggers) else 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        batches = args[-1] + 1
        self.wanted |= self.every is not None and trainer.global_step % self.every == 0
        often = trainer.log_every_n_steps or 1  # type: ignore[attr-defined]
        if self.interval is not None and trainer.global_step % often == 0:
            self.wanted |= trainer.strategy.broadcast(time.monotonic() - self.time >= self.interval.total_seconds())
        # Not between gradients that are summed up, and not before a validation, which going on would leave out.
        if self.wanted and not (
            batches % trainer.accumulate_grad_batches or trainer.is_last_batch or validates(trainer)
        ):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass

    def _save(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            if self.waiting:
                time.sleep(max(0, self.time + self.delay - time.monotonic()))
                self._publish(trainer)
            self.last_model_path = os.path.join(str(self.dirpath), "last.ckpt")
            waiting = Path(self.last_model_path).with_suffix(".part")
            trainer.save_checkpoint(waiting, weights_only=False)
            self.step, self.time, self.wanted, self.waiting = trainer.global_step, time.monotonic(), False, waiting

    def _publish(self, trainer: Trainer) -> None:
        if self.waiting and trainer.is_global_zero:
            self.waiting.replace(self.last_model_path)
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))
        self.waiting = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self.waiting and time.monotonic() >= self.time + self.delay:
            self._publish(trainer)

    on_train_epoch_start = on_train_batch_start

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._publish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.save_on_exception and self.step not in (-1, trainer.global_step):
            try:
                self._save(trainer)
            except (Exception, Failure) as error:  # not in the place of what ended the training
                rank_zero_only(print)(f"warning: the last state is not saved: {error}")
        self._publish(trainer)


@dataclass
class Callbacks:
    """The callbacks that configs/defaults.yaml sets; null for none. All others go into `trainer.callbacks`."""

    checkpoint: ModelCheckpoint | None = None
    backup: Backup | None = None
    early_stopping: EarlyStopping | None = None
    lr_monitor: LearningRateMonitor | None = None
    summaries: Summaries | None = None
    divergence: Divergence | None = None


class NameCheck(Callback):
    """Ends a run in its first seconds if a monitor or a summary names a metric that nobody logs.

    After the first validation (the sanity check's, as a rule) a missing name is wrong if it is close to one that is
    logged. Others, such as `train/acc`, may still come, and are judged when the first epoch is over.
    """

    def __init__(self, callbacks: Callbacks) -> None:
        self.callbacks = callbacks
        self.validated = self.done = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.validated:
            self._judge(trainer, final=False)
        self.validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_overridden("on_train_epoch_end", pl_module):  # the model's own comes after this, and may log
            self._judge(trainer, final=True)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.callback_metrics:
            self._judge(trainer, final=True)

    def _judge(self, trainer: Trainer, final: bool) -> None:
        if self.done or (final and trainer.enable_validation and not self.validated):
            return
        self.done = final
        logged = sorted(trainer.callback_metrics)
        for option, name in self._names(trainer):
            near = [other for other in logged if name.startswith(other) or other.startswith(name)]
            near += get_close_matches(name, logged, cutoff=0.85)
            if name not in (*logged, "epoch", "step") and (near or final):
                others = ", ".join(logged) or "nothing"
                raise Mistake(f"{option}: nobody logs {name}, but {others}{nearest(name, logged)}")

    def _names(self, trainer: Trainer) -> Iterator[tuple[str, str]]:
        options = {id(callback): f"callbacks.{name}" for name, callback in vars(self.callbacks).items()}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            option = options.get(id(callback), type(callback).__name__)
            if isinstance(callback, Summaries):
                yield from ((f"{option}.metrics", name) for name in callback.metrics)
            if isinstance(callback, EarlyStopping) and (callback.strict or callback is self.callbacks.early_stopping):
                yield f"{option}.monitor", callback.monitor
            # One that saves every few epochs may look for its metric later than in the first.
            if isinstance(callback, ModelCheckpoint) and callback.monitor and (callback.every_n_epochs or 1) == 1:
                yield f"{option}.monitor", callback.monitor
        for config in trainer.lr_scheduler_configs:
            if config.reduce_on_plateau and config.monitor and config.strict:
                yield f"{type(config.scheduler).__name__}.monitor", config.monitor


class Record(Callback):
    """Writes config.yaml into the run's folder, gives it and more to every logger, and says what begins."""

    def __init__(self, run: Run, config: dict[str, Any], checkpoint: str | None) -> None:
        self.run = run
        self.config = config
        self.checkpoint = checkpoint
        self.command = ""
        self.done = False
        self.differs: list[str] = []
        self.begun: dict[str, Any] = {}
        self.restored: dict[str, Any] = {}
        self.restored_step = -1
        self.rows_end = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begun = begun_with(trainer)
        self._renew(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._renew(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.forget(self.rows_end)

    def _renew(self, trainer: Trainer) -> None:
        if self.restored:
            from .references import renew

            renew(trainer, self.begun, self.restored)
            self.restored = {}

    def state_dict(self) -> dict[str, Any]:
        return {"begun": self.begun, "config": self.config}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        from .references import adapt

        self.restored, self.restored_step = checkpoint, checkpoint["global_step"]
        self.rows_end = adapt(trainer, self.run, self.checkpoint, checkpoint)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.done or trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        self.done = True
        file = self.run.folder / "config.yaml"
        if stage == "fit" or not file.exists():  # evaluating may join a run, but never changes its configuration
            with replacing(file) as part:
                part.write_text(yaml.safe_dump(self.config, sort_keys=False), encoding="utf-8")
        weights = sum(weight.numel() for weight in pl_module.parameters())
        devices = type(trainer.accelerator).__name__.removesuffix("Accelerator")
        if trainer.world_size > 1:
            devices = f"{trainer.world_size} x {devices}; --trainer.devices 1 for one"
        print(f"run      {shown(self.run.folder)}")
        if self.checkpoint:
            print(f"from     {shown(Path(self.checkpoint)) if Path(self.checkpoint).exists() else self.checkpoint}")
        for line in self.differs:
            print(f"differs  {line}")
        print(f"model    {type(pl_module).__name__}, {weights:,} weights")
        print(f"device   {devices}")
        config = self.config | ({"ckpt_path": self.checkpoint} if self.checkpoint else {})
        config["run"] = {"command": self.command, "commit": commit(), "folder": str(self.run.folder)}
        for logger in trainer.loggers:
            logger.log_hyperparams(config)
            if isinstance(logger, Wandb):
                logger.uses(self.checkpoint or "")
                print(f"W&B      {logger.state}", flush=True)


def begun_with(trainer: Trainer) -> dict[str, Any]:
    """The options of optimizers and schedulers before their first step: what the configuration makes of them."""
    schedules = trainer.lr_scheduler_configs
    kinds = [type(optimizer).__name__ for optimizer in trainer.optimizers]
    kinds += [f"{type(config.scheduler).__name__} each {config.interval}" for config in schedules]
    groups = [[{**group, "params": None} for group in optimizer.param_groups] for optimizer in trainer.optimizers]
    states = [config.scheduler.state_dict() for config in schedules]
    return copy.deepcopy({"kinds": kinds, "groups": groups, "schedules": states})


class Checkpoints(TorchCheckpointIO):
    """Writes a checkpoint without secrets, and beside its place until it is whole: there is never half of one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        content = {key: redacted(value) if "hyper_parameters" in key else value for key, value in checkpoint.items()}
        if "://" in str(path):
            return super().save_checkpoint(content, path, storage_options)
        whole = io.BytesIO()
        torch.save(content, whole)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(Path(path)) as part:  # Lightning's own writes into TMPDIR, where a kill leaves it for ever
            part.write_bytes(whole.getbuffer())


class Bookmark(Callback):
    """Keeps in each checkpoint what Lightning leaves out: the place in the data, random states, metrics not yet due.

    Training goes on from there as if it had not ended, bit by bit, with map-style datasets and any plain sampler.
    """

    def __init__(self) -> None:
        self.seed = self.epoch = self.batch = 0
        self.metrics: dict[str, Any] = {}  # what was logged last, for a scheduler or a callback that monitors it
        self.ranks: list[dict[str, Any]] = []
        self.means: dict[str, dict[str, Tensor]] = {}  # of this epoch, as `self.log` sums them up

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.seed = trainer.strategy.broadcast(int(os.environ.get("PL_GLOBAL_SEED") or secrets.randbits(32)))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        loop: Any = trainer.fit_loop
        epochs, batch = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current.processed
        here: dict[str, Any] = {"states": {}, "means": {}}
        epoch = epochs.ready
        if epochs.processed < epochs.ready and not trainer.is_last_batch:
            epoch -= 1
            # What ModelCheckpoint saves at the end of a validation holds that one's metrics, which are done with.
            done = {id(result.value) for result in loop.epoch_loop.val_loop._results.values() if trainer.validating}
            modules = pl_module.named_modules()
            metrics = [item for item in modules if isinstance(item[1], Metric) and id(item[1]) not in done]
            means = [item for item in loop.epoch_loop._results.items() if item[1].is_tensor and item[1].meta.on_epoch]
            here = {"states": dict(metrics), "means": dict(means)}
            here = {kind: {name: metric.metric_state for name, metric in of.items()} for kind, of in here.items()}
        else:
            batch = 0
        here = {"random": random_states(), **move_data_to_device(here, "cpu")}
        ranks: list[Any] = [here] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(ranks, here)
        last = {name: value.cpu() for name, value in trainer.callback_metrics.items()}
        checkpoint["bookmark"] = {"seed": self.seed, "epoch": epoch, "batch": batch, "metrics": last, "ranks": ranks}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        vars(self).update(checkpoint.get("bookmark", {}))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.ranks:
            return
        if trainer.ckpt_path and Path(trainer.ckpt_path).is_relative_to(trainer.default_root_dir):
            trainer.ckpt_path = None  # or ModelCheckpoint would keep this file when there is a better one
        loop = trainer.fit_loop
        if not self.batch and loop.restarting:  # with `max_steps` Lightning would take an ended epoch for one begun
            loop.epoch_progress.increment_completed()
            loop.on_iteration_done()
            loop.epoch_loop.on_iteration_done()
        trainer.callback_metrics.update(self.metrics)
        for config in trainer.lr_scheduler_configs if not self.batch else []:
            ended = config.interval == "epoch" and self.epoch % config.frequency == 0
            if config.reduce_on_plateau and ended and config.monitor in self.metrics:  # Lightning does so after saving
                pl_module.lr_scheduler_step(config.scheduler, self.metrics[config.monitor])
        if len(self.ranks) == trainer.world_size:
            mine = move_data_to_device(self.ranks[trainer.global_rank], pl_module.device)
            self.means = mine["means"]
            for name, module in pl_module.named_modules():
                vars(module).update(mine["states"].get(name, {}))
            restore_random_states(self.ranks[trainer.global_rank]["random"])
        else:
            rank_zero_only(print)(
                f"ranks    {len(self.ranks)} before, {trainer.world_size} now: not the same to the bit"
            )
        self.ranks = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.fit_loop.restarting:  # or Lightning would leave out the scheduler that waits for this epoch's metric
            trainer.fit_loop.on_iteration_done()
        for key in self.means.keys() & (results := trainer.fit_loop.epoch_loop._results).keys() if self.means else ():
            combine = {torch.max: torch.maximum, torch.min: torch.minimum}.get(results[key].meta.reduce_fx, torch.add)
            for name, before in self.means.pop(key).items():
                setattr(results[key], name, combine(getattr(results[key], name), before))

    def order(self, loader: Any, trainer: Trainer) -> Any:
        """Has a loader read in an order that can be taken up anywhere, each rank its share; returns the loader."""
        batches: Any = getattr(loader, "batch_sampler", None)
        plain = type(batches) is BatchSampler and not isinstance(loader.dataset, IterableDataset)
        if plain and isinstance(batches.sampler, Sized):
            batches.sampler = Order(batches, self, trainer, seeds=loader.num_workers > 0)
            loader.generator = loader.generator or torch.Generator()  # a loader would draw from that of all
        elif trainer.training:
            rank_zero_only(print)(
                "data     an IterableDataset or batches of your own: going on is not exact to the bit"
            )
        return loader


class Order(Sampler[int]):
    """What a sampler yields in an epoch, drawn from the run's seed and the epoch alone; each rank takes its turn.

    To train, all ranks take equally many, so that none waits for another; to evaluate, they take each sample once.
    """

    def __init__(self, batches: BatchSampler, mark: Bookmark, trainer: Trainer, seeds: bool) -> None:
        sampler: Any = batches.sampler
        self.sampler: Any = sampler.sampler if isinstance(sampler, Order) else sampler
        self.batch_size, self.seed, self.seeds = batches.batch_size, mark.seed, seeds
        shares = not isinstance(self.sampler, DistributedSampler)  # which takes the rank's share by itself
        self.rank, self.ranks = (trainer.global_rank, trainer.world_size) if shares else (0, 1)
        loop: Any = trainer.fit_loop
        self.epoch = loop.epoch_progress.current.processed
        self.training = trainer.training
        self.start = mark.batch if self.training and self.epoch == mark.epoch else 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch
        if isinstance(self.sampler, DistributedSampler):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        samples = len(self.sampler)
        return samples // self.ranks if self.training else len(range(self.rank, samples, self.ranks))

    def __iter__(self) -> Iterator[int]:
        with isolate_rng():
            seed = sow(self.seed, self.epoch)
            if getattr(self.sampler, "generator", None) is not None:
                self.sampler.generator.manual_seed(seed)
            mine = list(self.sampler)[self.rank :: self.ranks][: len(self)]
        # Of several loaders a shorter one is read more than once in an epoch, from its beginning then.
        first, self.start = self.start * self.batch_size % max(len(mine), 1), 0
        for position, index in enumerate(islice(mine, first, None), first):
            begins = self.seeds and position % self.batch_size == 0
            yield Index(index, (self.seed, self.epoch, self.rank, position)) if begins else index


def validates(trainer: Trainer) -> bool:
    """Whether a validation follows the present batch of the training."""
    every = trainer.val_check_batch
    if not trainer.enable_validation or every is None or every == math.inf:
        return False
    loop = trainer.fit_loop
    return (1 + (loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx)) % every == 0


class Index(int):
    """An index that begins a batch: whichever process it is sent to draws what augments this batch from its words."""

    words: tuple[int, ...]

    def __new__(cls, index: int, words: tuple[int, ...]) -> "Index":
        self = super().__new__(cls, index)
        self.words = words
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return received, (int(self), self.words)


def received(index: int, words: tuple[int, ...]) -> int:
    sow(*words)
    return index


def sow(*words: int) -> int:
    """Seeds this process by several words at once; returns the seed. Source: numpy.random.SeedSequence."""
    seed = int(np.random.SeedSequence(words).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    return seed


def random_states() -> dict[str, Any]:
    """The states of this process's random number generators, in types that a checkpoint may hold."""
    kind, keys, *rest = tuple(np.random.get_state())  # noqa: NPY002
    numbers: Any = keys
    states = {"python": random.getstate(), "numpy": (kind, numbers.tolist(), *rest), "torch": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


class EpochLines(Callback):
    """Prints a line for each validation, or epoch without one, where there is no terminal to draw a bar in."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and trainer.state.fn == "fit" and not trainer.sanity_checking:
            values = "  ".join(f"{name} {value:.4g}" for name, value in sorted(trainer.callback_metrics.items()))
            print(f"epoch {trainer.current_epoch:<3} step {trainer.global_step:<6} {values}", flush=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation:
            self.on_validation_end(trainer, pl_module)


class MetricsFile(DummyLogger):
    """Writes every logged value, whatever the other loggers are, into a table: `step`, `epoch`, then by name.

    To the model it is the logger where there is no other: DummyLogger takes any call and ignores it.
    """

    def __init__(self, file: Path, write: bool) -> None:
        super().__init__()
        self.file = file
        self.write = write
        self.columns = ["step", "epoch"]

    @property
    def save_dir(self) -> str:
        return str(self.file.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if not self.write:  # but under `fast_dev_run`
            return
        values = sorted((name, getattr(value, "item", lambda v=value: v)()) for name, value in metrics.items())
        row: dict[str, Any] = {"step": step, **dict(values)}
        if self.file.exists() and row.keys() <= set(self.columns):
            size = self.file.stat().st_size
            try:
                with self.file.open("a", newline="") as stream:
                    csv.DictWriter(stream, self.columns, lineterminator="\n").writerow(row)
            except OSError as error:
                os.truncate(self.file, size)
                raise Failure(f"{shown(self.file)} cannot be written: {error.strerror}") from error
        else:
            self._write([*self._read(), row])

    @rank_zero_only
    def forget(self, step: int) -> None:
        """Drops the rows from this step on, which are about to be logged again; what a test has logged stays."""
        if self.write and self.file.exists():
            tested = re.compile(r"test/.")
            self._write(
                [row for row in self._read() if int(row["step"]) < step or any(map(tested.match, filter(row.get, row)))]
            )

    def _read(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        with self.file.open(newline="") as stream:
            return [*csv.DictReader(stream)]

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self.columns = list(dict.fromkeys([*self.columns, *(name for row in rows for name in row)]))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.file) as part, part.open("w", newline="") as stream:  # with a new header
            writer = csv.DictWriter(stream, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
