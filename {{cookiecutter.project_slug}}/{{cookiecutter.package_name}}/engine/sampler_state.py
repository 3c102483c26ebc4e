"""What a sampler keeps between its passes: generators, an order, counts, and its `state_dict`.

A checkpoint holds it in types that torch.load reads without running code.
"""

import hashlib
import io
import pickle
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

# Of these only a generator changes, and what the samplers inside keep.
TORCH_SAMPLERS = {
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
}
CHANGES_IN_TORCH_SAMPLERS = ("generator", "sampler")
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
# Objects of these packages are not searched, save samplers: a Trainer, a logger, a model's layers.
FOREIGN = {*sys.stdlib_module_names, "lightning", "numpy", "torch", "wandb"}
SCALARS = {type(None), bool, int, float, str}
CONTAINERS = (list, tuple, dict, deque, set)
FEW = 100  # items; a longer list that is no plain value is not searched
OBJECT = "()"  # ends the path of a generator, and of what has a `state_dict`
KIND, VALUE = "__kind__", "value"  # of what torch.load would not read as it is


class Slot(NamedTuple):
    """A value that a sampler holds."""

    path: str
    value: Any
    assign: Callable[[Any], None] | None  # puts another value in its place


class SamplerState:
    """Reads and restores what a sampler keeps, and the generators in a dataset.

    Args:
        samplers: Samplers and generators, by name.
        dataset: What they are for. Only its generators count, since its values may be many.
    """

    def __init__(self, samplers: dict[str, Any], dataset: Any = None) -> None:
        self.samplers = samplers
        self.dataset = dataset
        self.changed: set[str] = set()  # paths of the values that were others since
        self.unknown: list[str] = []  # attributes that keep a state which no checkpoint can hold
        values = ((path, value) for path, value, _ in self._slots() if is_plain(value))
        self.initial = {path: digest(value) for path, value in values}  # what they are at first
        self.capture()

    def capture(self) -> dict[str, Any]:
        """Return generators, what a `state_dict` says, and values that are not those at first."""
        found = {}
        self.unknown = []
        for path, value, _ in self._slots():
            if isinstance(value, Iterator):
                self.unknown.append(path.partition(".")[2])
            elif isinstance(value, GENERATORS):
                found[path + OBJECT] = encode(generator_state(value))
            elif is_stateful(value):
                found[path + OBJECT] = encode(value.state_dict())
            else:
                if self.initial.get(path) != digest(value):
                    self.changed.add(path)
                if path in self.changed:
                    found[path] = encode(value)
        return found

    def restore(self, saved: dict[str, Any]) -> None:
        """Put back what `capture` returned."""
        self.changed |= {path for path in saved if not path.endswith(OBJECT)}
        owners: dict[str, Any] = {}
        missing = dict(saved)  # values that the sampler did not have at first
        for path, value, assign in self._slots(owners):
            missing.pop(path, None)
            if path + OBJECT in saved:
                restore_object(value, decode(saved[path + OBJECT]))
            elif path in saved:
                before = decode(saved[path])
                if not set_in_place(value, before) and assign is not None:
                    assign(before)
        for path, value in missing.items():
            owner, _, name = path.rpartition(".")
            if hasattr(owners.get(owner), "__dict__") and not path.endswith(OBJECT):
                setattr(owners[owner], name, decode(value))

    def _slots(self, owners: dict[str, Any] | None = None) -> Iterator[Slot]:
        """Yield what is read as a whole, in the order in which it is found.

        Args:
            owners: Is given the objects that hold them, by their path.
        """
        owners = {} if owners is None else owners
        samplers = [Slot(name, one, None) for name, one in self.samplers.items()]
        yield from search(samplers, owners, ignored=self.dataset)
        if self.dataset is not None:
            yield from search([Slot("dataset", self.dataset, None)], owners, generators_only=True)


def search(
    todo: list[Slot], owners: dict[str, Any], ignored: Any = None, generators_only: bool = False
) -> Iterator[Slot]:
    """Yield what some values hold that is read as a whole."""
    seen: set[int] = set()
    for slot in todo:  # which grows meanwhile
        value = slot.value
        if not generators_only and (value is ignored or isinstance(value, Dataset)):
            continue
        if isinstance(value, GENERATORS) or (not generators_only and is_leaf(value)):
            yield slot
        elif id(value) not in seen and may_hold(value):
            seen.add(id(value))
            owners[slot.path] = value
            todo += children(slot)


