"""Two hosts in one machine: network namespaces joined by a cable. It takes root and iproute2.

Each has its own network, loopback included. All else they share: the disk, as in a cluster, and the
host's name, so torchrun must be told which of them is the first (`is_host`) and where each of them
is (`--local-addr`).
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

CABLE = "eth0"  # its name at either end
ADDRESSES = ("10.0.0.1", "10.0.0.2")
RENDEZVOUS = f"{ADDRESSES[0]}:29500"


def ip(*words: str) -> str:
    return subprocess.run(("ip", *words), check=True, capture_output=True, text=True).stdout


class Hosts:
    """Two hosts with names of this process's own.

    Raises:
        CalledProcessError: If this user may not make them.
        FileNotFoundError: If there is no iproute2.
    """

    def __init__(self) -> None:
        self.names = [f"host{number}-{os.getpid()}" for number in (1, 2)]
        for name in self.names:
            ip("netns", "add", name)
            ip("-netns", name, "link", "set", "lo", "up")
        first, second = self.names
        ip(
            "-netns",
            first,
            "link",
            "add",
            CABLE,
            "type",
            "veth",
            "peer",
            "name",
            CABLE,
            "netns",
            second,
        )
        for name, address in zip(self.names, ADDRESSES, strict=True):
            ip("-netns", name, "address", "add", f"{address}/24", "dev", CABLE)
        self.plug(first)
        self.plug(second)

    def plug(self, name: str) -> None:
        ip("-netns", name, "link", "set", CABLE, "up")

    def unplug(self, name: str) -> None:
        ip("-netns", name, "link", "set", CABLE, "down")

    def sysctl(self, name: str, setting: str, value: int) -> None:
        """Sets what the system does on a host."""
        file = f"/proc/sys/{setting.replace('.', '/')}"
        ip("netns", "exec", name, "sh", "-c", f"echo {value} > {file}")

    def torchrun(
        self, name: str, words: list[str], project: Path, env: dict[str, str], screen: IO[str]
    ) -> subprocess.Popen[str]:
        """Start torchrun on a host, for one rank there; words are its options and the command."""
        here = self.names.index(name)
        place = [
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={RENDEZVOUS}",
            f"--local-addr={ADDRESSES[here]}",
        ]
        place += [
            f"--rdzv-conf=is_host={int(here == 0)},read_timeout=20",
            "--nnodes=2",
            "--nproc-per-node=1",
        ]
        return subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                name,
                sys.executable,
                "-m",
                "torch.distributed.run",
                *place,
                *words,
            ],
            cwd=project,
            env=env | {"GLOO_SOCKET_IFNAME": CABLE},
            stdin=subprocess.DEVNULL,
            stdout=screen,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def processes(self) -> dict[int, str]:
        """Return the commands of all processes on the hosts but zombies, by process id."""
        commands = {}
        for pid in [int(line) for name in self.names for line in ip("netns", "pids", name).split()]:
            with suppress(OSError):
                commands[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        return {pid: command for pid, command in commands.items() if command}

    def kill(self) -> None:
        """Ends what is left on the hosts."""
        while left := self.processes():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def remove(self) -> None:
        self.kill()
        for name in self.names:
            ip("netns", "delete", name)
