"""What stands between the command line, Lightning and W&B. Updates of the template replace it."""

from importlib import import_module
from typing import Any

from .version import __version__

# By public name the file that defines it; importing one takes no more than it needs.
PUBLIC = {
    "CLI": "cli",
    "Divergence": "metrics",
    "LastCheckpoint": "checkpoints",
    "Run": "run",
    "RunError": "errors",
    "RunWandbLogger": "wandb_logger",
    "Summaries": "metrics",
    "UsageError": "errors",
    "command": "commands",
    "find_checkpoint": "checkpoints",
    "load": "checkpoints",
    "runs_root": "run",
}
__all__ = ["__version__", *PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
