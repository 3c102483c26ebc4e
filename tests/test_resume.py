"""A run resumes from any of its checkpoints as if it had not ended, whatever it trains and logs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos import compare
from command import Commands

THEIRS = '''
import os
import random
import shutil

import numpy
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint
from odd_duck.data import Digits
from odd_duck.model import Classifier
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler
from torch.utils.data import Subset, WeightedRandomSampler
from torchmetrics.classification import MulticlassAccuracy


class Keeps(Callback):
    """Copies the run's folder whenever there is another last.ckpt in it."""

    seen = 0

    def on_train_batch_start(self, trainer, *_):
        folder, copies = trainer.default_root_dir, os.environ.get("COPIES")
        last = os.path.join(folder, "checkpoints", "last.ckpt")
        if copies and os.path.exists(last) and os.stat(last).st_mtime_ns != self.seen:
            self.seen = os.stat(last).st_mtime_ns
            copy = os.path.join(copies, f"{len(os.listdir(copies)):03}")
            shutil.copytree(folder, os.path.join(copy, os.path.basename(folder)))

    on_train_epoch_start = on_train_end = on_validation_start = on_train_batch_start


class Noisy(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        images, label = self.images[index]
        return images + 0.1 * (torch.rand(1) + random.random() + numpy.random.rand()), label


class NoisyDigits(Digits):
    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        persistent: bool = False,
        sampler: str = "",
    ):
        super().__init__(batch_size, num_workers)
        self.persistent, self.sampler = persistent, sampler

    def _loader(self, images, shuffle=False, drop_last=False):
        options = {"num_workers": self.num_workers, "persistent_workers": self.persistent}
        if self.sampler == "weighted" and shuffle:
            weights = [1.0 + i % 3 for i in range(len(images))]
            options["sampler"] = WeightedRandomSampler(weights, len(images))
        elif self.sampler == "generator" and shuffle:
            options |= {"shuffle": True, "generator": torch.Generator().manual_seed(7)}
        else:
            options["shuffle"] = shuffle
        return DataLoader(Noisy(images), self.batch_size, drop_last=drop_last, **options)


class Logs(Classifier):
    """Log the mean, the largest and the sum of the loss over an epoch, and a training metric."""

    def __init__(self, num_classes: int, lr: float = 2e-3):
        super().__init__(num_classes, lr=lr)
        self.train_acc = MulticlassAccuracy(num_classes)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        logits = self(images)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        self.train_acc(logits, labels)
        self.log("train/acc", self.train_acc, on_step=True, on_epoch=True)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        self.log("train/worst", loss, on_epoch=True, on_step=False, reduce_fx="max")
        self.log("train/sum", loss, on_epoch=True, on_step=False, reduce_fx="sum")
        return loss


class Manual(Classifier):
    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        images, labels = batch
        for optimizer in self.optimizers():
            loss = torch.nn.functional.cross_entropy(self(images), labels)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.log("train/loss", loss)

    def configure_optimizers(self):
        return [torch.optim.Adam(self.parameters(), 1e-3), torch.optim.SGD(self.parameters(), 1e-2)]


class Several(NoisyDigits):
    """Two loaders to train on; the shorter one is read again until the longer one ends."""

    def train_dataloader(self):
        short, long = Subset(self.train, range(48)), Subset(self.train, range(112))
        return [self._loader(part, shuffle=True, drop_last=True) for part in (short, long)]


class Pairs(Classifier):
    def __init__(self, num_classes: int):
        super().__init__(num_classes)

    def training_step(self, batch, batch_idx):
        return sum(super(Pairs, self).training_step(part, batch_idx) for part in batch)


class Stream(IterableDataset):
    def __init__(self, images):
        self.images = images

    def __iter__(self):
        return (self.images[index] for index in range(64))


class Streamed(Digits):
    def train_dataloader(self):
        return DataLoader(Stream(self.train), self.batch_size)


class Batched(Digits):
    def train_dataloader(self):
        class Own(BatchSampler):
            pass

        batches = Own(RandomSampler(self.train), self.batch_size, drop_last=True)
        return DataLoader(self.train, batch_sampler=batches, collate_fn=tuple)
