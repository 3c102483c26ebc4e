"""Every use of a private name of Lightning, torch or torchmetrics: one function each.

Each function says why it is needed and what happens without it. If a private name is gone in a
newer release, the run continues without that nicety and one line says so. Where the result would
be wrong, one clear line ends the run instead.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ContextDecorator, contextmanager
from itertools import product
from pathlib import Path
from subprocess import Popen
from types import FunctionType
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.core import module
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loops import evaluation_loop, prediction_loop, training_epoch_loop
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors import data_connector
from lightning.pytorch.trainer.connectors.logger_connector import result
from lightning.pytorch.utilities import rank_zero_only
from torch.utils import _python_dispatch
from torch.utils.data import dataloader

from .errors import RunError, warn_user

GONE = (AttributeError, KeyError, TypeError)  # what a missing or changed private name raises
READER, GENERATOR = "_reader", "_own_generator"  # attributes of a class that `read_by` makes
BATCH_HOOKS = [
    name
    for name in vars(Callback)
    if "_batch_" in name or name.startswith(("on_before", "on_after"))
]


def say_without(nicety: str, error: Exception) -> None:
    """Say in one line what this release of Lightning does not allow."""
    if not rank_zero_only.rank:  # type: ignore[attr-defined]
        warn_user(f"this release of Lightning does not allow {nicety} ({error})")


@contextmanager
def without_copies_to_the_same_device() -> Iterator[None]:
    """Keep `self.log` from copying each value to the device on which it already is.

    Lightning issue 20388. Without it each logged value costs some microseconds more in a step.
    """
    try:
        kind: Any = result._ResultMetric
        original: Callable[..., Any] = kind.to
    except GONE as error:
        say_without("faster logging", error)
        yield
        return

    def to(metric: Any, device: Any) -> Any:
        in_place = not metric.is_tensor or metric.value.device == device
        return metric if in_place else original(metric, device)

    kind.to = to
    try:
        yield
    finally:
        kind.to = original


@contextmanager
def signatures_read_once() -> Iterator[None]:
    """Have Lightning look up the parameters of a hook once, not in each step.

    Without it each batch, and each value that a training step logs, costs some ten microseconds
    more: Python reads a function's signature each time it is asked.
    """
    known: dict[Any, bool] = {}
    users: list[Any] = [module, training_epoch_loop, evaluation_loop, prediction_loop]
    try:
        originals = [user.is_param_in_hook_signature for user in users]
    except GONE as error:
        say_without("faster steps", error)
        yield
        return

    def is_parameter(hook: Any, *args: Any, **options: Any) -> bool:
        function = getattr(hook, "__func__", None)
        if type(function) is not FunctionType:  # it may be another object each time
            return originals[0](hook, *args, **options)
        key = (function, args, *options.items())
        if key not in known:
            known[key] = originals[0](hook, *args, **options)
        return known[key]

    for user in users:
        user.is_param_in_hook_signature = is_parameter
    try:
        yield
    finally:
        for user, original in zip(users, originals, strict=True):
            user.is_param_in_hook_signature = original


class Unprofiled(ContextDecorator):
    """What a profiler that measures nothing has around each action: nothing.

    Args:
        action_name: The action.
    """

    def __init__(self, action_name: str) -> None:
        self.action_name = action_name

    def __enter__(self) -> str:
        return self.action_name

    def __exit__(self, *_: object) -> None:
        pass


def strip_noop_profiler(trainer: Trainer) -> None:
    """Have the profiler that measures nothing do nothing around each action.

    A trainer without a profiler has a PassThroughProfiler, which enters and leaves some thirty
    generators in a step. Any other is left alone. Without it a step costs some tens of microseconds
    more.
    """
    profiler = trainer.profiler  # type: ignore[attr-defined]
    if type(profiler) is PassThroughProfiler:
        vars(profiler)["profile"] = Unprofiled


def strip_noop_hooks(callbacks: Iterable[Callback]) -> None:
    """Remove hooks that do nothing from Lightning's and our own callbacks.

    Lightning calls each empty hook of each callback in each step, within a profiler's context, but
    skips an attribute that is no function. Without it a step costs some tens of microseconds more.
    A team's callbacks, and others', stay as they are.
    """
    try:
        if "callable(fn)" not in inspect.getsource(call._call_callback_hooks):
            raise AttributeError("_call_callback_hooks calls whatever is there")
    except (*GONE, OSError) as error:
        say_without("skipping empty hooks", error)
        return
    ours = ("lightning.", f"{__package__}.")
    known = [callback for callback in callbacks if type(callback).__module__.startswith(ours)]
    for callback, hook in product(known, BATCH_HOOKS):
        method = getattr(callback, hook)
        if getattr(method, "__func__", None) is getattr(Callback, hook):
            setattr(callback, hook, None)


def epoch_results(trainer: Trainer) -> dict[str, Any]:
    """Return the values that `self.log` has summed up so far in this training epoch, by key.

    A checkpoint within an epoch needs them. Without it the mean of an epoch that is resumed covers
    only the batches after the checkpoint.
    """
    try:
        results: Any = trainer.fit_loop.epoch_loop._results
        return {key: item for key, item in results.items() if item.is_tensor and item.meta.on_epoch}
    except GONE as error:
        say_without("resuming the means of an epoch", error)
        return {}


def epoch_names(trainer: Trainer) -> set[str]:
    """Return the names of the values that the end of this training epoch gives callbacks.

    An epoch that is cut short gives means of its part. Without it a checkpoint keeps those.
    """
    try:
        results: Any = trainer.fit_loop.epoch_loop._results
        return set(results.metrics(on_step=False)["callback"])
    except GONE as error:
        say_without("telling the means of a part of an epoch", error)
        return set()


def validation_values(trainer: Trainer) -> list[Any]:
    """Return the metrics and tensors that the validation loop has logged.

    Those of a validation that has just ended are not saved with the training's. Without it they
    are saved as well, and counted twice when the run resumes.

    Raises:
        RunError: If this release of Lightning does not show them.
    """
    try:
        results: Any = trainer.fit_loop.epoch_loop.val_loop._results
        return [item.value for item in results.values()]
    except GONE as error:
        raise RunError(
            f"this release of Lightning hides what a validation logged: {error}"
        ) from error


def current_results(trainer: Trainer) -> list[Any]:
    """Return the result metrics of the loop that runs now.

    Exact evaluation on several ranks corrects them after a padding batch (Lightning pull request
    21859). Without it the padding would be counted.

    Raises:
        RunError: If this release of Lightning does not show them.
    """
    try:
        return [item for item in (trainer._results or {}).values() if item.is_tensor]
    except GONE as error:
        raise RunError(f"this release of Lightning hides what a loop logged: {error}") from error


def steps_in_checkpoint(checkpoint: dict[str, Any]) -> int:
    """Return the number of steps that loggers had been given when the checkpoint was written.

    Lightning counts them apart from `global_step`, which also counts steps of several optimizers.
    Without it rows are dropped from `global_step` on, the same with one optimizer.
    """
    try:
        state = checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]
        return int(state["_batches_that_stepped"])
    except GONE as error:
        say_without("reading how many steps were logged", error)
        return int(checkpoint["global_step"])


def steps_logged(trainer: Any) -> int:
    """Return the number of steps that loggers have been given so far.

    Without it a row counts as logged at the trainer's `global_step`, the same with one optimizer.
    """
    loop = getattr(getattr(trainer, "fit_loop", None), "epoch_loop", None)
    return int(getattr(loop, "_batches_that_stepped", trainer.global_step))


def is_tuner_restoring(trainer: Trainer) -> bool:
    """Return True while LearningRateFinder or BatchSizeFinder restores what it saved within a fit.

    Lightning calls the same hooks as to resume a run; only the file's name tells them apart.
    Without it such a state is taken for that of an earlier start.
    """
    name = Path(str(trainer.ckpt_path)).name
    return name.startswith((".lr_find_", ".scale_batch_size_"))


def unwrap_batch_sampler(loader: Any) -> Any:
    """Return the batch sampler of a loader; the one inside Lightning's wrapper in `predict`.

    Lightning's wrapper records the indices of each batch. Without it `predict` on several ranks
    gives each of them the whole data, and the writer removes what is there twice.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    return getattr(batch_sampler, "_batch_sampler", batch_sampler)


