"""Times the providers of one op side by side: A, B, C, A, B, C, … so that a drift of the machine hits all alike.

A sample is the mean of as many calls as fill a few milliseconds, without garbage collection. CPU: host clock. CUDA:
events, in three modes: `hot` (inputs are where the call before left them), `cold` (the L2 cache was overwritten) and
`graph` (replay of a captured CUDA graph: no launch cost on the host).

Why no library does this: `torch.utils.benchmark` and pytest-benchmark time one provider to its end before the next, so
that a drift falls on one of them. One matrix product against itself, 14 times on two busy cores: the ratio's standard
deviation was 0.15 in rounds and 4.3 by `Timer.blocked_autorange`. `Timer` also makes two calls more for each sample,
and has neither the cold nor the graph mode. pytest-benchmark gets its samples from here (`test_ops.py`).
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy
import torch

Run = Callable[[], Any]
FLUSH_BYTES = 1 << 28
"""More than the L2 cache of any GPU."""


class Unavailable(RuntimeError):
    """A provider cannot run here; the message is the reason that the table shows."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How long one case is measured."""

    seconds: float = 10.0
    min_rounds: int = 3
    max_rounds: int = 25
    sample_seconds: float = 0.005
    prepare_seconds: float = math.inf
    """Providers that would be prepared later than this are left out: the ones before are measured."""

    def calls(self, seconds_per_call: float) -> int:
        """As many calls as fill a sample."""
        return max(1, min(1000, math.ceil(self.sample_seconds / max(seconds_per_call, 1e-9))))


@dataclass(slots=True)
class Measured:
    """Seconds per call of each provider, one entry a round, and why the others have none."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """The median over the rounds."""
        return statistics.median(self.samples[name])

    def quantile(self, name: str, share: float) -> float:
        """p20, p80, …: linear between the two samples around it."""
        return float(numpy.quantile(self.samples[name], share))

    def ratio(self, name: str, to: str) -> float:
        """Median over the rounds of (time of `name`) / (time of `to`) in the same round."""
        return statistics.median(a / b for a, b in zip(self.samples[name], self.samples[to], strict=True))


class Clock(Protocol):
    """Prepares a call, then times `calls` of them: seconds per call."""

    def prepare(self, run: Run) -> Run: ...

    def __call__(self, run: Run, calls: int) -> float: ...


class HostClock:
    """Wall time of synchronous work."""

    def prepare(self, run: Run) -> Run:
        """Nothing to prepare."""
        return run

    def __call__(self, run: Run, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls


class EventClock:
    """Device time between two events; with `cold`, the L2 cache is overwritten before every call."""

    def __init__(self, cold: bool = False) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda") if cold else None

    def prepare(self, run: Run) -> Run:
        """Nothing to prepare."""
        return run

    def __call__(self, run: Run, calls: int) -> float:
        if self.flush is None:
            return self._between(run, calls) / calls
        total = 0.0
        for _ in range(calls):
            self.flush.zero_()
            total += self._between(run, 1)
        return total / calls

    @staticmethod
    def _between(run: Run, calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


class GraphClock(EventClock):
    """Device time of replays of the captured call."""

    def prepare(self, run: Run) -> Run:
        """Captures the call; what cannot be captured is unavailable in this mode."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                kept = run()
        except Exception as error:  # whatever a library raises while it is captured
            torch.cuda.synchronize()
            raise Unavailable(f"cannot be captured: {_first_line(error)}") from error

        def replay() -> Any:
            graph.replay()
            return kept

        return replay


def clock_for(mode: str, device: str) -> Clock:
    """The clock of a mode: hot, cold or graph."""
    if device == "cpu":
        return HostClock()
    return GraphClock() if mode == "graph" else EventClock(cold=mode == "cold")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def measure(providers: Mapping[str, Callable[[], Run]], clock: Clock, budget: Budget) -> Measured:
    """Prepares and warms up every provider, then takes one sample of each per round."""
    measured = Measured()
    runs: dict[str, Run] = {}
    start = time.perf_counter()
    for name, prepare in providers.items():
        if time.perf_counter() - start > budget.prepare_seconds:
            measured.skipped[name] = f"not prepared: {budget.prepare_seconds:.0f} s were over"
            continue
        try:
            run = clock.prepare(prepare())
            run()  # compiles, allocates, loads
        except Unavailable as reason:
            measured.skipped[name] = str(reason)
        except Exception as error:
            # A peer of another version, one whose kernel does not compile (triton's errors have no common base), or
            # one that runs out of memory leaves the others to be measured.
            measured.skipped[name] = f"failed: {_first_line(error)}"
        else:
            runs[name] = run
            measured.samples[name] = []
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        _take_rounds(measured, runs, clock, budget)
    finally:
        if collecting:
            gc.enable()
    return measured


def _take_rounds(measured: Measured, runs: dict[str, Run], clock: Clock, budget: Budget) -> None:
    """The first sample is one call; it says how many the next ones take."""
    calls = dict.fromkeys(runs, 1)
    start = time.perf_counter()
    for done in range(budget.max_rounds):
        if done >= budget.min_rounds and time.perf_counter() - start > budget.seconds:
            break
        for name, run in list(runs.items()):
            try:
                seconds = clock(run, calls[name])
            except Exception as error:  # out of memory beside the others, say: it leaves, the others go on
                measured.skipped[name] = f"failed in round {done + 1}: {_first_line(error)}"
                del runs[name], measured.samples[name]
                continue
            measured.samples[name].append(seconds)
            calls[name] = budget.calls(seconds)


def fastest(measured: Measured, names: Sequence[str]) -> str | None:
    """The one with the smallest median among those that ran."""
    ran = [name for name in names if name in measured.samples]
    return min(ran, key=measured.median) if ran else None
