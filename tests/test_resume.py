"""A run resumes from any of its checkpoints as if it had not ended, whatever it trains and logs."""

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from chaos import compare
from command import Commands
from test_exact import values

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
        trainer.strategy.checkpoint_io.settle()  # else files come and go while they are copied
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
        elif self.sampler and shuffle:
            return DataLoader(Noisy(images), batch_sampler=self.batches(images), **options)
        else:
            options["shuffle"] = shuffle
        return DataLoader(Noisy(images), self.batch_size, drop_last=drop_last, **options)


    def batches(self, images):
        """Batches by one's own rules; `shuffled` keeps an order and a generator."""
        order = RandomSampler(images) if self.sampler == "sorted" else Shuffled(len(images))
        return Sorted(order, self.batch_size, drop_last=True)


class Sorted(BatchSampler):
    def __iter__(self):
        return iter(sorted(super().__iter__()))


class Shuffled:
    def __init__(self, n):
        self.order, self.generator = list(range(n)), numpy.random.default_rng(1)

    def __len__(self):
        return len(self.order)

    def __iter__(self):
        self.generator.shuffle(self.order)
        return iter(self.order)


class Scheduled(Classifier):
    """Sizes its schedule by the trainer's own count of steps."""

    def __init__(self, num_classes: int):
        super().__init__(num_classes)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Annealed(Classifier):
    """Sets a value at each epoch's start, logs it there, and draws for it."""

    def __init__(self, num_classes: int):
        super().__init__(num_classes)

    def on_train_epoch_start(self):
        self.scale = 1.0 / (1 + self.current_epoch) + float(torch.rand(()))
        self.log("scale", self.scale)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.scale


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


class Stops(Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == 6


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
        ("--data resumable.NoisyDigits --data.sampler sorted", 7),
        ("--data resumable.NoisyDigits --data.sampler shuffled --data.num_workers 1", 7),
        ("--model resumable.Scheduled", 7),
        ("--model resumable.Scheduled --data.num_workers 1", 7),
        ("--model resumable.Annealed", 7),
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


def test_a_stream_without_a_state_is_left_alone_and_a_line_at_the_start_says_so(
    command: Commands,
) -> None:
    first = command(
        f"{LINE} --data resumable.Streamed --callbacks.last_checkpoint.every_n_train_steps 3"
    )
    assert (first.code, first.err) == (0, ""), first.error or first.err
    (line,) = [line for line in first.out.splitlines() if "bit-for-bit" in line]
    assert line.startswith("data     an IterableDataset without state_dict: ")
    assert first.out.index(line) < first.out.index("epoch 0")
    assert first.run is not None
    assert command(f"fit --resume {first.run.name} --trainer.max_epochs 3").code == 0


def test_a_run_whose_loaders_are_left_to_lightning_says_so(command: Commands) -> None:
    outcome = command(f"{LINE} --trainer.use_distributed_sampler false")
    assert (outcome.code, outcome.err) == (0, "")
    assert "data     use_distributed_sampler is false: does not resume bit-for-bit" in outcome.out


def test_a_resumed_run_says_where_it_stands(
    command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COPIES", str(tmp_path))
    reference = command(LINE)
    monkeypatch.delenv("COPIES")
    assert reference.run is not None
    copies = sorted(folder / reference.run.name for folder in tmp_path.iterdir())
    outcome = command(f"fit --resume {copies[4]}")
    steps = [line for line in outcome.out.splitlines() if line.startswith("resumed")]
    assert steps == ["resumed  at epoch 1, batch 1, step 5"]
    assert "resumed" not in reference.out


@pytest.mark.parametrize("how", ["--trainer.max_steps 6", "--trainer.callbacks+ resumable.Stops"])
def test_a_run_that_is_ended_within_an_epoch_and_resumed_is_the_run_that_was_not(
    how: str, command: Commands
) -> None:
    line = LINE.replace(" --trainer.callbacks resumable.Keeps", "")
    line += " --data resumable.NoisyDigits --data.sampler shuffled"
    reference, first = command(line), command(f"{line} {how}")
    assert first.code == 0, first.error or first.err
    assert first.run is not None
    assert reference.run is not None
    second = command(
        f"fit --resume {first.run.name} --trainer.max_steps -1 --trainer.callbacks null"
    )
    assert (second.code, second.err) == (0, ""), second.error or second.err
    assert "resumed  at epoch 1, batch 2, step 6" in second.out
    ours, theirs = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        for run in (reference.run, first.run)
    )
    for name, value in ours["state_dict"].items():
        assert torch.equal(value, theirs["state_dict"][name]), name
    rows = [row for row in values(first.run) if row in values(reference.run)]
    assert rows == values(reference.run)  # and rows of the end in between


OPTIMIZERS = """
import torch
from odd_duck.model import Classifier

class Groups(Classifier):
    def __init__(
        self, groups: int = 1, frozen: bool = False, several: int = 1, num_classes: int = 10
    ):
        super().__init__(num_classes=num_classes)
        self.groups, self.frozen, self.several = groups, frozen, several
        self.automatic_optimization = several == 1

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.several > 1:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        return loss

    def configure_optimizers(self):
        kept = [p for name, p in self.named_parameters() if not (self.frozen and "bias" in name)]
        if self.several > 1:
            return [torch.optim.Adam(kept[k :: self.several]) for k in range(self.several)]
        return torch.optim.Adam([{"params": kept[k :: self.groups]} for k in range(self.groups)])
"""


@pytest.fixture(scope="module")
def of_one_group(command: Commands) -> Path:
    (command.project / "grouped.py").write_text(OPTIMIZERS.lstrip())
    run = command(f"{GROUPED} --model grouped.Groups").run
    assert run is not None
    return run


GROUPED = "fit --config @digits --trainer.limit_train_batches 3 --trainer.logger false"
GROUPED += " --trainer.max_epochs 1"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            "--model.groups 2",
            "does not fit: loaded state dict has a different number of parameter groups",
        ),
        (
            "--model.frozen true",
            "does not fit: loaded state dict contains a parameter group that doesn't match",
        ),
        ("--model.several 2", "expected Adam, as it was saved, got Adam and Adam"),
        ("--model Classifier", "expected Adam, as it was saved, got AdamW"),
    ],
)
@pytest.mark.parametrize("way", ["--resume", "--ckpt_path"])
def test_another_optimizer_is_one_line(
    way: str, options: str, problem: str, of_one_group: Path, command: Commands, tmp_path: Path
) -> None:
    copy = tmp_path / of_one_group.name
    shutil.copytree(of_one_group, copy)
    outcome = command(f"fit {way} {copy} --trainer.max_epochs 2 {options}")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome
    said = outcome.err.replace("state does", "state: does")
    assert f"error: the optimizer's state: {problem}" in said
    assert "see --init_from" in outcome.err
    kept = (copy / "checkpoints" / "last.ckpt").read_bytes()
    assert kept == (of_one_group / "checkpoints" / "last.ckpt").read_bytes()


