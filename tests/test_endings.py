"""Any end of a run leaves its last checkpoint, a true exit code, truth in W&B and no process."""

import csv
import importlib
import math
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bakery import environment
from command import Commands, Outcome
from conftest import Bake
from lightning.pytorch import Callback, LightningDataModule
from torch.utils.data import DataLoader, Dataset
from wandb_record import recorded
from wandb_server import Run as Sent
from wandb_server import WandbServer

ACT = " --trainer.callbacks+=acts.Act --trainer.callbacks.what "
FIT = "fit --config configs/digits.yaml --trainer.max_epochs 4"
BRIEF = (
    "fit --config @digits --trainer.max_epochs 3 --trainer.log_every_n_steps 1"
    " --trainer.limit_train_batches 6"
    " --callbacks.early_stopping null"
)
SLURM = {
    "JOB_ID": "77",
    "JOB_NAME": "train",
    "NTASKS": "1",
    "PROCID": "0",
    "LOCALID": "0",
    "NODEID": "0",
}
SCONTROL = """#!/bin/sh
echo "$@" > "$HOME/asked"
ls "$RUNS_ROOT"/*/checkpoints >> "$HOME/asked"
"""
CASES = {  # how each of the processes ends
    # Waits for batches that are not loaded yet.
    "ctrl_c": ACT
    + "group_sigint --trainer.callbacks.step 4 --trainer.accumulate_grad_batches 9"
    + " --data.num_workers 2 --trainer.logger.log_model true",
    "sigterm": ACT + "group_sigterm --data.num_workers 2 --trainer.logger.log_model true",
    "requeue": ACT + "SIGUSR1 --trainer.logger.log_model true",
    "full": ACT + "fill_the_disk",
    "table": ACT + "fill_the_table --trainer.logger false",
}


@dataclass(frozen=True)
class Ended:
    code: int
    screen: str
    seconds: float  # since what ended it
    run: Path
    sent: Sent | None
    left: list[str]
    home: Path

    @property
    def step(self) -> int:
        return int(read(self.run / "checkpoints" / "last.ckpt")["global_step"])


