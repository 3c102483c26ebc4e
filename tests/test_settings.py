"""Each setting alone and with each other one: a callback off, Lightning's switches, loggers."""

import csv
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

import pytest
import yaml
from command import Commands, Outcome
from wandb_record import recorded

OFF = [
    f"--callbacks.{name} null"
    for name in (
        "checkpoint",
        "last_checkpoint",
        "divergence",
        "early_stopping",
        "lr_monitor",
        "summaries",
    )
]
SETTINGS = [
    "--trainer.logger false",
    "--trainer.logger CSVLogger",
    "--trainer.logger TensorBoardLogger",
    "--trainer.enable_checkpointing false",
    "--trainer.fast_dev_run true",
    "--trainer.barebones true",
    "--trainer.enable_progress_bar false",
    *OFF,
    "--test_after_fit true",
]
DRY = {"--trainer.fast_dev_run true", "--trainer.barebones true"}  # Lightning takes one of them


AT_ONCE = 5  # more would hide what each one does


def go_together(settings: Sequence[str]) -> bool:
    options = {one.split()[0] for one in settings}
    return len(options) == len(settings) and not set(settings) >= DRY


def together() -> list[tuple[str, ...]]:
    """Return sets of settings such that each two that go together are in one of them.

    Source: the greedy construction of pairwise testing (Cohen and others, AETG, 1997).
    """
    missing = [pair for pair in combinations(SETTINGS, 2) if go_together(pair)]
    rows: list[tuple[str, ...]] = []
    while missing:
        row: tuple[str, ...] = missing[0]
        for setting in SETTINGS:
            pairs = [tuple(sorted((setting, one), key=SETTINGS.index)) for one in row]
            new = len(set(pairs) & set(missing)) * 2 > len(pairs)
            if new and len(row) < AT_ONCE and go_together([*row, setting]):
                row = tuple(sorted((*row, setting), key=SETTINGS.index))
        missing = [pair for pair in missing if not set(pair) <= set(row)]
        rows.append(row)
    return rows


def expected_files(settings: Iterable[str]) -> set[str]:
    """Return what a run with these settings leaves in its folder."""
    settings = set(settings)
    if settings & DRY:
        return set()
    files = {".lock", "config.yaml", "metrics.csv", "metrics.jsonl", "run.json"}
    saves = "--trainer.enable_checkpointing false" not in settings
    kinds = {"--callbacks.checkpoint null", "--callbacks.last_checkpoint null"}
    if saves and not kinds <= settings:
        files.add("checkpoints")
    loggers = [one.split()[1] for one in settings if one.startswith("--trainer.logger")]
    if loggers != ["false"]:
        files.add("lightning_logs" if loggers else "wandb")
    return files


SHORT = (
    "fit --config @digits --trainer.max_epochs 1 --trainer.limit_train_batches 2 "
    "--trainer.limit_val_batches 1 --trainer.log_every_n_steps 1 "
)


def assert_quiet(outcome: Outcome) -> None:
    assert outcome.error is None, outcome.error
    assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.parametrize("settings", [*((one,) for one in SETTINGS), *together()], ids=" ".join)
