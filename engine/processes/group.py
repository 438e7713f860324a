"""The process group of a run: joining it, this process's place in it and its device, and rank 0 before the others."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from .meeting import Meeting, meet

Made = TypeVar("Made")


def init_distributed(timeout: float = 1800.0) -> None:
    """Joins the launcher's process group, or makes one of a single process; DeepSpeed takes the one that it finds.

    Args:
        timeout: seconds after which a collective that another rank has not joined is an error.

    Raises:
        RankFailed: not all ranks have come.
    """
    if not dist.is_initialized():
        join(meet(), timeout)


def join(meeting: Meeting, timeout: float) -> None:
    """The process group of the ranks that have met; `timeout` as above."""
    device = own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # collectives of Python objects use the current one
    backend, seconds = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=timeout)
    if meeting.store is None:
        dist.init_process_group(backend, timeout=seconds)
        return
    meeting.store.set_timeout(seconds)
    store = dist.PrefixStore("group", meeting.store)
    dist.init_process_group(backend, timeout=seconds, store=store, rank=meeting.rank, world_size=meeting.world_size)


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
