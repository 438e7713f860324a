"""The tests that need a GPU, one file a step, each test known as it ends.

What test_triton_interpreted.py runs in processes of its own, contracts and `check_…` functions, is run directly here,
so that one failure does not hide the others.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
from gpu_report import Report, Skipped

TESTS = Path(__file__).resolve().parent.parent / "tests"
CHECKS = (
    "triton_ops",
    "rows",
    "triton_rows",
    "sample",
    "triton_sample",
    "prefix_decode_attention",
    "triton_decode_attention",
    "token_loss",
    "group_advantages",
    "dgs_select",
    "grpo_plan",
)
"""Files that state what Triton must do, as tests/support/backends.py picks it."""


def file_of(name: str) -> Path:
    """`test_<name>.py` in whichever room it is."""
    (path,) = TESTS.glob(f"*/test_{name}.py")
    return path


class Recorder:
    """A plugin that hands every result on."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def pytest_runtest_logreport(self, report: Any) -> None:
        """The call of a test, or what ended it before."""
        if report.when == "call" or report.outcome != "passed":
            ok = {"passed": True, "failed": False, "skipped": None}[report.outcome]
            detail = "" if ok else _reason(report)
            self.report.line(name=report.nodeid.split("/")[-1], ok=ok, detail=detail, seconds=report.duration)

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be imported."""
        if report.failed:
            self.report.line(name=f"{report.nodeid}: collection", ok=False, detail=_reason(report))


def _reason(report: Any) -> str:
    """The last line that says something."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[-1])[:300]
    lines = [line for line in str(report.longrepr).splitlines() if line.strip()]
    wrong = [line[1:].strip() for line in lines if line.startswith("E ")]
    return (wrong or lines[-1:] or [""])[0][:300]


def run(report: Report, pretend: bool, name: str) -> None:
    """`test_<name>.py`: what is marked gpu, or its checks; in pretence one quick check in the interpreter."""
    options = ["-q", "-x"] if pretend else ["-q"]
    options += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    if name in CHECKS:
        os.environ["SYNCR1_TEST_TRITON"] = "cpu" if pretend else "cuda"
        which = "check_ or [triton or -triton"
        options += ["-o", "python_functions=check_* test_*", "-m", "not gpu"]
        options += ["-k", f"({which}) and no_rows" if pretend else which]
    else:
        options += ["-m", "gpu"]
    # Every check compiles kernels for seconds, on one core.
    workers = (os.cpu_count() or 1) // 4 if name in CHECKS and not pretend and importlib.util.find_spec("xdist") else 1
    options += ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else ["-p", "no:xdist"]
    code = pytest.main([str(file_of(name)), *options], plugins=[Recorder(report)])
    lines = report.found.get("lines", [])
    if code == pytest.ExitCode.NO_TESTS_COLLECTED and not lines:
        raise Skipped("nothing there to run")
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        report.line(name=f"{name}: pytest", ok=False, detail=f"exit code {int(code)}: see the log")
    passed, failed = (sum(line["ok"] is ok for line in lines) for ok in (True, False))
    report.write(passed=passed, failed=failed, skipped=len(lines) - passed - failed)
