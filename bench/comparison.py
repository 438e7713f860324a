"""Two sides of one piece of work, timed in turn, with what their runs tell: stages, keys and values, peak memory.

A run here takes seconds to minutes, so the warm-up is a short one, and a sample is a single run.  CPU seconds of the
process stand beside wall time: where other programs run too, they are the better comparison.

On a CPU the allocator keeps what is freed, for all sides: else the kernel hands out zeroed pages again for every copy
that a growing cache makes, which is 40 % of a transformers rollout's CPU time and no fault of the method (measured: 10
of 25 s).  Peak memory is measured in a process of its own without this (memory.py says how), by the same script with
`--probe case/provider`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import memory
import torch
from interleaved import Budget, Measured, Run, clock_for, fastest, measure
from table import RESULTS, show_goals, write

from syncr1.engine.rollout.capacity import free_bytes

MIB = 1 << 20
OURS = "ours"
"""Names of our side begin with it."""
IN_COLUMNS = ("kv_bytes", "cpu_seconds")
HEAP_BYTES = 8 << 30
"""The released step takes 6 GiB."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's mallopt."""
QUICK = Budget(seconds=0.0, min_rounds=1, max_rounds=1, sample_seconds=0.0)


@dataclass(frozen=True, slots=True)
class Told:
    """What one run says about itself."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    """By stage."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """kv_bytes, tokens, …"""


class Provider:
    """One side.

    Args:
        name: in tables; ours begins with `ours`.
        work: does it; `short` asks for a small part of it, which loads and compiles everything.
        memory: its peak is wanted.
    """

    def __init__(self, name: str, work: Callable[[bool], Told], *, memory: bool = True) -> None:
        self.name, self.work, self.memory = name, work, memory
        self.told: list[Told] = []

    def prepare(self) -> Run:
        """The first call is the warm-up."""
        warm = False

        def run() -> None:
            nonlocal warm
            if warm:
                start = time.process_time()
                told = self.work(False)
                spent = {"cpu_seconds": time.process_time() - start}
                self.told.append(Told(told.seconds, {**told.numbers, **spent}))
            else:
                self.work(True)
                warm = True

        return run

    def stages(self) -> dict[str, float]:
        """Median seconds of each stage."""
        names = dict.fromkeys(name for told in self.told for name in told.seconds)
        return {name: statistics.median(told.seconds.get(name, 0.0) for told in self.told) for name in names}

    def numbers(self) -> dict[str, float]:
        """Medians of the other numbers."""
        names = dict.fromkeys(name for told in self.told for name in told.numbers)
        return {name: statistics.median(told.numbers.get(name, 0.0) for told in self.told) for name in names}


@dataclass(frozen=True, slots=True)
class Case:
    """What is compared; `goals` reads the finished comparison."""

    title: str
    shape: str
    providers: Sequence[Provider]
    goals: Callable[[Comparison], list[Goal]]
    floor: Callable[[], Mapping[str, float]] | None = None
    """Seconds that the machine needs at least, by part; measured when called."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound on one number, which is None where it was not measured."""

    text: str
    measured: float | None
    bound: float
    at_most: bool = False
    unit: str = "x"
    key: str = ""
    """Of a goal of the GPU page."""

    def line(self, shape: str) -> dict[str, Any]:
        """As table.py writes it."""
        met = (
            None
            if self.measured is None
            else (self.measured <= self.bound if self.at_most else self.measured >= self.bound)
        )
        sign = "<=" if self.at_most else ">="
        text = f"{self.text} ({shape}): {sign} {self.bound:.3g} {self.unit}"
        line = {"goal": text, "measured": self.measured, "met": met}
        return line | {"key": self.key} if self.key else line


