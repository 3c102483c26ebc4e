"""The callbacks of every run."""

import copy
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.model_helpers import is_overridden

from . import Mistake, nearest
from .run import Run, commit, redacted, shown
from .wandb import Wandb

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
            for logger in trainer.loggers:
                if isinstance(logger, Wandb):
                    logger.experiment.summary.update(self.best)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "run": os.environ.get("WANDB_RUN_ID")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["run"] == os.environ.get("WANDB_RUN_ID"):
            self.best = state_dict["best"]


@dataclass
class Callbacks:
    """The callbacks that configs/defaults.yaml sets; null for none. All others go into `trainer.callbacks`."""

    checkpoint: ModelCheckpoint | None = None
    early_stopping: EarlyStopping | None = None
    lr_monitor: LearningRateMonitor | None = None
    summaries: Summaries | None = None


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

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begun = begun_with(trainer)
        if self.restored:
            from .references import renew

            renew(trainer, self.begun, self.restored)
            self.restored = {}

    def state_dict(self) -> dict[str, Any]:
        return {"begun": self.begun, "config": self.config}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        from .references import adapt

        self.restored, self.restored_step = checkpoint, checkpoint["global_step"]
        adapt(trainer, self.run, self.checkpoint, checkpoint)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.done or trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        self.done = True
        file = self.run.folder / "config.yaml"
        if stage == "fit" or not file.exists():  # evaluating may join a run, but never changes its configuration
            file.write_text(yaml.safe_dump(self.config, sort_keys=False), encoding="utf-8")
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
        part = Path(path).with_suffix(".part")
        super().save_checkpoint(content, part, storage_options)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)


class EpochLines(Callback):
    """Prints a line for each validation, or epoch without one, where there is no terminal to draw a bar in."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and trainer.state.fn == "fit" and not trainer.sanity_checking:
            values = "  ".join(f"{name} {value:.4g}" for name, value in sorted(trainer.callback_metrics.items()))
            print(f"epoch {trainer.current_epoch:<3} step {trainer.global_step:<6} {values}", flush=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation:
            self.on_validation_end(trainer, pl_module)
