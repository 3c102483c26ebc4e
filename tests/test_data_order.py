"""Any loader is read as stock reads it, shared among ranks, and resumed anywhere, bit-for-bit."""

import importlib
import logging
import random
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command import Commands
from epoch_hooks import HOOKS, accumulation
from lightning.pytorch import Callback, Trainer, seed_everything
from loaders import KINDS, PAIRS, Counted, Data, Noisy, Notes, Numbers, loaders
from torch.utils.data import BatchSampler, DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-untyped]

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
    """Saves a checkpoint after each batch from which LastCheckpoint would, and each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.module = importlib.import_module("odd_duck.engine.train_state")

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        sums_gradients = (args[-1] + 1) % trainer.accumulate_grad_batches != 0
        validates = self.module.validation_follows(trainer)
        if not (trainer.is_last_batch or sums_gradients or validates):
            self.save(trainer, "batch")

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self.save(trainer, "epoch")

    def save(self, trainer: Trainer, what: str) -> None:
        batches = trainer.fit_loop.total_batch_idx + 1
        trainer.save_checkpoint(self.folder / f"{batches:03d}-{what}.ckpt")


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
    notes: Notes = model or Notes()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=first is None,
        callbacks=[*([first] if first else []), *callbacks],
        **{"max_epochs": EPOCHS, "enable_checkpointing": False, **options},
    )
    trainer.fit(notes, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return notes


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
    files = sorted(folder.iterdir())[:-1]  # after the last nothing is left to train
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
        train_state, tmp_path, slice(3, None, 4), data=lambda: Data(kind, 2), **limit(kind)
    )
    assert wrong == []


@pytest.mark.parametrize("what", HOOKS)
def test_what_an_epoch_sets_at_its_start_is_set_in_a_resumed_run(
    what: str, train_state: Any, tmp_path: Path
) -> None:
    model, callbacks = HOOKS[what]
    wrong = resumed_wrongly(
        train_state,
        tmp_path,
        slice(1, None, 2),
        model,
        data=Data,
        callbacks=callbacks,
        max_epochs=4,
    )
    assert wrong == []


def test_the_gradients_of_as_many_batches_are_summed_up_in_a_resumed_epoch(
    train_state: Any, tmp_path: Path
) -> None:
    how = {"data": Data, "callbacks": accumulation, "max_epochs": 4}
    wrong = resumed_wrongly(train_state, tmp_path, slice(0, None), **how)
    assert wrong == []


@pytest.mark.parametrize(
    "options",
    [
        {"limit_train_batches": 5},
        {"overfit_batches": 3},
        {"reload_dataloaders_every_n_epochs": 1},
        {"reload_dataloaders_every_n_epochs": 2, "max_epochs": 5},
        {"max_epochs": -1, "max_steps": 20},
        {"val_check_interval": 3},
        {"check_val_every_n_epoch": None, "val_check_interval": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["shuffle", "shuffles", "unsized"])
def test_settings_that_change_what_is_read_change_nothing_when_a_run_resumes(
    kind: str, options: dict[str, Any], train_state: Any, tmp_path: Path
) -> None:
    wrong = resumed_wrongly(
        train_state, tmp_path, slice(1, None, 3), data=lambda: Data(kind), **options
    )
    assert wrong == []


class Drawn(Data):
    """Draws its samples each time that loaders are made, by the epoch too."""

    def train_dataloader(self) -> Any:
        epoch = self.trainer.current_epoch if self.trainer else 0
        chosen = (torch.randperm(30)[:20] + epoch).tolist()
        return DataLoader(Numbers(40), batch_size=4, sampler=chosen)

    def val_dataloader(self) -> Any:
        return DataLoader(Numbers(40), batch_size=4, sampler=random.sample(range(40), 8))


@pytest.mark.parametrize("every", [0, 1, 2])
@pytest.mark.parametrize("validates", [(0, 1), (2, 1), (2, 2)], ids=str)
def test_loaders_that_are_drawn_when_they_are_made_are_the_same_in_a_resumed_run(
    every: int, validates: tuple[int, int], train_state: Any, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "reload_dataloaders_every_n_epochs": every,
        "num_sanity_val_steps": validates[0],
        "check_val_every_n_epoch": validates[1],
    }
    wrong = resumed_wrongly(train_state, tmp_path, data=Drawn, max_epochs=5, **options)
    assert wrong == []


class Stops(Callback):
    """Asks the trainer to stop, or says that no time is left, after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.steps:
            trainer.should_stop = True