def take_over_launched_ranks(trainer: Trainer) -> list[Popen[bytes]]:
    """Return the processes that Lightning's launcher started, which it then no longer watches.

    Lightning kills this process as soon as one of them fails, before it could save or say why.
    Without it the end of another rank ends this one without a word.
    """
    launched = getattr(getattr(trainer.strategy, "launcher", None), "procs", None) or []
    processes = [process for process in launched if isinstance(process, Popen)]
    if processes:
        launched.clear()
    return processes


def skip_sigterm_broadcast(trainer: Trainer, skip: bool) -> None:
    """Have a rank not ask the first one before each batch whether Lightning was sent a SIGTERM.

    It never was, since the engine receives signals. Without it each step copies a number to the
    GPU and back, and waits for it.
    """
    loop: Any = getattr(getattr(trainer, "fit_loop", None), "epoch_loop", None)
    if loop is None:  # a Fabric loop
        return
    vars(loop).pop("_broadcast_sigterm_tensor", None)
    if skip and hasattr(loop, "_broadcast_sigterm_tensor"):
        vars(loop)["_broadcast_sigterm_tensor"] = lambda: None


def end_restored_epoch(trainer: Trainer) -> None:
    """Count an epoch as ended that ended just before the checkpoint was written.

    With `max_steps` Lightning takes it for one that has begun, and trains no step in it.

    Raises:
        RunError: If this release of Lightning has another loop.
    """
    loop: Any = trainer.fit_loop
    try:
        loop.epoch_progress.increment_completed()
        loop.on_iteration_done()
        loop.epoch_loop.on_iteration_done()
    except GONE as error:
        raise RunError(f"this release of Lightning cannot resume here: {error}") from error


