"""One interleaved measurement per case, shared by the tests of its providers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import cases_of
from goals import CaseResult
from interleaved import Budget
from table import QUICK, run_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PEDANTIC = Budget(seconds=5.0, min_rounds=3, max_rounds=10)
"""Few rounds: the table has its own budget."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="benchmarks at tiny shapes: shows that everything runs")


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Callable[[str], tuple[CaseResult, dict[str, str]]]:
    """A case by name, all of its providers timed round-robin the first time it is asked for."""
    quick = bool(request.config.getoption("--quick"))
    known: dict[str, Any] = {}

    def result(name: str) -> tuple[CaseResult, dict[str, str]]:
        if name not in known:
            case, shape = cases_of(DEVICE, quick)[name]
            known[name] = run_case(name, case, shape, DEVICE, QUICK if quick else PEDANTIC, memory=False, quick=quick)
        return known[name]

    return result
