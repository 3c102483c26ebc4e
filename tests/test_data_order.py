"""Any loader is read as stock reads it, shared among ranks, and resumed anywhere, bit-for-bit."""

import importlib
import logging
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Commands
from lightning.pytorch import Callback, Trainer, seed_everything
from loaders import KINDS, PAIRS, Data, Notes, loaders

EPOCHS, BATCHES = 3, 8  # batches of an epoch, for those kinds that have no end


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Keep Lightning's advice out of hundreds of trainings."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        yield
    logger.setLevel(level)


@pytest.fixture
def train_state(command: Commands) -> Any:
    return importlib.import_module("odd_duck.engine.train_state").TrainState


class Saves(Callback):
    """Saves a checkpoint after each batch and each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.is_last_batch:
            self.save(trainer, "batch")

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self.save(trainer, "epoch")

    def save(self, trainer: Trainer, what: str) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step:03d}-{what}.ckpt")


def fit(
    first: Callback | None,
    data: Any,
    model: Any = None,
    checkpoint: Path | None = None,
    callbacks: tuple[Callback, ...] = (),
    **options: Any,
) -> Notes:
    """Train `data` from seed 3, on the engine's order if `first` is given, else on stock's."""
    seed_everything(3, verbose=False)
    model = model or Notes()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=first is None,
        callbacks=[*([first] if first else []), *callbacks],
        **{"max_epochs": EPOCHS, **options},
    )
    trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return model


def limit(kind: str) -> dict[str, Any]:
    return {"limit_train_batches": BATCHES} if kind == "endless" else {}


def resumed_wrongly(
    train_state: Any, folder: Path, places: slice = slice(None), model: Any = Notes, **how: Any
) -> list[str]:
    """Return the places from which a run resumes to something else than the run that never ended.

    Args:
        train_state: The engine's callback.
        folder: An empty one.
        places: Which of the checkpoints to resume from.
        model: Makes the model.
        how: What `fit` takes; `data` makes the data.
    """
    data = how.pop("data")
    more = how.pop("callbacks", tuple)
    whole = fit(train_state(), data(), model(), callbacks=(*more(), Saves(folder)), **how)
    wrong = []
    files = sorted(folder.iterdir())
    assert len(files) > 3
    for file in files[places]:
        part = fit(train_state(), data(), model(), file, callbacks=more(), **how)
        done = int(file.name[:3])
        expected = [row for row in whole.rows if row[0] == "train"][done:]
        got = [row for row in part.rows if row[0] == "train"]
        same_end = whole.rows[len(whole.rows) - len(part.rows) :] == part.rows
        weights = zip(whole.state_dict().values(), part.state_dict().values(), strict=True)
        if got != expected or not same_end or not all(torch.equal(*pair) for pair in weights):
            wrong.append(file.name)
    return wrong


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_anywhere_as_if_it_had_not_ended(
    kind: str, train_state: Any, tmp_path: Path
) -> None:
    wrong = resumed_wrongly(
        train_state, tmp_path, slice(1, None, 3), data=lambda: Data(kind), **limit(kind)
    )
    assert wrong == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_workers_resumes_as_if_it_had_not_ended(
    kind: str, train_state: Any, tmp_path: Path
) -> None:
    wrong = resumed_wrongly(
        train_state, tmp_path, slice(2, None, 9), data=lambda: Data(kind, 2), **limit(kind)
    )
    assert wrong == []
