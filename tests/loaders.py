"""Loaders as people write them, and a model that notes each batch: what the order tests train.

Nothing in here knows of the template. A sample is its index and one random number of each global
generator, as an augmentation would draw them.
"""

# mypy: ignore-errors
# It is written as people write it, without types where they leave them out.

import random
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

SAMPLES, SIZE = 32, 4  # 8 batches an epoch
START = datetime(2026, 1, 1)


class Numbers(Dataset):
    """Sample i is the number i. An index may be a pair of slices, a text or a time as well."""

    def __init__(self, n: int = SAMPLES) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: Any) -> torch.Tensor:
        if isinstance(index, tuple):
            index = index[0].start * 8 + index[1].start
        if isinstance(index, str):
            index = int(index[1:])
        if isinstance(index, datetime):
            index = (index - START).days
        noise = [float(torch.rand(())), np.random.rand(), random.random()]
        return torch.tensor([float(index), *noise], dtype=torch.float64)


class Batches(Numbers):
    """Reads all samples of a batch at once."""

    def __getitem__(self, indices: Any) -> torch.Tensor:
        return torch.stack([super(Batches, self).__getitem__(index) for index in indices])


class Noisy(Numbers):
    """Draws from its own generator, deep in what it holds."""

    def __init__(self, n: int = SAMPLES) -> None:
        super().__init__(n)
        self.transforms = [Jitter(np.random.default_rng(5)), Jitter(random.Random(5))]

    def __getitem__(self, index: Any) -> torch.Tensor:
        sample = super().__getitem__(index)
        for transform in self.transforms:
            sample = sample + transform.generator.random()
        return sample


class Jitter:
    def __init__(self, generator: Any) -> None:
        self.generator = generator


# Samplers


class Endless(Sampler):
    """Never ends, and says how long an epoch is meant to be."""

    def __init__(self, n: int = SAMPLES) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self.n).tolist()


class Unsized(Sampler):
    def __init__(self, n: int = SAMPLES) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.n).tolist()


class Lazy(Endless):
    """Draws from all three global generators for each index."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.n):
            drawn = torch.randint(self.n, ()).item() + np.random.randint(self.n)
            yield (drawn + random.randrange(self.n)) % self.n


class Steered(Endless):
    """The training tells it what to yield, while the epoch runs."""

    only: int | None = None

    def __iter__(self) -> Iterator[int]:
        for index in range(self.n):
            yield index if self.only is None else self.only


class Shuffles(Endless):
    """Keeps an order, which each pass shuffles further by its own generator."""

    def __init__(self, n: int = SAMPLES) -> None:
        super().__init__(n)
        self.order, self.generator = np.arange(n), np.random.default_rng(7)

    def __iter__(self) -> Iterator[int]:
        self.generator.shuffle(self.order)
        return iter(self.order.tolist())


class ShufflesLists(Endless):
    """The same with lists within a plain object, and a draw for each index."""

    def __init__(self, n: int = SAMPLES) -> None:
        super().__init__(n)
        self.buckets = [list(range(n // 2)), list(range(n // 2, n))]
        self.policy = Jitter(random.Random(7))

    def __iter__(self) -> Iterator[int]:
        for bucket in self.buckets:
            self.policy.generator.shuffle(bucket)
            for index in bucket:
                yield index if self.policy.generator.random() < 0.9 else 0


class Stateful(Endless):
    """Has a `state_dict`, and a count that is not visible otherwise."""

    def __init__(self, n: int = SAMPLES) -> None:
        super().__init__(n)
        self.hidden = object(), [0]

    def __iter__(self) -> Iterator[int]:
        self.hidden[1][0] += 1
        return iter(np.random.default_rng(self.hidden[1][0]).permutation(self.n).tolist())

    def state_dict(self) -> dict[str, Any]:
        return {"count": np.int64(self.hidden[1][0])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.hidden[1][0] = int(state["count"])


class Curriculum(Endless):
    """Counts its passes, and yields harder samples in later ones; a set of what it has seen."""

    def __init__(self, n: int = SAMPLES) -> None:
        super().__init__(n)
        self.passes, self.seen = 0, set()

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        for number in range(self.n):
            index = (number * self.passes + len(self.seen)) % self.n
            if number % 3 == 0:
                self.seen.add(index)
            yield index


class Slices(Endless):
    def __iter__(self) -> Iterator[Any]:
        for number in torch.randperm(self.n).tolist():
            yield slice(number // 8, number // 8 + 1), slice(number % 8, number % 8 + 1)


class Texts(Endless):
    def __iter__(self) -> Iterator[str]:
        return (f"k{index}" for index in torch.randperm(self.n).tolist())


class Times(Endless):
    def __iter__(self) -> Iterator[datetime]:
        return (START + timedelta(days=index) for index in torch.randperm(self.n).tolist())


class Bucketed(BatchSampler):
    """A subclass of torch's with another argument and order."""

    def __init__(self, sampler: Any, batch_size: int, drop_last: bool = False, extra: int = 3):
        super().__init__(sampler, batch_size, drop_last)
        self.extra = extra

    def __iter__(self) -> Iterator[list[int]]:
        return iter(sorted(super().__iter__()))


