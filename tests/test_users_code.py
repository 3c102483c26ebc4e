"""What a team writes works as in plain Lightning: no right name is refused, no call fails."""

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
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
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
