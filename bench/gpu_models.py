"""Rollouts beside transformers' loops, and training beside padded rows: `rollout/<case>` and `step/<case>`.

The cases are those of rollout.py and step.py with a random Janus-Pro-1B; in pretence with a tiny one on the CPU.  Every
run of a side is told as it ends, by stage, so that a case that is killed half way has told what it measured.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import comparison
import machine
import models
import rollout
import step
import torch
from comparison import Case, Comparison, Provider, Told
from gpu_report import Report
from interleaved import Budget
from sides import Sides, photo_folder, work_of

BUDGET = Budget(seconds=10.0, min_rounds=1, max_rounds=5, sample_seconds=0.0)
RESERVED_BYTES = 48 << 30
"""Of free GPU memory that the allocator takes at once: else a cache that grows asks the driver at every step."""


def told(report: Report, provider: Provider) -> None:
    """Has every run of a provider written down as it ends."""
    work: Callable[[bool], Told] = provider.work

    def run(short: bool) -> Told:
        result = work(short)
        runs: dict[str, list[Any]] = report.found.get("runs", {})
        entry = {"warm_up": short, "seconds": dict(result.seconds), **result.numbers}
        report.write(runs={**runs, provider.name: [*runs.get(provider.name, []), entry]})
        return result

    provider.work = run


def measure(report: Report, name: str, case: Case, device: str, quick: bool, memory: bool) -> None:
    """One case, its floor and its goals."""

    def so_far(found: Comparison) -> None:
        report.write(cases={name: comparison.entry_of(found)})

    def peaks(provider: Provider) -> dict[str, Any]:
        return comparison.probe(provider, device)

    for provider in case.providers:
        told(report, provider)
    budget = comparison.QUICK if quick else BUDGET
    found = comparison.compare(case, device, budget, peaks if memory else None, so_far)
    so_far(found)
    print(found.show(), flush=True)
    lines = [goal.line(case.shape) for goal in case.goals(found)]
    keyed = {line["key"]: {"measured": line["measured"]} for line in lines if "key" in line}
    shares = {line["goal"]: line["measured"] for line in lines if "key" not in line}
    report.write(goals=keyed, other_goals=shares)
    if not any(row["provider"].startswith(comparison.OURS) for row in found.rows()):
        report.line(name=f"{name}: ours", ok=False, detail="; ".join(f"{k}: {v}" for k, v in found.skipped.items()))


def reserve() -> None:
    """Takes the memory once and gives it to the allocator."""
    free = torch.cuda.mem_get_info()[0]
    block = torch.empty(min(RESERVED_BYTES, free // 2), dtype=torch.uint8, device="cuda")
    del block


def build(name: str, device: str, quick: bool, folder: Path) -> Case:
    """A case by name."""
    size, work = models.size_of(device, quick), work_of(device, quick)
    if name not in rollout.CASES:
        return step.build_case(name, size, work, folder)
    make = {"understanding": rollout.understanding, "drawing": rollout.drawing}[name]
    questions = work.questions if name == "understanding" else 0
    return make(Sides(size, work, folder, questions, 0 if questions else work.drawings))


def run(report: Report, pretend: bool, name: str) -> None:
    """A case by name."""
    device = "cpu" if pretend else "cuda"
    report.write(environment=machine.environment(device))
    if not pretend:
        reserve()
    with photo_folder() as folder:
        case = build(name, device, pretend, folder)
        measure(report, name, case, device, pretend, memory=name == "training" and not pretend)
