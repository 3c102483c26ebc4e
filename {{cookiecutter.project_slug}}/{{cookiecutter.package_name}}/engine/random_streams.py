"""Random numbers: streams that words name, and the states of this process's generators."""

import hashlib
import random
from typing import Any

import numpy as np
import torch


class RandomStream:
    """A random stream apart from the process's, the same wherever the same words name it.

    Within `with stream:` the global generators of torch, numpy and random draw from it.

    Args:
        words: What names the stream: numbers and texts.
    """

    def __init__(self, *words: Any) -> None:
        seed = seed_of(*words)
        self._states: tuple[Any, ...] = (
            torch.Generator().manual_seed(seed).get_state(),
            np.random.MT19937(seed),
            random.Random(seed).getstate(),
        )

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: Any) -> None:
        self._swap()

    def _swap(self) -> None:
        """Exchange the states of the process for those kept here."""
        numpy: Any = np.random
        process = torch.get_rng_state(), numpy.get_bit_generator(), random.getstate()
        torch.set_rng_state(self._states[0])
        numpy.set_bit_generator(self._states[1])
        random.setstate(self._states[2])
        self._states = process


class SeededIndex:
    """What a loading process is to read. Unpickling it there seeds that process.

    Augmentation then does not depend on which process loads which batch.

    Args:
        index: One index or a list of them, of any kind.
        words: What names this batch: numbers and texts.
    """

    def __init__(self, index: Any, *words: Any) -> None:
        self.arguments = index, *words

    def __reduce__(self) -> tuple[Any, ...]:
        return seed_and_return, self.arguments


def seed_and_return(index: Any, *words: Any) -> Any:
    """Seed the global generators of this process by `words`, and return the index."""
    seed = seed_of(*words)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)  # torch.manual_seed looks for GPUs, in 160 us
    return index


def seed_of(*words: Any) -> int:
    """Return the seed of 32 bits that words name, in every process the same."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def random_states() -> dict[str, Any]:
    """Return the states of this process's generators, in types that a checkpoint may hold."""
    kind, keys, *rest = tuple(np.random.get_state())  # noqa: NPY002
    numbers: Any = keys
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, numbers.tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random(states: dict[str, Any]) -> None:
    """Set the generators of this process to what `random_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def same_states(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return True if two results of `random_states` are equal."""
    return all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )
