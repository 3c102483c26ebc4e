"""last.ckpt, finding a checkpoint by reference, and loading the model in one."""

import os
import re
import time
from argparse import ArgumentError
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_type_hints

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from .checkpoint_record import read_record, record_of
from .errors import RunError, UsageError, print_usage_errors, warn_user
from .files import display_path
from .lightning_internals import original_save
from .metrics_log import update_table
from .readable import SAFE, about_checkpoint, is_complete, newest_first, read_checkpoint
from .run import find_run, runs_root
from .screen import say
from .train_state import validation_follows

REFERENCE = "a checkpoint file, RUN or RUN:last"


class LastCheckpoint(ModelCheckpoint):
    """Keeps last.ckpt, from which a run resumes bit-for-bit: at each epoch's end, and in between.

    It keeps no state: where it saves, and how often, is in the configuration.

    Args:
        dirpath: Folder of last.ckpt.
        every_n_train_steps: Optimizer steps between two within an epoch, if any.
        train_time_interval: Time between two within an epoch, if any.
        save_on_exception: Whether to write one when the training fails.
    """

    takes_over = True  # a best checkpoint of the same step is the same file under another name

    def __init__(
        self,
        dirpath: str,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        save_on_exception: bool = False,
    ) -> None:
        super().__init__(
            dirpath,
            save_top_k=0,
            save_on_exception=save_on_exception,
            enable_version_counter=False,
        )
        self.every_n_train_steps = every_n_train_steps
        self.train_time_interval = train_time_interval
        self.save_requested = False  # at the next batch from which training can resume exactly
        self.step = -1  # of the newest checkpoint; that of its start once the training has begun
        self.saved_at = 0.0  # seconds, as time.monotonic
        self.cut_epoch = -1  # the last that was ended before its last batch

    @cached_property
    def state_key(self) -> str:
        """The name of its state, which Lightning asks for in each step."""
        return str(super().state_key)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing from a checkpoint, neither from one of an earlier release."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step, self.saved_at = trainer.global_step, time.monotonic()
        if Path(self.file).is_file():  # of an earlier start of this run
            self.last_model_path = self.file

    @property
    def file(self) -> str:
        """The path of last.ckpt, which may be one of fsspec."""
        return os.path.join(str(self.dirpath), "last.ckpt")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.save_requested = self.save_requested or self._is_due(trainer)
        if not self.save_requested:
            return
        batches_done = args[-1] + 1
        sums_gradients = batches_done % trainer.accumulate_grad_batches != 0
        # A checkpoint before a validation would leave it out when the run resumes.
        if not (sums_gradients or trainer.is_last_batch or validation_follows(trainer)):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.cut_epoch != trainer.current_epoch:
            self._save(trainer)

    def save_within_epoch(self, trainer: Trainer) -> None:
        """Save before the hooks of an epoch's end, which comes early; TrainState calls this."""
        self.cut_epoch = trainer.current_epoch
        self.takes_over = False  # the best one was saved as if the epoch did not end here
        self._save(trainer)
        self.takes_over = True
        batches_done = trainer.fit_loop.batch_idx + 1
        if batches_done % trainer.accumulate_grad_batches != 0:
            problem = "ends before the gradients of a step are summed up"
            rank_zero_only(say)(f"last     {problem}: does not resume bit-for-bit")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not save, unlike a ModelCheckpoint."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not save, unlike a ModelCheckpoint."""

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self.save_on_exception and self.step not in (-1, trainer.global_step):
            try:
                self._save(trainer)
            except (Exception, RunError) as error:  # must not hide what ended the training
                rank_zero_only(say)(f"warning: the last state is not saved: {error}")

    def _is_due(self, trainer: Trainer) -> bool:
        """Return True if the settings ask for a checkpoint after this batch, on every rank."""
        step, every = trainer.global_step, self.every_n_train_steps
        if every is not None and step % every == 0:
            return True
        log_every = trainer.log_every_n_steps or 1  # type: ignore[attr-defined]
        if self.train_time_interval is None or step % log_every != 0:
            return False
        passed = time.monotonic() - self.saved_at
        return trainer.strategy.broadcast(passed >= self.train_time_interval.total_seconds())

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.last_model_path = self.file
        original_save(self)(trainer, self.file)
        self.step, self.saved_at = trainer.global_step, time.monotonic()
        self.save_requested = False


def decide_the_best(saving: ModelCheckpoint) -> bool:
    """Have a callback be the one whose best checkpoint is the run's; return False if it was."""
    is_new = not vars(saving).get("decides_the_best")
    vars(saving)["decides_the_best"] = True
    return is_new


