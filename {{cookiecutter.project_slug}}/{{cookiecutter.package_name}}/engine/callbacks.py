"""The callbacks of every run, and the logger of its metrics.csv."""

import copy
import csv
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from .resume import Backup
from .run import Failure, Mistake, Run, commit, nearest, replacing, shown
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

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, Wandb) and self.best:  # that of an earlier start too: a summary is its last start's
                logger.experiment.summary.update(self.best)

    on_train_start = on_fit_start  # FSDP restores only between the two

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        monitors = [(c.monitor, c.mode) for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        monitors += [(name, rule) for name, rules in self.metrics.items() for rule in ("max", "min") if rule in rules]
        monitor, mode = next(((name, mode) for name, mode in monitors if name), ("", ""))
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


@dataclass
class Callbacks:
    """The callbacks that configs/defaults.yaml sets; null for none. All others go into `trainer.callbacks`."""

    checkpoint: ModelCheckpoint | None = None
    backup: Backup | None = None
    early_stopping: EarlyStopping | None = None
    lr_monitor: LearningRateMonitor | None = None
    summaries: Summaries | None = None
    divergence: Divergence | None = None
    samples: Callback | None = None
    watch: Callback | None = None


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
        self.run, self.config, self.checkpoint = run, config, checkpoint
        self.command, self.done = "", False
        self.differs: list[str] = []
        self.begun, self.restored = dict[str, Any](), dict[str, Any]()
        self.restored_step, self.rows_end = -1, 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begun = self.begun or begun_with(trainer)
        if self.restored:
            from .references import renew

            renew(trainer, self.begun, self.restored)
            self.restored = {}
        if self.done:  # only now, for a run that cannot go on with this configuration keeps its own
            self.write()

    def write(self) -> None:
        with replacing(self.run.folder / "config.yaml") as part:
            part.write_text(yaml.safe_dump(self.config, sort_keys=False), encoding="utf-8")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_fit_start(trainer, pl_module)
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.forget(self.rows_end)

    def state_dict(self) -> dict[str, Any]:
        return {"begun": self.begun, "config": self.config}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            from .references import adapt

            self.restored, self.restored_step = checkpoint, checkpoint["global_step"]
            self.rows_end = adapt(trainer, self.run, self.checkpoint, checkpoint)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.done or trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        self.done = True
        if stage != "fit" and not (self.run.folder / "config.yaml").exists():  # evaluating may join a run
            self.write()
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
        print(f"device   {devices}", flush=True)
        config = self.config | ({"ckpt_path": self.checkpoint} if self.checkpoint else {})
        config["run"] = {"command": self.command, "commit": commit(), "folder": str(self.run.folder)}
        each = getattr(trainer.datamodule, "batch_size", None)  # type: ignore[attr-defined]
        if stage == "fit" and isinstance(each, int):
            batches = trainer.world_size * trainer.accumulate_grad_batches
            config["run"]["batch_size"] = each * batches
            if batches > 1:
                print(f"batch    {each * batches} samples a step, {batches} batches of {each}")
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
        self.file, self.write = file, write
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
