"""The order of a loader's batches, and the random numbers drawn for them.

The order of an epoch depends on the run's seed and the epoch alone. So training can resume at any
batch, and ranks can share the samples without a word to each other.
"""

import random
from collections.abc import Iterator, Sized
from itertools import islice
from typing import Any, Self

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import BatchSampler, DistributedSampler, IterableDataset, Sampler

from .lightning_internals import unwrap_batch_sampler


class ResumableBatches(Sampler[int]):
    """The indices that a sampler yields in an epoch, in an order that can be resumed anywhere.

    Each rank takes every n-th index. In training all ranks take equally many, so that none waits
    for another. In evaluation each sample is taken once; a rank without any takes a padding
    sample, because it has to take part, and ExactEvaluation undoes its effect.

    Args:
        batches: Batch sampler whose sampler this one replaces.
        loader: Loader of these batches. It gets a generator, or it would draw from the global one.
        seed: Seed of the run.
        rank: This rank, and the number of ranks.
        training: Whether the batches are trained on.
        position: Epoch, and the number of its batches that are done.
    """

    def __init__(
        self,
        batches: BatchSampler,
        loader: Any,
        seed: int,
        rank: tuple[int, int],
        training: bool,
        position: tuple[int, int],
    ) -> None:
        sampler: Any = batches.sampler
        self.sampler: Any = sampler.sampler if isinstance(sampler, ResumableBatches) else sampler
        self.batch_size = batches.batch_size
        self.seed = seed
        self.seeds_workers = loader.num_workers > 0
        shares_by_itself = isinstance(self.sampler, DistributedSampler)
        self.rank, self.ranks = (0, 1) if shares_by_itself else rank
        self.training = training
        self.epoch, self.start = position
        self.is_padding = not training and self.rank >= len(self.sampler) > 0
        loader.generator = loader.generator or torch.Generator()

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch
        if isinstance(self.sampler, DistributedSampler):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        samples = len(self.sampler)
        if self.training:
            return samples // self.ranks
        return self.is_padding + len(range(self.rank, samples, self.ranks))

    def __iter__(self) -> Iterator[int]:
        indices = self._draw()
        # Of several loaders a shorter one is read more than once in an epoch, then from its start.
        first = self.start * self.batch_size % max(len(indices), 1)
        self.start = 0
        for position, index in enumerate(islice(indices, first, None), first):
            if self.seeds_workers and position % self.batch_size == 0:
                yield SeededBatch(index, (self.seed, self.epoch, self.rank, position))
            else:
                yield index

    def _draw(self) -> list[int]:
        """Return the indices of this rank in this epoch."""
        with isolate_rng():
            seed = seed_all(self.seed, self.epoch)
            if getattr(self.sampler, "generator", None) is not None:
                self.sampler.generator.manual_seed(seed)
            indices = list(self.sampler)
        first = 0 if self.is_padding else self.rank
        return indices[first :: self.ranks][: len(self)]


class SeededBatch(int):
    """The first index of a batch. Unpickling seeds the worker for this batch.

    Args:
        index: The index.
        words: Numbers that identify the batch: seed, epoch, rank and position.
    """

    words: tuple[int, ...]

    def __new__(cls, index: int, words: tuple[int, ...]) -> Self:
        self = super().__new__(cls, index)
        self.words = words
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return seed_and_return, (int(self), self.words)


def seed_and_return(index: int, words: tuple[int, ...]) -> int:
    """Seed this process by `words`, and return the index."""
    seed_all(*words)
    return index


def seed_all(*words: int) -> int:
    """Seed this process by several numbers at once, and return the seed.

    Source: numpy.random.SeedSequence, which mixes numbers into one.
    """
    seed = int(np.random.SeedSequence(words).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    return seed


def random_states() -> dict[str, Any]:
    """Return the states of this process's generators, in types that a checkpoint may hold."""
    kind, keys, *rest = tuple(np.random.get_state())  # noqa: NPY002
    numbers: Any = keys
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, numbers.tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random(states: dict[str, Any]) -> None:
    """Set the generators of this process to what `random_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def is_resumable(loader: Any) -> bool:
    """Return True for a map-style dataset in torch's own batches of a sampler with a length."""
    batches = unwrap_batch_sampler(loader)
    if type(batches) is not BatchSampler or isinstance(loader.dataset, IterableDataset):
        return False
    return isinstance(batches.sampler, Sized)


def is_padding_loader(loader: Any) -> bool:
    """Return True if all that a loader yields on this rank is a padding sample."""
    sampler = getattr(unwrap_batch_sampler(loader), "sampler", None)
    return isinstance(sampler, ResumableBatches) and sampler.is_padding
