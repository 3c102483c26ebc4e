"""What a checkpoint holds beside Lightning's: the position in the data, random states, metrics.

With it a run resumes bit-for-bit (on the CPU), within an epoch too.
"""

import math
import os
import secrets
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics import Metric

from .data_order import DataOrder
from .epoch_start import Flags, module_flags, set_module_flags, state_kept
from .lightning_internals import (
    at_next_epoch_start,
    begin_epoch_once_more,
    count_as_within_epoch,
    end_restart,
    end_restored_epoch,
    epoch_names,
    epoch_results,
    is_tuner_restoring,
    last_reloads,
    read_again,
    validated_batches,
    validation_values,
)
from .random_streams import random_states, restore_random
from .screen import say

INEXACT = "does not resume bit-for-bit"


class TrainState(Callback):
    """Keeps in each checkpoint what Lightning leaves out, and restores it.

    A checkpoint's `train_state` has `seed`, `epoch` and `batch` (the position in the data),
    `all_read` (whether only the end of the epoch is left), `metrics` (the values logged last),
    `loaders` (what their samplers keep), `flags` (those of the module that have changed),
    `reloaded` (the epochs in which loaders were made) and `ranks`:
    of each rank `random` states, those of the epoch's start (`began`), `states` of metrics, the
    sums behind the `means` of this epoch, the batches that were read `ahead`, and how the loaders
    were `made`.

    It is the first of the callbacks, so that it sees an epoch before the others change anything.

    Args:
        shares_data: Whether to have loaders shared among ranks and read in an order that can be
            resumed.
    """

    def __init__(self, shares_data: bool = True) -> None:
        self.shares_data = shares_data
        self.order: DataOrder | None = None
        self.seed = 0
        self.saved: dict[str, Any] | None = None  # the `train_state` to restore, until it is
        self.stateful_loaders: list[Any] = []  # what Lightning has saved of them
        self.began: dict[str, Any] = {}  # random states at the start of this epoch
        self.metrics_at_start: dict[str, Tensor] = {}  # of this epoch
        self.initial_flags: Flags = {}
        self.changed_flags: Flags = {}
        self.means: dict[str, dict[str, Tensor]] = {}  # of this epoch's part before the checkpoint
        self.resumed = False
        self.cut = False  # the epoch is being ended before its last batch
        # Random states, and what loaders keep, before a validation that only the end brings.
        self.before_validation: tuple[Any, ...] | None = None
        # Batches of validations, as Lightning counts them: before that one, or at the resuming.
        self.validated: dict[str, int] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        drawn = int(os.environ.get("PL_GLOBAL_SEED") or secrets.randbits(32))
        self.seed = trainer.strategy.broadcast(drawn)
        self.saved, self.resumed = None, False  # an evaluation may have read a checkpoint before
        self.changed_flags = {}
        if self.shares_data:
            self.order = DataOrder(trainer, self.seed)
            self.order.attach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.order:
            self.order.detach()
            self.order = None

    # Saving.

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        epoch, batch = self._position(trainer)
        all_read = batch > 0 and trainer.is_last_batch
        if self.cut:
            count_as_within_epoch(checkpoint, self.validated)
        kept = self.cut and self.before_validation
        loaders, random, ahead = kept or self._kept(0 if all_read else batch)
        made = self.order.made if self.order else {}
        here = {"random": random, "states": {}, "means": {}, "ahead": ahead, "made": made}
        if batch:
            here["began"] = self.began
            here["states"] = metric_states(trainer, pl_module)
            sums = {key: item.metric_state for key, item in epoch_results(trainer).items()}
            here["means"] = move_data_to_device(sums, "cpu")
        ranks: list[Any] = [here] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(ranks, here)
        checkpoint["train_state"] = {
            "seed": self.seed,
            "epoch": epoch,
            "batch": batch,
            "all_read": all_read,
            "metrics": {name: value.cpu() for name, value in self._metrics(trainer).items()},
            "loaders": loaders,
            "flags": self._flags(trainer, pl_module),
            "reloaded": last_reloads(trainer),
            "ranks": ranks,
        }

    def _metrics(self, trainer: Trainer) -> dict[str, Tensor]:
        """Return the values logged last; of an epoch that is cut short not those of its part."""
        values = dict(trainer.callback_metrics)
        for name in epoch_names(trainer) if self.cut else ():
            values.pop(name, None)
            if name in self.metrics_at_start:
                values[name] = self.metrics_at_start[name]
        return values

    def _kept(self, batch: int) -> tuple[Any, ...]:
        """Return what loaders keep, random states, and the batches that were read ahead."""
        loaders, ahead = self.order.capture(batch) if self.order else ([], [])
        return loaders, random_states(), ahead

    def _position(self, trainer: Trainer) -> tuple[int, int]:
        """Return the epoch to train next, and how many of its batches are done."""
        loop: Any = trainer.fit_loop
        epochs = loop.epoch_progress.current
        # A validation after the last batch precedes the hooks of the epoch's end.
        within_epoch = not trainer.is_last_batch or trainer.validating
        if self.cut or (within_epoch and epochs.processed < epochs.ready):
            return epochs.ready - 1, loop.epoch_loop.batch_progress.current.processed
        return epochs.ready, 0

    def _flags(self, trainer: Trainer, pl_module: LightningModule) -> Flags:
        """Return the flags of the module that the training has changed."""
        for key, value in module_flags(pl_module).items():
            switched_by_validation = trainer.validating and key.endswith(":training")
            if switched_by_validation or key not in self.initial_flags:
                continue
            if key in self.changed_flags or value != self.initial_flags[key]:
                self.changed_flags[key] = value
        return dict(self.changed_flags)

    # Restoring.

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.saved = None
        self.resumed = trainer.state.fn == TrainerFn.FITTING and not is_tuner_restoring(trainer)
        if not self.resumed:  # Lightning drops what the tuner's callback was about to resume
            return
        self.saved = checkpoint.get("train_state")  # plain Lightning has none
        loop = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
        self.stateful_loaders = loop.get("combined_loader", [])
        if self.saved:
            self.seed = self.saved["seed"]
            if self.order:
                self.order.seed, self.order.restoring = self.seed, True
                self.order.make_again(self._of_this_rank(trainer, self.saved).get("made", {}))

    def _of_this_rank(self, trainer: Trainer, saved: dict[str, Any]) -> dict[str, Any]:
        """Return this rank's part of a `train_state`; {} if there were more ranks, or fewer."""
        same_ranks = len(saved["ranks"]) == trainer.world_size
        return saved["ranks"][trainer.global_rank] if same_ranks else {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.initial_flags = module_flags(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._print_exceptions()
        saved = self.saved
        if not self.resumed or saved is None:
            return
        if not saved["batch"] and trainer.fit_loop.restarting:
            end_restored_epoch(trainer)
        trainer.callback_metrics.update(saved["metrics"])
        self.changed_flags = dict(saved.get("flags", {}))
        set_module_flags(pl_module, self.changed_flags)
        if not saved["batch"]:
            step_plateau_schedules(trainer, pl_module, saved)
        if trainer.is_global_zero:
            self._print_position(trainer, saved)
        at_next_epoch_start(trainer, partial(self._begin, trainer, pl_module))

    def _print_exceptions(self) -> None:
        """Say what cannot be resumed bit-for-bit."""
        if self.order is None:
            say(f"data     use_distributed_sampler is false: {INEXACT} within an epoch")
            return
        for reason in self.order.exceptions():
            say(f"data     {reason}: {INEXACT} within an epoch")

    def _print_position(self, trainer: Trainer, saved: dict[str, Any]) -> None:
        epoch, batch = saved["epoch"], saved["batch"]
        say(f"resumed  at epoch {epoch}, batch {batch}, step {trainer.global_step}")
        if len(saved["ranks"]) != trainer.world_size:
            counts = f"{len(saved['ranks'])} before, {trainer.world_size} now"
            say(f"ranks    {counts}: {INEXACT}")
        if batch and "loaders" not in saved:
            say(f"data     the checkpoint is of an earlier release: {INEXACT} within its epoch")

    def _begin(self, trainer: Trainer, module: LightningModule, begin: Callable[[], None]) -> None:
        """Begin the epoch in which the training resumes, in the place of Lightning's `begin`."""
        saved, self.saved = self.saved, None
        if saved is None:
            return begin()
        here = self._of_this_rank(trainer, saved)
        last_reloads(trainer, saved.get("reloaded"))
        if saved["batch"]:
            self.validated = validated_batches(trainer)
            with state_kept(trainer, module):
                begin_epoch_once_more(trainer)
                restore_random_of(here, "began")
                begin()
            trainer.callback_metrics.update(saved["metrics"])
            restore_random_of(self._resume_order(saved, here), "before")
            if not saved.get("all_read"):
                read_again(trainer, self.stateful_loaders)
            self._restore_metrics(trainer, module, here)
            restore_random_of(here, "random")
        else:
            restore_random_of(here, "random")
            self._resume_order(saved, here)
            begin()
            read_again(trainer, [])

    def _resume_order(self, saved: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
        """Have loaders begin at the checkpoint; return random states `before` a batch, if any."""
        if self.order is None:
            return {}
        before = self.order.resume(saved, here.get("ahead", []))
        return {"before": before} if before else {}

    def _restore_metrics(
        self, trainer: Trainer, module: LightningModule, here: dict[str, Any]
    ) -> None:
        on_device = move_data_to_device(
            {"states": here.get("states", {}), "means": here.get("means", {})}, module.device
        )
        for name, one in module.named_modules():
            vars(one).update(on_device["states"].get(name, {}))
        self.means = on_device["means"]
        results = epoch_results(trainer)
        for key in self.means.keys() & results.keys():  # logged by the hooks of the epoch's start
            for name, value in self.means.pop(key).items():
                setattr(results[key], name, value)

    # In the training.

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = random_states()
        self.metrics_at_start = dict(trainer.callback_metrics)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.validated:
            validated_batches(trainer, self.validated)
            self.validated = {}
        if self.order:
            self.order.next_batch = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.resumed:
            end_restart(trainer)
        if self.means:
            self._add_means(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the state before a validation that a run without an end here does not have."""
        if trainer.should_stop and not (trainer.is_last_batch or validation_follows(trainer)):
            self.before_validation = self._kept(self._position(trainer)[1])
            self.validated = validated_batches(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have an epoch that ends early saved as one within which the run resumes."""
        self._add_means(trainer)
        if self.order:
            self.order.next_batch = 0
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if trainer.is_last_batch or not done:
            return
        self.cut = True
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if hasattr(callback, "save_within_epoch"):
                callback.save_within_epoch(trainer)
        self.cut, self.before_validation, self.validated = False, None, {}

    def _add_means(self, trainer: Trainer) -> None:
        results = epoch_results(trainer)
        for key in self.means.keys() & results.keys():
            add_to_result(results[key], self.means.pop(key))


def validation_follows(trainer: Trainer, later: int = 0) -> bool:
    """Return True if a validation follows this batch of the training, or one that comes later.

    Args:
        trainer: The trainer.
        later: How many batches later.
    """
    every = trainer.val_check_batch
    if not trainer.enable_validation or every is None or every == math.inf:
        return False
    loop = trainer.fit_loop
    across_epochs = trainer.check_val_every_n_epoch is None
    batch = loop.total_batch_idx if across_epochs else loop.batch_idx
    return (batch + 1 + later) % every == 0


def restore_random_of(states: dict[str, Any], name: str) -> None:
    """Set the generators of this process to the states of that name, if they are there."""
    if states.get(name):  # none where the epoch began in plain Lightning
        restore_random(states[name])


def step_plateau_schedules(
    trainer: Trainer, module: LightningModule, saved: dict[str, Any]
) -> None:
    """Step the schedules that Lightning steps at an epoch's end after the checkpoint."""
    for config in trainer.lr_scheduler_configs:
        ends_here = config.interval == "epoch" and saved["epoch"] % config.frequency == 0
        if config.reduce_on_plateau and ends_here and config.monitor in saved["metrics"]:
            module.lr_scheduler_step(config.scheduler, saved["metrics"][config.monitor])


def metric_states(trainer: Trainer, pl_module: LightningModule) -> dict[str, dict[str, Any]]:
    """Return the states of the module's metrics on the CPU, without those that are done with.

    ModelCheckpoint may save at the end of a validation, whose metrics would be counted twice.
    """
    done = {id(value) for value in validation_values(trainer)} if trainer.validating else set()
    states = {
        name: module.metric_state
        for name, module in pl_module.named_modules()
        if isinstance(module, Metric) and id(module) not in done
    }
    return move_data_to_device(states, "cpu")


def add_to_result(result: Any, before: dict[str, Tensor]) -> None:
    """Add what was summed up before the checkpoint to what was logged after it."""
    reductions = {torch.max: torch.maximum, torch.min: torch.minimum}
    combine = reductions.get(result.meta.reduce_fx, torch.add)
    for name, value in before.items():
        setattr(result, name, combine(getattr(result, name), value))
