"""What a team writes works as in plain Lightning: no right name is refused, no call fails."""

import copy
import csv
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from command import Commands, Outcome

THEIRS = """
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from odd_duck.data import Digits
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

class StageLast(BoringModel):
    def training_step(self, batch, batch_idx):
        loss = self.step(batch)
        self.log("loss_train", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("loss_val", self.step(batch))

class NotInSanity(BoringModel):
    def validation_step(self, batch, batch_idx):
        self.log("val/cheap", self.step(batch))
        if not self.trainer.sanity_checking:
            self.log("val/dear", self.step(batch))

class AtTheEnd(BoringModel):
    def on_train_epoch_end(self):
        self.log("late", 1.0)

class Logs(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log("theirs", 1.0)

class Nan(BoringModel):
    def validation_step(self, batch, batch_idx):
        self.log("val/loss", torch.tensor([float("nan"), 3.0, 2.0, 4.0][self.current_epoch]))

class Talks(BoringModel):
    def training_step(self, batch, batch_idx):
        self.logger.experiment.log({"anything": 1})
        self.logger.log_metrics({"tensor": torch.tensor(2.0)}, step=7)
        return self.step(batch)

    def configure_callbacks(self):
        return [ModelCheckpoint(filename="mine")]

class Alike(BoringModel):
    def training_step(self, batch, batch_idx):
        loss = self.step(batch)
        self.log("train/contrastive_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/contrastive_loss", self.step(batch))
        self.log("val/acc", 0.5)
        if not self.trainer.sanity_checking:
            self.log("val/acc_ema", 0.5)

class Computed(ModelCheckpoint):
    def _monitor_candidates(self, trainer):
        return {**super()._monitor_candidates(trainer), "sum": torch.tensor(trainer.global_step)}

class Notes(BoringModel):
    guarded = False

    def on_fit_start(self):
        run = self.logger.experiment
        run.config.update({"pool": "north"})
        run.summary["begun"] = True
        assert "lr" not in run.config
        assert list(run.config) == []
        assert run.config.get("lr", 3) == 3
        with run:
            run.log({"x": 1})
        if self.logger:
            type(self).guarded = True

class Rising(BoringModel):
    def validation_step(self, batch, batch_idx):
        self.log("val/acc", [0.1, 0.9, 0.2, 0.3][self.current_epoch])
        self.log("val/other", [0.4, 0.3, 0.2, 0.1][self.current_epoch])

class Brings(Rising):
    def configure_callbacks(self):
        return [Computed(filename="theirs", monitor="val/other", mode="max")]

class Threshold(BoringModel):
    def __init__(self):
        super().__init__()
        self.register_buffer("threshold", torch.tensor(float("nan")))
        self.statistics = torch.nn.BatchNorm1d(2)
        self.statistics.running_mean.fill_(float("nan"))

    def on_train_start(self):
        self.threshold = torch.tensor(float("nan"))

class OnlyTrain(Digits):
    val_dataloader = LightningDataModule.val_dataloader

class Sized(BoringModel):
    def __init__(self, num_classes: int):
        super().__init__()
        self.save_hyperparameters()
        assert num_classes == 5
"""
NOTHING_WATCHED = (
    "--callbacks.checkpoint.monitor null --callbacks.early_stopping null "
    "--callbacks.summaries null "
)
BORING = (
    " --data lightning.pytorch.demos.boring_classes.BoringDataModule "
    "--trainer.limit_train_batches 2 "
)


@pytest.fixture(scope="module", autouse=True)
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    file = tmp_path_factory.mktemp("theirs") / "theirs.py"
    file.write_text(THEIRS)
    with pytest.MonkeyPatch.context() as path:
        path.syspath_prepend(file.parent)
        yield


def fit(command: Commands, model: str, words: str = "", epochs: int = 2) -> Outcome:
    base = f"fit --model theirs.{model}{BORING}--trainer.log_every_n_steps 1 "
    base += f"--trainer.max_epochs {epochs} "
    outcome = command(
        base + NOTHING_WATCHED + words + ("" if "logger" in words else " --trainer.logger false")
    )
    assert outcome.error is None, outcome.error
    assert (outcome.code, outcome.err) == (0, ""), outcome.err
    return outcome


