"""Has Lightning read loaders as batches.py says: shared among ranks, resumable anywhere."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, IterableDataset

from .batches import Position, SharedBatches, StatefulStream
from .errors import UsageError
from .lightning_internals import (
    epoch_shown,
    has_iterator_already,
    last_reloads,
    makes_loaders,
    read_by,
    reader_of,
    reads_ahead,
    restore_reader,
    share_like_lightning,
)
from .random_streams import random_states, restore_random, same_states
from .sampler_state import is_stateful

LOADERS = {
    "train": "train_dataloader",
    "sanity_check": "val_dataloaders",
    "validate": "val_dataloaders",
    "test": "test_dataloaders",
    "predict": "predict_dataloaders",
}
KEPT = ("train_dataloader", "val_dataloaders")  # those of which a checkpoint holds something


class DataOrder:
    """Replaces what the loaders of a trainer read, from `attach` to `detach`.

    Args:
        trainer: The trainer.
        seed: Seed of the run.
    """

    def __init__(self, trainer: Trainer, seed: int) -> None:
        self.trainer = trainer
        self.seed = seed
        self.restoring = False  # a checkpoint is read, and the training not yet where it says
        self.next_batch: int | None = None  # where the loop is before it counts the next batch
        self.replaced: list[DataLoader] = []
        self.reloaded: Any = None  # epoch in which the loaders of `saved` were made
        self.saved: dict[tuple[str, int], dict[str, Any]] = {}  # of loaders not read yet
        # Of the loaders of each kind: the epoch in which they were made, and the random states
        # before that, if it drew random numbers.
        self.made: dict[str, dict[str, Any]] = {}
        self.to_make_again: set[str] = set()

    def attach(self) -> None:
        """Take part when the trainer has loaders made, and hands one to its strategy."""
        strategy: Any = self.trainer.strategy
        process = strategy.process_dataloader
        strategy.process_dataloader = lambda loader: process(self.take(loader))
        for kind, loop in self._loops().items():
            loop.setup_data = partial(self._make, kind, loop, loop.setup_data)

    def detach(self) -> None:
        """Give the strategy, the loops and the loaders back as they were."""
        vars(self.trainer.strategy).pop("process_dataloader", None)
        for loop in self._loops().values():
            vars(loop).pop("setup_data", None)
        for loader in self.replaced:
            restore_reader(loader)
        self.replaced = []

    def _loops(self) -> dict[str, Any]:
        loop = self.trainer.fit_loop
        return dict(zip(KEPT, (loop, loop.epoch_loop.val_loop), strict=True))

    def _make(self, kind: str, loop: Any, make: Callable[[], None]) -> None:
        """Make loaders; in a resumed run as they were made before the checkpoint.

        Args:
            kind: One of KEPT.
            loop: The loop that reads the loaders.
            make: Lightning's function, which does nothing while there are loaders to keep.
        """
        makes, due = makes_loaders(loop)
        if not makes:
            return make()
        before = random_states()
        # Before the training says in which epochs loaders were made, a reload always seems due.
        again = kind in self.to_make_again and (self.restoring or not due)
        self.to_make_again.discard(kind)
        if again:
            with epoch_shown(self.trainer, self.made[kind]["epoch"]):
                restore_random(self.made[kind]["random"] or before)
                make()
            restore_random(before)
        else:
            epoch = self.trainer.current_epoch
            make()
            drew = not same_states(before, random_states())
            self.made[kind] = {"epoch": epoch, "random": before if drew else None}

    def make_again(self, made: dict[str, dict[str, Any]]) -> None:
        """Have the loaders of a resumed run made as a checkpoint says that they were."""
        self.made, self.to_make_again = dict(made), set(made)

    def take(self, loader: Any) -> Any:
        """Return the loader that the trainer is to read: the same, save where Lightning shares it.

        Raises:
            UsageError: If there is not one batch for each rank to train on.
        """
        if not isinstance(loader, DataLoader) or reader_of(loader) is not None:
            return loader
        if is_stateful(loader) or has_iterator_already(loader):
            several = self.trainer.world_size > 1
            return share_like_lightning(self.trainer, loader) if several else loader
        position = partial(self._position, loader)
        if isinstance(loader.dataset, IterableDataset):
            if loader.num_workers or not is_stateful(loader.dataset):
                return loader
            stream = StatefulStream(loader, position)
            self._replace(loader, stream)
            return loader
        rank = self.trainer.global_rank, self.trainer.world_size
        batches = SharedBatches(loader, position, rank)
        self._replace(loader, batches)
        check_shares(batches, self.trainer)
        agree_on_generators(batches, self.trainer)
        return loader

    def _replace(self, loader: DataLoader, reader: Any) -> None:
        read_by(loader, reader)
        self.replaced.append(loader)

    def _position(self, loader: DataLoader) -> Position:
        """Return where the training is, for one of its loaders."""
        trainer = self.trainer
        training = bool(trainer.training)
        kind = LOADERS[trainer.state.stage.value if trainer.state.stage else "train"]
        number = next((n for n, one in self._loaders(kind) if one is loader), 0)
        epoch = batch = 0
        if trainer.state.fn == TrainerFn.FITTING:
            loop = trainer.fit_loop
            epoch = loop.epoch_progress.current.processed  # type: ignore[attr-defined]
            batch = loop.epoch_loop.batch_progress.current.ready
            batch = batch if self.next_batch is None else self.next_batch
        words: tuple[Any, ...] = (self.seed, kind, number, epoch)
        if training:
            return Position(words, batch, True, not self.restoring, reads_ahead(trainer))
        self._restore_evaluation(kind, number, loader)
        return Position((*words[:3], batch, epoch), training=False)

    def _loaders(self, kind: str) -> Iterator[tuple[int, Any]]:
        loaders = getattr(self.trainer, kind)
        if loaders is not None:
            yield from enumerate(CombinedLoader(loaders).flattened)

    def _readers(self) -> Iterator[tuple[tuple[str, int], Any]]:
        for kind in KEPT:
            for number, loader in self._loaders(kind):
                reader = reader_of(loader)
                if reader is not None:
                    yield (kind, number), reader

    # Checkpoints.

    def capture(self, batch: int) -> tuple[list[Any], list[Any]]:
        """Return what a checkpoint holds of the loaders.

        Args:
            batch: Batches of the epoch that are done; 0 at its end.

        Returns:
            The states of all loaders, which are the same on each rank; and of this rank the
            batches that are read but not done. Each with the kind and number of the loader.
        """
        states: dict[tuple[str, int], Any] = {}
        ahead = []
        for key, reader in self._readers():
            done = batch if key[0] == "train_dataloader" else 0
            states[key] = reader.capture(done)
            ahead.append((*key, reader.batches_read_ahead(done)))
        states |= self.saved  # these readers do not know it yet
        return [(*key, states[key]) for key in sorted(states)], ahead

    def resume(self, saved: dict[str, Any], ahead: list[Any]) -> dict[str, Any] | None:
        """Have the loaders begin where a checkpoint was written.

        Args:
            saved: Its `train_state`.
            ahead: The batches of this rank that were read but not done.

        Returns:
            The random states before a batch that was read ahead, if there was one.
        """
        self.restoring = False
        states = saved.get("loaders", [])
        self.reloaded = self._reloaded()
        self.saved = {(kind, number): state for kind, number, state in states}
        read = {(kind, number): batches for kind, number, batches in ahead}
        self.next_batch = 0 if saved.get("all_read") else saved["batch"]
        cycles = reads_ahead(self.trainer)
        before = None
        for key, reader in self._readers():
            state = self.saved.get(key)
            if key[0] == "train_dataloader" and state:
                del self.saved[key]
                reader.resume(state, read.get(key), cycles)
                before = before or state.get("before")
        return before

    def _restore_evaluation(self, kind: str, number: int, loader: DataLoader) -> None:
        """Restore the sampler of a loader that is first read after the training has resumed."""
        in_fit = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        state = self.saved.pop((kind, number), None) if in_fit else None
        if state and self.reloaded == self._reloaded():  # else it is a newer loader
            reader_of(loader).resume(state, [])

    def _reloaded(self) -> Any:
        epochs = last_reloads(self.trainer)
        return epochs and epochs[1]

    # What is said at the start.

    def exceptions(self) -> Iterator[str]:
        """Yield why the training cannot be resumed bit-for-bit within an epoch, by loader."""
        for _, loader in self._loaders("train_dataloader"):
            reason = self._exception(loader)
            if reason:
                yield reason

    def _exception(self, loader: Any) -> str:
        name = type(loader).__name__
        if is_stateful(loader) or self._has_stateful_datamodule():
            return ""
        if not isinstance(loader, DataLoader):
            return f"a {name} without state_dict"
        reader = reader_of(loader)
        if isinstance(loader.dataset, IterableDataset):
            workers = " in workers" if loader.num_workers else ""
            return "" if reader else f"an IterableDataset without state_dict{workers}"
        if reader is None:
            return f"a {name} that makes its iterator itself"
        if reader.kept.unknown:
            return f"an iterator in its sampler ({', '.join(reader.kept.unknown)})"
        return "a generator in its dataset, used by workers" if reader.has_generators() else ""

    def _has_stateful_datamodule(self) -> bool:
        module: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        names = ("state_dict", "load_state_dict")
        return module is not None and all(
            is_overridden(name, module, LightningDataModule) for name in names
        )


def check_shares(batches: SharedBatches, trainer: Trainer) -> None:
    """Raise a UsageError if no rank would train a step."""
    if not trainer.training or batches.ranks == 1:
        return
    try:
        there, share = len(batches.inner), len(batches)
    except (TypeError, NotImplementedError):  # it has no length
        return
    if there and not share:
        problem = f"{there} batches cannot be shared among {batches.ranks} ranks"
        hint = "--trainer.use_distributed_sampler false has each rank train on all of them"
        raise UsageError(f"train_dataloader: {problem}; {hint}")


def agree_on_generators(batches: SharedBatches, trainer: Trainer) -> None:
    """Have a generator that nobody has seeded be on each rank what it is on the first."""
    kept = batches.kept.capture() if batches.ranks > 1 else {}
    if kept:
        first = trainer.strategy.broadcast(kept)
        if not trainer.is_global_zero:
            batches.kept.restore(first)