@pytest.mark.parametrize("steps", [3, 8, 13])
@pytest.mark.parametrize("how", ["max_steps", "should_stop"])
@pytest.mark.parametrize("kind", ["shuffle", "shuffles", "cycle, own order", "unsized"])
def test_a_run_that_ended_within_an_epoch_trains_the_rest_of_it(
    kind: str, how: str, steps: int, command: Commands, train_state: Any, tmp_path: Path
) -> None:
    checkpoints = importlib.import_module("odd_duck.engine.checkpoints")

    def last(name: str) -> Any:
        return checkpoints.LastCheckpoint(str(tmp_path / name))

    options: dict[str, Any] = {"enable_checkpointing": True}
    whole = fit(train_state(), Data(kind), callbacks=(last("a"),), **options)
    ending: dict[str, Any] = {"max_steps": steps} if how == "max_steps" else {}
    stops = () if ending else (Stops(steps),)
    first = fit(train_state(), Data(kind), callbacks=(*stops, last("b")), **ending, **options)
    file = tmp_path / "b" / "last.ckpt"
    limit: dict[str, Any] = {"max_steps": 24} if ending else {}
    second = fit(train_state(), Data(kind), None, file, (last("c"),), **limit, **options)
    rows = [row for row in (*first.rows, *second.rows) if row[0] == "train"]
    assert rows == [row for row in whole.rows if row[0] == "train"]
    for one, other in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


