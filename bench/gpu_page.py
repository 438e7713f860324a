"""What a run of `bench/gpu.py` found: one JSON file, one page and one log, rewritten after every step.

The page says goal by goal whether it is met, then what did not run and why, then what was wrong, then the numbers.
Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gpu_goals import GOALS
from gpu_process import Outcome, Part

Line = dict[str, Any]
MOST_LINES = 12
"""Of one step that the page shows of what is wrong."""


def goal_lines(outcomes: Iterable[Outcome], pretend: bool) -> list[Line]:
    """Every goal, measured or not; `met` is None where nothing is claimed."""
    by_step = {f"{o.part}/{o.step}": o for o in outcomes}
    lines: list[Line] = []
    for goal in GOALS:
        outcome = by_step.get(goal.step)
        told = {} if outcome is None else outcome.found.get("goals", {}).get(goal.key, {})
        measured = told.get("measured")
        sign = "<=" if goal.at_most else ">="
        line: Line = {
            "key": goal.key,
            "goal": f"{goal.text}: {sign} {goal.bound:.4g} {goal.unit}".strip(),
            "measured": measured,
            "met": None,
        }
        if measured is not None and not pretend:
            line["met"] = goal.met(measured)
        if measured is None:
            line["why"] = _why_not(goal.step, outcome)
        lines.append(line)
    return lines


def _why_not(step: str, outcome: Outcome | None) -> str:
    """Why a goal has no number."""
    if outcome is None:
        return f"{step} has not run"
    return f"{step}: {outcome.why}" if outcome.why else f"{step} {outcome.status}, but did not measure it"


def content(
    parts: Sequence[Part], outcomes: Sequence[Outcome], *, pretend: bool, seconds: float, finished: bool
) -> dict[str, Any]:
    """Everything, in the form of the other result files: environment, cases, goals; and the rest by part."""
    environment: Any = next((o.found["environment"] for o in outcomes if "environment" in o.found), {})
    cases: dict[str, Any] = {}
    for outcome in outcomes:
        cases |= outcome.found.get("cases", {})
    steps: dict[str, Any] = {}
    for outcome in outcomes:
        found = {k: v for k, v in outcome.found.items() if k not in ("cases", "environment")}
        steps[f"{outcome.part}/{outcome.step}"] = {
            "status": outcome.status,
            "why": outcome.why,
            "seconds": round(outcome.seconds, 2),
            **found,
        }
    return {
        "environment": environment,
        "pretend": pretend,
        "finished": finished,
        "seconds": round(seconds, 1),
        "goals": goal_lines(outcomes, pretend),
        "cases": cases,
        "steps": steps,
        "parts": {part.name: part.title for part in parts},
    }


def number(value: Any) -> str:
    """Three digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:.3g}"


