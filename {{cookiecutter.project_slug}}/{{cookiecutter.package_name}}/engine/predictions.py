"""The table that `predict` leaves: a row for each sample, in the order of the data."""

import csv
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import IterableDataset

from .errors import UsageError
from .files import atomic_write, display_path

Columns = dict[str, np.ndarray]  # by name, each of shape (samples,)
HARMLESS = "Total length of `DataLoader` across ranks is zero|Couldn't infer the batch"
SWITCH_OFF = "--predictions null writes nothing"
MAP_STYLE = "a map-style dataset"


class PredictionWriter(BasePredictionWriter):
    """Writes what `predict_step` returns into a CSV file.

    That is probabilities (B, C), values (B,), or a dict of such by the column's name. A subclass
    for another format sets `suffix` and overrides `write`.

    Args:
        file: The file to write.

    Raises:
        UsageError: If the name of the file, the data or the predictions make no table.
    """

    suffix = ".csv"

    def __init__(self, file: str | Path) -> None:
        super().__init__("batch")
        self.file = Path(file)
        self.loaders: dict[int, list[Columns]] = {}  # the batches of each loader
        if self.file.suffix != self.suffix:
            expected = f"expected a name that ends in {self.suffix}"
            raise UsageError(f"predictions: {expected}, got {self.file.name}")

    def write(self, file: Path, columns: Columns) -> None:
        """Write the whole table. Called on the first rank, once."""
        texts = [as_texts(column) for column in columns.values()]
        with file.open("w", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(zip(*texts, strict=True))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        warnings.filterwarnings("ignore", HARMLESS)

    def write_on_batch_end(
        self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx
    ):
        columns = columns_of(prediction)
        lengths = {len(column) for column in columns.values()}
        batches = self.loaders.setdefault(dataloader_idx, [])
        if not has_indices(trainer, dataloader_idx):
            batch_indices = None  # Lightning passes those of another loader
        if not batch_indices and trainer.world_size == 1:
            begin = sum(len(before["index"]) for before in batches)
            batch_indices = range(begin, begin + max(lengths, default=0))
        if lengths != {len(batch_indices or ())}:
            expected = f"{len(batch_indices)} values a column" if batch_indices else MAP_STYLE
            got = " and ".join(map(str, sorted(lengths))) or "none"
            raise UsageError(f"predictions: expected {expected}, got {got}; {SWITCH_OFF}")
        batches.append({"index": np.asarray(batch_indices), **columns})

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ranks: list[Any] = [self.loaders]
        if trainer.world_size > 1:
            ranks = ranks * trainer.world_size
            torch.distributed.all_gather_object(ranks, self.loaders)
        if not trainer.is_global_zero:
            return
        columns = join_ranks(ranks)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.file) as part:
            self.write(part, columns)
        print(f"saved    {display_path(self.file)}, {len(columns['index'])} rows")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.predict_loop.skip:
            raise UsageError("predict: expected data, got none; nothing is written")


def has_indices(trainer: Trainer, number: int) -> bool:
    """Return True if one of the loaders reads a dataset by indices."""
    loaders = CombinedLoader(trainer.predict_dataloaders, "sequential").flattened
    dataset = getattr(loaders[number], "dataset", None)
    return dataset is not None and not isinstance(dataset, IterableDataset)


def columns_of(prediction: Any) -> Columns:
    """Return the columns of what `predict_step` has returned for a batch."""
    if isinstance(prediction, Tensor):
        if prediction.ndim == 2:
            prediction = {"class": prediction.argmax(dim=1), "p": prediction}
        else:
            prediction = {"prediction": prediction}
    if not isinstance(prediction, Mapping):
        expected = "a tensor (B, C) or (B,), or a dict of them by column"
        got = type(prediction).__name__
        raise UsageError(f"predict_step: expected {expected}, got {got}; {SWITCH_OFF}")
    columns: Columns = {}
    for name, values in prediction.items():
        array = as_array(values)
        if array.ndim == 1:
            columns[name] = array
        elif array.ndim == 2:
            columns |= {f"{name}{k}": column for k, column in enumerate(array.T)}
        else:
            expected = f"expected {name} of one or two dimensions"
            raise UsageError(f"predict_step: {expected}, got {tuple(array.shape)}")
    return columns


def as_array(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values  # numpy has none
    return np.asarray(values)


def as_texts(column: np.ndarray) -> list[Any]:
    # Nine digits tell any two numbers of 32 bits apart (IEEE 754).
    return [f"{value:.9g}" if isinstance(value, float) else value for value in column.tolist()]


def join_ranks(ranks: list[dict[int, list[Columns]]]) -> Columns:
    """Return the whole table, given for each rank the batches of each loader."""
    loaders = sorted({loader for rank in ranks for loader in rank})
    parts = []
    for loader in loaders:
        part = concatenate([columns for rank in ranks for columns in rank.get(loader, ())])
        _, first = np.unique(part["index"], return_index=True)  # samplers of ranks repeat some
        part = {name: column[first] for name, column in part.items()}
        if len(loaders) > 1:
            part = {"dataloader": np.full(len(first), loader), **part}
        parts.append(part)
    return concatenate(parts)


def concatenate(parts: list[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
