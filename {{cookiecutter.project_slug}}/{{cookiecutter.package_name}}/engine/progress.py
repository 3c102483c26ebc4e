"""What the screen shows of a training: a bar in a terminal, else a line per epoch."""

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

REDRAW_INTERVAL = 0.2  # seconds


class ThrottledProgressBar(TQDMProgressBar):
    """Lightning's bar, drawn five times a second, with the values that were logged last.

    Lightning's own reads the values of each step from the GPU, which then waits for them.
    """

    drawn = 0.0  # time of the last drawing, in seconds

    def is_due(self) -> bool:
        """Return True at most once per interval."""
        now = time.monotonic()
        if now - self.drawn <= REDRAW_INTERVAL:
            return False
        self.drawn = now
        return True

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self.is_due() or trainer.is_last_batch:
            super().on_train_batch_end(trainer, *args)

    def on_validation_batch_end(self, *args: Any) -> None:
        if self.is_due():
            super().on_validation_batch_end(*args)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        values = sorted(trainer.callback_metrics.items())
        return {name: value.item() for name, value in values}


class EpochLines(Callback):
    """Prints a line for each validation, or for each epoch without one."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        in_fit = trainer.state.fn == "fit" and not trainer.sanity_checking
        if trainer.is_global_zero and in_fit:
            metrics = sorted(trainer.callback_metrics.items())
            values = "  ".join(f"{name} {value:.4g}" for name, value in metrics)
            place = f"epoch {trainer.current_epoch:<3} step {trainer.global_step:<6}"
            print(f"{place} {values}", flush=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation:
            self.on_validation_end(trainer, pl_module)


def progress_callback() -> Callback:
    """Return the bar in a terminal, and lines where the output goes to a file."""
    return ThrottledProgressBar() if sys.stdout.isatty() else EpochLines()