def end_restart(trainer: Trainer) -> None:
    """Tell the loop that the first batch after resuming is done.

    Else Lightning leaves out the scheduler that waits for the metric of this epoch.
    """
    loop: Any = trainer.fit_loop
    if loop.restarting:
        loop.on_iteration_done()


def set_wandb_run(logger: WandbLogger, run: Any) -> None:
    """Hand a WandbLogger the W&B run that it logs to; None has the next call begin one.

    Lightning's own property cannot begin a run offline where W&B does not answer.
    """
    logger._experiment = run


def wandb_run(logger: WandbLogger) -> Any:
    """Return the W&B run of a WandbLogger without beginning one; None if there is none."""
    return getattr(logger, "_experiment", None)


def record_indices(loader: Any) -> list[Any] | None:
    """Return an empty list to which the indices of each batch are to be added, in `predict`.

    Lightning's wrapper of a batch sampler gives them to prediction writers. Without it a writer
    does not know which samples it is given, and says so.
    """
    wrapper: Any = getattr(loader, "batch_sampler", None)
    if not hasattr(wrapper, "_batch_sampler"):
        return None
    wrapper.seen_batch_indices = []
    return wrapper.seen_batch_indices


def read_by(loader: Any, reader: Any) -> None:
    """Have a DataLoader read what `reader` yields, not its batch sampler.

    Its attributes stay, save that it gets a generator, or it would draw from the global one. It is
    still of its class: of a subclass in which torch's `_index_sampler` is the reader. Without it
    a batch sampler is neither shared nor resumed.

    Raises:
        RunError: If this release of torch has no such property.
    """
    kind: Any = type(loader)
    generator = loader.generator
    if not hasattr(kind, "_index_sampler"):
        raise RunError("this release of torch reads loaders in another way")

    def reduce(one: Any, _: int) -> tuple[Any, ...]:
        return object.__new__, (kind,), {**vars(one), "generator": generator}

    members = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__reduce_ex__": reduce,
        "_index_sampler": property(lambda _: reader),
        READER: reader,
        GENERATOR: generator,
    }
    loader.__class__ = type(kind)(kind.__name__, (kind,), members)
    loader.generator = generator or torch.Generator().manual_seed(torch.initial_seed())