def test_a_new_run_says_what_it_takes_from_the_run_of_its_checkpoint(
    of_one_group: Path, command: Commands
) -> None:
    begun = command(f"fit --init_from {of_one_group.name} --trainer.max_epochs 2")
    assert begun.code == 0, begun
    (line,) = [line for line in begun.out.splitlines() if line.startswith("taken ")]
    assert line == "taken    from that run: all that no file and no flag gives"
    config = "--config @digits --trainer.max_epochs 2 --model grouped.Groups"
    begun = command(f"fit {config} --init_from {of_one_group.name}")
    (line,) = [line for line in begun.out.splitlines() if line.startswith("taken ")]
    assert line == "taken    from that run: trainer.logger False, trainer.limit_train_batches 3.0"


LOGS = '''
from odd_duck.model import Classifier

class Logs(Classifier):
    """Logs under any name, by hand too, where a checkpoint follows and where it does not."""

    def log_by_hand(self, name):
        self.logger.log_metrics({name: self.current_epoch}, step=self.global_step)

    def on_fit_start(self):
        self.log_by_hand("begins")

    def on_train_epoch_start(self):
        self.log_by_hand("starts")

    def on_train_epoch_end(self):
        self.log_by_hand("ends")

    def test_step(self, batch, batch_idx):
        self.log("test_loss", 1.0)
'''


def test_a_resumed_run_drops_the_rows_that_it_logs_again_and_no_others(command: Commands) -> None:
    (command.project / "logging_rows.py").write_text(LOGS.lstrip())
    base = GROUPED.replace("max_epochs 1", "max_epochs 2")
    line = f"{base} --model logging_rows.Logs --trainer.log_every_n_steps 1"
    run = command(f"{line} --test_after_fit true").run
    assert run is not None
    whole = command(line.replace("max_epochs 2", "max_epochs 4")).run
    assert whole is not None
    assert command(f"fit --resume {run} --trainer.max_epochs 4 --test_after_fit false").code == 0
    table, other = rows(run), rows(whole)
    assert [row["test_loss"] for row in table if row.get("test_loss")] == ["1.0"]
    for name in ("starts", "ends", "train/loss", "val/acc"):
        ours = [(row["step"], row[name]) for row in table if row[name]]
        assert ours == [(row["step"], row[name]) for row in other if row[name]], name
    assert len([row for row in table if row["begins"]]) == 2  # each start has logged it


@pytest.mark.parametrize("reader", ["test", "load", "sync"])
def test_whatever_reads_a_killed_run_writes_its_table(
    reader: str, of_one_group: Path, command: Commands, tmp_path: Path
) -> None:
    from odd_duck.engine import load

    killed = command.runs / f"killed-{reader}"
    shutil.copytree(of_one_group, killed)
    (killed / "metrics.csv").unlink()
    if reader == "test":
        assert command(f"test --ckpt_path {killed.name} --trainer.logger false").code == 0
    elif reader == "load":
        load(str(killed))
    else:
        command(f"sync {killed.name}")
    assert rows(killed) == rows(of_one_group)


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))
