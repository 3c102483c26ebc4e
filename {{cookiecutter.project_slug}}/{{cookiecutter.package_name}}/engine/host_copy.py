"""Copies of a checkpoint's content in host memory, which a thread writes during the training.

The buffers are kept from one copy to the next: fresh memory costs more than the copying.
"""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from .lightning_internals import wraps_tensors

ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
ATOMIC = frozenset(ATOMS)
PIECE = 1 << 23  # elements that are compared at a time
SMALL = 1 << 20  # bytes, below which a copy costs as little as a buffer
Keys = tuple[Any, ...]  # those that lead to a value


class HostCopy:
    """Copies content into buffers in host memory, of which there is one set.

    Args:
        wait: Called before a buffer changes that a file may still have to be written from.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait
        self.buffers: dict[Keys, Tensor] = {}  # by the first path to a storage, as bytes
        self.shared: set[Keys] = set()  # those that a file may still have to be written from

    def copy(self, content: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of a checkpoint's content.

        Tensors that share memory still do. Numpy's scalars become Python's, and plain subclasses
        of Tensor become Tensors: `torch.load(weights_only=True)` reads no others.
        """
        one = OneCopy(self)
        copied: dict[str, Any] = one.of(content, ())
        unused = self.buffers.keys() - one.used
        for path in unused if len(unused) > len(one.used) else ():
            del self.buffers[path]  # of a state that is gone
        self.shared |= one.used  # what an earlier file needs stays in, until it is waited for
        return copied

    def fill(self, path: Keys, source: Tensor) -> Tensor:
        """Return a copy of `source`, which is bytes, in the buffer at its path if it is large."""
        if source.nbytes < SMALL:
            return source.to("cpu", copy=True)
        kept = self.buffers.get(path)
        if kept is not None and kept.nbytes == source.nbytes:
            if path in self.shared and same_bytes(kept, source):
                return kept
        else:
            pinned = source.is_cuda
            kept = torch.empty(source.nbytes, dtype=torch.uint8, pin_memory=pinned)
        if self.shared:
            self.wait()
            self.shared = set()
        self.buffers[path] = kept
        return kept.copy_(source, non_blocking=source.is_cuda)


class OneCopy:
    """Walks through the content of one checkpoint."""

    def __init__(self, host: HostCopy) -> None:
        self.host = host
        self.used: set[Keys] = set()
        self.storages: dict[Any, Tensor] = {}  # by where they are
        self.known: dict[int, Any] = {}  # copies of containers, by the original's id

    def of(self, value: Any, path: Keys) -> Any:
        """Return a copy of a value that changes no more."""
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, ATOMS):
            return value
        if isinstance(value, Tensor):
            return self.of_tensor(value, path)
        if id(value) not in self.known:
            self.known[id(value)] = self.of_container(value, path)
        return self.known[id(value)]

    def of_container(self, value: Any, path: Keys) -> Any:
        kind = type(value)
        if kind in (dict, OrderedDict, defaultdict):
            new = copy.copy(value)  # with its attributes, such as `_metadata` of a state_dict
            for name, item in value.items():
                new[name] = self.of(item, (*path, name))
            return new
        if kind in (list, tuple, set) and ATOMIC.issuperset(map(type, value)):
            return copy.copy(value)  # such as the 625 numbers of a random state
        if kind in (list, tuple, set):
            return kind(self.of(item, (*path, index)) for index, item in enumerate(value))
        return copy.deepcopy(value)

    def of_tensor(self, value: Tensor, path: Keys) -> Tensor:
        if value.device.type == "meta" or wraps_tensors(value):
            return copy.deepcopy(value.detach())
        if not is_plain(value):
            return value.detach().clone()
        storage = value.untyped_storage()
        place = (storage.data_ptr(), storage.nbytes(), value.device)
        if place not in self.storages:
            data = torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage)
            self.storages[place] = self.host.fill(path, data)
            self.used.add(path)
        form = (value.storage_offset(), value.size(), value.stride())
        kept = self.storages[place].untyped_storage()
        new = torch.empty(0, dtype=value.dtype).set_(kept, *form)
        return Parameter(new, value.requires_grad) if type(value) is Parameter else new


def is_plain(value: Tensor) -> bool:
    """Return True for a tensor that is a view of memory, also of a subclass such as MONAI's."""
    is_strided = value.layout is torch.strided
    return is_strided and not (value.is_quantized or value.is_neg() or value.is_conj())


def same_bytes(kept: Tensor, source: Tensor) -> bool:
    """Return True if two tensors of bytes are equal."""
    wide = torch.int64 if source.nbytes % 8 == 0 else torch.uint8  # five times as fast
    pieces = zip(kept.view(wide).split(PIECE), source.view(wide).split(PIECE), strict=True)
    return all(torch.equal(mine.to(other.device), other) for mine, other in pieces)