def reader_of(loader: Any) -> Any:
    """Return what a loader reads by `read_by`; None if it reads its own batch sampler."""
    reader = getattr(type(loader), READER, None)
    return reader if reader is not None and reader.loader is loader else None


def restore_reader(loader: Any) -> None:
    """Have a loader read its batch sampler again; undo `read_by`."""
    kind = type(loader)
    if hasattr(kind, READER):
        loader.generator = getattr(kind, GENERATOR)
        loader.__class__ = kind.__bases__[0]


def has_iterator_already(loader: Any) -> bool:
    """Return True for a loader that made its iterator in its constructor, as some do to keep it.

    What it reads cannot be replaced any more. Without it such a loader is not shared among ranks.
    """
    kind = getattr(dataloader, "_BaseDataLoaderIter", ())
    return any(
        isinstance(value, kind)
        for name, value in vars(loader).items()
        if name != "_iterator"  # torch's own, of workers that persist
    )


def share_like_lightning(trainer: Trainer, loader: Any) -> Any:
    """Return a loader as Lightning shares it among ranks, for those that the engine leaves alone.

    Raises:
        RunError: If this release of Lightning shares loaders in another way.
    """
    try:
        options: Any = trainer._accelerator_connector
        shuffle = bool(trainer.training) or data_connector._is_dataloader_shuffled(loader)
        prepare = trainer._data_connector._prepare_dataloader
        options.use_distributed_sampler = True
    except GONE as error:
        raise RunError(f"this release of Lightning cannot share a loader: {error}") from error
    try:
        stage: Any = trainer.state.stage
        return prepare(loader, shuffle=shuffle, mode=stage)
    finally:
        options.use_distributed_sampler = False


def reads_ahead(trainer: Trainer) -> bool:
    """Return True if Lightning reads a batch before it trains on the one before it.

    It does so where the loaders do not say how many batches they have. Without it the random
    numbers of that batch are others in a resumed run.
    """
    fetcher: Any = trainer.fit_loop._data_fetcher
    return fetcher is not None and fetcher.length is None


def read_again(trainer: Trainer, states: list[Any]) -> None:
    """Have Lightning begin to read the loaders of the training, since the position is now known.

    Without it a resumed run trains on the batches at the start of the epoch.

    Args:
        trainer: The trainer.
        states: Those of loaders with a `state_dict`, which Lightning saves.
    """
    loop: Any = trainer.fit_loop
    if trainer.current_epoch > 0 and not loop.is_resuming and not loop.epoch_loop.restarting:
        return  # then Lightning does so itself
    if states:
        loop._combined_loader._load_state_dicts(states)
    iter(loop._data_fetcher)


def at_next_epoch_start(trainer: Trainer, act: Callable[[Callable[[], None]], None]) -> None:
    """Have `act` called once in place of what Lightning does at the next epoch's start.

    It is given that as a function. All hooks of the training's start are called by then. Without
    it what they draw or change is not undone when a run resumes.
    """
    loop: Any = trainer.fit_loop
    original = loop.on_advance_start

    def once() -> None:
        vars(loop).pop("on_advance_start", None)
        act(original)

    loop.on_advance_start = once


def begin_epoch_once_more(trainer: Trainer) -> None:
    """Have Lightning call `on_train_epoch_start` although it resumes within an epoch.

    Lightning issue 21901. Without it a value that the hook sets is another after resuming.
    """
    loop: Any = trainer.fit_loop
    loop.reset_restart_stage()
    for progress in (loop.epoch_progress.current, loop.epoch_progress.total):
        progress.ready -= 1
        progress.started -= 1