def rows(outcome: Outcome) -> list[dict[str, str]]:
    assert outcome.run is not None
    with (outcome.run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("StageLast", "--callbacks.checkpoint.monitor loss_train"),
        ("StageLast", "--callbacks.summaries.metrics '{loss_train: min, loss_val: min}'"),
        ("NotInSanity", "--callbacks.checkpoint.monitor val/dear"),
        ("AtTheEnd", "--callbacks.summaries.metrics '{late: min}'"),
        (
            "StageLast",
            "--callbacks.summaries.metrics '{theirs: min}' --trainer.callbacks+=theirs.Logs",
        ),
        ("StageLast", "--callbacks.checkpoint.monitor step --callbacks.checkpoint.mode max"),
        (
            "StageLast",
            "--callbacks.checkpoint.monitor loss_val --trainer.check_val_every_n_epoch 2",
        ),
        ("NotInSanity", "--callbacks.checkpoint.monitor val/dear --trainer.num_sanity_val_steps 0"),
        ("Alike", "--callbacks.checkpoint.monitor train/contrastive_loss"),
        ("Alike", "--callbacks.checkpoint.monitor val/acc_ema"),
        (
            "Alike",
            "--callbacks.checkpoint.monitor val/aces --callbacks.checkpoint.every_n_epochs 3",
        ),
        ("Alike", "--trainer.callbacks theirs.Computed --trainer.callbacks.monitor sum"),
        ("Alike", "--callbacks.summaries.metrics '{val/contrastive_los: min}'"),
        (
            "Alike",
            "--callbacks.early_stopping EarlyStopping --callbacks.early_stopping.monitor val/ac"
            " --callbacks.early_stopping.strict false",
        ),
        ("Threshold", "--callbacks.divergence.metrics []"),
    ],
)
def test_no_name_is_mistaken_for_a_typo(model: str, words: str, command: Commands) -> None:
    fit(command, model, words)


def test_a_run_that_ends_before_its_first_validation_is_no_failure(command: Commands) -> None:
    outcome = command("fit --config @digits --trainer.max_steps 3 --trainer.logger false")
    assert (outcome.code, outcome.error) == (0, None)
    assert outcome.run is not None
    assert re.search(rf"saved    .*{outcome.run.name}/checkpoints/last.ckpt", outcome.out)


def test_a_value_that_is_not_a_number_is_never_the_best(command: Commands) -> None:
    options = "--callbacks.summaries.metrics '{val/loss: min}' --callbacks.divergence null"
    assert "best     val/loss 2  epoch 2" in fit(command, "Nan", options, 4).out


def test_without_a_logger_theirs_can_still_be_called_and_checkpoints_stay_in_the_run(
    command: Commands,
) -> None:
    outcome = fit(command, "Talks", "--trainer.logger false")
    assert outcome.run is not None
    assert {row["tensor"] for row in rows(outcome)} == {"2.0", ""}
    assert (outcome.run / "checkpoints" / "mine.ckpt").exists()


def test_an_argument_that_data_usually_gives_can_be_given_and_is_kept(command: Commands) -> None:
    run = fit(command, "Sized", "--model.num_classes 5").run
    assert run is not None
    assert (
        yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["num_classes"] == 5
    )
    for line in (
        f"fit --config {run}/config.yaml",
        f"test --ckpt_path {run.name} --trainer.logger false",
    ):
        assert command(line).error is None


@pytest.mark.parametrize(
    "callback",
    [
        "theirs.Logs",
        "[{class_path: theirs.Logs}, {class_path: RichModelSummary}]",
        "{class_path: theirs.Logs}",
    ],
)
def test_a_callback_may_be_given_alone_or_in_a_list(callback: str, command: Commands) -> None:
    line = f"fit --model theirs.StageLast{BORING}--trainer.logger false --trainer.max_epochs 1"
    words = [*f"{line} {NOTHING_WATCHED}".split(), "--trainer.log_every_n_steps", "1"]
    outcome = command([*words, "--trainer.callbacks", callback])
    assert (outcome.code, outcome.error, outcome.err) == (0, None, "")


