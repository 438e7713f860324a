"""The drop-in for Liger at the shapes of Liger's own GRPO tests, against Liger where it runs on a CPU.

luspo with a KL is left out: there Liger adds what lies at masked positions (see `liger_cases.counts_padding`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import liger_cases
import pytest
import torch
from backends import NIGHTLY
from liger_cases import (
    LOSS_TYPES,
    TOKEN_LEVEL_ONLY,
    Case,
    Inputs,
    check_chunked,
    chunked_call,
    chunked_loss,
    chunked_result,
    compare_results,
    liger_chunked,
    plain_result,
    triton_result,
    use_backend,
)
from torch import Tensor

from syncr1.kernels import liger as ours

pytestmark = pytest.mark.slow
LARGE, SMALL = (8, 128, 1024, 4096), (3, 47, 31, 123)
LOGITS_SHAPE = (2, 128, 1, 1000)
KINDS = [
    (kind, level, beta)
    for kind in LOSS_TYPES
    for level in ("token", "sequence")
    for beta in (0.0, 0.04)
    if not (level == "sequence" and kind in TOKEN_LEVEL_ONLY) and not (kind == "luspo" and beta)
]
# At the large shape one of each formula; all of them at night.
FORMULAS = [("dapo", "sequence", 0.04), ("cispo", "token", 0.0), ("sapo", "token", 0.04), ("vespo", "token", 0.04)]
AT_LARGE = KINDS if NIGHTLY else FORMULAS
CHUNKED = [(LARGE, "native", *kind) for kind in AT_LARGE]
CHUNKED += [(SMALL, name, *kind) for name in ("native", "reference") for kind in KINDS]


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return use_backend(request.param, monkeypatch)


@contextmanager
def sized(shape: tuple[int, int, int, int], looser: float) -> Iterator[None]:
    """`liger_cases` at another size, its comparisons that much looser: sums are as much longer."""
    plain = liger_cases.compare

    def compare(actual: Any, expected: Any, what: str, factor: float = 1.0) -> None:
        plain(actual, expected, what, factor * looser)

    with pytest.MonkeyPatch.context() as patch:
        for name, size in zip(("BATCH", "LENGTH", "HIDDEN", "VOCABULARY"), shape, strict=True):
            patch.setattr(liger_cases, name, size)
        patch.setattr(liger_cases, "compare", compare)
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        yield
        torch.set_num_threads(threads)


def a_case(kind: str, level: str, beta: float, **more: Any) -> Case:
    return {
        "loss_type": kind,
        "level": level,
        "beta": beta,
        "corrected": False,
        "is_ratio": None,
        "old": True,
        "temperature": 0.9,
        "num_items": None,
        "mask": "ragged",
        "mask_dtype": torch.int64,
        "max_length": 128,
        "shapes": "default",
        "delta": None,
    } | more


def chunked_case(kind: str, level: str, beta: float) -> Case:
    return a_case(kind, level, beta, ref="logps" if beta else "none", bias=True, frozen=False)


def tamed(inputs: Inputs) -> Inputs:
    """Logits of a spread that a head has: at 1024 inputs random ones would be 16 apart."""
    inputs.weight = inputs.weight * (2 / inputs.hidden.shape[-1] ** 0.5)
    exact = inputs.hidden.double() @ inputs.weight.double().T + (0 if inputs.bias is None else inputs.bias.double())
    logp = liger_cases.logp_of(exact, inputs.ids, inputs.case["temperature"]).float()
    noise = torch.Generator().manual_seed(1)
    inputs.old = logp + 0.2 * torch.randn(logp.shape, generator=noise)
    inputs.ref_logps = logp + 0.2 * torch.randn(logp.shape, generator=noise)
    return inputs


@pytest.mark.parametrize(("shape", "backend_name", "kind", "level", "beta"), CHUNKED, ids=str)
def test_chunked_loss(
    shape: tuple[int, int, int, int],
    backend_name: str,
    kind: str,
    level: str,
    beta: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_backend(backend_name, monkeypatch)
    with sized(shape, looser=10):
        make = liger_cases.Inputs
        monkeypatch.setattr(liger_cases, "Inputs", lambda case: tamed(make(case)))
        check_chunked(chunked_case(kind, level, beta))


@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_chunked_loss_in_bfloat16(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No further from Liger in float32 than twice what Liger in bfloat16 is, and a rounding."""
    use_backend("native", monkeypatch)
    case = chunked_case(kind, "token", 0.0 if kind == "luspo" else 0.04) | {"mask": "full"}  # see `counts_padding`
    with sized((4, 64, 256, 4096), looser=1):
        inputs = tamed(Inputs(case))

        def result(module: Any, dtype: torch.dtype) -> list[Tensor]:
            cast = [None if part is None else part.to(dtype) for part in (inputs.hidden, inputs.weight, inputs.bias)]
            inputs.hidden, inputs.weight, inputs.bias = cast  # type: ignore[assignment]
            loss = chunked_loss(module, case, inputs)
            got = chunked_result(lambda leaves: chunked_call(loss, inputs, leaves), inputs)
            return [got["loss"].detach(), *got["grads"]]

        halves = [result(module, torch.bfloat16) for module in (ours, liger_chunked())]
        truth = result(liger_chunked(), torch.float32)  # of the operands as bfloat16 has them
    for mine, theirs, exact in zip(*halves, truth, strict=True):
        error, allowed = ((x.double() - exact.double()).norm() for x in (mine, theirs))
        assert error <= 2 * allowed + 2.0**-8 * exact.double().norm()


@pytest.mark.parametrize(("kind", "level", "beta"), KINDS)
def test_loss_from_logits(kind: str, level: str, beta: float, backend: str) -> None:
    with sized(LOGITS_SHAPE, looser=10):
        case = a_case(kind, level, beta, inplace=True, reduce=True, strided=False)
        inputs = Inputs(case)
        compare_results(triton_result(ours, case, inputs), plain_result(case, inputs))


AT_NIGHT = pytest.mark.skipif(not NIGHTLY, reason="SYNCR1_NIGHTLY=1 runs it")


@pytest.mark.parametrize(
    ("temperature", "vocabulary"), [(0.9, 64_000), pytest.param(0.7, 151_936, marks=AT_NIGHT)], ids=str
)
def test_log_probabilities_of_long_rows(temperature: float, vocabulary: int, backend: str) -> None:
    torch.set_num_threads(2)
    length = 1024 if NIGHTLY else 256
    logits = torch.randn(1, length + 1, vocabulary, dtype=torch.bfloat16)
    ids = torch.randint(vocabulary, (1, 100 + length))
    found = ours.fused_selective_log_softmax(logits, ids, temperature)
    rows = torch.arange(length)
    for part in rows.split(256):
        whole = (logits[0, part].float() / temperature).log_softmax(-1)
        expected = whole[torch.arange(len(part)), ids[0, 100 + part]]
        torch.testing.assert_close(found[0, part].float(), expected, rtol=1e-5, atol=2e-5)
