"""Each setting works, alone and together with each other one: a named callback off, Lightning's switches, loggers."""

import csv
from itertools import combinations
from pathlib import Path

import pytest
import yaml
from command import Commands, Outcome
from wandb_record import recorded

SETTINGS = [
    "--trainer.logger false",
    "--trainer.logger CSVLogger",
    "--trainer.logger TensorBoardLogger",
    "--trainer.enable_checkpointing false",
    "--trainer.fast_dev_run true",
    "--trainer.barebones true",
    "--trainer.enable_progress_bar false",
    "--callbacks.checkpoint null",
    "--callbacks.backup null",
    "--callbacks.divergence null",
    "--callbacks.early_stopping null",
    "--callbacks.lr_monitor null",
    "--callbacks.summaries null",
    "--test_after_fit true",
]
TOGETHER = [
    pair
    for pair in combinations(SETTINGS, 2)
    if len({setting.split()[0] for setting in pair}) == 2
    and set(pair) != {"--trainer.fast_dev_run true", "--trainer.barebones true"}  # Lightning: one or the other
]
SHORT = (
    "fit --config @digits --trainer.max_epochs 1 --trainer.limit_train_batches 2 --trainer.limit_val_batches 1 "
    "--trainer.log_every_n_steps 1 "
)


def assert_quiet(outcome: Outcome) -> None:
    assert outcome.error is None, outcome.error
    assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_works_alone_without_a_word_of_complaint(setting: str, command: Commands) -> None:
    assert_quiet(command(SHORT + setting))


@pytest.mark.parametrize("pair", TOGETHER, ids=" ".join)
def test_two_settings_work_together(pair: tuple[str, str], command: Commands) -> None:
    words = " ".join(pair)
    assert_quiet(command(SHORT + words + (" --trainer.logger false" if "logger" not in words else "")))


def test_all_callbacks_can_be_off_at_once(command: Commands) -> None:
    off = " ".join(setting for setting in SETTINGS if setting.endswith("null"))
    outcome = command(f"{SHORT} {off} --trainer.logger false")
    assert_quiet(outcome)
    assert outcome.run is not None
    assert sorted(path.name for path in outcome.run.iterdir()) == [".lock", "config.yaml", "metrics.csv"]


def test_a_link_to_the_last_checkpoint_stays_a_link(command: Commands) -> None:
    run = command(f"{SHORT} --trainer.logger false --callbacks.checkpoint.save_last link --callbacks.backup null").run
    assert run is not None
    assert (run / "checkpoints" / "last.ckpt").is_symlink()


def test_a_dry_run_leaves_nothing_behind(command: Commands) -> None:
    assert command("fit --config @digits --trainer.fast_dev_run true").run is None


@pytest.mark.parametrize(("logger", "file"), [("CSVLogger", "hparams.yaml"), ("TensorBoardLogger", "events.*")])
def test_another_logger_writes_into_the_runs_folder_and_gets_the_configuration(
    logger: str, file: str, command: Commands
) -> None:
    run = command(f"{SHORT} --trainer.logger {logger}").run
    assert run is not None
    assert list(run.rglob(file))
    assert yaml.safe_load(next(run.rglob("hparams.yaml")).read_text())["model"]["init_args"]["lr"] == 0.002


def test_a_flag_changes_one_field_of_a_callback_and_an_overlay_too(command: Commands, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("callbacks:\n  checkpoint:\n    init_args:\n      save_top_k: 2\n")
    run = command(f"{SHORT} --trainer.logger false --config {overlay} --callbacks.early_stopping.patience 7").run
    assert run is not None
    callbacks = yaml.safe_load((run / "config.yaml").read_text())["callbacks"]
    checkpoint, early_stopping = callbacks["checkpoint"]["init_args"], callbacks["early_stopping"]["init_args"]
    assert (checkpoint["save_top_k"], checkpoint["monitor"]) == (2, "val/acc")
    assert (early_stopping["patience"], early_stopping["mode"]) == (7, "max")


def test_flags_win_over_files_wherever_they_stand(command: Commands, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model:\n  init_args:\n    lr: 0.5\n")
    words = f"--model.lr 0.25 --config @digits --config {overlay} --trainer.fast_dev_run true --print_config"
    assert "lr: 0.25" in command(f"fit {words}").out


@pytest.mark.parametrize("line", ["--help", "fit --help", "test -h", "predict --help", "fit --model.help Classifier"])
def test_help_is_given_wherever_it_is_asked_for(line: str, command: Commands) -> None:
    outcome = command(line)
    assert (outcome.code, outcome.err) == (0, "")
    assert ("--model.lr" if "Classifier" in line else "--config") in outcome.out
    assert all(verb in outcome.out for verb in ("fit", "validate", "test", "predict")) or line != "--help"


def test_the_optimizer_and_its_schedule_are_chosen_by_flags(command: Commands) -> None:
    schedule = "--model.lr_scheduler OneCycleLR --model.lr_scheduler.max_lr 0.4 --model.lr_scheduler.total_steps 100"
    run = command(f"{SHORT} --trainer.logger false --model.optimizer SGD --model.lr 0.4 {schedule}").run
    assert run is not None
    with (run / "metrics.csv").open() as file:
        rates = [float(row["lr-SGD"]) for row in csv.DictReader(file) if row["lr-SGD"]]
    assert rates[0] == pytest.approx(0.4 / 25)  # OneCycleLR begins there
    assert rates[1] > rates[0]  # and counts steps, not epochs


def test_the_loggers_options_are_plain_options(command: Commands) -> None:
    options = "--trainer.logger.project p --trainer.logger.name n --trainer.logger.tags+ a --trainer.logger.job_type j"
    run = command(f"{SHORT} {options} --trainer.logger.log_model true").run
    assert run is not None
    record = recorded(run)
    assert (record.project, record.job_type, record.id) == ("p", "j", run.name)
    assert len(list(run.glob("uploads/*.ckpt"))) == 2  # the best and the last, for `sync`


def test_another_model_and_its_data_need_flags_and_one_overlay_alone(command: Commands, tmp_path: Path) -> None:
    overlay = tmp_path / "boring.yaml"
    overlay.write_text(
        "trainer: {max_epochs: 1, limit_train_batches: 2, log_every_n_steps: 1}\n"
        "callbacks: {checkpoint: {init_args: {monitor: null}}, early_stopping: null, summaries: null}\n"
    )
    boring = "lightning.pytorch.demos.boring_classes.Boring"
    outcome = command(f"fit --model {boring}Model --data {boring}DataModule --config {overlay}")
    assert_quiet(outcome)
    assert outcome.run is not None
    tested = command(f"test --ckpt_path {outcome.run.name} --trainer.logger false")
    assert_quiet(tested)


def test_a_run_that_exists_is_neither_trained_over_nor_changed_by_a_test(
    command: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "--trainer.logger false --trainer.limit_test_batches 1"
    run = command(SHORT + words).run
    assert run is not None
    before = {path: path.read_bytes() for path in (run / "config.yaml", *run.glob("checkpoints/*"))}
    monkeypatch.setenv("WANDB_RUN_ID", run.name)
    again = command(SHORT + words)
    assert (again.code, again.run) == (2, None)
    assert run.name in again.err
    assert_quiet(command(f"test --ckpt_path {run.name} {words}"))
    assert "test/acc" in (run / "metrics.csv").read_text().splitlines()[0]
    assert {path: path.read_bytes() for path in before} == before