def test_what_was_asked_for_is_said(command: Commands, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(command, "StageLast", "--trainer.profiler simple")
    assert "Profiler Report" in caplog.text


def test_a_run_that_begins_at_anothers_checkpoint_has_a_best_of_its_own(command: Commands) -> None:
    first = command("fit --config @digits --trainer.max_epochs 3 --trainer.logger false")
    assert first.run is not None
    words = "--trainer.max_epochs 4 --trainer.logger false --trainer.limit_val_batches 1"
    second = command(f"fit --ckpt_path {first.run.name}:last {words}")
    assert (second.code, second.err) == (0, ""), second.err
    assert second.run is not None
    assert "epoch 3\n" in second.out.partition("best  ")[2]
    assert re.search(rf"from     .*{first.run.name}/checkpoints/last.ckpt", second.out)
    state = torch.load(second.run / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["epoch"] == 3


def test_the_printed_command_finds_the_run_wherever_it_is(
    command: Commands, tmp_path: Path
) -> None:
    outcome = command(f"fit --config @digits --config @debug --runs_root {tmp_path}")
    assert outcome.code == 0
    assert command(outcome.out.splitlines()[-1].partition("main.py ")[2]).code == 0


@pytest.mark.parametrize(
    "words",
    [
        "--trainer.limit_val_batches 0",
        "--data theirs.OnlyTrain --model.num_classes 10",
        "--trainer.barebones true",
        "--trainer.limit_val_batches 0 --monitor val/ac",
    ],
)
def test_without_a_validation_the_defaults_train_as_in_stock(words: str, command: Commands) -> None:
    line = "fit --config @digits --trainer.max_epochs 2 --trainer.limit_train_batches 2"
    outcome = command(f"{line} --trainer.logger false {words}")
    assert (outcome.code, outcome.error) == (0, None), outcome.err
    assert "error" not in outcome.err


def test_a_name_that_nothing_needs_is_said_once(command: Commands) -> None:
    words = "--callbacks.summaries.metrics '{val/contrastive_los: min}'"
    said = [line for line in fit(command, "Alike", words).out.splitlines() if "metrics " in line]
    assert len(said) == 1
    assert "callbacks.summaries.metrics: no metric named val/contrastive_los was logged" in said[0]
    assert said[0].endswith("did you mean val/contrastive_loss?")


WATCHED = "--monitor val/acc --mode max --callbacks.checkpoint.monitor val/acc "


@pytest.mark.parametrize(
    "words",
    [
        "--trainer.callbacks ModelCheckpoint",
        "--trainer.callbacks ModelCheckpoint --trainer.callbacks.monitor val/other",
        "--trainer.callbacks ModelCheckpoint --trainer.callbacks.every_n_train_steps 1",
    ],
)
def test_best_is_what_callbacks_checkpoint_says_beside_another(
    words: str, command: Commands
) -> None:
    more = f"{WATCHED}--callbacks.checkpoint.mode max --test_after_fit true {words}"
    outcome = fit(command, "Rising", f"{more} --callbacks.summaries.metrics '{{val/acc: max}}'", 4)
    assert "best     val/acc 0.9" in outcome.out
    assert re.search(r"saved    \S+epoch-001-step-000004.ckpt", outcome.out)
    assert outcome.run is not None
    tested = command(f"test --ckpt_path {outcome.run.name} --trainer.logger false")
    assert re.search(r"from     \S+epoch-001-step-000004.ckpt", tested.out)


def test_another_checkpoint_serves_where_callbacks_checkpoint_is_null(command: Commands) -> None:
    words = "--callbacks.checkpoint null --callbacks.early_stopping null --callbacks.summaries null"
    other = "--trainer.callbacks ModelCheckpoint --trainer.callbacks.monitor val/other"
    line = f"fit --model theirs.Rising{BORING}--trainer.log_every_n_steps 1 --trainer.max_epochs 2"
    outcome = command(f"{line} {words} {other} --trainer.logger false")
    assert (outcome.code, outcome.err) == (0, ""), outcome.err
    assert "best     by val/other of a ModelCheckpoint that is not callbacks.checkpoint" in (
        outcome.out
    )


def test_what_stands_in_for_a_wandb_run_takes_what_a_run_takes_and_pretends_no_value(
    command: Commands,
) -> None:
    from odd_duck.engine.distributed import DUMMY_RUN as run

    assert "lr" not in run.config
    assert [*run.config] == [*run.config.keys()] == [*run.summary.items()] == []
    assert dict(run.config) == {}
    assert len(run.summary) == 0
    assert run.config.get("lr", 3) == 3
    run.config.update({"lr": 1}, allow_val_change=True)
    run.summary["best"] = 1
    run.tags += ("new",)
    del run.summary["best"]
    with run as same:
        same.log({"a": 1}, step=run.step + 1)
    assert not run.step > 3
    assert f"{run.name:>10}{run.step:03d}" == ""
    run.watch(1).unwatch().define_metric("a").x = 3
    assert copy.deepcopy(run) is run


def test_a_checkpoint_that_a_model_brings_replaces_ours_as_in_stock(command: Commands) -> None:
    outcome = fit(command, "Brings", f"{WATCHED}--callbacks.checkpoint.mode max", 4)
    assert "best     by val/other of a Computed that is not callbacks.checkpoint" in outcome.out
    assert re.search(r"saved    \S+theirs.ckpt", outcome.out)


@pytest.mark.parametrize(
    ("flags", "option", "hint"),
    [
        ("--callbacks.early_stopping.monitor vall/acc", "early_stopping.monitor", "val/acc"),
        ("--callbacks.early_stopping.monitor train/los", "early_stopping.monitor", "train/loss"),
        ("--callbacks.summaries.metrics.val/ac max", "summaries.metrics", "val/acc"),
    ],
)
def test_a_name_that_does_no_harm_is_a_line_and_not_an_end(
    flags: str, option: str, hint: str, command: Commands
) -> None:
    brief = "--trainer.max_epochs 1 --trainer.limit_train_batches 2 --trainer.logger false"
    outcome = command(f"fit --config @digits {brief} --trainer.log_every_n_steps 1 {flags}")
    assert (outcome.code, outcome.err) == (0, ""), outcome.err
    assert re.search(rf"metrics  callbacks.{option}: .*; did you mean {hint}\?", outcome.out)


@pytest.mark.parametrize(
    ("words", "has_logger"),
    [
        ("--trainer.logger false", False),
        ("--trainer.fast_dev_run true --trainer.logger.offline true", True),
        ("--trainer.fast_dev_run true --trainer.logger false", False),
    ],
)
def test_what_a_model_calls_on_its_logger_does_nothing_where_there_is_none(
    words: str, has_logger: bool, command: Commands
) -> None:
    import theirs  # type: ignore[import-not-found]

    theirs.Notes.guarded = False
    fit(command, "Notes", words, 1)
    assert theirs.Notes.guarded is has_logger
