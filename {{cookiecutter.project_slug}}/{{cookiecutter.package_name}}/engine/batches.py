"""The batches of a loader: each rank's share of them, in an order that can be resumed anywhere.

A loader's own batch sampler is read when a batch is due, as torch reads it, but in a random stream
that seed and epoch name. So each rank draws the same batches, and takes its share without a word
to the others; and a resumed run draws again what the run before it drew.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from torch.utils.data import BatchSampler, DataLoader

from .lightning_internals import record_indices, unwrap_batch_sampler
from .random_streams import RandomStream, SeededIndex, random_states
from .sampler_state import TORCH_SAMPLERS, SamplerState, decode, encode, is_plain


class Position(NamedTuple):
    """Where the training is when a loader is read.

    `words` name the random stream, and end with the epoch. `batch` is the number of the epoch's
    batches that are done. Nothing is read while the position is not `known`: a checkpoint is about
    to be restored. `reads_ahead` says that Lightning reads a batch before it trains on the last.
    """

    words: tuple[Any, ...]
    batch: int = 0
    training: bool = True
    known: bool = True
    reads_ahead: bool = False


@dataclass
class Pass:
    """One pass over a loader: from its first batch, or from a checkpoint, to its last."""

    position: Position
    begin: int  # batches of the epoch that were read before it
    place: int  # batches of the epoch that are read
    first: dict[str, Any]  # what the sampler kept when it began
    over: bool = False
    padding: int | None = None  # number of the batch that is there only so that a rank has one
    before: dict[str, Any] | None = None  # random states before the batch that is read ahead
    read: deque[tuple[int, Any]] = field(default_factory=deque)  # batches read last, by place


class SharedBatches:
    """What a loader reads instead of its batch sampler, or of its sampler without one.

    The k-th batches of N ranks are together what one process reads as N batches, or as one of
    N times the size. In training all ranks have equally many batches. In evaluation each sample is
    read once; a rank without any gets a padding batch, which `is_padding` tells.

    Args:
        loader: The loader. It gets a generator, or it would draw from the global one.
        position: Says where the training is.
        rank: This rank, and the number of ranks.
        pads: Whether a rank without a sample gets a padding batch.
    """

    def __init__(
        self,
        loader: DataLoader,
        position: Callable[[], Position],
        rank: tuple[int, int],
        pads: bool = True,
    ) -> None:
        self.loader: Any = loader
        self.position = position
        self.pads = pads
        batch_sampler: Any = unwrap_batch_sampler(loader)
        self.inner: Any = loader.sampler if batch_sampler is None else batch_sampler
        self.sampler: Any = getattr(self.inner, "sampler", self.inner)
        shares_by_itself = any(hasattr(one, "num_replicas") for one in (self.inner, self.sampler))
        self.rank, self.ranks = (0, 1) if shares_by_itself else rank
        # Where torch makes the batches, their samples are shared: those of an incomplete last group
        # in training, and all in evaluation, so that rank r evaluates every N-th sample from r on.
        self.made_by_torch = type(self.inner) is BatchSampler
        self.shares_samples = self.made_by_torch and not getattr(self.inner, "drop_last", False)
        # Those of torch draw random numbers for their first index only.
        self.draws_once = {type(self.inner), type(self.sampler)} <= TORCH_SAMPLERS
        kept = {"sampler": self.inner, "generator": loader.generator}
        self.kept = SamplerState(kept, None if loader.num_workers else loader.dataset)
        self.resumed: dict[str, Any] | None = None  # what the next pass takes up
        self.called_once = False  # `__iter__`, by a loader with workers that is about to read
        self.current: Pass | None = None

    def __len__(self) -> int:
        training = self.position().training
        if self.ranks > 1 and self.shares_samples:
            in_all_ranks = self.ranks * self.inner.batch_size
            full, rest = divmod(len(self.sampler), in_all_ranks)
            return full + (rest >= self.ranks if training else rest > 0)
        batches = len(self.inner)
        return batches // self.ranks if training else -(-batches // self.ranks)

    def __iter__(self) -> Iterator[Any]:
        if not self.position().known:
            return iter(())
        # A loader with workers calls this twice, and reads from the second. In between it draws
        # from its generator, as it did before the checkpoint.
        if self.resumed and not self.called_once:
            self.kept.restore(self.resumed["first"])
        self.called_once = bool(self.loader.num_workers) and not self.called_once
        return self._read()

    def is_padding(self, batch: int) -> bool:
        """Return True if a batch of the newest pass is padding; `batch` counts from 0."""
        return self.current is not None and self.current.padding == batch

    def capture(self, batch: int) -> dict[str, Any]:
        """Return what a checkpoint holds of the pass, for `resume`.

        Args:
            batch: Batches of the epoch that are done; 0 at its end.
        """
        now, current = self.kept.capture(), self.current
        if current is None or not batch:
            return {"within": False, "begin": 0, "first": now, "now": {}, "over": False}
        return {
            "within": True,
            "begin": current.begin,
            "first": current.first,
            "now": now,
            "over": current.over,
            "before": current.before if current.place > batch else None,
        }

    def has_generators(self) -> bool:
        """Return True if a dataset draws from generators that it keeps, which workers copy."""
        found = SamplerState({}, self.loader.dataset).capture()
        return bool(self.loader.num_workers and found)

    def batches_read_ahead(self, batch: int) -> Any:
        """Return the batches of this rank that are read but not done; None if they are not plain.

        Args:
            batch: Batches of the epoch that are done.
        """
        current = self.current
        if current is None or not batch:
            return []
        ahead = [indices for place, indices in current.read if place >= batch]
        complete = len(ahead) == max(current.place - batch, 0)
        return encode(ahead) if complete and is_plain(ahead) else None

    def resume(self, state: dict[str, Any], ahead: list[Any] | None, cycles: bool = False) -> None:
        """Have the next pass begin where a checkpoint was written.

        Args:
            state: What `capture` returned.
            ahead: What `batches_read_ahead` returned.
            cycles: Whether a CombinedLoader reads this loader again until a longer one ends,
                without knowing how long they are.
        """
        self.resumed = {**state, "ahead": decode(ahead), "cycles": cycles}
        self.called_once = False

    def _read(self) -> Iterator[Any]:
        """Yield the batches of a pass."""
        resumed, self.resumed = self.resumed, None
        if resumed and resumed["begin"] and resumed["cycles"]:
            # So that a CombinedLoader knows that it was read to its end once, and begins again.
            self.resumed = {**resumed, "cycles": False}
            return
        now = self._begin(resumed)
        position = now.position
        stream = RandomStream(*position.words, now.begin)
        with stream:
            batches = iter(self.inner)
            if resumed:
                skip(batches, (now.place - now.begin) * self.ranks + now.over)
        if resumed:
            self.kept.restore(resumed["now"])  # what the training has told the sampler meanwhile
        seen = record_indices(self.loader)
        yield from [self._sent(place, batch, now) for place, batch in now.read]
        drawn = now.over
        while not now.over:
            if drawn and self.draws_once:
                group = list(islice(batches, self.ranks))
            else:
                with stream:
                    group = list(islice(batches, self.ranks))
                drawn = True
            batch = self._share(group, now)
            if batch is None:
                now.over = True
                return
            if position.reads_ahead and not self.loader.num_workers:
                now.before = random_states()
            place = now.place
            now.place += 1
            now.read.append((place, batch))
            if seen is not None:
                seen.append(batch)
            yield self._sent(place, batch, now)

    def _begin(self, resumed: dict[str, Any] | None) -> Pass:
        """Return a new pass, and take it for the current one."""
        position, before = self.position(), self.current
        same_epoch = before is not None and before.position.words == position.words
        read_to_its_end = before is not None and before.over and not self.loader.num_workers
        in_epoch = position.training and (position.batch > 0 or read_to_its_end)
        self._set_epoch(position.words[-1])
        begin = place = position.batch
        if resumed:
            begin = resumed["begin"]
            if resumed["within"] or self.loader.persistent_workers:
                # Once more, for the loader has drawn from its generator meanwhile.
                self.kept.restore(resumed["first"])
        elif before and same_epoch and in_epoch:  # a CombinedLoader reads this loader once more
            begin = place = before.place
        now = Pass(position, begin, place, self.kept.capture())
        workers: int = self.loader.num_workers
        ahead = (resumed and resumed["ahead"]) or []
        length = 2 + workers * (self.loader.prefetch_factor or 0)
        now.read = deque(enumerate(ahead, place), maxlen=length)
        now.place += len(ahead)
        now.over = bool(resumed and resumed["over"] and resumed["ahead"] is not None)
        beside = before and same_epoch and in_epoch and not before.over
        if resumed or not beside:  # else a callback reads it while the training does
            self.current = now
        return now

    def _set_epoch(self, epoch: int) -> None:
        """Tell the samplers the epoch; Lightning does so only after workers have begun to read."""
        for sampler in {id(one): one for one in (self.loader.sampler, self.sampler)}.values():
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(epoch)

    def _share(self, group: list[Any], now: Pass) -> Any:
        """Return this rank's batch of a group of one batch for each rank; None at the end."""
        if not group:
            return None
        training = now.position.training
        complete = len(group) == self.ranks
        if self.shares_samples and self.ranks > 1:
            complete = complete and len(group[-1]) == self.inner.batch_size
        by_sample = self.shares_samples if training else self.made_by_torch
        if complete and (training or self.ranks == 1 or not by_sample):
            return group[self.rank]
        share: Any = None
        padding: Any = group[0]
        if by_sample:
            rest = [index for batch in group for index in batch]
            limit = len(rest) // self.ranks if training else None
            share = rest[self.rank :: self.ranks][:limit] or None
            padding = rest[:1]
        elif self.rank < len(group) and not training:
            share = group[self.rank]
        if share is not None or training or not self.pads:
            return share
        now.padding = now.place - now.begin
        return padding

    def _sent(self, place: int, batch: Any, now: Pass) -> Any:
        """Return a batch as the loader takes it; a worker is seeded by it."""
        if not self.loader.num_workers:
            return batch
        return SeededIndex(batch, *now.position.words, self.rank, place)


