"""The table: every case, all providers interleaved, and the goals; also written to bench/results/<device>.json.

    python bench/table.py                          all cases; a few minutes on two cores
    python bench/table.py --only mixed pruned      some of them, the others stay in the file
    python bench/table.py --quick --out /tmp/x     tiny shapes: shows that everything runs

Columns: median, p20 and p80 over the rounds; time relative to our fastest backend and to the floor (medians of the
ratios within a round); `of floor` is floor / time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import goals
import machine
import torch
from cases import FLOOR, Case, cases_of
from goals import CaseResult
from interleaved import Budget, Measured, clock_for, measure
from memory import peak
from shapes import Shape

RESULTS = Path(__file__).resolve().parent / "results"
QUICK = Budget(seconds=0.05, min_rounds=2, max_rounds=2, sample_seconds=0.0)


def modes_of(case: Case, device: str) -> tuple[str, ...]:
    """How the case is timed."""
    if not case.timed:
        return ()
    if device == "cpu":
        return ("hot",)
    return ("hot", "cold", "graph") if case.graph else ("hot", "cold")


def run_case(
    name: str,
    case: Case,
    shape: Shape,
    device: str,
    budget: Budget,
    *,
    memory: bool,
    chosen: Callable[[str], bool] = lambda _: True,
    quick: bool = False,
    so_far: Callable[[CaseResult, dict[str, str]], None] = lambda *_: None,
    modes: Sequence[str] | None = None,
) -> tuple[CaseResult, dict[str, str]]:
    """Times and memory of one case, and why providers were left out.

    Args:
        name, case, shape, device: what is measured.
        budget: of each mode.
        memory: also the peaks.
        chosen: which providers take part, by name; ours and the floor are prepared first.
        quick: tiny shapes.
        so_far: called with what is known after each mode.
        modes: None: all that the case has.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # else the cases before count as recompilations of this one
    providers = [p for p in case.build(shape) if chosen(p.name)]
    providers.sort(key=lambda p: not p.name.startswith(("ours", FLOOR)))
    times: dict[str, Measured] = {}
    skipped: dict[str, str] = {}
    for mode in modes or modes_of(case, device):
        times[mode] = measure({p.name: p.prepare for p in providers}, clock_for(mode, device), budget)
        suffix = "" if mode == "hot" else f" [{mode}]"
        skipped |= {provider + suffix: reason for provider, reason in times[mode].skipped.items()}
        so_far(CaseResult(shape, times, {}), skipped)
    peaks: dict[str, int] = {}
    if memory and (case.memory or device == "cuda"):
        for provider in providers:
            found = peak(name, provider.name, device, quick)
            if "bytes" in found:
                peaks[provider.name] = found["bytes"]
            else:
                skipped[f"{provider.name}, memory"] = found["skipped"]
            so_far(CaseResult(shape, times, peaks), skipped)
    return CaseResult(shape, times, peaks), skipped


def rows_of(result: CaseResult) -> list[dict[str, Any]]:
    """One row per provider and mode, fastest first; memory alone where nothing was timed."""
    rows: list[dict[str, Any]] = []
    for mode, measured in result.times.items():
        mine = result.ours(mode=mode)
        for name in sorted(measured.samples, key=measured.median):
            rows.append(
                {
                    "provider": name,
                    "mode": mode,
                    "median": measured.median(name),
                    "p20": measured.quantile(name, 0.2),
                    "p80": measured.quantile(name, 0.8),
                    "rounds": len(measured.samples[name]),
                    "to_ours": measured.ratio(name, mine) if mine else None,
                    "of_floor": 1 / measured.ratio(name, FLOOR) if FLOOR in measured.samples else None,
                    "peak_extra_bytes": result.memory.get(name),
                }
            )
    timed = {row["provider"] for row in rows}
    return rows + [{"provider": n, "peak_extra_bytes": b} for n, b in result.memory.items() if n not in timed]


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def show(title: str, result: CaseResult, skipped: dict[str, str]) -> str:
    """A case as Markdown."""
    lines = [f"\n### {title} ({result.shape})\n"]
    lines.append("| provider | mode | median | p20 | p80 | / ours | of floor | extra memory |")
    lines.append("|---|---|--:|--:|--:|--:|--:|--:|")
    for row in rows_of(result):
        times = [_seconds(row.get(key)) for key in ("median", "p20", "p80")]
        ratio = "" if row.get("to_ours") is None else f"{row['to_ours']:.2f}"
        share = "" if row.get("of_floor") is None else f"{row['of_floor']:.0%}"
        bytes_ = row["peak_extra_bytes"]
        memory = "" if bytes_ is None else f"{bytes_ / goals.MIB:.0f} MiB"
        lines.append(
            f"| {row['provider']} | {row.get('mode', '')} | {' | '.join(times)} | {ratio} | {share} | {memory} |"
        )
    return "\n".join([*lines, *(f"- {name}: {reason}" for name, reason in skipped.items())])


def show_goals(lines: list[dict[str, Any]]) -> str:
    """The goals as Markdown."""
    shown = ["\n| goal | measured | met |", "|---|--:|---|"]
    for line in lines:
        measured = "not measured" if line["measured"] is None else f"{line['measured']:.3g}"
        met = {True: "yes", False: "NO", None: ""}[line["met"]]
        shown.append(f"| {line['goal']} | {measured} | {met} |")
    return "\n".join(shown)


def write(path: Path, content: dict[str, Any], keep: bool) -> None:
    """Adds to what the file has where only some cases were run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if keep and path.is_file():
        known = json.loads(path.read_text())
        content["cases"] = known.get("cases", {}) | content["cases"]
        fresh = {line["goal"] for line in content["goals"]}
        content["goals"] = [g for g in known.get("goals", []) if g["goal"] not in fresh] + content["goals"]
    path.write_text(json.dumps(content, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints and writes; returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two rounds")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of cases")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for the rounds of a case")
    parser.add_argument("--no_memory", action="store_true")
    parser.add_argument("--no_compile", action="store_true", help="without providers that compile")
    given = parser.parse_args(arguments)
    cases = cases_of(given.device, given.quick)
    unknown = sorted(set(given.only or ()) - set(cases))
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}; known: {', '.join(cases)}")
    budget = QUICK if given.quick else Budget(seconds=given.seconds)
    environment = machine.environment(given.device)
    print(json.dumps(environment))
    results: dict[str, CaseResult] = {}
    written: dict[str, Any] = {}
    content: dict[str, Any] = {"environment": environment, "cases": {}, "goals": []}
    for name, (case, shape) in cases.items():
        if given.only and name not in given.only:
            continue
        print(f"{name}: {shape} …", file=sys.stderr, flush=True)
        results[name], skipped = run_case(
            name,
            case,
            shape,
            given.device,
            budget,
            memory=not given.no_memory,
            chosen=lambda provider: not given.no_compile or "compile" not in provider,
            quick=given.quick,
        )
        print(show(case.title, results[name], skipped), flush=True)
        stamp = {key: environment[key] for key in ("commit", "uncommitted_changes", "date", "threads")}
        written[name] = {
            "title": case.title,
            "shape": str(shape),
            "rows": rows_of(results[name]),
            "skipped": skipped,
            **stamp,
        }
        reached = goals.lines(results, given.device)
        if given.quick:  # tiny shapes say nothing about the goals
            reached = [line | {"met": None} for line in reached]
        content = {"environment": environment, "cases": dict(written), "goals": reached}
        write(given.out / f"{machine.slug(given.device)}.json", content, keep=bool(given.only))
    print(show_goals(content["goals"]))
    return content


if __name__ == "__main__":
    main()