def last_reloads(trainer: Trainer, epochs: list[Any] | None = None) -> list[Any] | None:
    """Return in which epochs the loaders of training and validation were made; set them if given.

    For `reload_dataloaders_every_n_epochs`; None without it. Without this function a resumed run
    makes the loaders in other epochs.
    """
    loop: Any = trainer.fit_loop
    validation = loop.epoch_loop.val_loop
    if not vars(trainer).get("reload_dataloaders_every_n_epochs"):
        return None
    if epochs is not None:
        loop._last_train_dl_reload_epoch, validation._last_val_dl_reload_epoch = epochs
    return [loop._last_train_dl_reload_epoch, validation._last_val_dl_reload_epoch]


def makes_loaders(loop: Any) -> tuple[bool, bool]:
    """Return whether a loop's `setup_data` will make loaders, and whether it is for a reload.

    A reload is what `reload_dataloaders_every_n_epochs` asks for. Without this function loaders
    are made with other random numbers in a resumed run.
    """
    kind = "train" if hasattr(loop, "_should_reload_train_dl") else "val"
    due = bool(getattr(loop, f"_should_reload_{kind}_dl"))
    return loop._combined_loader is None or due, due


@contextmanager
def epoch_shown(trainer: Trainer, epoch: int) -> Iterator[None]:
    """Have the trainer's `current_epoch` be another, as loaders saw it that are made again."""
    progress: Any = trainer.fit_loop.epoch_progress
    now, progress.current.completed = progress.current.completed, epoch
    try:
        yield
    finally:
        progress.current.completed = now


def validated_batches(trainer: Trainer, total: dict[str, int] | None = None) -> dict[str, int]:
    """Return how many batches of validations the training has begun and ended; set it if given.

    Without it a resumed run counts a validation twice: Lightning counts the one that a checkpoint
    follows, and one that only an end within an epoch has brought.
    """
    progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    for name, number in (total or {}).items():
        setattr(progress.total, name, number)
    return dict(progress.state_dict()["total"])


def count_as_within_epoch(checkpoint: dict[str, Any], validated: dict[str, int]) -> None:
    """Have a checkpoint say that its epoch has not ended, as one after a batch says.

    Lightning counts an epoch as ended that `max_steps`, `max_time` or `should_stop` has cut short.
    Without it the rest of that epoch is never trained on.

    Args:
        checkpoint: Changed in place.
        validated: What `validated_batches` was before a validation that only this end has brought;
            {} without one.
    """
    loops = checkpoint["loops"]["fit_loop"]
    for which in ("current", "total"):
        loops["epoch_progress"][which]["processed"] -= 1
        loops["epoch_loop.batch_progress"][which]["completed"] -= 1
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
    loops["epoch_loop.val_loop.batch_progress"]["total"].update(validated)


def wraps_tensors(value: torch.Tensor) -> bool:
    """Return True for a tensor that only wraps others, such as a DTensor.

    Without it the copy of such a tensor would be empty.
    """
    return bool(_python_dispatch.is_traceable_wrapper_subclass(value))


def original_save(saving: Any) -> Callable[..., None]:
    """Return the method by which a ModelCheckpoint saves a file and tells loggers of it.

    Raises:
        RunError: If this release of Lightning has none.
    """
    try:
        save: Callable[..., None] = saving._save_checkpoint
    except GONE as error:
        raise RunError(f"this release of Lightning saves in another way: {error}") from error
    return save


def replace_save(saving: Any, save: Callable[..., None] | None) -> None:
    """Have a ModelCheckpoint save by another method; by its own again with None.

    Without it the training waits for each file, and loggers are told before it is there.
    """
    if save is None:
        vars(saving).pop("_save_checkpoint", None)
    else:
        vars(saving)["_save_checkpoint"] = save


def run_of_parent(logger: WandbLogger, wandb: Any) -> Any:
    """Return the W&B run that the parent process began, where a launcher copied the logger here.

    Lightning's strategies by `spawn` do. Without it W&B refuses a second run of the same id.
    """
    attach_id = vars(logger).get("_attach_id")
    return wandb._attach(attach_id) if attach_id else None