class Slow(Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(0.05)


def test_a_run_that_ended_by_max_time_trains_the_rest(
    command: Commands, train_state: Any, tmp_path: Path
) -> None:
    checkpoints = importlib.import_module("odd_duck.engine.checkpoints")
    last = checkpoints.LastCheckpoint(str(tmp_path))
    whole = fit(train_state(), Data("shuffles"))
    limit: dict[str, Any] = {"enable_checkpointing": True, "max_time": {"milliseconds": 600}}
    first = fit(train_state(), Data("shuffles"), callbacks=(Slow(), last), **limit)
    second = fit(train_state(), Data("shuffles"), None, tmp_path / "last.ckpt")
    rows = [row for row in (*first.rows, *second.rows) if row[0] == "train"]
    assert 0 < len([row for row in first.rows if row[0] == "train"]) < len(rows)
    assert rows == [row for row in whole.rows if row[0] == "train"]
    for one, other in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


class Steers(Callback):
    """Tells the sampler what to yield, in the middle of an epoch."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if args[-1] in (2, 6):
            trainer.datamodule.made.sampler.only = 31 if args[-1] == 2 else None


@pytest.mark.parametrize("workers", [0, 2])
def test_what_the_training_has_told_a_sampler_counts_in_a_resumed_run(
    workers: int, train_state: Any, tmp_path: Path
) -> None:
    how = {"data": lambda: Data("steered", workers), "callbacks": lambda: (Steers(),)}
    assert resumed_wrongly(train_state, tmp_path, slice(None, None, 1 + workers), **how) == []


def test_a_limit_that_is_lifted_again_leaves_nothing_out(train_state: Any, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    fit(train_state(), Data("shuffles"), callbacks=(Saves(folder),), limit_train_batches=5)
    whole = fit(train_state(), Data("shuffles"))
    part = fit(train_state(), Data("shuffles"), None, folder / "003-batch.ckpt")
    assert part.rows == whole.rows[-len(part.rows) :]
    assert torch.equal(part.layer.weight, whole.layer.weight)


# Several ranks, without processes: what each rank would read.


def shares(kind: str, ranks: int, training: bool, module: Any) -> list[tuple[list[Any], Any]]:
    """Return for each rank its batches, and which of them is padding."""
    found = []
    for rank in range(ranks):
        torch.manual_seed(100 + rank)
        np.random.seed(rank)
        random.seed(rank)  # each process has other states
        loader = loaders()[kind]()
        position = module.Position((1, "train_dataloader", 0, 0), 0, training)
        batches = module.SharedBatches(loader, lambda at=position: at, (rank, ranks))
        read = list(islice(batches, 8 // ranks) if kind == "endless" else batches)
        found.append((read, batches.current.padding))
    return found


def indices(batches: list[Any]) -> list[Any]:
    return [
        index
        for batch in batches
        for index in (batch if isinstance(batch, list | np.ndarray) else [batch])
    ]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in PAIRS])
def test_ranks_train_on_disjoint_shares_of_what_one_process_reads(
    kind: str, ranks: int, command: Commands
) -> None:
    module = importlib.import_module("odd_duck.engine.batches")
    ((one, _),) = shares(kind, 1, True, module)
    read = [batches for batches, _ in shares(kind, ranks, True, module)]
    if kind in ("shares", "a distributed sampler"):  # which know of ranks themselves
        assert read == [one] * ranks
        return
    assert len({len(batches) for batches in read}) == 1
    together = indices([batch for group in zip(*read, strict=True) for batch in group])
    complete = len(one) // ranks * ranks
    if kind == "an incomplete last batch":
        complete -= ranks * (complete == len(one))
    first = indices(one[:complete])
    assert together[: len(first)] == first
    if kind == "endless":
        return
    if loaders()[kind]().batch_sampler.__class__ is not BatchSampler or kind == "drop_last":
        assert len(together) == len(first)
        return
    rest = Counter(map(str, indices(one[complete:])))  # shared sample by sample
    left = Counter(map(str, together[len(first) :]))
    assert left <= rest
    assert left.total() == rest.total() // ranks * ranks


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in PAIRS])
def test_ranks_evaluate_each_sample_once_and_take_equally_many_batches(
    kind: str, ranks: int, command: Commands
) -> None:
    if kind in ("endless", "shares", "a distributed sampler"):
        pytest.skip("has no end, or knows of ranks itself")
    module = importlib.import_module("odd_duck.engine.batches")
    ((one, _),) = shares(kind, 1, False, module)
    read = shares(kind, ranks, False, module)
    assert len({len(batches) for batches, _ in read}) == 1
    counted = [
        batch for batches, padding in read for n, batch in enumerate(batches) if n != padding
    ]
    assert sorted(map(str, indices(counted))) == sorted(map(str, indices(one)))


def test_a_group_that_is_not_complete_is_shared_sample_by_sample(command: Commands) -> None:
    module = importlib.import_module("odd_duck.engine.batches")
    for samples in (1, 3, 7, 32, 101):
        for size in (1, 4, 32):
            for ranks in (2, 3, 8):
                data = torch.utils.data.TensorDataset(torch.arange(samples))
                read = []
                for rank in range(ranks):
                    loader = torch.utils.data.DataLoader(data, batch_size=size, shuffle=True)
                    at = module.Position((1, "train_dataloader", 0, 0))
                    batches = module.SharedBatches(loader, lambda at=at: at, (rank, ranks))
                    read.append(list(batches))
                    assert len(read[-1]) == len(batches)
                flat = indices([batch for group in zip(*read, strict=True) for batch in group])
                assert len(set(flat)) == len(flat) >= samples - (ranks - 1)


def test_too_few_batches_for_the_ranks_are_refused_in_one_line(command: Commands) -> None:
    module = importlib.import_module("odd_duck.engine.data_order")
    errors = importlib.import_module("odd_duck.engine.errors")
    batches = type("Few", (), {"ranks": 4, "inner": [1, 2, 3], "__len__": lambda _: 0})()
    with pytest.raises(errors.UsageError, match="3 batches cannot be shared among 4 ranks") as said:
        module.check_shares(batches, SimpleNamespace(training=True))
    assert "use_distributed_sampler" in str(said.value)


# Stock, beside ours.


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_reads_what_stock_reads(kind: str, train_state: Any) -> None:
    """The same batches in number and size, and the same samples where no shuffling is drawn."""
    ours = fit(train_state(), Data(kind), **limit(kind)).rows
    stock = fit(None, Data(kind), **limit(kind)).rows

    def outline(rows: list[Any], what: str) -> list[Any]:
        return [
            (*row[:3], *[part and len(part) for part in row[3:]])
            for row in rows
            if row[0].startswith(what)
        ]

    def samples(rows: list[Any]) -> list[Any]:
        return [[part[::4] for part in row[3:] if part] for row in rows if row[0] == "train"]

    if kind != "token budget":  # whose batches depend on the shuffling
        assert outline(ours, "train") == outline(stock, "train")
    assert outline(ours, "val") == outline(stock, "val")
    if kind in ("in order", "shuffles", "shuffles lists", "stateful", "curriculum"):
        assert samples(ours) == samples(stock)
    if kind == "a generator in the sampler":
        assert samples(ours) == samples(stock)
    if kind in ("shuffle", "subset", "unsized", "slices", "texts", "times", "a subclass"):
        assert sorted(samples(ours)[:8][0][0]) != sorted(
            samples(ours)[8:][0][0]
        )  # each epoch has another order


def test_each_pass_of_a_shorter_loader_has_another_order(train_state: Any) -> None:
    rows = fit(train_state(), Data("cycle"), max_epochs=1).rows
    short = [row[3][::4] for row in rows if row[0] == "train"]
    passes = [sum(short[:3], ()), sum(short[3:6], ())]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(10))
    assert passes[0] != passes[1]


def test_loaders_and_the_strategy_are_as_they_were_after_the_training(train_state: Any) -> None:
    data = Data("shuffle")
    kind = type(loaders()["shuffle"]())
    fit(train_state(), data, max_epochs=1)
    assert type(data.made) is kind
    assert data.made.generator is None
    assert sorted(int(sample[0]) for batch in data.made for sample in batch) == list(range(32))


# Streams, and what a sampler or a dataset keeps.


class Streams(Data):
    """A stream with a state, or a loader that keeps one."""

    def train_dataloader(self) -> Any:
        if self.kind == "a dataset with generators":
            return DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=self.workers)
        if self.kind == "a loader with a state":
            loader = StatefulDataLoader(
                Numbers(), batch_size=4, shuffle=True, num_workers=self.workers
            )
            return loader
        return DataLoader(Counted(), batch_size=4, num_workers=self.workers)


@pytest.mark.parametrize("model", [Notes, HOOKS["a schedule by the estimated steps"][0]])
@pytest.mark.parametrize(
    "kind", ["a stream with a state", "a loader with a state", "a dataset with generators"]
)
def test_what_has_a_state_is_resumed_by_it(
    kind: str, model: Any, train_state: Any, tmp_path: Path
) -> None:
    sizes = {} if kind != "a stream with a state" or model is Notes else {"max_steps": 24}
    wrong = resumed_wrongly(
        train_state, tmp_path, slice(1, None, 3), model, data=lambda: Streams(kind), **sizes
    )
    assert [name for name in wrong if "batch" in name] == []
    if kind != "a loader with a state":  # Lightning saves it, but not at an epoch's end
        assert wrong == []


@pytest.mark.parametrize(
    ("kind", "workers", "said"),
    [
        ("a stream", 1, "an IterableDataset without state_dict in workers"),
        ("a dataset with generators", 1, "a generator in its dataset, used by workers"),
        ("a dataset with generators", 0, ""),
        ("a loader with a state", 0, ""),
    ],
)
def test_what_cannot_be_exact_is_said_at_the_start(
    kind: str, workers: int, said: str, train_state: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(train_state(), Streams(kind, workers), max_steps=1)
    out = capsys.readouterr().out
    assert ("bit-for-bit" in out) == bool(said)
    assert said in out


class Kept:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


def test_a_sampler_that_keeps_an_iterator_is_named(command: Commands) -> None:
    module = importlib.import_module("odd_duck.engine.sampler_state")
    sampler = Kept(order=[1], rest=iter([1, 2]))
    assert module.SamplerState({"sampler": sampler}).unknown == ["rest"]


def test_a_state_is_restored_over_another_and_loads_without_running_code(
    command: Commands, tmp_path: Path
) -> None:
    module = importlib.import_module("odd_duck.engine.sampler_state")

    def make() -> Any:
        kept = Kept(
            generators={"a": [np.random.RandomState(1)], "b": random.Random(1)},
            torch=torch.Generator().manual_seed(1),
            order=np.arange(5),
            queue=deque([1, 2]),
            seen={3},
            rate=np.float32(0.5),
            weights=torch.ones(3),
            nested=Kept(count=0),
        )
        return kept, module.SamplerState({"sampler": kept})

    one, state = make()
    drawn = one.generators["a"][0].random(), one.generators["b"].random()
    torch.rand(1, generator=one.torch)
    one.order[:] = one.order[::-1].copy()
    one.queue.append(3)
    one.seen.add(4)
    one.rate, one.nested.count = np.float32(0.25), 7
    one.weights.mul_(2)
    torch.save(state.capture(), tmp_path / "state")
    other, again = make()
    again.restore(torch.load(tmp_path / "state", weights_only=True))
    assert other.generators["a"][0].random() == one.generators["a"][0].random() != drawn[0]
    assert other.generators["b"].random() == one.generators["b"].random() != drawn[1]
    assert torch.equal(torch.rand(1, generator=other.torch), torch.rand(1, generator=one.torch))
    assert other.order.tolist() == [4, 3, 2, 1, 0]
    assert (other.queue, other.seen, other.nested.count) == (deque([1, 2, 3]), {3, 4}, 7)
    assert other.rate == np.float32(0.25)
    assert other.weights.tolist() == [2, 2, 2]
    one.nested.count = 0  # as at first: it must be restored nevertheless
    again.restore(state.capture())
    assert other.nested.count == 0
    assert again.capture()["sampler.nested.count"] == 0  # for the next one that resumes