class Free:
    """A batch sampler without a base."""

    def __init__(self, n: int = SAMPLES, size: int = SIZE) -> None:
        self.n, self.size = n, size

    def __len__(self) -> int:
        return self.n // self.size

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.n)[: len(self) * self.size]
        return iter(order.view(-1, self.size).tolist())


class Arrays(Free):
    """Yields arrays of numpy, each a batch."""

    def __iter__(self) -> Iterator[Any]:
        order = np.random.permutation(self.n)
        return iter(np.split(order, len(self)))


class TokenBudget:
    """Batches of unequal size, whose number depends on the shuffling: no length."""

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for index in torch.randperm(SAMPLES).tolist():
            batch.append(index)
            if sum(batch) > 70:
                yield batch
                batch = []


class Shares(Endless):
    """Knows of ranks itself."""

    num_replicas, rank = 1, 0

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.n).tolist()[self.rank :: self.num_replicas]


# Loaders


class OwnSignature(DataLoader):
    def __init__(self, samples: int, **options: Any) -> None:
        self.samples = samples
        super().__init__(Numbers(samples), batch_size=SIZE, shuffle=True, **options)


class OwnIterator(DataLoader):
    """Iterates itself, and collates by a method."""

    def __init__(self, n: int, **options: Any) -> None:
        self.count = 0
        super().__init__(Numbers(n), collate_fn=self.gather, **options)

    def gather(self, samples: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(samples)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for batch in super().__iter__():
            self.count += 1
            yield batch * 1


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(42)


def weighted() -> WeightedRandomSampler:
    return WeightedRandomSampler(torch.arange(1, SAMPLES + 1).float(), SAMPLES)


def short_and_long(mode: str, sampler: Callable[[], Any] | None, workers: int) -> Any:
    """Two loaders whose lengths do not divide: 3 and 8 batches."""
    few, many = Numbers(10), Numbers()
    options: dict[str, Any] = {"batch_size": SIZE, "num_workers": workers}
    drawn = {"sampler": sampler()} if sampler else {"shuffle": True}
    pair = {
        "short": DataLoader(few, **drawn, **options),
        "long": DataLoader(many, shuffle=True, **options),
    }
    return CombinedLoader(pair, mode)


def loaders(workers: int = 0) -> dict[str, Callable[[], Any]]:
    """Return what makes each kind of loader."""
    data = Numbers()
    options: dict[str, Any] = {"num_workers": workers}

    def sampled(sampler: Any, dataset: Any = data) -> DataLoader:
        return DataLoader(dataset, batch_size=SIZE, sampler=sampler, **options)

    def batched(sampler: Any) -> DataLoader:
        return DataLoader(data, batch_sampler=sampler, **options)

    def shuffled(dataset: Any = data, **more: Any) -> DataLoader:
        return DataLoader(dataset, **{"batch_size": SIZE, **more}, shuffle=True, **options)

    parts = ConcatDataset([Subset(data, range(20)), Subset(data, range(20, SAMPLES))])
    return {
        "shuffle": shuffled,
        "in order": lambda: DataLoader(data, batch_size=SIZE, **options),
        "an incomplete last batch": lambda: shuffled(batch_size=5),
        "drop_last": lambda: shuffled(batch_size=5, drop_last=True),
        "weighted": lambda: sampled(weighted()),
        "subset": lambda: sampled(SubsetRandomSampler(range(SAMPLES))),
        "with replacement": lambda: sampled(RandomSampler(data, True, SAMPLES)),
        "a generator": lambda: shuffled(generator=generator()),
        "a generator in the sampler": lambda: sampled(RandomSampler(data, generator=generator())),
        "a distributed sampler": lambda: sampled(DistributedSampler(data, 1, 0)),
        "endless": lambda: sampled(Endless()),
        "unsized": lambda: sampled(Unsized()),
        "lazy": lambda: sampled(Lazy()),
        "shuffles": lambda: sampled(Shuffles()),
        "steered": lambda: sampled(Steered()),
        "shuffles lists": lambda: sampled(ShufflesLists()),
        "stateful": lambda: sampled(Stateful()),
        "curriculum": lambda: sampled(Curriculum()),
        "slices": lambda: sampled(Slices()),
        "texts": lambda: sampled(Texts()),
        "times": lambda: sampled(Times()),
        "shares": lambda: sampled(Shares()),
        "bucketed": lambda: batched(Bucketed(RandomSampler(data), SIZE)),
        "bucketed by its own order": lambda: batched(Bucketed(Shuffles(), SIZE)),
        "free": lambda: batched(Free()),
        "arrays": lambda: batched(Arrays()),
        "token budget": lambda: batched(TokenBudget()),
        "no batch size": lambda: DataLoader(
            Batches(),
            batch_size=None,
            sampler=BatchSampler(RandomSampler(data), SIZE, True),
            **options,
        ),
        "single samples": lambda: shuffled(batch_size=None),
        "a subclass": lambda: OwnSignature(SAMPLES, **options),
        "iterates itself": lambda: OwnIterator(SAMPLES, batch_size=SIZE, shuffle=True, **options),
        "persistent": lambda: shuffled(persistent_workers=workers > 0),
        "persistent, a generator": lambda: shuffled(
            persistent_workers=workers > 0, generator=generator()
        ),
        "concatenated": lambda: shuffled(parts),
        "cycle": lambda: short_and_long("max_size_cycle", None, workers),
        "cycle, own order": lambda: short_and_long("max_size_cycle", lambda: Shuffles(10), workers),
        "cycle, unsized": lambda: short_and_long("max_size_cycle", lambda: Unsized(10), workers),
        "max_size": lambda: short_and_long("max_size", None, workers),
        "min_size": lambda: short_and_long("min_size", None, workers),
    }


KINDS = tuple(loaders())
PAIRS = {"cycle", "cycle, own order", "cycle, unsized", "max_size", "min_size"}


class Data(LightningDataModule):
    """One kind of loader to train on, and two loaders to validate on."""

    def __init__(self, kind: str = "shuffle", workers: int = 0) -> None:
        super().__init__()
        self.kind, self.workers = kind, workers

    def train_dataloader(self) -> Any:
        self.made = loaders(self.workers)[self.kind]()
        return self.made

    def val_dataloader(self) -> Any:
        return [
            DataLoader(Numbers(8), batch_size=SIZE, sampler=Shuffles(8)),
            DataLoader(Numbers(6), batch_size=SIZE, sampler=RandomSampler(Numbers(6))),
        ]


class Notes(LightningModule):
    """Trains one layer with dropout, and notes each batch that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1).double()
        self.dropout = nn.Dropout(0.3)
        self.rows: list[tuple[Any, ...]] = []

    def note(self, what: str, number: int, batch: Any) -> torch.Tensor:
        parts = batch.values() if isinstance(batch, dict) else [batch]
        there = [part for part in parts if part is not None]
        if not self.trainer.sanity_checking:
            noted = [None if part is None else tuple(part.flatten().tolist()) for part in parts]
            self.rows.append((what, self.current_epoch, number, *noted))
        return torch.cat([part.reshape(-1, 4) for part in there])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        samples = self.note("train", batch_idx, batch) * torch.tensor([0.01, 1, 1, 1]).double()
        return self.layer(self.dropout(samples)).square().mean()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.note(f"val {dataloader_idx}", batch_idx, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


class Counted(IterableDataset):
    """A stream that can be resumed: samples in its own order, from where it stopped."""

    def __init__(self, n: int = SAMPLES) -> None:
        self.n, self.done, self.epoch = n, 0, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        order = np.random.default_rng(self.epoch).permutation(self.n)
        while self.done < self.n:
            index = int(order[self.done])
            self.done += 1
            yield Numbers()[index]
        self.done, self.epoch = 0, self.epoch + 1

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done, self.epoch = state["done"], state["epoch"]
