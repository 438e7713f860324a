"""Wall time by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up seconds by name; stages may repeat. A GPU is waited for at both ends, so that its work counts where it
    was asked for: time stages, not steps of a loop."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        _wait()
        start = time.perf_counter()
        try:
            yield
        finally:
            _wait()
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def split(seconds: Mapping[str, float], **parts: Mapping[str, float]) -> dict[str, float]:
    """Stages with some of them replaced by their parts: `rollout` -> `rollout/prefill`, …, `rollout/other`."""
    whole: dict[str, float] = {}
    for stage, total in seconds.items():
        if stage not in parts:
            whole[stage] = total
            continue
        whole |= {f"{stage}/{part}": value for part, value in parts[stage].items()}
        whole[f"{stage}/other"] = max(0.0, total - sum(parts[stage].values()))
    return whole


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
