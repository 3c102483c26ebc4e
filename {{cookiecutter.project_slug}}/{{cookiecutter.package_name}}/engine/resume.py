"""Checkpoints with which a run goes on as if it had never ended, bit by bit: what they hold, and when they are written.

Lightning's lack random states, the place in the data, and what metrics have summed up so far. `Bookmark` adds them;
`Order` makes the place one that can be found again; `Backup` writes last.ckpt at the moments that can be gone on from.
"""

import io
import math
import os
import random
import secrets
import time
from collections.abc import Iterator, Sized
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any
from weakref import proxy

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import BatchSampler, DistributedSampler, IterableDataset, Sampler
from torchmetrics import Metric

from .run import Failure, redacted, replacing
from .wandb import FLUSH, Wandb


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
        if self.ranks:
            from .references import go_on

            self.means = go_on(trainer, pl_module, self)
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
        batches = getattr(batches, "_batch_sampler", batches)  # to predict, Lightning's own is around it
        plain = type(batches) is BatchSampler and not isinstance(loader.dataset, IterableDataset)
        if plain and isinstance(batches.sampler, Sized):
            loop: Any = trainer.fit_loop
            epoch = loop.epoch_progress.current.processed
            start = self.batch if trainer.training and epoch == self.epoch else 0
            rank = (trainer.global_rank, trainer.world_size)
            batches.sampler = Order(batches, loader, self.seed, rank, trainer.training, (epoch, start))
        elif trainer.training:
            rank_zero_only(print)("data     an IterableDataset or batches of your own: going on is not bit by bit")
        return loader


class Order(Sampler[int]):
    """What a sampler yields in an epoch, drawn from the run's seed and the epoch alone; each rank takes its turn.

    To train, all ranks take equally many, so that none waits for another; to evaluate, they take each sample once. A
    rank that gets none is lent one, for it has to take part: `Ranks` sees to it that this one does not count.
    """

    def __init__(
        self, batches: BatchSampler, loader: Any, seed: int, rank: tuple[int, int], training: bool, at: tuple[int, int]
    ) -> None:
        sampler: Any = batches.sampler
        self.sampler: Any = sampler.sampler if isinstance(sampler, Order) else sampler
        self.batch_size, self.seed, self.seeds = batches.batch_size, seed, loader.num_workers > 0
        shares = not isinstance(self.sampler, DistributedSampler)  # which takes the rank's share by itself
        self.rank, self.ranks = rank if shares else (0, 1)
        self.training, (self.epoch, self.start) = training, at
        self.lent = not training and self.rank >= len(self.sampler) > 0
        loader.generator = loader.generator or torch.Generator()  # a loader would draw from that of all

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch
        if isinstance(self.sampler, DistributedSampler):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        samples = len(self.sampler)
        return samples // self.ranks if self.training else self.lent + len(range(self.rank, samples, self.ranks))

    def __iter__(self) -> Iterator[int]:
        with isolate_rng():
            seed = sow(self.seed, self.epoch)
            if getattr(self.sampler, "generator", None) is not None:
                self.sampler.generator.manual_seed(seed)
            mine = list(self.sampler)[self.rank * (not self.lent) :: self.ranks][: len(self)]
        # Of several loaders a shorter one is read more than once in an epoch, from its beginning then.
        first, self.start = self.start * self.batch_size % max(len(mine), 1), 0
        for position, index in enumerate(islice(mine, first, None), first):
            if self.seeds and position % self.batch_size == 0:
                index = Index(index)
                index.words = (self.seed, self.epoch, self.rank, position)
            yield index


def validates(trainer: Trainer) -> bool:
    """Whether a validation follows the present batch of the training."""
    every = trainer.val_check_batch
    if not trainer.enable_validation or every is None or every == math.inf:
        return False
    loop = trainer.fit_loop
    return (1 + (loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx)) % every == 0


class Index(int):
    """An index that begins a batch: whichever process it is sent to draws what augments this batch from its words."""

    words: tuple[int, ...] = ()

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