def best_saving(trainer: Any) -> ModelCheckpoint | None:
    """Return the callback whose best checkpoint is the run's.

    That is `callbacks.checkpoint` or, where the run has none, the first ModelCheckpoint with a
    monitor, or else the first. Others belong to the team alone.
    """
    kinds = ModelCheckpoint, LastCheckpoint
    saving = [one for one in trainer.checkpoint_callbacks if isinstance(one, kinds[0])]
    saving = [one for one in saving if not isinstance(one, kinds[1])]

    def rank(one: Any) -> tuple[bool, bool]:
        return not vars(one).get("decides_the_best"), not one.monitor

    return min(saving, key=rank, default=None)


def find_checkpoint(reference: str, root: Path, option: str) -> Path:
    """Find a checkpoint.

    Args:
        reference: A file, a run's id or folder (its best checkpoint), `RUN:last`, or an artifact
            `wandb:ENTITY/PROJECT/NAME:ALIAS`.
        root: Folder of the runs.
        option: Name of the option, for messages.

    Raises:
        UsageError: If there is none.
    """
    if Path(reference).is_file():
        return Path(reference).absolute()
    if reference.startswith("wandb:"):
        if not re.fullmatch(r"wandb:([^/:]+/){2}[^/:]+:[^/:]+", reference):
            expected = "wandb:ENTITY/PROJECT/NAME:ALIAS"
            raise UsageError(f"{option}: expected {expected}, got {reference}")
        from .wandb_uploads import download_checkpoint  # imports wandb, which takes a second

        return download_checkpoint(reference.removeprefix("wandb:"), root, option)
    name, _, which = reference.partition(":")
    if which not in ("", "last"):
        raise UsageError(f"{option}: expected {REFERENCE}, got {reference}")
    folder = find_run(name, root, option, REFERENCE)
    rank_zero_only(update_table)(folder)
    last = folder / "checkpoints" / "last.ckpt"
    if not last.is_file():
        problem = f"{folder.name} has no checkpoint; expected {display_path(last)}"
        raise UsageError(f"{option}: {problem}")
    return last if which == "last" else best_checkpoint(last)


def best_checkpoint(last: Path) -> Path:
    """Return the checkpoint beside last.ckpt that was the best; last.ckpt itself without one."""
    record = read_record(last)
    if record is None:
        record = about_checkpoint(last) if is_complete(last) else {}
    best = record.get("best")
    file = last.with_name(str(best))  # by its name alone: the folder may have been moved
    return file if best and file.exists() else last


def newest_checkpoint(folder: Path) -> Path:
    """Return the newest complete checkpoint of a run, and say so if it is not the last one."""
    rank_zero_only(update_table)(folder)
    files = newest_first(folder / "checkpoints")
    newest = next(filter(is_complete, files), None)
    if newest is None:
        shown = display_path(folder / "checkpoints")
        raise UsageError(f"--resume: no complete checkpoint in {shown}")
    if newest != files[0]:
        broken = f"{display_path(files[0])} is broken"
        message = f"{broken}, {display_path(newest)} is the newest complete one"
        rank_zero_only(warn_user)(message)
    return newest


def saved_model_config(about: dict[str, Any], file: Path, given_class: str = "") -> dict[str, Any]:
    """Return a checkpoint's section `model`: `class_path` and `init_args`, or {} if it has none.

    With a fixed class it has the arguments alone. Options that a class does not take any more are
    left out, with a warning.

    Args:
        about: The engine's record of the checkpoint.
        file: The checkpoint, for messages.
        given_class: A class that takes the place of the one in the checkpoint, by its full or
            its short name.
    """
    saved = dict(about.get("hyper_parameters") or {})
    saved.pop("_instantiator", None)
    class_path = saved.pop("_class_path", None)
    config = (about.get("config") or {}).get("model") or {}
    written = config.get("init_args") or {}
    if class_path is not None:  # else of a function or a fixed class, for which Lightning has none
        untyped = config.get("dict_kwargs", {})  # which a class takes as **kwargs
        options = {name: value for name, value in saved.items() if name not in untyped}
        for name in set(about.get("omitted", ())) & written.keys():
            options[name] = written[name]  # as the configuration writes it
        config = {**config, "class_path": class_path, "init_args": options}
    if "class_path" not in config:
        return config
    if given_class and "." not in given_class:  # the parser knows what short names stand for
        return {**config, "class_path": given_class}
    config = {**config, "class_path": given_class or config["class_path"]}
    options = config.get("init_args") or {}
    accepted = add_arguments(ArgumentParser(), import_object(config["class_path"]))
    # A link to an option that the class never had leaves null.
    given = {name for name, value in options.items() if value is not None}
    gone = sorted(given - accepted)
    if about.get("config"):  # it says what were options; a model may save others by itself
        gone = [name for name in gone if name in written]
    if gone:
        problem = f"the model no longer takes {', '.join(gone)}"
        rank_zero_only(warn_user)(f"{problem}, which {display_path(file)} has")
    kept = {name: value for name, value in options.items() if name in accepted}
    section = {name: value for name, value in config.items() if name != "init_args"}
    return {**section, "init_args": kept} if kept else section


