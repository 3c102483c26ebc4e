"""What a checkpoint holds beside Lightning's: the position in the data, random states, metrics.

With it a run resumes bit-for-bit (on the CPU), within an epoch too.
"""

import os
import secrets
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torchmetrics import Metric

from .batches import ResumableBatches, is_resumable, random_states, restore_random
from .lightning_internals import (
    end_restart,
    end_restored_epoch,
    epoch_results,
    is_tuner_restoring,
    unwrap_batch_sampler,
    validation_values,
)


class TrainState(Callback):
    """Keeps in each checkpoint what Lightning leaves out, and restores it.

    A checkpoint's `train_state` has `seed`, `epoch` and `batch` (the position in the data),
    `metrics` (the values logged last) and `ranks`: of each rank `random` states, `states` of
    metrics, and the sums behind the `means` of this epoch.
    """

    def __init__(self) -> None:
        self.seed = self.epoch = self.batch = 0
        self.metrics: dict[str, Tensor] = {}
        self.ranks: list[dict[str, Any]] = []  # until it is restored
        self.means: dict[str, dict[str, Tensor]] = {}  # of this epoch's part before the checkpoint
        self.resumed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        drawn = int(os.environ.get("PL_GLOBAL_SEED") or secrets.randbits(32))
        self.seed = trainer.strategy.broadcast(drawn)
        self.epoch = self.batch = 0
        self.ranks = []  # an evaluation may have read a checkpoint before
        self.resumed = False

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        loop: Any = trainer.fit_loop
        epochs = loop.epoch_progress.current
        epoch, batch = epochs.ready, 0
        here: dict[str, Any] = {"random": random_states(), "states": {}, "means": {}}
        if epochs.processed < epochs.ready and not trainer.is_last_batch:  # within an epoch
            epoch -= 1
            batch = loop.epoch_loop.batch_progress.current.processed
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
            "metrics": {name: value.cpu() for name, value in trainer.callback_metrics.items()},
            "ranks": ranks,
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if is_tuner_restoring(trainer):  # Lightning then drops what it was about to resume
            self.batch, self.ranks, self.resumed = 0, [], False
            return
        self.resumed = True
        state = checkpoint.get("train_state")
        if state is None:  # a checkpoint of plain Lightning
            return
        self.seed, self.epoch, self.batch = state["seed"], state["epoch"], state["batch"]
        self.metrics, self.ranks = state["metrics"], state["ranks"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ranks, self.ranks = self.ranks, []
        if not ranks:
            return
        if not self.batch and trainer.fit_loop.restarting:
            end_restored_epoch(trainer)
        trainer.callback_metrics.update(self.metrics)
        if not self.batch:
            self._step_plateau_schedules(trainer, pl_module)
        if len(ranks) != trainer.world_size:
            counts = f"{len(ranks)} before, {trainer.world_size} now"
            rank_zero_only(print)(f"ranks    {counts}: does not resume bit-for-bit")
            return
        here = ranks[trainer.global_rank]
        on_device = move_data_to_device(here, pl_module.device)
        for name, module in pl_module.named_modules():
            vars(module).update(on_device["states"].get(name, {}))
        self.means = on_device["means"]
        restore_random(here["random"])

    def _step_plateau_schedules(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step the schedules that Lightning steps at an epoch's end after the checkpoint."""
        for config in trainer.lr_scheduler_configs:
            ends_here = config.interval == "epoch" and self.epoch % config.frequency == 0
            if config.reduce_on_plateau and ends_here and config.monitor in self.metrics:
                pl_module.lr_scheduler_step(config.scheduler, self.metrics[config.monitor])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.resumed:
            end_restart(trainer)
        if not self.means:
            return
        results = epoch_results(trainer)
        for key in self.means.keys() & results.keys():
            add_to_result(results[key], self.means.pop(key))

    def resumable_loader(self, loader: Any, trainer: Trainer) -> Any:
        """Have a loader read in an order that can be resumed, each rank its share.

        Returns:
            The same loader; what cannot be resumed is left as it is.
        """
        if is_resumable(loader):
            epochs: Any = trainer.fit_loop.epoch_progress.current
            epoch = epochs.processed
            resumes_here = trainer.training and epoch == self.epoch
            batches = unwrap_batch_sampler(loader)
            batches.sampler = ResumableBatches(
                batches,
                loader,
                seed=self.seed,
                rank=(trainer.global_rank, trainer.world_size),
                training=trainer.training,
                position=(epoch, self.batch if resumes_here else 0),
            )
        elif trainer.training:
            kind = "an IterableDataset or a batch sampler of another class"
            rank_zero_only(print)(f"data     {kind}: does not resume bit-for-bit")
        return loader


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
