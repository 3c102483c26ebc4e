"""Logged values: the metrics file, the best values, and checks of names and of values."""

import difflib
import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from .checkpoints import best_saving
from .distributed import DUMMY_RUN
from .errors import RunError, UsageError, did_you_mean
from .lightning_internals import steps_logged, wraps_tensors
from .metrics_log import NUMBER, STAGE, STEP, MetricsLog
from .screen import say
from .wandb_logger import RunWandbLogger, answer_nothing

SUMMARY_RULES = ("min", "max", "mean", "last")
SIMILAR = 0.85  # of two names, by difflib.SequenceMatcher.ratio: from here on it is a typo


class MetricsFile(DummyLogger):
    """Writes every logged value into the run's folder; `metrics.csv` is there when the run ends.

    It is the model's logger where there is no other: DummyLogger ignores any other call.

    Args:
        folder: The run's folder.
        trainer: The trainer that logs, or what has a `global_step`.
        write: Whether to write; False for `fast_dev_run`.
        is_only_one: Whether the run has no logger. It is then false, for code that asks
            `if self.logger:` as where stock has None.
    """

    def __init__(
        self, folder: Path, trainer: Any, write: bool = True, is_only_one: bool = False
    ) -> None:
        super().__init__()
        self.rows = MetricsLog(folder)
        self.trainer = trainer
        self.write = write
        self.is_only_one = is_only_one

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A launcher copies it to another process; DummyLogger ignores that.
        vars(self).update(state)

    def __bool__(self) -> bool:
        return not self.is_only_one

    @property
    def experiment(self) -> Any:
        """What does nothing, whatever is called."""
        return answer_nothing() if self.is_only_one else DUMMY_RUN

    @property
    def save_dir(self) -> str:
        return str(self.rows.file.parent)

    @property
    def run_id(self) -> str:
        # Not `version`: a ModelCheckpoint without a folder saves to `save_dir/name/version`.
        return self.rows.file.parent.name

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if self.write:
            values = {str(name): metrics[name] for name in sorted(metrics, key=str)}
            function = getattr(getattr(self.trainer, "state", None), "fn", None)
            stage = function.value if function else "fit"
            self.rows.append({"step": step, **values}, stage, steps_logged(self.trainer))

    @property
    def next_row(self) -> int:
        """The number that the next row will have; a checkpoint holds it."""
        if self.write and self.trainer.is_global_zero:
            self.rows.open()
        return self.rows.next_row

    @rank_zero_only
    def drop_rows(
        self, first_row: int | None, first_step: int, rows_before: int | None = None
    ) -> None:
        """Drop the rows that a resumed run logs again.

        Args:
            first_row: What `next_row` was when the checkpoint was written, if it says so.
            first_step: The step at which the run resumes.
            rows_before: What `next_row` was before this start logged anything.
        """
        first_row = 0 if first_row is None else first_row
        rows_before = self.next_row if rows_before is None else rows_before

        def stays(row: dict[str, Any]) -> bool:
            # Within an epoch, Lightning saves before it logs the values of that step.
            is_done = row[NUMBER] < first_row or row[STEP] < first_step
            return is_done or row[NUMBER] >= rows_before or row[STAGE] != "fit"

        if self.write:
            self.rows.keep(stays)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        with nullcontext() if status == "success" else suppress(RunError):  # another is raised
            self.rows.close()


