"""Machines for tests: network namespaces with addresses of their own, joined by a bridge; root and iproute2 needed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "eth0"


def missing() -> str | None:
    """Why there can be no namespaces here; None where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2 (`ip`)"
    probe = f"syncr1-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=False)
    return None


@dataclass(frozen=True, slots=True)
class Cluster:
    """Machines 10.77.0.1, 10.77.0.2, … that see each other and nothing else."""

    prefix: str
    addresses: tuple[str, ...]

    @property
    def launcher(self) -> str:
        """In place of ssh: `{host}` is the machine's address."""
        return f"ip netns exec {self.prefix}{{host}}"

    def pids(self, index: int) -> list[int]:
        """Processes of a machine."""
        listed = _ip("netns", "pids", self.prefix + self.addresses[index])
        return [int(pid) for pid in listed.split()]

    def kill(self, index: int) -> int:
        """The machine loses power: SIGKILL to all of its processes at once; returns how many there were."""
        pids = self.pids(index)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(pids)

    def hostfile(self, path: Path, slots: int = 1) -> Path:
        path.write_text("".join(f"{address} slots={slots}\n" for address in self.addresses))
        return path


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


@contextmanager
def cluster(num_nodes: int) -> Iterator[Cluster]:
    """`num_nodes` machines for the duration; what still runs on them at the end is killed."""
    made = Cluster(f"s{os.getpid()}-", tuple(f"10.77.0.{index + 1}" for index in range(num_nodes)))
    hub = f"{made.prefix}hub"
    spaces = [hub, *(made.prefix + address for address in made.addresses)]
    try:
        for space in spaces:
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
        # The bridge is in a namespace too: this machine's own network stays as it is.
        _ip("-n", hub, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", hub, "link", "set", "bridge0", "up")
        for index, (space, address) in enumerate(zip(spaces[1:], made.addresses, strict=True)):
            port = f"port{index}"
            _ip("-n", hub, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", space)
            _ip("-n", hub, "link", "set", port, "master", "bridge0", "up")
            _ip("-n", space, "address", "add", f"{address}/24", "dev", INTERFACE)
            _ip("-n", space, "link", "set", INTERFACE, "up")
        yield made
    finally:
        for index in range(num_nodes):
            with suppress(subprocess.CalledProcessError):
                made.kill(index)
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)
