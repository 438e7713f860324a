"""The drop-in for Liger over the whole product of its parameters; `make fuzz`, some minutes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from backends import NIGHTLY
from liger_cases import (
    CHUNKED,
    INTERPRETED_CASES,
    LOSS_TYPES,
    TRITON,
    Case,
    Inputs,
    check_chunked,
    check_interpreted_logps,
    check_interpreted_losses,
    chunked_is_valid,
    compare_results,
    plain_result,
    run_interpreted,
    triton_is_valid,
    triton_result,
    use_backend,
)

from syncr1.kernels import liger as ours

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not NIGHTLY, reason="SYNCR1_NIGHTLY=1 runs it"),
]
DRAWN = ("temperature", "num_items", "mask_dtype", "max_length", "shapes", "bias", "frozen", "inplace", "strided")
"""Parameters that meet no other in the formulas: each case has some value of theirs."""


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return use_backend(request.param, monkeypatch)


def product(
    grid: Mapping[str, Sequence[Any]], loss_type: str, valid: Callable[[Case], bool], seed: int = 0
) -> Iterator[Case]:
    """All valid cases of one loss type."""
    rng = random.Random(seed)
    crossed = {name: values for name, values in grid.items() if name not in DRAWN} | {"loss_type": (loss_type,)}
    for values in itertools.product(*crossed.values()):
        case = {name: rng.choice(grid[name]) for name in grid} | dict(zip(crossed, values, strict=True))
        if case["max_length"] is None and loss_type == "dr_grpo":
            case["max_length"] = 9
        if valid(case):
            yield case


def try_all(cases: Iterator[Case], check: Callable[[Case], None]) -> None:
    """Every failure with its case, not the first alone."""
    failures, count = [], 0
    for case in cases:
        count += 1
        try:
            check(case)
        except AssertionError as error:
            failures.append(f"{case}\n{error}")
    assert not failures, f"{len(failures)} of {count} cases\n" + "\n\n".join(failures[:5])
    assert count >= 300


def try_triton(case: Case) -> None:
    inputs = Inputs(case)
    compare_results(triton_result(ours, case, inputs), plain_result(case, inputs))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_chunked_loss_is_that_of_liger(loss_type: str, backend: str) -> None:
    try_all(product(CHUNKED, loss_type, chunked_is_valid), check_chunked)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_triton_loss_is_what_its_formulas_say(loss_type: str, backend: str) -> None:
    try_all(product(TRITON, loss_type, triton_is_valid), try_triton)


def test_triton_loss_is_that_of_liger(tmp_path: Path, backend: str) -> None:
    results = run_interpreted(tmp_path, len(INTERPRETED_CASES))
    check_interpreted_losses(results["losses"])
    check_interpreted_logps(results["logps"])
