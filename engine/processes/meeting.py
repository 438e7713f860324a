"""The ranks of one start find each other, whatever earlier starts have left in the launcher's store.

torchrun keeps one store over all its starts, and what a rank wrote into it before it was lost (where it listens, how
far it was) is taken for the new rank's.  So every start gets a name, which is before all of its keys:

    hello              every rank appends its number and a word that no other process has
    welcome/<word>     rank 0's answer: the number of this start, from 1; earlier starts' words are answered as well
    <start>/here/<rank>    the rank has read it; when all have, they begin

Nobody waits for ever: after `seconds` a rank ends, naming those that did not come.  What is to outlive a start stands
beside, under names without one: see `Meeting.keep`.

Source: torch.distributed's env:// rendezvous, which trusts that a store is new (pytorch#135712).
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..errors import ConfigError, RankFailed

START_SECONDS = 300.0
"""How long ranks wait for each other when they start: for slow disks, from which they all load their programs."""
POLL = 0.05
"""Seconds between two looks; more where there are many ranks."""
PREFIX = "syncr1"
REFUSED = "refused"
"""Kept: why an earlier start ended with exit code 2, after which starting again does not help."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """The ranks of a start, which have all come."""

    rank: int
    world_size: int
    start: int = 1
    """Of how many that share the launcher's store this one is; 1 is the first."""
    store: Any = None
    """Of this start alone; None for a process alone."""
    kept: Any = None
    """Of all starts; None where the store ends with rank 0."""

    def keep(self, name: str, value: str) -> None:
        """Leaves a value to later starts, unless an earlier one did."""
        if self.kept is not None:
            self.kept.compare_set(name, "", value)

    def left(self, name: str) -> str | None:
        """What this start or an earlier one has left."""
        if self.kept is None or not self.kept.check([name]):
            return None
        value: bytes = self.kept.get(name)
        return value.decode()


def meet(seconds: float = START_SECONDS) -> Meeting:
    """Waits for all ranks that the launcher has started; sets what it tells in the environment where nobody did.

    Raises:
        RankFailed: not all have come.
        ConfigError: the launcher starts a run again that was refused.
    """
    _as_one_process(os.environ)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if world_size == 1 and not agents:
        return Meeting(0, 1)
    deadline, where = time.monotonic() + seconds, f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        base, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timedelta(seconds=seconds)))
        shared = dist.PrefixStore(PREFIX, base)
        start = _host(shared, world_size, deadline) if rank == 0 else _guest(shared, rank, world_size, deadline)
    except (dist.DistError, RuntimeError) as error:
        told = f"rank {rank} found no store at {where} within {seconds:g} s of its start ({str(error)[:200]})"
        raise RankFailed(f"{told}: rank 0 or the launcher is gone, or a firewall is between") from error
    store = dist.PrefixStore(str(start), shared) if world_size > 1 else None
    meeting = Meeting(rank, world_size, start, store, shared if agents else None)
    refused = meeting.left(REFUSED)
    if refused is not None:
        raise ConfigError(f"this run was refused, and was started again all the same: {refused}")
    return meeting


def _host(shared: Any, world_size: int, deadline: float) -> int:
    """Rank 0 welcomes everybody."""
    start = int(shared.add("starts", 1))
    here, answered, missing = [f"{start}/here/{rank}" for rank in range(1, world_size)], set[str](), list[str]()
    shared.append("hello", "")
    while here and not shared.check(here):
        words = {line.partition(" ")[2] for line in shared.get("hello").decode().splitlines()}
        for word in words - answered:
            shared.set(f"welcome/{word}", str(start))
        answered |= words
        if time.monotonic() > deadline:
            missing = [key.rpartition("/")[2] for key in here if not shared.check([key])]
            raise RankFailed(f"of {world_size} ranks {_listed(missing)} did not come: {_REMEDY}")
        time.sleep(POLL)
    shared.set(f"{start}/all", "")
    return start


def _guest(shared: Any, rank: int, world_size: int, deadline: float) -> int:
    word, pause = secrets.token_hex(8), max(POLL, world_size / 2000)
    shared.append("hello", f"{rank} {word}\n")

    def wait(key: str, problem: str) -> None:
        while not shared.check([key]):
            if time.monotonic() > deadline + 1:  # rank 0, which says more, comes first
                raise RankFailed(f"{problem}: {_REMEDY}")
            time.sleep(pause)

    wait(f"welcome/{word}", f"rank {rank} was not welcomed by rank 0")
    start = int(shared.get(f"welcome/{word}"))
    shared.set(f"{start}/here/{rank}", "")
    wait(f"{start}/all", f"rank {rank} has met rank 0, and others have not")
    return start


_REMEDY = "their programs end, or hang, before they join; look at their output, and at their machines"


def _listed(ranks: list[str]) -> str:
    return f"{', '.join(ranks[:8])}{', …' if len(ranks) > 8 else ''} ({len(ranks)})"


def _as_one_process(environ: Any) -> None:
    defaults: Mapping[str, str] = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in defaults.items():
        environ.setdefault(name, value)
    if "MASTER_PORT" not in environ:
        environ["MASTER_PORT"] = str(free_port())


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