'''
LINE = (
    "fit --config @digits --data.batch_size 16 --trainer.max_epochs 2"
    " --trainer.limit_train_batches 4"
    " --trainer.limit_val_batches 2 --trainer.log_every_n_steps 1 --trainer.logger false"
    " --trainer.callbacks resumable.Keeps --callbacks.last_checkpoint.every_n_train_steps 1"
)
PLATEAU = (
    "--model.lr_scheduler lightning.pytorch.cli.ReduceLROnPlateau"
    " --model.lr_scheduler.monitor val/loss"
    " --model.lr_scheduler.patience 0 --model.lr_scheduler.threshold 10"
)
CYCLE = (
    "--model.lr_scheduler OneCycleLR --model.lr_scheduler.max_lr 0.02"
    " --model.lr_scheduler.total_steps 8"
)
UNVALIDATED = (
    "--callbacks.checkpoint.monitor train/loss --callbacks.early_stopping null"
    " --callbacks.summaries null"
)


@pytest.fixture(scope="module", autouse=True)
def theirs(command: Commands, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("resumable")
    (folder / "resumable.py").write_text(THEIRS)
    with pytest.MonkeyPatch.context() as environment:
        environment.syspath_prepend(folder)
        yield


@pytest.mark.parametrize(
    ("options", "fewest"),
    [
        ("", 7),
        ("--data resumable.NoisyDigits", 7),
        ("--data resumable.NoisyDigits --data.num_workers 2", 7),
        ("--data resumable.NoisyDigits --data.num_workers 2 --data.persistent true", 7),
        ("--data resumable.NoisyDigits --data.sampler weighted", 7),
        ("--data resumable.NoisyDigits --data.sampler generator", 7),
        ("--data resumable.Several --model resumable.Pairs --trainer.limit_train_batches 1.0", 13),
        (
            "--data resumable.Several --data.num_workers 1 --model resumable.Pairs"
            " --trainer.limit_train_batches 1.0",
            13,
        ),
        ("--model resumable.Logs", 7),
        (
            "--model resumable.Logs --trainer.accumulate_grad_batches 2"
            " --trainer.log_every_n_steps 2",
            3,
        ),
        ("--model resumable.Manual --callbacks.last_checkpoint.every_n_train_steps 2", 7),
        (f"{CYCLE} --trainer.val_check_interval 0.5", 5),
        (f"{PLATEAU}", 7),
        (f"{PLATEAU} --trainer.max_steps 6 --trainer.max_epochs 9", 5),
        ("--trainer.val_check_interval 3 --model resumable.Logs", 5),
        ("--trainer.check_val_every_n_epoch 2", 7),
        ("--trainer.check_val_every_n_epoch null --trainer.val_check_interval 3", 5),
        (f"--trainer.limit_val_batches 0 {UNVALIDATED}", 7),
    ],
)
def test_any_checkpoint_leads_to_the_same_weights_and_rows(
    options: str, fewest: int, command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COPIES", str(tmp_path))
    reference = command(f"{LINE} {options}")
    assert (reference.code, reference.err) == (0, ""), reference.error or reference.err
    assert reference.run is not None
    monkeypatch.delenv("COPIES")
    copies = sorted(folder / reference.run.name for folder in tmp_path.iterdir())
    assert len(copies) >= fewest
    wrong = {}
    for copy in copies[1::2]:
        outcome = command(f"fit --resume {copy}")
        assert (outcome.code, outcome.err) == (0, ""), f"{copy}: {outcome.err or outcome.error}"
        assert "does not resume bit-for-bit" not in outcome.out
        if differences := compare(reference.run, copy).differences:
            wrong[copy.parent.name] = differences
    assert not wrong, "\n".join(f"{step}: {differences}" for step, differences in wrong.items())


@pytest.mark.parametrize("data", ["resumable.Streamed", "resumable.Batched"])
def test_data_that_cannot_be_taken_up_anywhere_are_left_alone_and_a_line_says_so(
    data: str, command: Commands
) -> None:
    first = command(f"{LINE} --data {data} --callbacks.last_checkpoint.every_n_train_steps 3")
    assert (first.code, first.err) == (0, ""), first.error or first.err
    (line,) = [line for line in first.out.splitlines() if "bit-for-bit" in line]
    assert line.startswith("data     ")
    assert first.run is not None
    assert command(f"fit --resume {first.run.name} --trainer.max_epochs 3").code == 0
