"""One step of `bench/gpu.py` in a process of its own; what it finds goes to `--report`, again and again.

    python bench/gpu_child.py ops/linear_large --report FILE [--pretend] [--wait]

A step is a function `run(report, pretend, what)` of a module. Its module is imported first, which takes seconds; with
`--wait` the work begins when a line is read, so that two steps never use the GPU at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import traceback
from pathlib import Path

from gpu_report import Report, Skipped

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    "machine": "gpu_machine",
    "checks": "gpu_checks",
    "cuda": "gpu_cuda_checks",
    "sanitizer": "gpu_sanitizer",
    "ops": "gpu_ops",
    "rollout": "gpu_models",
    "step": "gpu_models",
    "tests": "gpu_tests",
    "profile": "gpu_profile",
}
"""By the first word of a step."""


def run(what: str, report: Report, pretend: bool, wait: bool) -> int:
    """Imports, waits for its turn, works; returns the exit code."""
    kind, _, rest = what.partition("/")
    try:
        module = importlib.import_module(MODULES[kind])
        if wait:
            sys.stdin.readline()
        report.write(began=time.monotonic())
        module.run(report, pretend, rest or kind)
    except Skipped as reason:
        report.write(status="skipped", why=str(reason))
    except Exception as error:  # the whole point: it becomes a line of the page
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0][:300]
        report.write(status="failed", why=f"{type(error).__name__}: {first}")
        return 1
    else:
        wrong = [line for line in report.found.get("lines", []) if line.get("ok") is False]
        names = "; ".join(str(line["name"]) for line in wrong[:3])
        report.write(status="failed" if wrong else "ok", why=f"{len(wrong)} checks failed: {names}" if wrong else "")
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--pretend", action="store_true")
    parser.add_argument("--wait", action="store_true")
    given = parser.parse_args()
    code = run(given.what, Report(given.report), given.pretend, given.wait)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a broken CUDA context or a pool of compilers may not hold up the next step


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
