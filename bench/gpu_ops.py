"""The table of ops, a case a step: ours and the floor first, then peers while there is time; known after every mode."""

from __future__ import annotations

import contextlib
from typing import Any

import goals
import interleaved
import machine
import peers
import table
from cases import cases_of
from goals import CaseResult
from gpu_report import Report
from interleaved import Budget

BUDGET = Budget(seconds=2.5, min_rounds=3, max_rounds=25, prepare_seconds=14.0)
COMPILE_BUDGET = Budget(seconds=1.5, min_rounds=3, max_rounds=25, prepare_seconds=30.0)
WITH_MEMORY = ("linear_large",)
COMPILED = ("linear_large", "grpo_loss", "cfg_sample")
"""Cases whose compiled peers are measured, in a step of their own: compiling takes longer than measuring."""

for _name in ("liger_kernel.chunked_loss.grpo_loss", "trl.trainer.grpo_trainer", "cut_cross_entropy"):
    with contextlib.suppress(interleaved.Unavailable):  # its provider says why
        peers.load(_name)


def measure(report: Report, name: str, device: str, quick: bool, compiled: bool) -> None:
    """One case; with `compiled` only what is compiled, beside ours and the floor."""
    case, shape = cases_of(device, quick)[name]
    key = f"{name}, compiled" if compiled else name

    def chosen(provider: str) -> bool:
        return ("compile" in provider) == compiled or (compiled and provider.startswith(("ours triton", "floor")))

    def so_far(result: CaseResult, skipped: dict[str, str]) -> None:
        row = {"title": case.title, "shape": str(shape), "rows": table.rows_of(result), "skipped": dict(skipped)}
        found: dict[str, Any] = {"cases": {**report.found.get("cases", {}), key: row}}
        if not compiled:
            lines = goals.lines({name: result}, "cuda")
            found["goals"] = {line["key"]: {"measured": line["measured"]} for line in lines}
        report.write(**found)

    budget = table.QUICK if quick else COMPILE_BUDGET if compiled else BUDGET
    result, skipped = table.run_case(
        name,
        case,
        shape,
        device,
        budget,
        memory=name in WITH_MEMORY and not compiled and device == "cuda",
        chosen=chosen,
        quick=quick,
        so_far=so_far,
        modes=("hot",) if compiled else None,  # each mode compiles again
    )
    so_far(result, skipped)
    print(table.show(case.title, result, skipped), flush=True)
    if not any(row["provider"].startswith("ours") for row in table.rows_of(result)):
        report.line(
            name=f"{key}: ours", ok=False, detail="; ".join(f"{k}: {v}" for k, v in skipped.items() if "ours" in k)
        )


def run(report: Report, pretend: bool, name: str) -> None:
    """A case by name, or `compiled`."""
    device = "cpu" if pretend else "cuda"
    report.write(environment=machine.environment(device))
    if name == "compiled":
        for each in COMPILED:
            measure(report, each, device, pretend, compiled=True)
    else:
        measure(report, name, device, pretend, compiled=False)
