"""Stock and ours side by side: a plain LightningCLI, and a baked project with the same flags.

Each case is a line of flags that both take. What is trained and evaluated, in which order, the
weights, the values that were logged and how the command ended must be equal. The differences that
are wanted are one list in docs/decisions.md; none of them is among these cases.
"""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks
import pytest
import torch
from command import Commands, Outcome
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI

CODE = '''
"""A model and data that write down what is done with them, for stock and for ours."""

import hashlib
import json
import os

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, Dataset


class Rows(Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"row": index, "x": torch.full((4,), index / self.count)}


class Data(LightningDataModule):
    def __init__(self, batch_size: int = 4, validates: bool = True):
        super().__init__()
        self.batch_size, self.validates = batch_size, validates

    def loader(self, count):
        return DataLoader(Rows(count), batch_size=self.batch_size)

    def train_dataloader(self):
        return self.loader(26)

    def val_dataloader(self):
        return self.loader(10) if self.validates else []

    def test_dataloader(self):
        return self.loader(6)


class Traced(LightningModule):
    def __init__(self, lr: float = 0.05, fails_at: int = -1):
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.fails_at, self.trace = lr, fails_at, []
        self.backbone, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.backbone(x))).squeeze(1)

    def loss(self, batch, stage):
        self.trace.append([stage, batch["row"].tolist()])
        return (self(batch["x"]) - batch["x"].sum(1)).square().mean()

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fails_at:
            raise ValueError("of the user")
        loss = self.loss(batch, "train")
        self.log("train/loss", loss, on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch, "val")
        self.log("val/loss", loss)
        self.log("val/acc", 1 / (1 + loss))

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.loss(batch, "test"))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.lr)

    def digest(self):
        weights = b"".join(value.detach().float().numpy().tobytes() for value in self.parameters())
        return hashlib.sha256(weights).hexdigest()

    def on_fit_start(self):
        self.trace.append(["fit", self.digest()])

    def teardown(self, stage):
        trainer = self.trainer
        values = {name: value.item() for name, value in trainer.callback_metrics.items()}
        after = {
            "trace": self.trace,
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "weights": self.digest(),
            "values": dict(sorted(values.items())),
            "logger": bool(self.logger),
            "stopped": bool(trainer.should_stop),
        }
        with open(os.environ["TRACE"], "a") as stream:
            stream.write(json.dumps(after) + "\\n")


class Manual(Traced):
    """Several optimizers, by hand."""

    automatic_optimization = property(lambda self: False, lambda self, value: None)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer in (first, second):
            optimizer.zero_grad()
            loss = self.loss(batch, "train")
            self.manual_backward(loss)
            optimizer.step()
        self.log("train/loss", loss)

    def configure_optimizers(self):
        first = torch.optim.SGD(self.backbone.parameters(), self.lr)
        return first, torch.optim.SGD(self.head.parameters(), self.lr)


class Plateau(Traced):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        schedule = {"scheduler": schedule, "monitor": "val/loss"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class Silent(Traced):
    """Logs nothing, and has no validation."""

    validation_step = LightningModule.validation_step

    def training_step(self, batch, batch_idx):
        return self.loss(batch, "train")


class Brings(Traced):
    """Brings callbacks."""

    def configure_callbacks(self):
        from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

        stops = EarlyStopping("train/loss", patience=1, mode="max")
        return [stops, ModelCheckpoint(monitor="val/acc", mode="max", save_top_k=2)]


class Buffers(Traced):
    """A buffer that is NaN until the end, an epoch's own metric, and a value every other epoch."""

    def __init__(self, lr: float = 0.05):
        super().__init__(lr)
        self.register_buffer("threshold", torch.tensor(float("nan")))

    def on_train_epoch_end(self):
        if self.current_epoch % 2:
            self.log("train/rare", float(self.current_epoch))


def size_of(batch):
    return len(batch["row"])


class Guards(Callback):
    """Asks what code of others asks."""

    def on_train_epoch_end(self, trainer, pl_module):
        assert trainer.logger is None or trainer.logger.experiment is not None
        pl_module.trace.append(["logger", pl_module.logger is not None and bool(pl_module.logger)])
'''
CALLBACKS = "lightning.pytorch.callbacks"
# A line of flags for each callback that Lightning exports; None is what is no callback by itself.
EXPORTED: dict[str, str | None] = {
    "BackboneFinetuning": "--trainer.callbacks.unfreeze_backbone_at_epoch 1",
    "BaseFinetuning": None,
    "BasePredictionWriter": None,
    "BatchSizeFinder": "--trainer.callbacks.max_trials 2 --trainer.callbacks.steps_per_trial 1",
    "Callback": "",
    "Checkpoint": "",
    "DeviceStatsMonitor": "--trainer.callbacks.cpu_stats true",
    "EMAWeightAveraging": "--trainer.callbacks.decay 0.9",
    "EarlyStopping": "--trainer.callbacks.monitor val/loss --trainer.callbacks.patience 1",
    "GradientAccumulationScheduler": '--trainer.callbacks.scheduling {"1":2}',
    "LambdaCallback": "",
    "LearningRateFinder": "--trainer.callbacks.num_training_steps 20",
    "LearningRateMonitor": "",
    "ModelCheckpoint": "--trainer.callbacks.monitor val/loss --trainer.callbacks.save_top_k 2",
    "ModelPruning": "--trainer.callbacks.pruning_fn l1_unstructured",
    "ModelSummary": "",
    "OnExceptionCheckpoint": "--trainer.callbacks.dirpath FOLDER",
    "ProgressBar": None,
    "RichModelSummary": "",
    "RichProgressBar": "",
    "SpikeDetection": "--trainer.callbacks.exclude_batches_path FOLDER/spikes.json",
    "StochasticWeightAveraging": "--trainer.callbacks.swa_lrs 0.02"
    " --trainer.callbacks.swa_epoch_start 1",
    "TQDMProgressBar": "",
    "ThroughputMonitor": None,  # takes a function; see the case
    "Timer": "--trainer.callbacks.duration 00:00:01:00",
    "WeightAveraging": "",
}
CSV = "--trainer.logger CSVLogger --trainer.logger.save_dir FOLDER"
CASES = {
    **{
        f"callback {name}": f"--trainer.callbacks {CALLBACKS}.{name} {flags} {CSV}"
        for name, flags in EXPORTED.items()
        if flags is not None
    },
    "plain": "",
    "a logger of Lightning's": CSV,
    "guards without a logger": "--trainer.callbacks traced.Guards",
    "guards with a logger": f"--trainer.callbacks traced.Guards {CSV}",
    "fast_dev_run": f"--trainer.fast_dev_run 2 {CSV}",
    "barebones": "--trainer.barebones true",
    "no validation": "--trainer.limit_val_batches 0",
    "no validation loader": "--data.validates false",
    "no sanity check": "--trainer.num_sanity_val_steps 0",
    "a whole sanity check": "--trainer.num_sanity_val_steps -1",
    "validation within an epoch": "--trainer.val_check_interval 2",
    "validation by fraction": "--trainer.val_check_interval 0.5",
    "validation by time": "--trainer.val_check_interval 00:00:00:01",
    "validation every other epoch": "--trainer.check_val_every_n_epoch 2",
    "max_steps": "--trainer.max_steps 9",
    "max_time": "--trainer.max_time 00:00:10:00",
    "min_epochs": "--trainer.min_epochs 2",
    "limits": "--trainer.limit_train_batches 0.5 --trainer.limit_val_batches 1",
    "overfit": "--trainer.overfit_batches 2",
    "accumulation": "--trainer.accumulate_grad_batches 3",
    "clipping": "--trainer.gradient_clip_val 0.1 --trainer.gradient_clip_algorithm value",
    "an option of long ago": "--trainer.track_grad_norm 2",
    "bfloat16": "--trainer.precision bf16-mixed",
    "double": "--trainer.precision 64",
    "anomaly": "--trainer.detect_anomaly true",
    "profiler": "--trainer.profiler simple",
    "deterministic": "--trainer.deterministic true",
    "reload": "--trainer.reload_dataloaders_every_n_epochs 1",
    "inference": "--trainer.inference_mode false",
    "async": "--trainer.plugins AsyncCheckpointIO",
    "own sampler": "--trainer.use_distributed_sampler false",
    "no checkpoints": "--trainer.enable_checkpointing false",
    "ddp": "--trainer.strategy ddp --trainer.use_distributed_sampler false",
    "manual": "--model traced.Manual",
    "plateau": "--model traced.Plateau",
    "silent": "--model traced.Silent",
    "brings callbacks": "--model traced.Brings",
    "buffers": "--model traced.Buffers",
    "a metric of the training": "--trainer.callbacks EarlyStopping"
    " --trainer.callbacks.monitor train/loss --trainer.callbacks.patience 1",
    "a metric that is rare": "--model traced.Buffers --trainer.callbacks EarlyStopping"
    " --trainer.callbacks.monitor train/rare --trainer.callbacks.strict false",
    "a metric that never is": "--trainer.callbacks EarlyStopping"
    " --trainer.callbacks.monitor val/f1 --trainer.callbacks.strict false",
    "a metric that never is, strict": "--trainer.callbacks EarlyStopping"
    " --trainer.callbacks.monitor val/f1",
    "a checkpoint by a metric of some epochs": "--model traced.Buffers"
    " --trainer.callbacks ModelCheckpoint --trainer.callbacks.monitor train/rare"
    " --trainer.callbacks.every_n_epochs 2",
    "an error of the user": "--model.fails_at 5",
    "an error and OnExceptionCheckpoint": "--model.fails_at 5"
    f" --trainer.callbacks {CALLBACKS}.OnExceptionCheckpoint --trainer.callbacks.dirpath FOLDER",
    "throughput": f"--trainer.callbacks {CALLBACKS}.ThroughputMonitor"
    f" --trainer.callbacks.batch_size_fn traced.size_of {CSV}",
    "a class that is not there": "--model traced.Trased",
}