@dataclass(eq=False)
class Summaries(Callback):
    """Shows best values in W&B's summary, and all values of the best validation as `best/<metric>`.

    The best validation is the best by what the checkpoint callback monitors or, without one, by
    the first of `metrics` with the rule min or max. The best values so far are in the checkpoint,
    for the same run to resume with.

    Args:
        metrics: By the metric's name what to show: min, max, mean, last, or a list of several.
    """

    metrics: dict[str, str | list[str]] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict, init=False)
    run_id: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        # Not by the annotation: values such as $mode are filled in only after parsing.
        for name, rules in self.metrics.items():
            for rule in as_list(rules):
                if rule not in SUMMARY_RULES:
                    expected = f"expected min, max, mean or last for {name}, got {rule}"
                    hint = did_you_mean(str(rule), SUMMARY_RULES)
                    raise UsageError(f"callbacks.summaries.metrics: {expected}{hint}")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                self.run_id = logger.run_id
            if isinstance(logger, RunWandbLogger):
                self._define_metrics(logger)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:  # W&B keeps the summary of a run's last start only
            if isinstance(logger, RunWandbLogger) and self.best:
                logger.experiment.summary.update(self.best)

    on_train_start = on_fit_start  # a sharded strategy restores between the two

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        monitor, mode = self.monitor(trainer)
        values = trainer.callback_metrics
        now = values[monitor].item() if monitor in values else math.nan
        before = self.best.get(f"best/{monitor}")
        if trainer.sanity_checking or math.isnan(now):
            return
        if before is None or (now > before if mode == "max" else now < before):
            self.best = {f"best/{monitor}": now}
            stage = monitor.partition("/")[0]
            for name in sorted(values):
                if name in self.metrics or name.startswith(f"{stage}/"):
                    self.best[f"best/{name}"] = values[name].item()
            self.best["best/epoch"] = trainer.current_epoch
            self.on_fit_start(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "run": self.run_id}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["run"] == self.run_id:
            self.best = state_dict["best"]

    def _define_metrics(self, logger: RunWandbLogger) -> None:
        # This replaces the logger's definition for all metrics, so it repeats the x axis.
        for name, rules in self.metrics.items():
            logger.experiment.define_metric(
                logger.full_name(name),
                summary=",".join(as_list(rules)),
                step_metric="trainer/global_step",
                step_sync=True,
            )

    def monitor(self, trainer: Trainer) -> tuple[str, str]:
        """Return the metric that decides which validation is the best, and its mode."""
        callback = best_saving(trainer)
        if callback is not None and callback.monitor:
            return callback.monitor, callback.mode
        for name, rules in self.metrics.items():
            for mode in ("max", "min"):
                if mode in as_list(rules):
                    return name, mode
        return "", ""


def as_list(rules: str | list[str]) -> list[str]:
    return [rules] if isinstance(rules, str) else rules


@dataclass(eq=False)
class Divergence(Callback):
    """Ends a run whose values are no longer finite, before it replaces a good checkpoint.

    No step waits for it: it reads metrics that have just been logged, and parameters that are about
    to be saved. A buffer may hold NaN by design.

    Args:
        metrics: Names of metrics that must be finite.
    """

    metrics: list[str] = field(default_factory=list)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or trainer.global_step % every:
            return
        for name in trainer.callback_metrics.keys() & set(self.metrics):
            value = trainer.callback_metrics[name].item()
            if not math.isfinite(value):
                self._fail(trainer, f"{name} is {value}")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        buffers = {name for name, _ in pl_module.named_buffers()}
        values = checkpoint["state_dict"].items()
        tensors = {name: value for name, value in values if isinstance(value, Tensor)}
        name = first_with_nan({name: one for name, one in tensors.items() if name not in buffers})
        if name:
            self._fail(trainer, f"{name} has NaN values")

    def _fail(self, trainer: Trainer, problem: str) -> None:
        place = f"at step {trainer.global_step}, which is not saved"
        raise RunError(f"{problem} {place}; --callbacks.divergence null switches this check off")


def first_with_nan(tensors: dict[str, Tensor]) -> str:
    """Return the name of a tensor with a NaN, or "". Wait once for a GPU, not for each tensor."""
    found = {name: value.isnan().any() for name, value in tensors.items()}
    together: dict[torch.device, list[Tensor]] = {}
    for name, has_nan in found.items():
        if wraps_tensors(has_nan):  # a DTensor says it for all ranks, by itself
            if has_nan:
                return name
        else:
            together.setdefault(has_nan.device, []).append(has_nan.as_subclass(Tensor))
    if not any(torch.stack(flags).any() for flags in together.values()):
        return ""
    return next(name for name, has_nan in found.items() if has_nan)


