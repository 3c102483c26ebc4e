"""Start a real SLURM on this machine: munged, slurmctld and two nodes, in one folder."""

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

HOST = socket.gethostname()
NODES = (HOST, f"{HOST}-2")  # the first must be a name that every rank can look up
GPUS = 4  # of a node; files, for SLURM only counts them
# cred_expire: seconds that a requeued job waits, 120 by default.
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdParameters=config_overrides  # more CPUs than there are
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
JobRequeue=0
NodeName={nodes[0]} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 Gres=gpu:{gpus}
NodeName={nodes[1]} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=16 Gres=gpu:{gpus}
PartitionName=all Nodes=ALL Default=YES
"""


def missing() -> str:
    """Why SLURM cannot run here, if so."""
    if not hasattr(os, "geteuid") or os.geteuid():
        return "SLURM's daemons need root"
    absent = [name for name in ("munged", "slurmctld", "slurmd", "srun") if not shutil.which(name)]
    return f"without {', '.join(absent)}; apt-get install slurm-wlm munge" if absent else ""


def until(done: Callable[[], object], seconds: float, said: Callable[[], str] = str) -> float:
    """Wait until something is true and return how long that took; fail if it takes longer."""
    began = time.monotonic()
    while not done():
        assert time.monotonic() < began + seconds, said()
        time.sleep(0.05)
    return time.monotonic() - began


class Slurm:
    """A cluster of two nodes, both on this machine. `env` tells SLURM's commands of it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)  # munged wants its socket where anybody may come
        self.env = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self.daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            ports = [
                stack.enter_context(socket.create_server(("", 0))).getsockname()[1]
                for _ in range(3)
            ]
        text = CONFIGURATION.format(
            folder=self.folder, host=HOST, nodes=NODES, ports=ports, gpus=GPUS
        )
        files = {
            "slurm.conf": text,
            "gres.conf": f"Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n",
        }
        files["cgroup.conf"] = (
            "CgroupPlugin=cgroup/v1\n"  # unused; others look for what may not be there
        )
        for name, content in (files | {f"gpu{number}": "" for number in range(GPUS)}).items():
            (self.folder / name).write_text(content)
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        socket_, pid, seed, log = (
            self.folder / f"munge.{suffix}" for suffix in ("socket", "pid", "seed", "log")
        )
        try:
            options = (
                f"--socket={socket_}",
                f"--pid-file={pid}",
                f"--seed-file={seed}",
                f"--log-file={log}",
            )
            self._start("munged", "--foreground", f"--key-file={key}", *options)
            until(socket_.exists, 20, self.log)
            self._start("slurmctld", "-D")
            for node in NODES:
                self._start("slurmd", "-D", "-N", node)
            until(lambda: self("sinfo", "--noheader", "--format=%t %D") == "idle 2\n", 30, self.log)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for daemon in reversed(self.daemons):
            daemon.terminate()
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()
        for pid in self.processes():  # of jobs
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, *words: str) -> None:
        with (self.folder / f"{words[0]}.out").open("a") as out:
            environment = os.environ | self.env
            self.daemons.append(
                subprocess.Popen(words, env=environment, stdout=out, stderr=subprocess.STDOUT)
            )

    def __call__(
        self, *words: str, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> str:
        """Runs a command and gives what it printed."""
        environment = (os.environ if env is None else env) | self.env
        done = subprocess.run(
            words,
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}\n{self.log()}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job."""
        return dict(re.findall(r"(\w+)=(\S+)", self("scontrol", "show", "job", "-o", job)))

    def log(self) -> str:
        return "\n".join(file.read_text()[-3000:] for file in self.folder.glob("*.out"))

    def processes(self, *marks: str) -> list[int]:
        """What has this cluster, and the marks, in its environment."""
        pids = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                environment = (process / "environ").read_bytes().split(b"\0")
                if {
                    f"SLURM_CONF={self.env['SLURM_CONF']}".encode(),
                    *(m.encode() for m in marks),
                } <= {*environment}:
                    pids.append(int(process.name))
        return pids
