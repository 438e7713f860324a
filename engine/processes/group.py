"""The process group of a run: joining it, this process's place in it and its device, and rank 0 before the others."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

Made = TypeVar("Made")


def init_distributed(timeout: float = 1800.0) -> None:
    """Joins the launcher's process group, or makes one of a single process; DeepSpeed takes the one that it finds.

    Args:
        timeout: seconds after which a collective that another rank has not joined is an error.
    """
    if dist.is_initialized():
        return
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    device = own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # collectives of Python objects use the current one
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))


def place() -> tuple[int, int]:
    """(rank, world size); (0, 1) outside of a process group."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def barrier() -> None:
    """Waits for all ranks; alone there is nobody to wait for."""
    if place()[1] > 1:
        dist.barrier()


def one_at_a_time(make: Callable[[], Made]) -> Made:
    """Rank 0 makes (and caches) first, the others find it made."""
    made = make() if place()[0] == 0 else None
    barrier()
    return make() if made is None else made


def of_all_ranks(words: str) -> list[str]:
    """What each rank has to say, in order of ranks. Collective."""
    _, world_size = place()
    if world_size == 1:
        return [words]
    said: list[str] = [""] * world_size
    dist.all_gather_object(said, words)
    return said


def local_device() -> torch.device:
    """This process's device, once it has joined the group."""
    init_distributed()
    return own_device()


def own_device() -> torch.device:
    """The GPU that the launcher meant for this process; the CPU without one, or where `DS_ACCELERATOR` says so."""
    if os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
