"""The predictions of all ranks: kept on the disk batch by batch, and read in the data's order."""

import heapq
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DistributedSampler

from .batches import SharedBatches
from .errors import RunError
from .files import atomic_write, display_path
from .lightning_internals import reader_of, unwrap_batch_sampler
from .prediction_samples import (
    Columns,
    bytes_of,
    columns_of,
    is_probabilities,
    rows_of,
    samples_of,
)

PART_BYTES = 1 << 26  # of predictions that are kept in memory


@dataclass
class Batch:
    """What a rank has predicted of a batch.

    Args:
        loader: Number of the loader.
        number: Number of the batch, from 0 on each rank.
        rank: The rank.
        index: What the sampler has drawn, for each sample; None where it is not known.
        id: What the batch carries under `id`, for each sample; None without.
        output: What `predict_step` returned, in plain containers.
    """

    loader: int
    number: int
    rank: int
    index: list[Any] | None
    id: list[Any] | None
    output: Any

    @property
    def rows(self) -> int | None:
        """The number of samples; None if nothing says it."""
        return rows_of(self.output) if self.index is None else len(self.index)

    @property
    def place(self) -> tuple[int, int, int]:
        return self.loader, self.number, self.rank


@dataclass
class Kind:
    """What all batches of a rank, or of several, have in common.

    Args:
        batches: How many there are.
        columns: Sets of names of columns that they have; None stands for what is no table.
        classes: Whether all are probabilities of classes.
        others: Names of classes that only a reader who trusts the file can read.
    """

    batches: int = 0
    columns: set[tuple[str, ...] | None] = field(default_factory=set)
    classes: bool = True
    others: set[str] = field(default_factory=set)

    def add(self, batch: Batch) -> None:
        columns = columns_of(batch.output, batch.rows, classes=False)
        self.batches += 1
        self.columns.add(None if columns is None else tuple(columns))
        self.classes = self.classes and is_probabilities(batch.output)

    @property
    def is_table(self) -> bool:
        return len(self.columns) == 1 and None not in self.columns


