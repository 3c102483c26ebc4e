"""What surrounds a command: environment, warnings, signals, and the end of W&B's run."""

import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

from .distributed import die_with_parent
from .error_messages import cause_of
from .lightning_internals import signatures_read_once, without_copies_to_the_same_device
from .shutdown import GracefulShutdown, end_command
from .wandb_session import own_session, restored_environment

# Messages that a reader could not act on. A test says when an entry can go.
SILENCED_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",  # tips, and what a run's first lines say
    "lightning.fabric.utilities",
    "lightning.pytorch.accelerators.cuda",  # which GPUs a rank sees
    "lightning.pytorch.trainer.connectors.signal_connector",  # that it would requeue a SLURM job
)
SILENCED_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own use of torch
    r"You are trying to `self.log\(\)` but `Trainer\(barebones=True\)`",  # that is what it is for
    r"Be aware that when using `ckpt_path`, callbacks used",  # evaluating needs none of them
    r"The AccumulateGrad node's stream does not match",  # of DDP's first step; torch syncs both
    r"The `srun` command is available",  # on a login node, or on a machine with SLURM's tools
    r"Checkpoint directory .* exists and is not empty",  # of a run that is resumed
    r"The dirpath has changed",  # a new run that begins at another's checkpoint has its own best
    r".*does not have many workers",  # data in memory needs none
    r"You're resuming from a checkpoint that ended before the epoch ended",  # ours is exact
)
QUIET = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}  # the screen's lines are ours


@contextmanager
def session(shutdown: GracefulShutdown, resources: ExitStack, runs: bool) -> Iterator[None]:
    """Run a command, and leave environment, warnings and signal handlers as they were.

    Args:
        shutdown: Handles signals, and ends W&B's run.
        resources: Closed at the end; holds the lock of the run's folder.
        runs: Whether the command trains or evaluates; for `CLI(run=False)` the caller does,
            afterwards, and signals and W&B's run are left to them.
    """
    import_package_modules()
    raised: BaseException | None = None
    with restored_environment():
        os.environ.update({**QUIET, **os.environ})
        with own_session() if runs else nullcontext(), warnings.catch_warnings(), resources:
            silence_libraries()
            resources.enter_context(without_copies_to_the_same_device())
            resources.enter_context(signatures_read_once())
            if runs:
                die_with_parent()
                shutdown.install_handlers()
                resources.callback(shutdown.restore_handlers)
            try:
                yield
            except BaseException as error:
                raised = error
            if runs:
                raised = end_command(shutdown, raised)
    if raised:  # outside of `except`: a traceback then does not show what was there first
        raise cause_of(raised) if isinstance(raised, Exception) else raised


def import_package_modules() -> None:
    """Import the team's files, so that their classes can be given by their names alone."""
    for name in ("data", "model", "callbacks"):
        if importlib.util.find_spec(f"..{name}", __package__):
            importlib.import_module(f"..{name}", __package__)


def silence_libraries() -> None:
    """Leave out messages of libraries that a reader could not act on."""
    for name in SILENCED_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in SILENCED_WARNINGS:
        warnings.filterwarnings("ignore", message)