@dataclass(frozen=True, slots=True)
class Comparison:
    """A case as it was measured."""

    case: Case
    times: Measured
    memory: Mapping[str, int]
    floor: Mapping[str, float]
    skipped: Mapping[str, str]

    def provider(self, name: str) -> Provider:
        """By name."""
        return next(p for p in self.case.providers if p.name == name)

    def times_slower(self, others: str, mine: str = OURS) -> float | None:
        """How much longer the fastest provider whose name begins with `others` takes; medians of the ratios."""
        other = fastest(self.times, [name for name in self.times.samples if name.startswith(others)])
        return self.times.ratio(other, mine) if other and mine in self.times.samples else None

    def ratio(self, other: str, mine: str = OURS) -> float | None:
        """How much longer this provider takes."""
        known = self.times.samples
        return self.times.ratio(other, mine) if other in known and mine in known else None

    def memory_share(self, of: str, mine: str = OURS) -> float | None:
        """Our peak over another's."""
        return self.memory[mine] / self.memory[of] if mine in self.memory and of in self.memory else None

    def number_share(self, number: str, of: str, mine: str = OURS) -> float | None:
        """Our number over another's."""
        ours, theirs = (self.provider(name).numbers().get(number) for name in (mine, of))
        return ours / theirs if ours and theirs else None

    def rows(self) -> list[dict[str, Any]]:
        """One per provider, fastest first; `to_ours` is relative to the fastest of ours."""
        floor = sum(self.floor.values())
        mine = fastest(self.times, [name for name in self.times.samples if name.startswith(OURS)])
        rows = []
        for name in sorted(self.times.samples, key=self.times.median):
            provider = self.provider(name)
            rows.append(
                {
                    "provider": name,
                    "mode": "hot",
                    "median": self.times.median(name),
                    "p20": self.times.quantile(name, 0.2),
                    "p80": self.times.quantile(name, 0.8),
                    "rounds": len(self.times.samples[name]),
                    "to_ours": self.times.ratio(name, mine) if mine else None,
                    "of_floor": floor / self.times.median(name) if floor else None,
                    "peak_extra_bytes": self.memory.get(name),
                    "stages": provider.stages(),
                    **provider.numbers(),
                }
            )
        return rows

    def show(self) -> str:
        """As Markdown."""
        lines = [f"\n### {self.case.title} ({self.case.shape})\n"]
        lines.append("| provider | median | p20 | p80 | / ours | of floor | CPU time | KV | extra memory |")
        lines.append("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
        for row in self.rows():
            times = " | ".join(f"{row[key]:.3g} s" for key in ("median", "p20", "p80"))
            ratio = "" if row["to_ours"] is None else f"{row['to_ours']:.2f}"
            share = "" if row["of_floor"] is None else f"{row['of_floor']:.0%}"
            sizes = " | ".join(
                "" if (n := row.get(key)) is None else f"{n / MIB:.1f} MiB" for key in ("kv_bytes", "peak_extra_bytes")
            )
            spent = f"{row['cpu_seconds']:.3g} s"
            lines.append(f"| {row['provider']} | {times} | {ratio} | {share} | {spent} | {sizes} |")
        lines += ["", self._stage_table()]
        if self.floor:
            lines.append("- floor: " + ", ".join(f"{name} {value:.3g} s" for name, value in self.floor.items()))
        for provider in self.case.providers:
            told = {name: value for name, value in provider.numbers().items() if name not in IN_COLUMNS}
            if told:
                lines.append(f"- {provider.name}: " + ", ".join(f"{name} {value:.6g}" for name, value in told.items()))
        return "\n".join([*lines, *(f"- {name}: {reason}" for name, reason in self.skipped.items())])

    def _stage_table(self) -> str:
        """Seconds of each stage, a column per provider."""
        columns = {row["provider"]: row["stages"] for row in self.rows()}
        stages = dict.fromkeys(stage for column in columns.values() for stage in column)
        lines = [f"| stage | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for stage in stages:
            shown = (f"{column[stage]:.3g} s" if stage in column else "" for column in columns.values())
            lines.append(f"| {stage} | {' | '.join(shown)} |")
        return "\n".join(lines)


def keep_freed_memory(reserve: int) -> None:
    """No block is mapped alone, the heap never shrinks, and it has `reserve` bytes already, so that no side pays for
    being the first to touch them. glibc only, elsewhere nothing happens."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)
    torch.zeros(min(reserve, free_bytes(torch.device("cpu")) // 2), dtype=torch.uint8)


def compare(
    case: Case,
    device: str,
    budget: Budget,
    peaks: Callable[[Provider], Mapping[str, Any]] | None,
    so_far: Callable[[Comparison], None] = lambda _: None,
) -> Comparison:
    """Times every provider, then asks for peaks where they are wanted; `so_far` is told what is known in between."""
    floor = case.floor() if case.floor is not None else {}
    times = measure({p.name: p.prepare for p in case.providers}, clock_for("hot", device), budget)
    skipped, sizes = dict(times.skipped), {}
    for provider in case.providers:
        if peaks is None or not provider.memory or provider.name in skipped:
            continue
        so_far(Comparison(case, times, dict(sizes), floor, dict(skipped)))
        found = peaks(provider)
        if "bytes" in found:
            sizes[provider.name] = int(found["bytes"])
        else:
            skipped[f"{provider.name}, memory"] = found["skipped"]
    return Comparison(case, times, sizes, floor, skipped)


def probe(provider: Provider, device: str) -> dict[str, Any]:
    """Peak memory that one run adds, in this process."""
    provider.work(True)
    run = lambda: provider.work(False)  # noqa: E731
    size, method = memory._peak_on_cpu(run) if device == "cpu" else memory._peak_on_cuda(run)
    return {"bytes": size, "method": method}


def probe_apart(script: str, name: str, device: str, quick: bool) -> dict[str, Any]:
    """The same in a process of its own: `{"bytes", "method"}` or `{"skipped"}`."""
    command = [sys.executable, script, "--probe", name, "--device", device, *(["--quick"] if quick else [])]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"skipped": f"failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:200]}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The flags of both scripts."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round: shows that everything runs")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="names of cases")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of every case, at least")
    parser.add_argument("--seconds", type=float, default=60.0, help="more rounds until a case has taken so long")
    parser.add_argument("--no_memory", action="store_true")
    parser.add_argument("--probe", metavar="CASE/PROVIDER", help="only the peak memory of one, as JSON")
    return parser


def run_cases(
    given: argparse.Namespace, names: Sequence[str], build: Callable[[str], Case], script: str, suffix: str
) -> dict[str, Any]:
    """Measures, prints and writes `<device>-<suffix>.json`; returns what was written.

    Args:
        given: of `parser_of`.
        names: cases that run unless `--only` names others.
        build: makes a case by name.
        script: path of the calling script, for probes.
        suffix: of the file.
    """
    if given.device == "cpu" and not given.quick:  # quick runs may share their process with tests
        keep_freed_memory(HEAP_BYTES)
    environment = machine.environment(given.device)
    print(json.dumps(environment), flush=True)
    budget = QUICK if given.quick else Budget(given.seconds, given.rounds, max(given.rounds, 25), 0.0)
    written: dict[str, Any] = {}
    goals: list[dict[str, Any]] = []
    content: dict[str, Any] = {"environment": environment, "cases": {}, "goals": []}
    for name in given.only or names:
        case = build(name)
        print(f"{name}: {case.shape} …", file=sys.stderr, flush=True)

        def peaks(provider: Provider, name: str = name) -> Mapping[str, Any]:
            if given.device == "cuda":  # its peak can be read again and again, in this process
                return probe(provider, given.device)
            return probe_apart(script, f"{name}/{provider.name}", given.device, given.quick)

        found = compare(case, given.device, budget, None if given.no_memory else peaks)
        print(found.show(), flush=True)
        stamp = {key: environment[key] for key in ("commit", "uncommitted_changes", "date", "threads")}
        written[name] = {**entry_of(found), **stamp}
        lines = [goal.line(case.shape) for goal in case.goals(found)]
        goals += [line | {"met": None} for line in lines] if given.quick else lines
        content = {"environment": environment, "cases": dict(written), "goals": list(goals)}
        write(given.out / f"{machine.slug(given.device)}-{suffix}.json", content, keep=bool(given.only))
    print(show_goals(goals))
    return content


def entry_of(found: Comparison) -> dict[str, Any]:
    """A case as the files have it."""
    case = found.case
    return {
        "title": case.title,
        "shape": case.shape,
        "rows": found.rows(),
        "floor": dict(found.floor),
        "skipped": dict(found.skipped),
    }


def only_probe(given: argparse.Namespace, build: Callable[[str], Case]) -> None:
    """Answers `--probe`."""
    name, _, provider = given.probe.partition("/")
    (chosen,) = (p for p in build(name).providers if p.name == provider)
    print(json.dumps(probe(chosen, given.device)))
