"""What `predict_step` returned for a batch: as columns of a table, or sample by sample."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Columns = dict[str, np.ndarray]  # by name, each of shape (samples,)
SCALAR = str | int | float
PLAIN = str | int | float | complex | bool | bytes | None
TOLERANCE = 0.02  # of the sum of probabilities: bfloat16 has three digits


class Plain:
    """Makes values into what `torch.load(weights_only=True)` reads: tensors, numbers, containers.

    `others` names the classes of what stayed as it was, because nothing plain says the same.
    """

    def __init__(self) -> None:
        self.others: set[str] = set()

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().cpu().as_subclass(Tensor).clone()
        if isinstance(value, np.ndarray):
            return self._array(value)
        value = as_container(value)
        if isinstance(value, Mapping):
            return {self(key): self(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return tuple(map(self, value))
        if isinstance(value, list):
            return list(map(self, value))
        return self._scalar(value)

    def _scalar(self, value: Any) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        for kind in (str, int, float):  # also of a subclass, such as an Enum's
            if isinstance(value, kind) and not isinstance(value, bool):
                return kind(value)
        if not isinstance(value, PLAIN):
            self.others.add(f"{type(value).__module__}.{type(value).__qualname__}")
        return value

    def _array(self, array: np.ndarray) -> Any:
        try:
            return torch.from_numpy(array.copy())
        except TypeError:  # of texts, or of objects
            return self(array.tolist())


def as_container(value: Any) -> Any:
    """Return a dataclass or a named tuple as a dict of its fields, and anything else as it is."""
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: getattr(value, one.name) for one in fields(value)}
    names = getattr(type(value), "__match_args__", ())  # of a named tuple
    if isinstance(value, tuple) and len(names) == len(value) > 0:
        return dict(zip(names, value, strict=True))
    return value


def rows_of(output: Any) -> int | None:
    """Return of how many samples an output is, where the data does not say it.

    That is the length of its tensors and lists, if they all have the same.
    """
    lengths = lengths_in(output)
    return lengths.pop() if len(lengths) == 1 else None


def lengths_in(output: Any) -> set[int | None]:
    if isinstance(output, Tensor):
        return {len(output) if output.ndim else None}
    if isinstance(output, list):
        return {len(output)}
    items = output.values() if isinstance(output, dict) else output
    return set().union(*map(lengths_in, items)) if isinstance(output, dict | tuple) else set()


def is_probabilities(output: Any) -> bool:
    """Return True for a tensor (B, C) of which each row is a distribution; NaN is left out."""
    if not (isinstance(output, Tensor) and output.ndim == 2 and output.shape[1] > 1):
        return False
    if not output.is_floating_point() or output.layout != torch.strided:
        return False
    finite = output[~output.isnan().any(dim=1)].float()
    sums_to_one = ((finite.sum(dim=1) - 1).abs() <= TOLERANCE).all()
    return bool((finite >= 0).all() and sums_to_one)


def columns_of(output: Any, rows: int | None, classes: bool) -> Columns | None:
    """Return the columns of an output; None if it is no table.

    Args:
        output: A tensor (B,), (B, 1) or (B, C), a list of B values, or a dict of such.
        rows: The number of samples B.
        classes: Whether a tensor (B, C) has the probabilities of classes.
    """
    if isinstance(output, Tensor):
        named = {"prediction": output}
        if classes and output.ndim == 2 and output.shape[1] > 1:
            named = {"class": output.argmax(dim=1), "p": output}
        return columns_of(named, rows, classes)
    if isinstance(output, list):
        output = {"prediction": output}
    if not isinstance(output, dict) or not output:
        return None
    columns: Columns = {}
    for name, values in output.items():
        array = as_array(values)
        if array is None or array.ndim not in (1, 2) or len(array) != rows:
            return None
        if array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        if array.ndim == 1:
            columns[str(name)] = array
        else:
            columns |= {f"{name}{k}": column for k, column in enumerate(array.T)}
    return columns


def as_array(values: Any) -> np.ndarray | None:
    """Return a tensor, or a list of numbers or texts, as an array; None for anything else."""
    if isinstance(values, Tensor):
        if values.layout != torch.strided or values.is_complex() or values.is_quantized:
            return None
        values = values.float() if values.dtype == torch.bfloat16 else values  # numpy has none
        return values.numpy()
    if not isinstance(values, list) or not all(
        isinstance(one, str | int | float) for one in values
    ):
        return None
    of_texts = any(isinstance(one, str) for one in values)
    return np.array(values, dtype=object) if of_texts else np.asarray(values)


def samples_of(output: Any, rows: int | None) -> list[Any] | None:
    """Return an output sample by sample; None if it cannot be told apart.

    A list of B things has one for each sample. In a dict or a tuple each thing is taken apart.
    """
    if rows is None:
        return None
    try:
        return [sample_of(output, number, rows) for number in range(rows)]
    except ValueError:
        return None


def sample_of(output: Any, number: int, rows: int) -> Any:
    """Return one sample of an output; raise a ValueError if it is not of so many."""
    if isinstance(output, Tensor) and output.ndim and len(output) == rows:
        return output[number]
    if isinstance(output, list) and len(output) == rows:
        return output[number]
    if isinstance(output, dict):
        return {name: sample_of(item, number, rows) for name, item in output.items()}
    if isinstance(output, list | tuple) and output:
        return type(output)(sample_of(item, number, rows) for item in output)
    raise ValueError


def bytes_of(output: Any) -> int:
    """Return how much memory an output takes, about."""
    if isinstance(output, Tensor):
        return output.nbytes + 200
    items = output.values() if isinstance(output, dict) else output
    nested = isinstance(output, dict | list | tuple)
    return 50 + sum(map(bytes_of, items)) if nested else 50
