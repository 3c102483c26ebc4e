"""The bar of a run that is watched in a terminal."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class Bar(TQDMProgressBar):
    """Lightning's bar, drawn five times a second with all that was logged last, so that no step waits for a value."""

    drawn = 0.0

    def due(self) -> bool:
        before, now = self.drawn, time.monotonic()
        self.drawn = now if now - before > 0.2 else before
        return self.drawn == now

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self.due() or trainer.is_last_batch:
            super().on_train_batch_end(trainer, *args)

    def on_validation_batch_end(self, *args: Any) -> None:
        if self.due():
            super().on_validation_batch_end(*args)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return {name: value.item() for name, value in sorted(trainer.callback_metrics.items())}
