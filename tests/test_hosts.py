"""A run over two hosts is one run: the numbers of one host, ended by a broken cable, resumed."""

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import Run
from hosts import RENDEZVOUS, Hosts
from test_endings import ACT
from test_launchers import TELL, TORCHRUN
from wandb_record import records

pytestmark = pytest.mark.slow

FIT = (
    "main.py fit --config configs/digits.yaml --config configs/ddp.yaml --trainer.accelerator cpu"
    " --callbacks.early_stopping null --trainer.log_every_n_steps 1"
)
TWO = " --trainer.num_nodes 2 --trainer.devices 1"
Launch = Callable[..., list[subprocess.Popen[str]]]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    try:
        hosts = Hosts()
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', error)}")
    yield hosts
    hosts.remove()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def env(env: dict[str, str], runs: Path) -> dict[str, str]:
    return env | {
        "OMP_NUM_THREADS": "1",
        "RUNS_ROOT": str(runs),
        "PYTHONPATH": str(Path(__file__).parent),
    }


@pytest.fixture
def launch(hosts: Hosts, project: Path, env: dict[str, str], tmp_path: Path) -> Iterator[Launch]:
    """Starts torchrun with the same words on both hosts."""
    started: list[subprocess.Popen[str]] = []

    def launch(words: str, **more: str) -> list[subprocess.Popen[str]]:
        for name in hosts.names:
            with (tmp_path / f"{name}.txt").open("w") as screen:
                started.append(hosts.torchrun(name, words.split(), project, env | more, screen))
        return started[-2:]

    yield launch
    hosts.kill()
    for process in started:
        process.wait()


def ended(processes: list[subprocess.Popen[str]], seconds: float = 120) -> list[int]:
    return [process.wait(seconds) for process in processes]


def screens(folder: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(folder.glob("host*.txt")))


def exits(run: Path) -> list[int | None]:
    """The exit codes that W&B was told, start by start."""
    logs = [
        [*records(file)]
        for file in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=os.path.getctime)
    ]
    return [
        next((r.exit.exit_code for r in log if r.WhichOneof("record_type") == "exit"), None)
        for log in logs
    ]


def steps(run: Path) -> int:
    content: dict[str, int] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return content["global_step"]


def test_two_hosts_make_one_run_with_the_numbers_of_one_host(
    launch: Launch, runs: Path, run: Run, project: Path, tmp_path: Path
) -> None:
    (tmp_path / "tell.py").write_text(TELL)
    tell = "--trainer.callbacks+=tell.Id"
    codes = ended(launch(f"{FIT}{TWO} --trainer.max_epochs 2 {tell}", PYTHONPATH=str(tmp_path)))
    screen = screens(tmp_path)
    assert codes == [0, 0], screen
    (over_two,) = runs.iterdir()
    assert sorted(re.findall(r"rank (\d) is of (\S+)", screen)) == [
        ("0", over_two.name),
        ("1", over_two.name),
    ]
    words = f"{FIT} --trainer.devices 2 --trainer.max_epochs 2"
    run(*TORCHRUN, "2", "--standalone", *words.split(), cwd=project)
    (over_one,) = {*runs.iterdir()} - {over_two}
    assert (over_two / "metrics.csv").read_text() == (over_one / "metrics.csv").read_text()
    assert (exits(over_two), steps(over_two)) == ([0], 18)
    assert screen.count("run      ") == 1


def test_a_host_that_is_cut_off_ends_the_job_which_goes_on_when_it_is_back(
    hosts: Hosts, launch: Launch, runs: Path, tmp_path: Path
) -> None:
    """torchrun there waits as long as TCP does: a quarter of an hour, but seconds here."""
    second = hosts.names[1]
    hosts.sysctl(second, "net.ipv4.tcp_retries2", 5)
    folder = runs / "the-run"
    processes = launch(
        f"{FIT}{TWO} --trainer.max_epochs 4000 --trainer.strategy.timeout 00:00:30",
        WANDB_RUN_ID="the-run",
    )
    while not (folder / "checkpoints" / "last.ckpt").exists():
        assert [process.poll() for process in processes] == [None, None], screens(tmp_path)
        time.sleep(0.1)
    hosts.unplug(second)
    cut = time.monotonic()
    try:
        codes = ended(processes)
        seconds = time.monotonic() - cut
        left = hosts.processes()
    finally:
        hosts.plug(second)
    assert codes == [1, 1], screens(tmp_path)
    assert seconds < 75
    assert left == {}
    assert exits(folder) == [1]
    reached = steps(folder)
    resumed = f"--resume the-run --trainer.max_epochs {reached // 9 + 2}"
    assert ended(launch(f"main.py fit {resumed}", WANDB_RUN_ID="the-run")) == [0, 0], screens(
        tmp_path
    )
    assert [path.name for path in runs.iterdir()] == ["the-run"]
    assert (exits(folder), steps(folder)) == ([1, 0], reached + 18)


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_starts_the_ranks_of_two_hosts_again_where_they_were(
    launch: Launch, runs: Path, project: Path, tmp_path: Path, rank: int
) -> None:
    """By the command of docs/devices.md, on hosts of one device."""
    (line,) = re.findall(
        "^torchrun (--nnodes 2 .*)$", (project / "docs" / "devices.md").read_text(), re.MULTILINE
    )
    for told, meant in {
        "HOST:29500": RENDEZVOUS,
        "-node 8": "-node 1",
        "devices 8": "devices 1",
    }.items():
        assert told in line
        line = line.replace(told, meant)
    line += (
        " --trainer.accelerator cpu --callbacks.early_stopping null --trainer.log_every_n_steps 1"
    )
    often = "--callbacks.last_checkpoint.every_n_train_steps 1 --trainer.max_epochs 2"
    kill = f"{ACT}SIGKILL --trainer.callbacks.rank {rank} --trainer.callbacks.step 8"
    codes = ended(launch(f"{line} {often}{kill}"))
    screen = screens(tmp_path)
    assert codes == [0, 0], screen
    (folder,) = runs.iterdir()
    first, second = exits(folder)
    assert (first, second, steps(folder)) == (first or None, 0, 18)
    assert screen.count("from     ") == 1
    assert "has checkpoints already" not in screen
