"""The place of `load` in earlier releases: `from <package>.engine import load` is its place now."""

import warnings

from .checkpoints import find_checkpoint, load

__all__ = ["find_checkpoint", "load"]
warnings.warn(
    f"{__name__} is now {__package__}: import load from there", FutureWarning, stacklevel=2
)