def skip(iterator: Iterator[Any], count: int) -> None:
    """Read `count` items, or until the end."""
    if count:
        next(islice(iterator, count - 1, None), None)


class StatefulStream:
    """What a loader of an IterableDataset with a `state_dict` reads: torch's own, and the states.

    Args:
        loader: The loader, without workers.
        position: Says where the training is.
    """

    def __init__(self, loader: DataLoader, position: Callable[[], Position]) -> None:
        self.loader: Any = loader
        self.position = position
        batch_sampler: Any = unwrap_batch_sampler(loader)
        self.inner: Any = loader.sampler if batch_sampler is None else batch_sampler
        self.read: deque[tuple[int, Any, Any]] = deque(maxlen=2)  # place, and the states before it
        self.resumed: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        if not self.position().known:
            return iter(())
        if self.resumed:
            self.loader.dataset.load_state_dict(decode(self.resumed["first"]))
        return self._read()

    def is_padding(self, batch: int) -> bool:
        """Return False: each rank reads its own stream."""
        return False

    def capture(self, batch: int) -> dict[str, Any]:
        """Return what a checkpoint holds of the stream, for `resume`.

        Args:
            batch: Batches of the epoch that are done; 0 at its end.
        """
        for place, state, before in self.read:
            if batch and place == batch:  # read ahead
                return {"first": state, "before": before}
        return {"first": encode(self.loader.dataset.state_dict()), "before": None}

    def batches_read_ahead(self, batch: int) -> list[Any]:
        """Return nothing: they are read once more."""
        return []

    def resume(self, state: dict[str, Any], *_: Any) -> None:
        """Have the stream begin where a checkpoint was written; see SharedBatches."""
        self.resumed = state

    def _read(self) -> Iterator[Any]:
        position = self.position()
        self.resumed = None
        self.read.clear()
        for place, index in enumerate(self.inner, position.batch):
            before = random_states() if position.reads_ahead else None
            self.read.append((place, encode(self.loader.dataset.state_dict()), before))
            yield index
