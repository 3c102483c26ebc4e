"""Whatever starts the ranks, a run has one id and one folder."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Bake
from wandb_record import recorded

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node")
FIT = (
    "main.py fit --config configs/digits.yaml --trainer.accelerator cpu --trainer.max_epochs 1 "
    "--trainer.limit_train_batches 2 --trainer.log_every_n_steps 1 --trainer.callbacks+=tell.Id "
    "--trainer.devices"
)
TELL = """
import os
from lightning.pytorch import Callback

class Id(Callback):
    def on_train_start(self, trainer, pl_module):
        line = f"\\nrank {trainer.global_rank} is of {os.environ['WANDB_RUN_ID']}\\n"
        os.write(1, line.encode())  # `print` writes the end of a line by itself
"""


@pytest.fixture
def project(bake: Bake, tmp_path: Path) -> Path:
    project = bake(tmp_path)
    (project / "tell.py").write_text(TELL)
    return project


@pytest.fixture
def env(env: dict[str, str]) -> dict[str, str]:
    return env | {"OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(words: list[str], project: Path, env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*TORCHRUN, *words],
        cwd=project,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes: subprocess.Popen[str]) -> str:
    try:
        printed = "".join(process.communicate(timeout=180)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), printed
    return printed


def assert_one_run(project: Path, printed: str) -> Path:
    (folder,) = (project / "runs").iterdir()
    assert printed.count("run      ") == 1
    assert recorded(folder).id == folder.name
    told = re.findall(r"rank (\d) is of (\S+)", printed)
    assert sorted(told) == [("0", folder.name), ("1", folder.name)]
    assert (folder / "checkpoints" / "last.ckpt").exists()
    return folder


def test_two_ranks_of_torchrun_make_one_run(project: Path, env: dict[str, str]) -> None:
    assert_one_run(project, finish(start(["2", "--standalone", *FIT.split(), "2"], project, env)))


def test_two_nodes_of_a_static_torchrun_make_one_run(project: Path, env: dict[str, str]) -> None:
    port = str(free_port())
    words = ["1", "--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", port]
    nodes = [
        start(
            [*words, "--node-rank", rank, *FIT.split(), "1", "--trainer.num_nodes", "2"],
            project,
            env,
        )
        for rank in ("0", "1")
    ]
    assert_one_run(project, finish(*nodes))


def test_two_launches_with_one_rendezvous_id_are_two_runs(
    project: Path, env: dict[str, str]
) -> None:
    for count in (1, 2):
        endpoint = f"127.0.0.1:{free_port()}"
        words = ["2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "100"]
        finish(start([*words, *FIT.split(), "2"], project, env))
        assert len(os.listdir(project / "runs")) == count


def test_an_id_that_is_given_is_the_runs(project: Path, env: dict[str, str]) -> None:
    printed = finish(
        start(["2", "--standalone", *FIT.split(), "2"], project, env | {"WANDB_RUN_ID": "my-run.1"})
    )
    assert assert_one_run(project, printed).name == "my-run.1"