def read(checkpoint: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(checkpoint, weights_only=True)
    return content


def alive(mark: str) -> list[str]:
    """The commands of all processes that have a text in their environment."""
    commands = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                commands.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            pass
    return commands


@pytest.fixture(scope="module")
def ended(bake: Bake, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ended]]:
    """One run for each case, as separate processes that send to a server, two at a time."""
    base = tmp_path_factory.mktemp("e")
    project = bake(base)

    def end(case: str) -> Ended:
        home = base / case
        env = environment(home) | server.env()
        env |= {"RUNS_ROOT": str(home / "runs"), "PYTHONPATH": str(Path(__file__).parent)}
        env |= {"WANDB_RUN_ID": f"run-{case}", "OMP_NUM_THREADS": "1"}
        if case == "requeue":
            env |= {f"SLURM_{name}": value for name, value in SLURM.items()}
            (home / "scontrol").write_text(SCONTROL)
            (home / "scontrol").chmod(0o755)
            env["PATH"] = f"{home}:{env['PATH']}"
        command = [sys.executable, "main.py", *shlex.split(FIT + CASES[case])]
        process = subprocess.Popen(
            command,
            cwd=project,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            screen = process.communicate(timeout=120)[0]
        finally:
            process.kill()
        now = time.time()
        run = home / "runs" / env["WANDB_RUN_ID"]
        acted = [float(file.read_text()) for file in run.glob("acted-*")]
        left = alive(f"HOME={env['HOME']}\0")
        return Ended(
            process.returncode, screen, now - acted[0], run, server.runs.get(run.name), left, home
        )

    with WandbServer() as server, ThreadPoolExecutor(2) as pool:
        yield dict(zip(CASES, pool.map(end, CASES), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "code", "sent", "state", "step"),
    [
        ("ctrl_c", 130, 255, "failed", 5),
        ("sigterm", 143, 143, "failed", 26),
        ("requeue", 138, 138, "preempted", 26),
        ("full", 1, 1, "failed", 19),
    ],
)
def test_the_exit_code_the_checkpoint_and_wandb_say_how_a_process_ended(
    ended: dict[str, Ended], case: str, code: int, sent: int, state: str, step: int
) -> None:
    end = ended[case]
    assert end.code == code, end.screen
    assert end.sent, end.screen
    assert (end.sent.exit_code, end.sent.state, end.step) == (sent, state, step), end.screen
    assert "Traceback" not in end.screen


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_ended_process_leaves_nothing_running_and_nothing_half_written(
    ended: dict[str, Ended], case: str
) -> None:
    end = ended[case]
    assert end.left == []
    assert end.seconds < 20
    assert not [*end.run.rglob("*.part"), *(end.home / "TMPD").glob("tmp*")]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ctrl_c", "sigterm", "requeue"])
def test_a_stopped_run_says_how_to_go_on_and_uploads_its_last_checkpoint(
    ended: dict[str, Ended], case: str
) -> None:
    end = ended[case]
    assert re.search(
        rf"^stopped  by SIG\w+\nresume   python main.py fit --resume \S*{end.run.name}$",
        end.screen,
        re.MULTILINE,
    )
    assert end.sent
    assert end.screen.count("stopping ") == 1  # not once more from the processes that load data
    assert [artifact.metadata["step"] for artifact in end.sent.logged] == (
        [3, 5] if case == "ctrl_c" else [19, 26]
    )
    assert not [*end.run.glob("uploads/*")]


@pytest.mark.slow
def test_a_job_is_requeued_once_all_is_saved(ended: dict[str, Ended]) -> None:
    asked = (ended["requeue"].home / "HOME" / "asked").read_text()
    assert asked.startswith("requeue 77\n")
    assert "last.ckpt" in asked
    assert not [*ended["requeue"].run.glob("hpc_ckpt*")]


def test_a_requeued_job_goes_on_from_last_ckpt_whatever_else_lies_there(
    command: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("WANDB_RUN_ID", "requeued")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # without scontrol, as in many a container
    first = command(f"{BRIEF}{ACT}SIGUSR1 --trainer.callbacks.step 8")
    assert (first.code, last_step(first.run)) == (138, 9)
    assert first.err.startswith("warning: ")
    assert "scontrol" in first.err
    assert first.run
    (first.run / "hpc_ckpt_1.ckpt").write_text("as Lightning would begin with")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = command(f"{BRIEF}{ACT}SIGUSR1 --trainer.callbacks.step 8")
    assert again.code == 0, again.err
    assert steps(first.run) == [*range(18)]


@pytest.mark.slow
def test_a_file_that_cannot_be_written_is_one_line_and_what_was_there_is_whole(
    ended: dict[str, Ended],
) -> None:
    full, table = ended["full"], ended["table"]
    assert full.screen.splitlines()[-1].startswith("error: ")
    assert full.screen.splitlines()[-1].endswith(
        ".ckpt cannot be written, and is as it was: File too large"
    )
    assert table.code == 1
    assert table.screen.splitlines()[-1].endswith("metrics.jsonl cannot be written: File too large")
    with (table.run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[-1]["train/loss"]
    assert all(None not in row.values() for row in rows)


class Torn(LightningDataModule):
    """The digits, of which one cannot be read."""

    num_classes = 10

    def __init__(self, num_workers: int = 0) -> None:
        super().__init__()
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        return DataLoader(
            Images(), batch_size=8, num_workers=self.num_workers, persistent_workers=True
        )

    def val_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        return DataLoader(Images(8), batch_size=8)


class Images(Dataset[tuple[torch.Tensor, ...]]):
    def __init__(self, length: int = 80) -> None:
        self.length = length
        self.read = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        self.read += 1
        if self.read > 45:  # in the second epoch, for each of two processes reads 40 in the first
            raise OSError("a file of the data cannot be read")
        return torch.zeros(1, 8, 8), torch.tensor(index % 10)


def ended_with(outcome: Outcome) -> int | None:
    """What W&B was told at the end of a run that is offline."""
    assert outcome.run
    return recorded(outcome.run).exit_code


def last_step(run: Path | None) -> int:
    assert run
    return int(read(run / "checkpoints" / "last.ckpt")["global_step"])


def steps(run: Path) -> list[int]:
    """The steps whose loss was logged."""
    with (run / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.parametrize(
    ("when", "options", "stopped"),
    [
        pytest.param("step 8", "", 9, id="in an epoch"),
        pytest.param("step 5", "", 6, id="in the last batch of an epoch"),
        pytest.param(
            "step 6 --trainer.callbacks.hook on_validation_batch_start", "", 6, id="in a validation"
        ),
        pytest.param(
            "step 1", "--trainer.accumulate_grad_batches 3", 2, id="within accumulated gradients"
        ),
        pytest.param("step 1", "--data.batch_size 1257", 2, id="in an epoch of one batch"),
        pytest.param(
            "step 7", "--trainer.val_check_interval 2", 9, id="in a batch before a validation"
        ),
    ],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_been(
    command: Commands, when: str, options: str, stopped: int
) -> None:
    whole, first = (
        command(f"{BRIEF} {options}"),
        command(f"{BRIEF} {options}{ACT}SIGTERM --trainer.callbacks.{when}"),
    )
    assert (first.code, ended_with(first), last_step(first.run)) == (143, 143, stopped), first.err
    assert whole.run
    assert first.run
    again = command(f"fit --resume {first.run} --trainer.callbacks null")
    assert again.code == 0, again.err
    weights = [
        read(run / "checkpoints" / "last.ckpt")["state_dict"] for run in (whole.run, first.run)
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert (first.run / "metrics.csv").read_text() == (whole.run / "metrics.csv").read_text()


def test_a_second_signal_ends_at_once_and_leaves_the_checkpoint_before(command: Commands) -> None:
    began = time.monotonic()
    outcome = command(f"{BRIEF}{ACT}twice --trainer.callbacks.step 8")
    assert (outcome.code, ended_with(outcome), last_step(outcome.run)) == (130, 255, 6), outcome.err
    assert time.monotonic() - began < 20


def test_the_echo_of_a_signal_is_no_second_one(command: Commands) -> None:
    outcome = command(f"{BRIEF}{ACT}echo --trainer.callbacks.step 8")
    assert (outcome.code, last_step(outcome.run)) == (143, 9), outcome.err


def test_a_signal_in_the_last_batch_of_all_is_too_late_to_be_a_failure(command: Commands) -> None:
    outcome = command(f"{BRIEF}{ACT}SIGTERM --trainer.callbacks.step 17")
    assert (outcome.code, ended_with(outcome), last_step(outcome.run)) == (0, 0, 18), outcome.err


def test_an_exception_after_a_signal_is_not_lost(command: Commands) -> None:
    error = "--trainer.callbacks+=acts.Act --trainer.callbacks.what error"
    error += " --trainer.callbacks.hook on_validation_start"
    outcome = command(
        f"{BRIEF}{ACT}SIGTERM --trainer.callbacks.step 5 {error} --trainer.callbacks.step 6"
    )
    assert str(outcome.error) == "the original error"
    assert ended_with(outcome) == 1


@pytest.mark.slow
def test_a_batch_that_does_not_end_is_not_waited_for_until_the_sender_kills(
    command: Commands,
) -> None:
    began = time.monotonic()
    outcome = command(f"{BRIEF}{ACT}sigterm_and_hang --trainer.callbacks.step 8")
    assert (outcome.code, ended_with(outcome), last_step(outcome.run)) == (143, 143, 6), outcome.err
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_a_signal_outside_of_training_ends_at_once(
    command: Commands, signal: str, capfd: pytest.CaptureFixture[str]
) -> None:
    trained = command(BRIEF + " --trainer.max_epochs 1")
    at_once = f"{ACT}{signal} --trainer.callbacks.step 0 --trainer.callbacks.hook"
    outcome = command(f"test --ckpt_path {trained.run}{at_once} on_test_batch_start")
    assert outcome.code == {"SIGINT": 130, "SIGTERM": 143}[signal]
    assert "test/acc" not in outcome.out
    early = command(f"{BRIEF}{at_once} on_fit_start")
    assert early.code == {"SIGINT": 130, "SIGTERM": 143}[signal]
    assert "to resume" not in early.out
    assert "stops" not in capfd.readouterr().out


HOOKS = {  # in which an exception may be raised, and the step of the checkpoint that is there then
    "on_train_batch_start": 8,
    "on_before_zero_grad": 8,
    "on_after_backward": 8,
    "on_before_optimizer_step": 8,
    "on_train_batch_end": 8,
    "on_validation_start": 12,
    "on_validation_batch_end": 12,
    "on_validation_epoch_end": 12,
    "on_validation_end": 12,
    "on_train_epoch_end": 12,
    "on_save_checkpoint": 12,
    "on_train_end": 18,
    "on_fit_end": 18,
    "teardown": 18,
}


@pytest.mark.parametrize("hook", HOOKS)
def test_an_exception_in_any_hook_ends_the_run_with_it_and_with_a_checkpoint(
    command: Commands, hook: str
) -> None:
    outcome = command(
        f"{BRIEF}{ACT}error --trainer.callbacks.step {HOOKS[hook]} --trainer.callbacks.hook {hook}"
    )
    assert str(outcome.error) == "the original error"
    assert (ended_with(outcome), last_step(outcome.run)) == (1, HOOKS[hook])
    assert not outcome.err


class Unsaved(Callback):
    """Has a state that cannot be saved, ever."""

    asked = 0

    def state_dict(self) -> dict[str, Any]:
        self.asked += 1
        raise ValueError(f"no state, asked {self.asked} times")


def test_an_exception_is_not_hidden_by_that_of_saving_after_it(command: Commands) -> None:
    outcome = command(f"{BRIEF} --trainer.callbacks+=test_endings.Unsaved")
    assert str(outcome.error) == "no state, asked 1 times"
    assert "warning: the last state is not saved: no state, asked 2 times" in outcome.out


def test_an_exception_where_data_are_loaded_ends_the_run_with_it(
    command: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = command(f"{BRIEF} --data test_endings.Torn --data.num_workers 2")
    assert isinstance(outcome.error, OSError)
    assert "a file of the data cannot be read" in str(outcome.error)
    assert ended_with(outcome) == 1
    assert last_step(outcome.run) == 6


def test_an_exit_code_of_the_users_own_is_wandbs_too(command: Commands) -> None:
    outcome = command(f"{BRIEF}{ACT}leave --trainer.callbacks.step 8")
    assert (outcome.code, ended_with(outcome), last_step(outcome.run)) == (3, 3, 8)


def test_a_time_limit_ends_as_success_with_all_steps_saved(command: Commands) -> None:
    outcome = command(f"{BRIEF} --trainer.max_epochs 100000 --trainer.max_time 00:00:00:02")
    assert (outcome.code, ended_with(outcome)) == (0, 0), outcome.err
    assert outcome.run
    assert last_step(outcome.run) == steps(outcome.run)[-1] + 1


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(command: Commands) -> None:
    outcome = command(f"{BRIEF}{ACT}diverge --trainer.callbacks.step 8")
    assert (outcome.code, ended_with(outcome), last_step(outcome.run)) == (1, 1, 6)
    assert outcome.err.splitlines() == [
        "error: train/loss is nan at step 9, which is not saved; --callbacks.divergence null"
        " switches this check off"
    ]
    unseen = "--trainer.log_every_n_steps 100 --trainer.limit_val_batches 0"
    unseen += " --callbacks.checkpoint.monitor null"
    seldom = command(
        f"{BRIEF}{ACT}diverge --trainer.callbacks.step 8 {unseen} --callbacks.summaries null"
    )
    assert (seldom.code, last_step(seldom.run)) == (1, 6)
    warned = r"error: \S+ has NaN values at step 12, which is not saved; "
    assert re.match(rf"{warned}--callbacks.divergence null [^\n]+\n", seldom.err)
    known = command(f"{BRIEF}{ACT}diverge --trainer.callbacks.step 8 --callbacks.divergence null")
    assert (known.code, last_step(known.run)) == (0, 18)


def test_all_parameters_are_searched_for_nan_before_a_gpu_is_waited_for(
    command: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = importlib.import_module("odd_duck.engine.metrics")
    waits: list[str] = []
    for name in ("__bool__", "item"):
        original = getattr(torch.Tensor, name)

        def method(tensor: torch.Tensor, original: Any = original) -> Any:
            waits.append("")
            return original(tensor)

        monkeypatch.setattr(torch.Tensor, name, method)
    good = {f"layer{number}.weight": torch.ones(3) for number in range(50)}
    good |= {"steps": torch.tensor(3), "half": torch.ones(2, dtype=torch.float16)}
    assert metrics.first_with_nan(good) == ""
    assert len(waits) == 1
    assert metrics.first_with_nan({**good, "bad": torch.tensor([1, math.nan])}) == "bad"
    assert metrics.first_with_nan({}) == ""


def test_a_configuration_that_cannot_be_written_is_one_line(command: Commands) -> None:
    trained = command(BRIEF + " --trainer.logger false --trainer.max_epochs 1")
    assert trained.run
    config = trained.run / "config.yaml"
    before = config.read_text()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        outcome = command(f"fit --resume {trained.run} --trainer.logger false")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert outcome.code == 1
    assert re.fullmatch(
        r"error: \S+config.yaml cannot be written, and is as it was: File too large\n", outcome.err
    )
    assert config.read_text() == before
    assert not [*trained.run.glob("*.part")]