def is_leaf(value: Any) -> bool:
    """Return True for what is read as a whole: a generator, a value, what has a `state_dict`."""
    if isinstance(value, GENERATORS) or is_plain(value):
        return True
    is_iterator = isinstance(value, Iterator) and not isinstance(value, io.IOBase)
    return is_iterator or (is_stateful(value) and may_hold(value))


def is_stateful(value: Any) -> bool:
    """Return True for an object with the methods `state_dict` and `load_state_dict`."""
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


def may_hold(value: Any) -> bool:
    """Return True if a value is worth a search for generators and changing values."""
    if isinstance(value, list | tuple | dict | deque):
        return len(value) <= FEW
    if not hasattr(value, "__dict__") or isinstance(value, type):
        return False
    package = type(value).__module__.partition(".")[0]
    return package not in FOREIGN or isinstance(value, Sampler | Dataset)


def children(slot: Slot) -> Iterator[Slot]:
    """Yield what a container or an object holds."""
    path, value, _ = slot
    if isinstance(value, list | tuple | deque):
        for number, item in enumerate(value):
            yield Slot(f"{path}.{number}", item, None)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield Slot(f"{path}.{key}", item, partial(value.__setitem__, key))
    else:
        known = type(value) in TORCH_SAMPLERS
        for name, item in vars(value).items():
            if not known or name in CHANGES_IN_TORCH_SAMPLERS:
                yield Slot(f"{path}.{name}", item, partial(setattr, value, name))


def is_plain(value: Any, depth: int = 0) -> bool:
    """Return True for numbers, texts, arrays and tensors, and for containers of them."""
    if type(value) in SCALARS or isinstance(value, torch.Tensor):
        return True
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.kind in "biuf"
    if not isinstance(value, CONTAINERS) or depth > 4:
        return False
    items = value.values() if isinstance(value, dict) else value
    if set(map(type, items)) <= SCALARS:
        return True
    return all(is_plain(item, depth + 1) for item in items)


def digest(value: Any) -> bytes:
    """Return a digest that is the same for equal values."""
    if isinstance(value, np.ndarray):
        return hashlib.blake2b(np.ascontiguousarray(value).data).digest()
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream)
    pickler.fast = True  # else the digest would depend on which items are the same object
    pickler.dump(value)
    return hashlib.blake2b(stream.getbuffer()).digest()


def generator_state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.getstate()


def restore_object(one: Any, state: Any) -> None:
    """Put back the state of a generator, or of what has a `state_dict`."""
    if isinstance(one, np.random.Generator):
        one.bit_generator.state = state
    elif isinstance(one, random.Random):
        one.setstate(state)
    elif isinstance(one, torch.Generator | np.random.RandomState):
        one.set_state(state)
    else:
        one.load_state_dict(state)


def set_in_place(value: Any, before: Any) -> bool:
    """Give a container another content, since others may hold it too; False if that cannot be."""
    if isinstance(value, np.ndarray) and value.shape == before.shape:
        value[...] = before
    elif isinstance(value, list):
        value[:] = before
    elif isinstance(value, dict | set | deque):
        value.clear()
        extend = value.extend if isinstance(value, deque) else value.update
        extend(before)
    else:
        return False
    return True


def encode(value: Any) -> Any:
    """Return a value in types that torch.load reads without running code."""
    if isinstance(value, np.ndarray | np.generic):
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        return {KIND: kind, VALUE: torch.from_numpy(np.array(value))}
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, deque | set):
        kind = "deque" if isinstance(value, deque) else "set"
        return {KIND: kind, VALUE: [encode(item) for item in value]}
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [encode(item) for item in value]
    return tuple(map(encode, value)) if isinstance(value, tuple) else value


def decode(value: Any) -> Any:
    """Return what `encode` was given."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, tuple):
        return tuple(map(decode, value))
    if not isinstance(value, dict):
        return value
    kind = value.get(KIND)
    if kind == "array":
        return value[VALUE].numpy().copy()
    if kind == "scalar":
        return value[VALUE].numpy()[()]
    if kind is not None:
        return {"deque": deque, "set": set}[kind](map(decode, value[VALUE]))
    return {key: decode(item) for key, item in value.items()}
