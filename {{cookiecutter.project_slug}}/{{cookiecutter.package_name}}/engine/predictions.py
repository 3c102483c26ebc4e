"""What `predict` leaves: a table with a row for each sample, in the order of the data, on any number of ranks."""

import csv
import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import IterableDataset

from .run import Mistake, replacing, shown

Columns = dict[str, np.ndarray]  # by name, each of as many values as there are samples


class Predictions(BasePredictionWriter):
    """Writes what `predict_step` returns: probabilities (B, C), values (B,), or a dict of such by the column's name.

    Args:
        file: Ends in `.csv` or, where pyarrow is installed, in `.parquet`.
        table: Whether W&B gets the same as a table, `predictions`.
    """

    def __init__(self, file: Path, table: bool = False) -> None:
        super().__init__("batch")
        self.file, self.table = file, table
        self.loaders: dict[int, list[Columns]] = {}
        if file.suffix not in (".csv", ".parquet"):
            raise Mistake(f"predictions: expected a name that ends in .csv or .parquet, got {file.name}")
        if file.suffix == ".parquet" and not importlib.util.find_spec("pyarrow"):
            raise Mistake(f"predictions: {file.name} takes pyarrow, which is not installed; expected a .csv without it")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        warnings.filterwarnings("ignore", "Total length of `DataLoader` across ranks is zero|Couldn't infer the batch")

    def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        values = dict(columns(prediction))
        rows = {len(column) for column in values.values()}
        batches = self.loaders.setdefault(dataloader_idx, [])
        loader = CombinedLoader(trainer.predict_dataloaders, "sequential").flattened[dataloader_idx]
        if isinstance(getattr(loader, "dataset", None), IterableDataset | None):  # then these are another loader's
            batch_indices = None
        if not batch_indices and trainer.world_size == 1:  # by their order alone
            begin = sum(len(columns["index"]) for columns in batches)
            batch_indices = range(begin, begin + max(rows, default=0))
        if rows != {len(batch_indices or ())}:
            got = " and ".join(map(str, sorted(rows))) or "none"
            expected = f"{len(batch_indices)} values a column" if batch_indices else "a map-style dataset"
            raise Mistake(f"predictions: expected {expected}, got {got}; --predictions null writes nothing")
        batches.append({"index": np.asarray(batch_indices), **values})

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts together what the ranks have. A sample that two of them had, as samplers repeat some, is there once."""
        ranks: list[Any] = [self.loaders]
        if trainer.world_size > 1:
            ranks = [None] * trainer.world_size
            torch.distributed.all_gather_object(ranks, self.loaders)
        if not trainer.is_global_zero:
            return
        parts = []
        for loader in sorted({loader for loaders in ranks for loader in loaders}):
            batches = [columns for loaders in ranks for columns in loaders.get(loader, ())]
            whole = {name: np.concatenate([columns[name] for columns in batches]) for name in batches[0]}
            _, first = np.unique(whole["index"], return_index=True)
            parts.append({"dataloader": np.full(len(first), loader)} | {name: whole[name][first] for name in whole})
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if len(parts) == 1:
            del whole["dataloader"]
        self._write(whole)
        print(f"saved    {shown(self.file)}, {len(whole['index'])} rows")
        for logger in trainer.loggers if self.table else ():
            if isinstance(logger, WandbLogger):
                rows = zip(*(column.tolist() for column in whole.values()), strict=True)
                logger.log_table("predictions", columns=[*whole], data=[list(row) for row in rows])

    def _write(self, whole: Columns) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.file) as part:
            if self.file.suffix == ".parquet":
                import pyarrow.parquet

                pyarrow.parquet.write_table(pyarrow.table(whole), part)
            else:
                # Nine digits tell any two numbers of 32 bits apart (IEEE 754).
                texts = [[f"{v:.9g}" if isinstance(v, float) else v for v in c.tolist()] for c in whole.values()]
                with part.open("w", newline="") as stream:
                    csv.writer(stream, lineterminator="\n").writerows([[*whole], *zip(*texts, strict=True)])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.predict_loop.skip:
            raise Mistake("predict: expected data, got none; nothing is written")


def columns(prediction: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The columns of what `predict_step` has returned for a batch."""
    if isinstance(prediction, Tensor) and prediction.ndim == 2:
        yield "class", numbers(prediction.argmax(dim=1))
        prediction = {"p": prediction}
    elif isinstance(prediction, Tensor):
        prediction = {"prediction": prediction}
    elif not isinstance(prediction, Mapping):
        raise Mistake(
            "predict_step: expected a tensor (B, C) or (B,), or a dict of them by column, "
            f"got {type(prediction).__name__}; --predictions null writes nothing"
        )
    for name, values in prediction.items():
        column = numbers(values)
        if column.ndim > 2 or column.ndim == 0:
            raise Mistake(f"predict_step: expected {name} of one or two dimensions, got {tuple(column.shape)}")
        yield from [(name, column)] if column.ndim == 1 else ((f"{name}{k}", part) for k, part in enumerate(column.T))


def numbers(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = (values.float() if values.dtype == torch.bfloat16 else values).detach().cpu().numpy()
    return np.asarray(values)