class MetricNameCheck(Callback):
    """Ends a run early if Lightning would end it later for a metric that is not logged.

    It judges when the first epoch with a validation is over, and only callbacks of Lightning's own
    classes that need their metric by then. Of every other name that was not logged one line says
    so, once; of one that looks like a typo after the first validation (as a rule that of the sanity
    check).

    Args:
        named: The named callbacks.
        monitor: The shared option of that name.
    """

    def __init__(self, named: dict[str, Callback], monitor: str | None = None) -> None:
        self.named = named
        self.monitor = monitor
        self.validated = False
        self.done = False
        self.said: set[str] = set()  # names

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.validated:
            logged = sorted(trainer.callback_metrics)
            for option, name, _ in self._missing(trainer, logged):
                if similar_names(name, logged) and of_same_stage(name, logged):
                    self._say(trainer, option, name, logged)
        self.validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The model's own hook is called after this one, and may log.
        if not is_overridden("on_train_epoch_end", pl_module):
            self._judge(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.callback_metrics:
            self._judge(trainer)

    def _judge(self, trainer: Trainer) -> None:
        if self.done or (trainer.enable_validation and not self.validated):
            return
        self.done = True
        logged = sorted(trainer.callback_metrics)
        for option, name, is_needed in self._missing(trainer, logged):
            if is_needed and self.validated:
                raise UsageError(f"{option}: {self._problem(name, logged)}")
            self._say(trainer, option, name, logged)

    def _missing(self, trainer: Trainer, logged: list[str]) -> Iterator[tuple[str, str, bool]]:
        """Yield each option that names a metric which was not logged, the name, and the need."""
        for option, name, is_needed in self._monitored(trainer):
            if name not in logged and name not in ("epoch", "step"):
                yield "monitor" if name == self.monitor else option, name, is_needed

    def _say(self, trainer: Trainer, option: str, name: str, logged: list[str]) -> None:
        if name not in self.said and trainer.is_global_zero:
            say(f"metrics  {option}: {self._problem(name, logged)}")
        self.said.add(name)

    def _problem(self, name: str, logged: list[str]) -> str:
        others = ", ".join(logged) or "none"
        hint = did_you_mean(name, logged)
        return f"no metric named {name} was logged; there are {others}{hint}"

    def _monitored(self, trainer: Trainer) -> Iterator[tuple[str, str, bool]]:
        """Yield each option that names a metric, the name, and whether it is needed by now."""
        options = {id(callback): f"callbacks.{name}" for name, callback in self.named.items()}
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            option = options.get(id(callback), type(callback).__name__)
            if isinstance(callback, Summaries):
                for name in callback.metrics:
                    yield f"{option}.metrics", name, False
            elif isinstance(callback, EarlyStopping | ModelCheckpoint) and callback.monitor:
                yield f"{option}.monitor", callback.monitor, needs_metric(callback)
        for config in trainer.lr_scheduler_configs:
            if config.reduce_on_plateau and config.monitor:
                each_epoch = config.interval == "epoch" and config.frequency == 1
                option = f"{type(config.scheduler).__name__}.monitor"
                yield option, config.monitor, bool(config.strict and each_epoch)


def needs_metric(callback: Any) -> bool:
    """Return True for a callback that fails without its metric after the first validation.

    A subclass may compute it.
    """
    if type(callback) is EarlyStopping:
        return bool(callback.strict)
    return type(callback) is ModelCheckpoint and callback.every_n_epochs == 1


def of_same_stage(name: str, others: list[str]) -> bool:
    """Return True if a name begins as one of the others, up to the slash."""
    stage, slash, _ = name.partition("/")
    return not slash or any(other.startswith(f"{stage}/") for other in others)


def similar_names(name: str, others: list[str]) -> bool:
    """Return True if `name` looks like a typo of one of the others."""
    extended = any(name.startswith(other) or other.startswith(name) for other in others)
    return extended or bool(difflib.get_close_matches(name, others, cutoff=SIMILAR))
