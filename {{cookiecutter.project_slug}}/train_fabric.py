"""The training of `main.py fit` as a loop to change as you like.

    python train_fabric.py --config configs/fabric.yaml

The command line, the run's folder and W&B are those of `main.py`, which tests what comes out.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from {{ cookiecutter.package_name }}.data import Digits
from {{ cookiecutter.package_name }}.engine.fabric import Loop, main
from {{ cookiecutter.package_name }}.model import Classifier


class Training(Loop):
    """A training with one optimizer, and a validation after each epoch."""

    def fit(self, model: Classifier, datamodule: Digits, ckpt_path: str | None = None) -> None:
        """Train a classifier.

        Args:
            model: Its network, optimizer, schedule and metrics.
            datamodule: What to train it on.
            ckpt_path: Checkpoint to resume from.
        """
        self.launch()
        datamodule.setup("fit")
        configured: Any = model.configure_optimizers()
        if not isinstance(configured, dict):
            constant = LambdaLR(configured, lambda _: 1.0)
            schedule = {"scheduler": constant, "interval": "epoch", "monitor": None}
            configured = {"optimizer": configured, "lr_scheduler": schedule}
        schedule = configured["lr_scheduler"]
        scheduler, interval = schedule["scheduler"], schedule["interval"]
        monitor = schedule["monitor"]
        network, optimizer = self.setup(model, configured["optimizer"])
        self.begin(model, ckpt_path, state_dict=network, optimizer=optimizer, scheduler=scheduler)
        lr = f"lr-{type(configured['optimizer']).__name__}"

        while self.current_epoch < self.max_epochs:
            network.train()
            for batch in self.share(datamodule.train_dataloader(), training=True):
                images, labels = self.to_device(batch)
                loss = F.cross_entropy(network(images), labels)
                self.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                if (self.global_step + 1) % self.log_every_n_steps == 0:
                    row = {"train/loss": loss, lr: optimizer.param_groups[0]["lr"]}
                    self.log_dict({**row, "epoch": self.current_epoch}, self.global_step)
                if interval == "step":
                    scheduler.step()
                self.after_batch()

            metrics = self.validate(model, datamodule)
            self.log_dict({**metrics, "epoch": self.current_epoch}, self.global_step - 1)
            if interval == "epoch":
                scheduler.step(*([metrics[monitor]] if monitor else []))
            self.after_epoch(metrics)

    @torch.no_grad()
    def validate(self, model: Classifier, datamodule: Digits) -> dict[str, Tensor]:
        """Return the validation metrics: each sample counts once, on any number of ranks."""
        model.eval()
        for batch in self.share(datamodule.val_dataloader()):
            images, labels = self.to_device(batch)
            with self.autocast():
                logits = model(images)  # not `network`, in which ranks wait for each other
            loss = F.cross_entropy(logits, labels)
            model.val_metrics.update(preds=logits, target=labels, value=loss, weight=len(labels))
        metrics = model.val_metrics.compute()
        model.val_metrics.reset()
        return metrics


if __name__ == "__main__":
    main(Training)