def seconds_text(value: float | None) -> str:
    """With a unit that fits."""
    if value is None:
        return ""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def cell(text: str) -> str:
    """Safe inside a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def _goals(all_of_it: dict[str, Any]) -> list[str]:
    words = {True: "yes", False: "**NO**", None: "pretend" if all_of_it["pretend"] else "not measured"}
    lines = ["## Goals", "", "| goal | measured | met |", "|---|--:|---|"]
    for line in all_of_it["goals"]:
        measured = cell(line.get("why", "")) if line["measured"] is None else number(line["measured"])
        lines.append(f"| {cell(line['goal'])} | {measured} | {words[line['met']]} |")
    return lines


def _missing(all_of_it: dict[str, Any], planned: Sequence[Part]) -> list[str]:
    lines = ["## What did not run, and why", ""]
    steps = all_of_it["steps"]
    for name, step in steps.items():
        wrong = [line for line in step.get("lines", []) if line.get("ok") is False]
        if step["status"] not in ("ok",) and not (step["status"] == "failed" and wrong):
            lines.append(f"- {name}: {step['status']}: {step['why']}")
    expected = [f"{part.name}/{step.name}" for part in planned for step in part.steps]
    lines += [f"- {name}: has not had its turn" for name in expected if name not in steps]
    for name, case in all_of_it["cases"].items():
        lines += [f"- {name}, {provider}: {reason}" for provider, reason in case.get("skipped", {}).items()]
    return [*lines, *(["nothing"] if len(lines) == 2 else [])]


def _wrong(all_of_it: dict[str, Any]) -> list[str]:
    lines = ["## Checks and tests", "", "| step | right | wrong | not run | seconds |", "|---|--:|--:|--:|--:|"]
    failures: list[str] = []
    for name, step in all_of_it["steps"].items():
        if "lines" not in step:
            continue
        counts = [sum(line.get("ok") is ok for line in step["lines"]) for ok in (True, False, None)]
        lines.append(f"| {name} | {' | '.join(map(str, counts))} | {number(step['seconds'])} |")
        wrong = [line for line in step["lines"] if line.get("ok") is False]
        failures += [f"- WRONG {line['name']}: {line['detail'][:300]}" for line in wrong[:MOST_LINES]]
        if len(wrong) > MOST_LINES:
            failures.append(f"- {name}: {len(wrong) - MOST_LINES} more that are wrong, see the JSON file")
        notes = [line for line in step["lines"] if line.get("ok") is None and line["detail"]]
        failures += [f"- note {line['name']}: {line['detail'][:300]}" for line in notes[:MOST_LINES]]
    return [*lines, "", *failures]


def _cases(all_of_it: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, case in all_of_it["cases"].items():
        lines += ["", f"### {name}: {case['title']} ({case['shape']})", ""]
        lines += [
            "| provider | mode | median | p20 | p80 | / ours | of floor | extra MiB |",
            "|---|---|--:|--:|--:|--:|--:|--:|",
        ]
        for row in case["rows"]:
            times = " | ".join(seconds_text(row.get(key)) for key in ("median", "p20", "p80"))
            ratio = "" if row.get("to_ours") is None else f"{row['to_ours']:.2f}"
            share = "" if row.get("of_floor") is None else f"{row['of_floor']:.0%}"
            extra = "" if row.get("peak_extra_bytes") is None else f"{row['peak_extra_bytes'] / (1 << 20):.0f}"
            lines.append(f"| {row['provider']} | {row.get('mode', '')} | {times} | {ratio} | {share} | {extra} |")
        stages = {row["provider"]: row["stages"] for row in case["rows"] if row.get("stages")}
        for provider, by_stage in stages.items():
            told = ", ".join(f"{stage} {seconds_text(value)}" for stage, value in by_stage.items())
            lines.append(f"- {provider}: {told}")
        if case.get("floor"):
            lines.append("- floor: " + ", ".join(f"{k} {seconds_text(v)}" for k, v in case["floor"].items()))
    return ["## Numbers", *lines] if lines else []


def _profiles(all_of_it: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, step in all_of_it["steps"].items():
        if "top" not in step:
            continue
        spent = f"{step['call_us']:.0f} us a call, {step['kernel_us']:.0f} us in {step['kernels']:.0f} kernels"
        lines += ["", f"### {name}: {spent}", "", "| kernel | calls | us | share |", "|---|--:|--:|--:|"]
        lines += [
            f"| {cell(row['name'][:90])} | {row['calls']:.0f} | {row['us']:.1f} | {row['share']:.0%} |"
            for row in step["top"]
        ]
        for kind, got in step["achieved"].items():
            told = ", ".join(f"{key} {number(value)}" for key, value in got.items())
            lines.append(f"- {kind}: {told}")
    return ["## Profiles", *lines] if lines else []


def page(all_of_it: dict[str, Any], planned: Sequence[Part]) -> str:
    """The whole page as Markdown."""
    environment = all_of_it["environment"]
    machine = all_of_it["steps"].get("machine/machine", {})
    lines = [f"# {environment.get('device', 'unknown device')}", ""]
    if all_of_it["pretend"]:
        lines += ["**Pretend run**: tiny sizes on a CPU. It shows that every part reports; no goal is claimed.", ""]
    if not all_of_it["finished"]:
        lines += ["**Not finished**: written while it ran.", ""]
    kept = {k: environment[k] for k in ("commit", "uncommitted_changes", "date", "cuda") if k in environment}
    lines += [", ".join(f"{k} {v}" for k, v in {**machine.get("versions", {}), **kept}.items()), ""]
    if "ceilings" in machine:
        copy, rate = machine["ceilings"]["copy_bytes_per_second"], machine["ceilings"]["bf16_flops"]
        lines += [
            f"Ceilings measured: copy {copy / 1e12:.3g} TB/s (read + written), bf16 product {rate / 1e12:.4g} TFLOP/s.",
            "",
        ]
    lines += [f"{all_of_it['seconds']:.0f} s in all.", ""]
    for section in (
        _goals(all_of_it),
        _missing(all_of_it, planned),
        _wrong(all_of_it),
        _cases(all_of_it),
        _profiles(all_of_it),
    ):
        lines += [*section, ""] if section else []
    return "\n".join(lines)


class Files:
    """The three files of a run; nothing else is written to the folder.

    Args:
        folder: where.
        name: of the device.
        parts: what is planned.
        pretend: nothing is claimed.
    """

    def __init__(self, folder: Path, name: str, parts: Sequence[Part], pretend: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.json, self.page, self.log = (folder / f"{name}{end}" for end in (".json", ".md", ".log"))
        self.parts, self.pretend = list(parts), pretend
        self.log.write_text("")

    def add_log(self, outcome: Outcome) -> None:
        """What a step printed."""
        with self.log.open("a") as log:
            log.write(f"\n===== {outcome.part}/{outcome.step}: {outcome.status} {outcome.why}\n{outcome.log}\n")

    def write(self, outcomes: Sequence[Outcome], seconds: float, finished: bool) -> dict[str, Any]:
        """All that is known; each file is replaced whole."""
        everything = content(self.parts, outcomes, pretend=self.pretend, seconds=seconds, finished=finished)
        try:
            shown = page(everything, self.parts)
        except Exception:  # what a step told may have any form; the numbers are in the other file
            shown = f"# The page could not be made\n\n```\n{traceback.format_exc()}```\n"
        for path, text in (
            (self.json, json.dumps(everything, indent=1) + "\n"),
            (self.page, shown),
        ):
            fresh = path.with_name(path.name + ".new")
            fresh.write_text(text)
            os.replace(fresh, path)
        return everything