OURS_ALONE = {"callback Timer"}  # jsonargparse cannot write its default for stock
FIXED = "--seed_everything 7 --trainer.max_epochs 3 --trainer.accelerator cpu --trainer.devices 1"
OURS = "--monitor null --callbacks.divergence null --callbacks.lr_monitor null"
OURS += " --callbacks.checkpoint null --callbacks.last_checkpoint null"
OURS += " --callbacks.early_stopping null --callbacks.summaries null"
# The default that may end a training, and the one whose values are beside the model's.
DEFAULTS = "--callbacks.early_stopping null --callbacks.lr_monitor null"


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Ends the process group that DDP leaves in this process."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def traced(command: Commands) -> Commands:
    (command.project / "traced.py").write_text(CODE.lstrip())
    return command


def stock(words: list[str]) -> None:
    LightningCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        args=words,
    )


def words_of(flags: str, folder: Path) -> list[str]:
    line = f"fit --model traced.Traced --data traced.Data {FIXED} {flags}"
    if "--model traced" in flags:
        line = line.replace("--model traced.Traced ", "", 1)
    if "--trainer.logger" not in flags:
        line += " --trainer.logger false"
    words = shlex.split(line.replace('{"1":2}', "'{\"1\":2}'"))
    return [word.replace("FOLDER", str(folder)) for word in words]