def add_arguments(parser: ArgumentParser, target: Any) -> set[str]:
    """Add the arguments of a class or a function under `model`, and return their names."""
    is_class = isinstance(target, type)
    add = parser.add_class_arguments if is_class else parser.add_function_arguments
    return {name.split(".")[1] for name in add(target, "model", fail_untyped=False)}


def import_object(class_path: str) -> Any:
    """Import the class or function that makes a checkpoint's model.

    Raises:
        UsageError: If there is none, or it makes something else: a checkpoint calls no function.
    """
    try:
        target = resolve_name(class_path)
    except (ImportError, AttributeError, ValueError) as error:
        problem = f"the class of the checkpoint's model cannot be imported, {class_path}"
        raise UsageError(f"{problem}: {error}; --model CLASS says where it is now") from error
    if not makes_module(target):
        problem = f"the checkpoint's model is said to be of {class_path}"
        raise UsageError(f"{problem}, which is no LightningModule")
    return target


def makes_module(target: Any) -> bool:
    """Return True for a LightningModule's class, and for a function that is said to return one."""
    if not isinstance(target, type):
        try:
            target = get_type_hints(target).get("return")
        except (NameError, TypeError, AttributeError):  # a name that cannot be found
            return False
    return isinstance(target, type) and issubclass(target, LightningModule)


@print_usage_errors()  # a SystemExit without a word, else
def load(
    reference: str, weights_only: bool = True, model_class: type[LightningModule] | None = None
) -> LightningModule:
    """Load a model, in evaluation mode and on the CPU.

    Args:
        reference: A checkpoint file, a run's id or folder (its best checkpoint), or `RUN:last`.
        weights_only: Whether to refuse a file that could run code; False for one that you trust.
        model_class: The model's class, if it has another name or place now.

    Raises:
        UsageError: If there is no such checkpoint, or if it does not say how to make its model.
    """
    file = find_checkpoint(reference, runs_root(), "load")
    checkpoint = read_checkpoint(file, weights_only)
    given = f"{model_class.__module__}.{model_class.__qualname__}" if model_class else ""
    config = saved_model_config(record_of(checkpoint), file, given)
    saved = checkpoint.get("hyper_parameters", {})
    class_path = config.get("class_path") or checkpoint.get("engine", {}).get("model_class")
    if not class_path:
        problem = f"{display_path(file)}: does not say which class its model is of"
        raise UsageError(f"{problem}; use that class's load_from_checkpoint")
    target = import_object(class_path)
    is_class = isinstance(target, type)
    if is_class and "_instantiator" in saved and not given:
        with torch.serialization.safe_globals(SAFE):
            loaded = target.load_from_checkpoint(
                file, map_location="cpu", weights_only=weights_only
            )
        return loaded.eval()
    options = config.get("init_args", {}) if "class_path" in config else config
    try:
        model = make_model(target, {**saved, **options})  # only `saved` has what a link has set
    except ArgumentError as error:
        problem = f"{display_path(file)}: does not have all that its model needs ({error})"
        raise UsageError(f"{problem}; use its class's load_from_checkpoint") from error
    model.configure_model()
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"], strict=model.strict_loading)
    return model.eval()


def make_model(target: Any, options: dict[str, Any]) -> LightningModule:
    """Call a class or a function with those of the options that it takes.

    Raises:
        argparse.ArgumentError: If an option is missing or wrong.
    """
    parser = ArgumentParser(exit_on_error=False)
    accepted = add_arguments(parser, target)
    taken = {name: value for name, value in options.items() if name in accepted}
    made = parser.instantiate(parser.parse_object({"model": taken})).model
    return made if isinstance(target, type) else target(**made)
