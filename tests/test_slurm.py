"""On a real SLURM: the job script of a project, and srun by hand."""

import csv
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from command import Commands
from conftest import Bake, command_lines
from slurm import NODES, Slurm, missing, until
from wandb_record import recorded, records
from wandb_server import WandbServer

# Stays in a step, one for each start of the job, until the test lets the job continue.
HOLD = """
import os, time
from pathlib import Path
from lightning.pytorch import Callback

class Hold(Callback):
    def __init__(self, steps: list[int] | None = None):
        self.steps = steps or []

    def on_train_start(self, trainer, pl_module):
        self.start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        rank = f"rank {trainer.global_rank} of {trainer.world_size}"
        print(f"\\n{rank} begins at {trainer.global_step}", flush=True)

    def on_train_batch_end(self, trainer, *_):
        if [trainer.global_step] == self.steps[self.start : self.start + 1]:
            mark = Path(trainer.default_root_dir, f"held-{self.start}")
            mark.with_suffix(f".{trainer.global_rank}").touch()
            while not mark.exists():
                time.sleep(0.05)
"""
FIT = (
    "--config configs/digits.yaml --trainer.accelerator cpu --trainer.log_every_n_steps 1 "
    "--callbacks.early_stopping null --trainer.callbacks+=hold.Hold "
)
SCRIPT = "slurm/train.sbatch"


@dataclass(frozen=True)
class Cluster:
    """A project whose folder is on all nodes."""

    slurm: Slurm
    project: Path
    env: dict[str, str]

    def submit(self, head: str, *script: str) -> str:
        """Submits a job and returns its number."""
        words = ("sbatch", "--parsable", "--cpus-per-task", "2", *head.split(), *script)
        return self.slurm(*words, cwd=self.project, env=self.env).strip()

    def run(self, name: str) -> Path:
        return self.project / "runs" / name

    def runs(self) -> set[str]:
        return {folder.name for folder in (self.project / "runs").iterdir()}

    def screen(self, job: str) -> str:
        file = self.project / f"slurm-{job}.out"
        return file.read_text() if file.exists() else ""

    def held(self, run: Path, start: int, ranks: int, job: str) -> float:
        """Waits until all ranks stay in their step."""
        marks = [run / f"held-{start}.{rank}" for rank in range(ranks)]
        return until(lambda: all(mark.exists() for mark in marks), 90, lambda: self.screen(job))

    def ended(self, job: str, state: str, code: str) -> None:
        """Waits for the end of a job, which must be this one."""
        wanted = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        until(lambda: self.slurm.job(job)["JobState"] in wanted, 120, lambda: self.screen(job))
        known = self.slurm.job(job)
        assert (known["JobState"], known["ExitCode"]) == (state, code), self.screen(job)


