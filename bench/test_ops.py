"""The timed cases of the table through pytest-benchmark: one row per provider, one group per case.

    pytest bench/                       interleaved rounds, medians; no assertion on time
    pytest bench/ --quick               tiny shapes
    pytest bench/ -k "grpo_loss and ours" --benchmark-json=ops.json

The first test of a case times all of its providers round-robin (`interleaved.py`); each test then hands its provider's
samples to pytest-benchmark, so that its statistics, JSON and comparison are those of the interleaved rounds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import FLOOR, cases_of
from goals import CaseResult

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAIRS = [
    pytest.param(name, provider.name, id=f"{name}-{provider.name}")
    for name, (case, shape) in cases_of(DEVICE, quick=True).items()
    if case.timed
    for provider in case.build(shape)
]


class Replay:
    """A timer whose intervals are the given samples."""

    def __init__(self) -> None:
        self.marks = iter([0.0])

    def load(self, samples: list[float]) -> None:
        """A start and an end for each sample."""
        ends = itertools.accumulate(samples)
        self.marks = iter([mark for end, sample in zip(ends, samples, strict=True) for mark in (end - sample, end)])

    def __call__(self) -> float:
        return next(self.marks)


replay = Replay()


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize(("name", "provider"), PAIRS)
def test_op(
    benchmark: Any, measured: Callable[[str], tuple[CaseResult, dict[str, str]]], name: str, provider: str
) -> None:
    result, skipped = measured(name)
    if provider in skipped:
        pytest.skip(skipped[provider])
    samples = result.hot.samples[provider]
    mine = result.ours()
    benchmark.group = f"{name}, {result.shape}"
    benchmark.extra_info |= {"p20": result.hot.quantile(provider, 0.2), "p80": result.hot.quantile(provider, 0.8)}
    if mine:
        benchmark.extra_info["to_ours"] = result.hot.ratio(provider, mine)
    if FLOOR in result.hot.samples:
        benchmark.extra_info["to_floor"] = result.hot.ratio(provider, FLOOR)
    replay.load(samples)
    benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1)