class Parts:
    """Batches on the disk, in files that each rank writes and the first one reads.

    Args:
        folder: Folder of these files.
        rank: This rank.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self.rank = rank
        self.kept: list[Batch] = []
        self.bytes = 0
        self.written = 0

    def add(self, batch: Batch) -> None:
        self.kept.append(batch)
        self.bytes += bytes_of(batch.output)
        if self.bytes > PART_BYTES:
            self.write()

    def write(self) -> None:
        """Write what is in memory."""
        if not self.kept:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self._file(self.rank, self.written)) as part:
            torch.save([vars(batch) for batch in self.kept], part)
        self.kept, self.bytes = [], 0
        self.written += 1

    def read(self, rank: int, files: int) -> Iterator[Batch]:
        """Yield the batches of a rank; their tensors lie in the files, not in memory."""
        for number in range(files):
            file = self._file(rank, number)
            if not file.exists():
                problem = f"the predictions of rank {rank} are not in {display_path(self.folder)}"
                raise RunError(f"{problem} here; the ranks need a file system that they share")
            for batch in torch.load(file, mmap=True, weights_only=False):  # written just now
                yield Batch(**batch)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, rank: int, number: int) -> Path:
        return self.folder / f"{rank}-{number}.pt"


@dataclass
class Sharing:
    """How the ranks share a loader.

    Args:
        interleaved: Whether rank r of N has each N-th sample from r on.
        samples: How many samples there are, if ranks may repeat some at the end.
        may_repeat: Whether ranks may have read the same.
    """

    interleaved: bool = False
    samples: int | None = None
    may_repeat: bool = True


def sharing_of(loader: Any) -> Sharing:
    """Return how the ranks share a loader that they have read."""
    reader = reader_of(loader)
    if isinstance(reader, SharedBatches) and reader.ranks > 1:
        return Sharing(interleaved=reader.made_by_torch, may_repeat=False)
    inner = unwrap_batch_sampler(loader)
    sampler = getattr(inner, "sampler", None) or getattr(loader, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        samples = None if sampler.drop_last else len(sampler.dataset)  # type: ignore[arg-type]
        return Sharing(interleaved=True, samples=samples, may_repeat=False)
    return Sharing()


class Merged:
    """The batches of all ranks, in the order of the data.

    Args:
        streams: The batches of each rank, in their order.
        loaders: How the ranks share each loader.
    """

    def __init__(self, streams: list[Iterator[Batch]], loaders: list[Sharing]) -> None:
        self.streams = streams
        self.loaders = loaders
        self.done: Counter[int] = Counter()  # samples of each loader
        self.whole = False  # whether a batch could not be taken apart

    @property
    def samples(self) -> int:
        return self.done.total()

    def tables(self, classes: bool) -> Iterator[Columns]:
        """Yield columns for the samples that all ranks read at a time.

        Args:
            classes: Whether a tensor (B, C) has probabilities of classes.
        """
        for batches in self._groups():
            loader = batches[0].loader
            parts = [with_index(batch, classes) for batch in batches]
            rows = [batch.rows or 0 for batch in batches]
            order = self._order(loader, rows)
            columns: Columns = {}
            if len(self.loaders) > 1:
                columns["dataloader"] = np.full(len(order), loader)
            columns["index"] = np.arange(self.done[loader], self.done[loader] + len(order))
            for name in parts[0]:
                columns[name] = np.concatenate([part[name] for part in parts])[order]
            self.done[loader] += len(order)
            yield columns

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yield a dict for each sample, or for each batch that cannot be taken apart."""
        for batches in self._groups():
            loader = batches[0].loader
            each = [self._entries_of(batch) for batch in batches]
            entries = list(chain(*each))
            for place in self._order(loader, list(map(len, each))):
                about = {"dataloader": loader} if len(self.loaders) > 1 else {}
                yield {**about, "index": self.done[loader], **entries[place]}
                self.done[loader] += 1

    def _entries_of(self, batch: Batch) -> list[dict[str, Any]]:
        outputs = samples_of(batch.output, batch.rows)
        about = {"index": batch.index, "id": batch.id}
        if outputs is None:
            outputs = [batch.output]
            is_sample = batch.rows == 1
            self.whole = self.whole or not is_sample
            if not is_sample:
                about = {name: values and [values] for name, values in about.items()}
        known = {name: values for name, values in about.items() if values is not None}
        return [
            {name: values[number] for name, values in known.items()}
            | (output if isinstance(output, dict) else {"prediction": output})
            for number, output in enumerate(outputs)
        ]

    def _groups(self) -> Iterator[list[Batch]]:
        """Yield the batches that all ranks have read at a time, each once."""
        merged = heapq.merge(*self.streams, key=lambda batch: batch.place)
        for (loader, _), group in groupby(merged, lambda batch: batch.place[:2]):
            batches = list(group)
            first = batches[0]
            if self.loaders[loader].may_repeat and first.index is not None:
                others = [batch for batch in batches[1:] if batch.index != first.index]
                batches = [first, *others]
            yield batches

    def _order(self, loader: int, rows: list[int]) -> list[int]:
        """Return the places of samples in the order of the data.

        Args:
            loader: Number of the loader.
            rows: How many samples each rank has; places count those of the first rank first.
        """
        sharing = self.loaders[loader]
        places = [(number, rank) for rank, count in enumerate(rows) for number in range(count)]
        order = list(range(len(places)))
        if sharing.interleaved:
            order.sort(key=places.__getitem__)
        left = None if sharing.samples is None else max(sharing.samples - self.done[loader], 0)
        return order[:left]


def with_index(batch: Batch, classes: bool) -> Columns:
    """Return the columns of a batch, first those that say which samples it is of."""
    columns = {
        name: np.array(values, dtype=None if all(type(one) is int for one in values) else object)
        for name, values in (("index", batch.index), ("id", batch.id))
        if values is not None
    }
    return columns | (columns_of(batch.output, batch.rows, classes) or {})