@pytest.fixture
def cluster(bake: Bake, env: dict[str, str], tmp_path: Path) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    env |= {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
    project = bake(tmp_path / "p", slurm="yes")
    (project / "hold.py").write_text(HOLD)
    with Slurm() as slurm:
        yield Cluster(slurm, project, env)
        until(lambda: not left(slurm), 20, lambda: f"still there: {left(slurm)}")


def left(slurm: Slurm) -> list[str]:
    """The commands of jobs' processes that are still there."""
    commands = [Path(f"/proc/{pid}/cmdline") for pid in slurm.processes()]
    texts = [file.read_text().replace("\0", " ") for file in commands if file.exists()]
    return [text for text in texts if "main.py" in text or "wandb-core" in text]


def step(run: Path) -> int:
    return int(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"])


def steps(run: Path) -> list[int]:
    """The steps whose loss was logged."""
    with (run / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]


def exits(run: Path) -> list[int]:
    """What W&B's client recorded at the ends of the run, one after another."""
    files = sorted(
        run.glob("wandb/*run-*/*.wandb"), key=lambda file: file.parent.name.partition("run-")[2]
    )
    ends = [
        record.exit
        for file in files
        for record in records(file)
        if record.WhichOneof("record_type") == "exit"
    ]
    return [end.exit_code for end in ends]


@pytest.mark.slow
def test_a_job_that_is_requeued_in_whatever_way_goes_on_in_the_same_run(cluster: Cluster) -> None:
    with WandbServer() as server:
        head = "--ntasks-per-node 2 --gpus-per-node 2"
        words = f"{FIT} --trainer.max_epochs 5 --trainer.callbacks.steps [12,25]"
        # SLURM looks after 90 seconds at the latest.
        timed = cluster.submit("--time 3", SCRIPT, *words.split())
        job = Cluster(cluster.slurm, cluster.project, cluster.env | server.env()).submit(
            head, SCRIPT, *words.split()
        )
        run = cluster.run(f"tests-{job}")
        seconds = {"from submission to step 12": cluster.held(run, 0, 2, job)}

        # As --signal does: to all of the step, and not to the script.
        cluster.slurm("scancel", "--signal=USR1", job)
        until(lambda: "stopping " in cluster.screen(job), 10)
        (run / "held-0").touch()
        seconds["from SIGUSR1 to the queue"] = until(
            lambda: cluster.slurm.job(job)["Restarts"] == "1", 60
        )
        assert (server.runs[run.name].state, server.runs[run.name].exit_code) == ("preempted", 138)
        saved = step(run)
        seconds["to the next start's step 25"] = cluster.held(run, 1, 2, job)

        # As for a job of higher priority: SIGTERM, later SIGKILL.
        cluster.slurm("scontrol", "requeue", job)
        until(lambda: cluster.screen(job).count("stopping ") == 2, 10)
        (run / "held-1").touch()
        cluster.ended(job, "COMPLETED", "0:0")
        screen = cluster.screen(job)
        begun = [
            [int(n) for n in re.findall(rf"rank {rank} of 2 begins at (\d+)", screen)]
            for rank in (0, 1)
        ]
        # Both ranks agree on a signal one step after the one in which it came.
        assert begun == [[0, saved, 26]] * 2, str(begun)
        assert saved == 13
        assert screen.count(f"from     runs/{run.name}/checkpoints/last.ckpt") == 2
        assert cluster.runs() == {run.name, f"tests-{timed}"}
        assert steps(run) == [*range(45)]
        assert (step(run), cluster.slurm.job(job)["Restarts"]) == (45, "2")
        assert {*server.runs} == {run.name}
        sent = server.runs[run.name]
        assert (sent.state, sent.exit_code) == ("finished", 0)
        assert exits(run) == [138, 143, 0]
        assert "SLURM auto-requeueing" not in screen
        rows = [row["trainer/global_step"] for row in sent.history if "train/loss" in row]
        assert rows == [*range(45)]
    late = cluster.run(f"tests-{timed}")
    until(lambda: "stopping " in cluster.screen(timed), 90)
    (late / "held-0").touch()
    until(lambda: cluster.slurm.job(timed)["Restarts"] == "1", 30, lambda: cluster.screen(timed))
    assert (step(late), exits(late)) == (12, [138])
    cluster.slurm("scancel", timed)
    print(seconds)


@pytest.mark.slow
def test_each_task_of_an_array_is_a_run_and_scancel_leaves_a_checkpoint_and_no_process(
    cluster: Cluster,
) -> None:
    words = f"{FIT} --trainer.max_epochs 2 --trainer.callbacks.steps [12]"
    job = cluster.submit("--array 1-2 --export ALL,SLURM_EXACT=1", SCRIPT, *words.split())
    going, cancelled = (cluster.run(f"tests-{job}_{task}") for task in (1, 2))
    for run in (going, cancelled):
        cluster.held(run, 0, 1, f"{job}_{run.name[-1]}")
    assert "CPUs=2 " in cluster.slurm("scontrol", "show", "step", f"{job}_2.0")
    cluster.slurm("scancel", f"{job}_2")
    until(lambda: "stopping " in cluster.screen(f"{job}_2"), 10)
    for run in (going, cancelled):
        (run / "held-0").touch()
    cluster.ended(f"{job}_2", "CANCELLED", "0:15")
    until(lambda: not cluster.slurm.processes(f"WANDB_RUN_ID={cancelled.name}"), 40)
    screen = cluster.screen(f"{job}_2")
    assert "stopped  by SIGTERM\nresume   python main.py fit --resume" in screen
    assert "Traceback" not in screen
    assert (step(cancelled), steps(cancelled)) == (12, [*range(12)])
    cluster.ended(f"{job}_1", "COMPLETED", "0:0")
    assert cluster.runs() == {going.name, cancelled.name}
    assert (recorded(going).id, recorded(going).exit_code) == (going.name, 0)
    assert (step(going), steps(going)) == (38, [*range(38)])

    again = cluster.submit(
        "", SCRIPT, *f"--resume {cancelled.name} --trainer.callbacks null".split()
    )
    cluster.ended(again, "COMPLETED", "0:0")
    assert cluster.runs() == {going.name, cancelled.name}
    assert (step(cancelled), steps(cancelled)) == (38, [*range(38)])
    assert exits(cancelled) == [143, 0]

    with WandbServer() as server:  # which compute nodes could not reach
        cluster.slurm(
            "python", "main.py", "sync", cwd=cluster.project, env=cluster.env | server.env()
        )
        for run in (going, cancelled):
            rows = [
                row["trainer/global_step"]
                for row in server.runs[run.name].history
                if "train/loss" in row
            ]
            assert (server.runs[run.name].state, rows) == ("finished", [*range(38)])


@pytest.mark.slow
def test_jobs_of_one_folder_and_sruns_of_one_allocation_are_runs_of_their_own(
    cluster: Cluster,
) -> None:
    words = f"{FIT} --trainer.max_epochs 1"
    across = cluster.submit("--nodes 2", SCRIPT, *words.split())
    srun = f"srun --ntasks 2 --exact python main.py fit {words} --trainer.devices 2"
    allocation = ("salloc", "--nodes", "1", "--ntasks", "4", "--cpus-per-task", "1")
    loop = f"for count in 1 2; do {srun} > srun-$count.out 2>&1 & done; "
    loop += "wait -n && wait -n && echo {$SLURM_JOB_ID}"
    printed = cluster.slurm(*allocation, "bash", "-c", loop, cwd=cluster.project, env=cluster.env)
    told = [(cluster.project / f"srun-{count}.out").read_text() for count in (1, 2)]
    (job,) = re.findall(r"{(\d+)}", printed)
    cluster.ended(across, "COMPLETED", "0:0")
    assert cluster.runs() == {f"tests-{across}", f"tests-{job}-0", f"tests-{job}-1"}, told
    for name in cluster.runs():
        assert (recorded(cluster.run(name)).id, recorded(cluster.run(name)).exit_code) == (name, 0)
        assert (step(cluster.run(name)), steps(cluster.run(name))) == (9, [*range(9)])
    for text in (*told, cluster.screen(across)):
        assert sorted(re.findall(r"rank \d of \d", text)) == ["rank 0 of 2", "rank 1 of 2"], text
    assert cluster.slurm.job(across)["NodeList"] == ",".join(NODES)


@pytest.mark.slow
def test_slurm_takes_each_command_of_the_readme(cluster: Cluster) -> None:
    lines = command_lines((cluster.project / "slurm" / "README.md").read_text())
    submitted = [shlex.split(line)[1:] for line in lines if line.startswith("sbatch ")]
    assert len(submitted) > 3
    assert [line for line in lines if not line.startswith("sbatch ")] == [
        "python main.py sync"
    ]  # in test_sync.py
    for words in submitted:
        printed = cluster.slurm(
            "sbatch", "--test-only", *words, cwd=cluster.project, env=cluster.env
        )
        assert "to start at" in printed
        assert SCRIPT in words
    assert not (cluster.project / "runs").exists()


@pytest.mark.slow
def test_a_task_that_is_alone_takes_a_fresh_id_and_is_not_requeued_to_begin_anew(
    cluster: Cluster,
) -> None:
    words = f"{FIT} --trainer.max_epochs 2 --trainer.callbacks.steps [12]"
    fits = f"python main.py fit {words} & sleep 0.3; python main.py fit {words} & wait"
    (cluster.project / "alone.sh").write_text(f"#!/bin/bash\nsrun bash -c '{fits}'\n")
    job = cluster.submit("--requeue", "alone.sh")
    held = cluster.project / "runs"
    until(lambda: len([*held.glob("*/held-0.0")]) == 2, 90, lambda: cluster.screen(job))
    cluster.slurm("scancel", "--signal=USR1", job)
    until(lambda: cluster.screen(job).count("stopping ") == 2, 10)
    for folder in held.iterdir():
        (folder / "held-0").touch()
    until(
        lambda: cluster.slurm.job(job)["JobState"] in ("COMPLETED", "FAILED"),
        60,
        lambda: cluster.screen(job),
    )
    assert cluster.slurm.job(job)["Restarts"] == "0"
    assert (
        cluster.screen(job).count("warning: not requeued: without WANDB_RUN_ID the job would begin")
        == 2
    )
    assert all(re.match(r"r\d{6}-", name) for name in cluster.runs())
    assert [step(run) for run in held.iterdir()] == [12, 12]


TASK = {
    "JOB_ID": "7",
    "CLUSTER_NAME": "c",
    "NTASKS": "2",
    "PROCID": "0",
    "LOCALID": "0",
    "NODEID": "0",
}


def test_a_command_without_srun_in_a_job_of_several_tasks_is_refused_instead_of_waiting_for_them(
    command: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (TASK | {"JOB_NAME": "train.sbatch"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    outcome = command("fit --config @digits --config @debug")
    assert (outcome.code, outcome.run) == (2, None)
    said = "this job has 2 tasks, and this command is none of them; begin it with srun"
    assert outcome.err == f"error: SLURM: {said}\n"


@pytest.mark.parametrize(
    "shell", [{"JOB_NAME": "interactive"}, {"JOB_NAME": "bash", "STEP_ID": "0", "PTY_PORT": "1"}]
)
def test_a_command_in_a_shell_of_salloc_or_srun_is_alone(
    command: Commands, monkeypatch: pytest.MonkeyPatch, shell: dict[str, str]
) -> None:
    for name, value in (TASK | shell).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    first, second = (command("fit --config @digits --config @debug").run for _ in range(2))
    assert first
    assert second
    assert first != second
