"""group.py: a process finds its place with and without a launcher."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from helpers import own_process_group

from syncr1.engine.processes.group import init_distributed, local_device, one_at_a_time, own_device, place


def test_alone_a_process_is_rank_0_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of a group and inside one of its own; joining again changes nothing."""
    assert place() == (0, 1)
    with own_process_group():
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        init_distributed(timeout=60)
        group = dist.group.WORLD
        assert local_device() == own_device() and dist.group.WORLD is group
        assert place() == (0, 1) and dist.get_world_size() == 1
        made: list[int] = []
        assert one_at_a_time(lambda: made.append(1) or len(made)) == 1 == len(made)  # type: ignore[func-returns-value]
    assert not dist.is_initialized()


def test_a_setting_keeps_a_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert str(own_device()) == "cuda:3"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert str(own_device()) == "cpu"
