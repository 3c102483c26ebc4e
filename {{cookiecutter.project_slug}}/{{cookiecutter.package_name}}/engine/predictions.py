"""What `predict` leaves: a table with a row for each sample, or a file of what is no table."""

import csv
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import IterableDataset

from .errors import UsageError
from .files import atomic_write, display_path
from .lightning_internals import reader_of
from .prediction_parts import Batch, Kind, Merged, Parts, sharing_of
from .prediction_samples import Columns, Plain
from .screen import say

HARMLESS = "Total length of `DataLoader` across ranks is zero|Couldn't infer the batch"
SAMPLES = ".pt"  # suffix of a file of samples


class PredictionWriter(BasePredictionWriter):
    """Writes what `predict_step` returns: a CSV file, or a file for `torch.load`.

    A table has values (B,) or (B, 1), probabilities (B, C), or a dict of such by the column's
    name. Anything else is in a file with the suffix `.pt`, sample by sample. Both are in the order
    in which the data was read. What the batch carries under `id` is a column. A subclass for
    another kind of table sets `suffix` and overrides `write`.

    Args:
        file: The table to write.

    Raises:
        UsageError: If the file's name has another suffix.
    """

    suffix = ".csv"

    def __init__(self, file: str | Path) -> None:
        super().__init__("batch")
        self.file = Path(file)
        self.parts: Parts | None = None
        if self.file.suffix not in (self.suffix, SAMPLES):
            expected = f"expected a name that ends in {self.suffix} or {SAMPLES}"
            raise UsageError(f"predictions: {expected}, got {self.file.name}")

    def write(self, file: Path, tables: Iterable[Columns]) -> None:
        """Write the table, given piece by piece with equal columns. Called on the first rank."""
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            for number, columns in enumerate(tables):
                if number == 0:
                    writer.writerow(columns)
                writer.writerows(zip(*map(as_texts, columns.values()), strict=True))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        warnings.filterwarnings("ignore", HARMLESS)
        self.plain, self.kind = Plain(), Kind()
        folder = self.file.with_name(f"{self.file.name}.parts")
        self.parts = Parts(folder, trainer.global_rank)

    def write_on_batch_end(
        self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx
    ):
        loader = loaders_of(trainer)[dataloader_idx]
        reader = reader_of(loader)
        if prediction is None or (reader is not None and reader.is_padding(batch_idx)):
            return
        place = dataloader_idx, batch_idx, trainer.global_rank
        index = None
        if batch_indices and has_indices(loader):  # else Lightning passes those of another loader
            index = [one if isinstance(one, str | int) else str(one) for one in batch_indices]
        predicted = Batch(*place, index, None, self.plain(prediction))
        predicted.id = ids_of(batch, self.plain, predicted.rows)
        self.kind.add(predicted)
        assert self.parts is not None
        self.parts.add(predicted)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.parts is not None
        self.parts.write()
        self.kind.others |= self.plain.others
        kinds: list[Any] = [(self.kind, self.parts.written)]
        if trainer.world_size > 1:
            kinds = kinds * trainer.world_size
            torch.distributed.all_gather_object(kinds, (self.kind, self.parts.written))
        if trainer.is_global_zero:
            self._write(trainer, self.parts, kinds)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if trainer.is_global_zero and self.parts is not None:
            self.parts.remove()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero and self.parts is not None:
            self.parts.remove()
        if trainer.predict_loop.skip and trainer.is_global_zero:
            say("predict  no data; nothing is written")

    def _write(self, trainer: Trainer, parts: Parts, kinds: list[tuple[Kind, int]]) -> None:
        kind = Kind(
            batches=sum(one.batches for one, _ in kinds),
            columns=set().union(*(one.columns for one, _ in kinds)),
            classes=all(one.classes for one, _ in kinds),
            others=set().union(*(one.others for one, _ in kinds)),
        )
        if not kind.batches:
            say("predict  predict_step returned nothing; nothing is written")
            return
        streams = [parts.read(rank, files) for rank, (_, files) in enumerate(kinds)]
        merged = Merged(streams, list(map(sharing_of, loaders_of(trainer))))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if kind.is_table and self.file.suffix == self.suffix:
            with atomic_write(self.file) as part:
                self.write(part, merged.tables(kind.classes))
            say(f"saved    {display_path(self.file)}, {merged.samples} rows")
        else:
            self._write_samples(merged, kind)

    def _write_samples(self, merged: Merged, kind: Kind) -> None:
        file = self.file.with_suffix(SAMPLES)
        content = list(merged.entries())
        with atomic_write(file) as part:
            torch.save(content, part)
        what = "batches" if merged.whole else "samples"
        say(f"saved    {display_path(file)}, {len(content)} {what}")
        trust = not kind.others
        line = f'read     torch.load("{file.name}", mmap=True, weights_only={trust})'
        say(line if trust else f"{line}  # it holds {min(kind.others)}")


def loaders_of(trainer: Trainer) -> list[Any]:
    return CombinedLoader(trainer.predict_dataloaders, "sequential").flattened


def has_indices(loader: Any) -> bool:
    """Return True if a loader reads a dataset by indices."""
    dataset = getattr(loader, "dataset", None)
    return dataset is not None and not isinstance(dataset, IterableDataset)


def ids_of(batch: Any, plain: Plain, rows: int | None) -> list[Any] | None:
    """Return what a batch carries under `id`, for each sample; None if it carries nothing."""
    found = batch.get("id") if isinstance(batch, Mapping) else None
    ids = plain(found)
    ids = ids.tolist() if isinstance(ids, torch.Tensor) and ids.ndim == 1 else ids
    return ids if isinstance(ids, list) and len(ids) == rows else None


def as_texts(column: np.ndarray) -> list[Any]:
    # Nine digits tell any two numbers of 32 bits apart (IEEE 754).
    short = column.dtype.itemsize <= 4
    return [
        f"{value:.9g}" if short and isinstance(value, float) else value for value in column.tolist()
    ]