def test_settings_work_alone_and_together_and_leave_what_they_should(
    settings: tuple[str, ...], command: Commands
) -> None:
    outcome = command(SHORT + " ".join(settings))
    assert_quiet(outcome)
    files = {file.name for file in outcome.run.iterdir()} if outcome.run else set()
    assert files == expected_files(settings)
    if outcome.run is None:
        return
    header = (outcome.run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert ("test/acc" in header) == ("--test_after_fit true" in settings)
    assert ("lr-AdamW" in header) == ("--callbacks.lr_monitor null" not in settings)
    assert ("best     " in outcome.out) == ("--callbacks.summaries null" not in settings)
    saved = {file.name[:4] for file in outcome.run.glob("checkpoints/*")}
    if "checkpoints" in files:
        assert ("epoc" in saved) == ("--callbacks.checkpoint null" not in settings)
        assert ("last" in saved) == ("--callbacks.last_checkpoint null" not in settings)


def test_all_callbacks_can_be_off_at_once(command: Commands) -> None:
    outcome = command(f"{SHORT} {' '.join(OFF)} --trainer.logger false")
    assert_quiet(outcome)
    assert outcome.run is not None
    assert sorted(path.name for path in outcome.run.iterdir()) == [
        ".lock",
        "config.yaml",
        "metrics.csv",
        "metrics.jsonl",
        "run.json",
    ]


def test_a_link_to_the_last_checkpoint_stays_a_link(command: Commands) -> None:
    linked = "--callbacks.checkpoint.save_last link --callbacks.last_checkpoint null"
    run = command(f"{SHORT} --trainer.logger false {linked}").run
    assert run is not None
    assert (run / "checkpoints" / "last.ckpt").is_symlink()


def test_a_dry_run_leaves_nothing_behind(command: Commands) -> None:
    assert command("fit --config @digits --trainer.fast_dev_run true").run is None


@pytest.mark.parametrize(
    ("logger", "file"), [("CSVLogger", "hparams.yaml"), ("TensorBoardLogger", "events.*")]
)
def test_another_logger_writes_into_the_runs_folder_and_gets_the_configuration(
    logger: str, file: str, command: Commands
) -> None:
    run = command(f"{SHORT} --trainer.logger {logger}").run
    assert run is not None
    assert list(run.rglob(file))
    assert (
        yaml.safe_load(next(run.rglob("hparams.yaml")).read_text())["model"]["init_args"]["lr"]
        == 0.002
    )


def test_a_flag_changes_one_field_of_a_callback_and_an_overlay_too(
    command: Commands, tmp_path: Path
) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("callbacks:\n  checkpoint:\n    init_args:\n      save_top_k: 2\n")
    run = command(
        f"{SHORT} --trainer.logger false --config {overlay} --callbacks.early_stopping.patience 7"
    ).run
    assert run is not None
    callbacks = yaml.safe_load((run / "config.yaml").read_text())["callbacks"]
    checkpoint, early_stopping = (
        callbacks["checkpoint"]["init_args"],
        callbacks["early_stopping"]["init_args"],
    )
    assert (checkpoint["save_top_k"], checkpoint["monitor"]) == (2, "$monitor")
    assert (early_stopping["patience"], early_stopping["mode"]) == (7, "$mode")


def test_flags_win_over_files_wherever_they_stand(command: Commands, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model:\n  init_args:\n    lr: 0.5\n")
    words = f"--model.lr 0.25 --config @digits --config {overlay} --trainer.fast_dev_run true"
    assert "lr: 0.25" in command(f"fit {words} --print_config").out


@pytest.mark.parametrize(
    "line", ["--help", "fit --help", "test -h", "predict --help", "fit --model.help Classifier"]
)
def test_help_is_given_wherever_it_is_asked_for(line: str, command: Commands) -> None:
    outcome = command(line)
    assert (outcome.code, outcome.err) == (0, "")
    assert ("--model.lr" if "Classifier" in line else "--config") in outcome.out
    assert (
        all(verb in outcome.out for verb in ("fit", "validate", "test", "predict"))
        or line != "--help"
    )


def test_the_optimizer_and_its_schedule_are_chosen_by_flags(command: Commands) -> None:
    schedule = "--model.lr_scheduler OneCycleLR --model.lr_scheduler.max_lr 0.4"
    schedule += " --model.lr_scheduler.total_steps 100"
    run = command(
        f"{SHORT} --trainer.logger false --model.optimizer SGD --model.lr 0.4 {schedule}"
    ).run
    assert run is not None
    with (run / "metrics.csv").open() as file:
        rates = [float(row["lr-SGD"]) for row in csv.DictReader(file) if row["lr-SGD"]]
    assert rates[0] == pytest.approx(0.4 / 25)  # OneCycleLR begins there
    assert rates[1] > rates[0]  # and counts steps, not epochs


def test_the_loggers_options_are_plain_options(command: Commands) -> None:
    options = "--trainer.logger.project p --trainer.logger.name n --trainer.logger.tags+ a"
    options += " --trainer.logger.job_type j"
    run = command(f"{SHORT} {options} --trainer.logger.log_model true").run
    assert run is not None
    record = recorded(run)
    assert (record.project, record.job_type, record.id) == ("p", "j", run.name)
    assert len(list(run.glob("uploads/*.ckpt"))) == 2  # the best and the last, for `sync`


def test_another_model_and_its_data_need_flags_and_one_overlay_alone(
    command: Commands, tmp_path: Path
) -> None:
    overlay = tmp_path / "boring.yaml"
    overlay.write_text(
        "trainer: {max_epochs: 1, limit_train_batches: 2, log_every_n_steps: 1}\n"
        "callbacks: {checkpoint: {init_args: {monitor: null}}, early_stopping: null,"
        " summaries: null}\n"
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