def trace(
    commands: Commands, words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Outcome]:
    """Run a command, and return what the model saw of it."""
    file = folder / "trace.jsonl"
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("TRACE", str(file))
    monkeypatch.chdir(folder)
    outcome = commands(words)
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines], outcome


def differences(found: list[Any], expected: list[Any]) -> list[str]:
    """Return what differs between what the model saw, by name."""
    if len(found) != len(expected):
        return [f"teardown: {len(found)}, not {len(expected)}"]
    return [
        f"{name}: {one[name]}, not {other[name]}"
        for one, other in zip(found, expected, strict=True)
        for name in one
        if one[name] != other[name]
    ]


def test_each_callback_that_lightning_exports_has_a_line() -> None:
    assert set(lightning.pytorch.callbacks.__all__) == set(EXPORTED)


@pytest.mark.parametrize("case", CASES)
def test_ours_does_what_stock_does(
    case: str, traced: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Commands(stock, traced.project, tmp_path)
    flags = CASES[case]
    words = words_of(flags, tmp_path / "stock")
    expected, there = trace(plain, words, tmp_path / "stock", monkeypatch)
    for name, more in (("bare", OURS), ("defaults", DEFAULTS)):
        words = words_of(f"{flags} {more}", tmp_path / name)
        found, ours = trace(traced, words, tmp_path / name, monkeypatch)
        if case in OURS_ALONE:
            assert (bool(there.code), ours.code) == (True, 0)
            continue
        assert bool(ours.code) == bool(there.code), f"{name}: {ours}\nstock: {there}"
        assert not differences(found, expected), name
        if there.error is not None and "of the user" in str(there.error):
            assert type(ours.error) is type(there.error)


def test_an_error_in_an_epoch_that_began_in_plain_lightning_leaves_a_checkpoint_that_resumes(
    traced: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = f"{CASES['an error and OnExceptionCheckpoint']} {OURS}"
    plain = Commands(stock, traced.project, tmp_path)
    trace(plain, words_of(fails.replace(OURS, ""), tmp_path), tmp_path, monkeypatch)
    # With this callback, Lightning resumes from its file where it is there.
    assert "of the user" in str(trace(traced, words_of(fails, tmp_path), tmp_path, monkeypatch)[1])
    mended = fails.replace("fails_at 5", "fails_at -1")
    found, outcome = trace(traced, words_of(mended, tmp_path), tmp_path, monkeypatch)
    assert outcome.code == 0, outcome
    assert found[-1]["step"] == 21
