"""Whatever ends one rank ends the whole job, soon, with the original error last on the screen."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
from conftest import Bake
from test_endings import ACT, alive, last_step
from test_launchers import TORCHRUN
from wandb_record import recorded

FIT = (
    "main.py fit --config configs/digits.yaml --trainer.accelerator cpu --trainer.devices 2"
    " --trainer.max_epochs 40"
    " --trainer.limit_train_batches 6 --trainer.log_every_n_steps 1 --callbacks.early_stopping null"
)
LAUNCHERS = {"lightning": (sys.executable,), "torchrun": (*TORCHRUN, "2", "--standalone")}


@dataclass(frozen=True)
class Ended:
    code: int
    screen: str
    seconds: float  # since what ended it
    run: Path
    left: list[str]

    @property
    def told(self) -> int | None:
        return recorded(self.run).exit_code


Job = Callable[..., Ended]


@pytest.fixture
def job(bake: Bake, env: dict[str, str], tmp_path: Path) -> Job:
    return jobs(bake(tmp_path), env, tmp_path / "runs")


def jobs(project: Path, env: dict[str, str], runs: Path) -> Job:
    """What runs two ranks of a project until they end."""
    env |= {
        "OMP_NUM_THREADS": "1",
        "RUNS_ROOT": str(runs),
        "PYTHONPATH": str(Path(__file__).parent),
    }

    def job(
        launcher: str,
        what: str,
        rank: int,
        options: str = "",
        started: tuple[str, ...] = (),
        verb: str = FIT,
    ) -> Ended:
        line = f"{verb}{ACT}{what} --trainer.callbacks.rank {rank} --trainer.callbacks.step 8"
        words = shlex.split(f"{line} {options}")
        command = [*LAUNCHERS[launcher], *started, *words]
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
            screen = process.communicate(timeout=150)[0]
        finally:
            ended = time.time()
            if process.poll() is None:
                os.killpg(process.pid, 9)
        run = max(runs.iterdir(), key=os.path.getctime)
        time.sleep(0.5)  # for the system to take away what it has been told to end
        left = [
            command for command in alive(f"HOME={env['HOME']}\0") if "wandb-symon" not in command
        ]
        acted = float((run / f"acted-{what}").read_text())
        return Ended(process.returncode, screen, ended - acted, run, left)

    return job


ENDS = list(product(LAUNCHERS, (0, 1), ("error", "die", "SIGKILL", "SIGTERM")))
QUICK = [("lightning", 1, "error"), ("lightning", 1, "SIGTERM")]


@pytest.mark.parametrize(
    ("launcher", "rank", "what"),
    [pytest.param(*end, marks=[] if end in QUICK else pytest.mark.slow) for end in ENDS],
)
def test_the_end_of_one_rank_is_soon_that_of_the_job(
    job: Job, launcher: str, rank: int, what: str
) -> None:
    end = job(launcher, what, rank)
    first = {"error": 1, "die": 7, "SIGKILL": -9, "SIGTERM": 143}[what]
    by_lightning = first if rank == 0 or what == "SIGTERM" else 1
    assert end.code == (by_lightning if launcher == "lightning" else 1), end.screen
    assert end.seconds < 30
    assert end.left == []
    if what == "error":
        last = [line for line in end.screen.splitlines() if line.strip(" =")][-1]
        assert last.endswith("ValueError: the original error"), end.screen
    if what == "SIGTERM":
        assert last_step(end.run) == 10  # ranks with fast steps agree one step later
    if not (rank == 0 and what in ("die", "SIGKILL")):  # then nobody is left who could tell W&B
        assert end.told in ({143} if what == "SIGTERM" else {1, 143}), end.screen
    if launcher == "lightning" and rank == 1 and what in ("die", "SIGKILL"):
        line = "error: rank 1 failed, see .*error.txt: its process ended with exit code "
        line += f"{first} and no error message"
        assert re.fullmatch(line, end.screen.splitlines()[-1])


@pytest.mark.slow
def test_a_rank_that_does_not_notice_is_ended(job: Job) -> None:
    """As with NCCL, where it waits in C for the one that failed."""
    hang = "--trainer.callbacks+=acts.Act --trainer.callbacks.what hang --trainer.callbacks.step 8"
    end = job("lightning", "error", 1, hang)
    assert (end.code, end.told, end.left) == (1, 1, []), end.screen
    assert end.seconds < 30
    assert end.screen.splitlines()[-1].endswith("ValueError: the original error")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "what"), [("lightning", "SIGKILL"), ("torchrun", "kill_the_launcher")]
)
def test_no_rank_outlives_the_one_that_started_it(job: Job, launcher: str, what: str) -> None:
    hang = "--trainer.callbacks+=acts.Act --trainer.callbacks.what hang --trainer.callbacks.step 8"
    end = job(launcher, what, 0, f"{hang} --trainer.callbacks.rank 1")
    assert (end.code, end.left) == (-9, [])
    assert end.seconds < 10


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_all_before_training_and_in_evaluation_too(job: Job) -> None:
    """Where Lightning's own handler would wait for ever for ranks that do something else."""
    unseen = job(
        "lightning", "SIGTERM", 1, "--trainer.num_sanity_val_steps 0 --trainer.callbacks.step 1"
    )
    assert (unseen.code, unseen.told, last_step(unseen.run)) == (143, 143, 3), unseen.screen
    verb = (
        f"main.py validate --trainer.accelerator cpu --trainer.devices 2 --ckpt_path {unseen.run}"
    )
    hook = "--trainer.callbacks.step 0 --trainer.callbacks.hook on_validation_batch_start"
    end = job("lightning", "SIGTERM", 1, hook, verb=verb)
    assert (end.code, end.told, end.left) == (1, 1, []), end.screen
    assert end.seconds < 30


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ctrl_c_in_a_terminal_is_saved_by_all_ranks(job: Job, launcher: str) -> None:
    end = job(launcher, "group_sigint", 1)
    assert end.code == (130 if launcher == "lightning" else 1), end.screen
    assert (end.told, last_step(end.run), end.left) == (255, 10, []), end.screen


@pytest.mark.slow
def test_of_three_ranks_the_one_that_was_killed_is_named(job: Job) -> None:
    end = job("lightning", "SIGKILL", 2, "--trainer.devices 3")
    assert (end.code, end.told, end.left) == (1, 1, []), end.screen
    assert end.screen.splitlines()[-1].startswith("error: rank 2 failed, ")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["error", "SIGKILL", "die"])
def test_torchrun_starts_a_failed_job_again_where_it_was(job: Job, what: str) -> None:
    often = "--callbacks.last_checkpoint.every_n_train_steps 1 --trainer.max_epochs 3"
    end = job("torchrun", what, 1, often, ("--max-restarts", "1"))
    assert end.code == 0, end.screen
    assert (end.left, last_step(end.run)) == ([], 18)
    assert re.search(r"^from     \S+last.ckpt$", end.screen, re.MULTILINE)
    assert len([*end.run.glob("wandb/offline-run-*")]) == 2
