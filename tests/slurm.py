"""Starts a real SLURM on this machine: munged, slurmctld and two nodes, in a folder and on ports of their own."""

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

CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5  # seconds that a requeued job waits; 120 by default
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdParameters=config_overrides  # more CPUs than there are
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
JobRequeue=1
KillWait=30
ReturnToService=2
NodeName={nodes[0]} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 Gres=gpu:4
NodeName={nodes[1]} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 Gres=gpu:4
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there is no SLURM here; empty if there may be."""
    if os.name != "posix" or os.geteuid():
        return "SLURM's daemons run as root"
    absent = [name for name in ("munged", "slurmctld", "slurmd", "srun") if not shutil.which(name)]
    return f"not installed: {', '.join(absent)} (Debian's slurm-wlm and munge)" if absent else ""


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("", 0))) for _ in range(number)]
        return [probe.getsockname()[1] for probe in probes]


class Slurm:
    """A cluster of two nodes, which are both this machine; `env` has to be in the environment of its commands."""

    nodes = (socket.gethostname(), f"{socket.gethostname()}-2")

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short, and open to the daemons, unlike pytest's
        self.folder.chmod(0o755)
        self.env = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self.daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            host = socket.gethostname()
            text = CONFIGURATION.format(folder=self.folder, host=host, nodes=self.nodes, ports=free_ports(3))
            (self.folder / "slurm.conf").write_text(text)
            # Asked for by slurmd, though nothing here uses it; the other kinds look for what may not be there.
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
            for gpu in range(4):
                (self.folder / f"gpu{gpu}").touch()  # SLURM only counts them
            (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-3]\n")
            key = self.folder / "munge.key"
            key.touch(0o600)
            key.write_bytes(os.urandom(128))
            (self.folder / "state").mkdir()
            files = (("key-file", "key"), ("log-file", "log"), ("pid-file", "pid"), ("seed-file", "seed"))
            options = [f"--{option}={self.folder}/munge.{suffix}" for option, suffix in files]
            self._start("munged", "--foreground", f"--socket={self.folder}/munge.socket", *options)
            self._until(lambda: (self.folder / "munge.socket").exists())
            self._start("slurmctld", "-D")
            for node in self.nodes:
                (self.folder / f"spool-{node}").mkdir()
                self._start("slurmd", "-D", "-N", node)
            self._until(lambda: self("sinfo", "--noheader", "--format=%t %D").split() == ["idle", "2"])
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
        for pid in self.processes():  # of jobs
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, *words: str) -> None:
        with (self.folder / f"{words[0]}.out").open("a") as out:
            environment = os.environ | self.env
            self.daemons.append(subprocess.Popen(words, env=environment, stdout=out, stderr=out))

    def _until(self, done: Callable[[], bool], seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end:
                logs = "\n".join(f"{file}:\n{file.read_text()[-2000:]}" for file in self.folder.glob("*.[lo][ou]*"))
                raise TimeoutError(logs)
            time.sleep(0.1)

    def __call__(self, *words: str) -> str:
        done = subprocess.run(words, env=os.environ | self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.stdout

    def processes(self) -> list[int]:
        """What runs in jobs of this cluster."""
        pids = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if f"SLURM_CONF={self.env['SLURM_CONF']}\0".encode() in (process / "environ").read_bytes():
                    pids.append(int(process.name))
        return pids
