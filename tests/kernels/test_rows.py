"""The contract of a backend's row functions, against float64: in C++ under every instruction set of the machine, in
Triton with rows that a program holds and rows that it sweeps over; test_triton_rows.py has those at multiples of 16
bytes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import DEVICE, FEW, NATIVE, ON_TRITON
from hypothesis import given
from hypothesis import strategies as st
from native_library import INSTRUCTION_SETS, Guarded, guarded_outputs, using
from rows_contract import (
    DTYPES,
    PLAIN,
    Chunk,
    a_chunk,
    assert_close,
    chunks,
    floor,
    log_probabilities,
    losses,
    scores,
    token_loss,
)
from torch import Tensor

from syncr1.kernels import dispatch
from syncr1.kernels.support import pack, unpack
from syncr1.kernels.terms import Head, RowSettings, RowTerms

WAYS: list[Any] = (
    [pytest.param(form, id=f"triton-{form}") for form in ("resident", "swept")]
    if ON_TRITON
    else [pytest.param(name, id=name, marks=NATIVE) for name in INSTRUCTION_SETS]
)


@pytest.fixture(params=WAYS, scope="module", autouse=True)
def _way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Swept rows in tiles small enough for several of them and a ragged last one."""
    if not ON_TRITON:
        with using(request.param):
            yield
        return
    rows = importlib.import_module("syncr1.kernels.triton_ops.rows")
    small = {"SCORE_RESIDENT_IDS": 0, "LOSS_RESIDENT_BYTES": 0, "STREAM_TILE": 512, "STREAM_BYTES": 1024}
    small |= dict.fromkeys(("SCORE_WARPS", "LOSS_WARPS", "GRADIENT_WARPS"), 1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in small.items() if request.param == "swept" else ():
            patch.setattr(rows, name, value)
        yield


@pytest.fixture(scope="module")
def kernels() -> Any:
    """score_rows, gradient_rows and loss_rows."""
    return dispatch.module_of("triton" if ON_TRITON else "native")


def outputs_between_margins() -> Any:
    return nullcontext() if ON_TRITON else guarded_outputs()


@FEW
@given(chunk=chunks())
def test_scores(chunk: Chunk, kernels: Any) -> None:
    there = chunk.there()
    products = Guarded(there.products)
    with outputs_between_margins():
        found = kernels.score_rows(products.matrix, there.targets, there.head)
    assert products.matrix.cpu().equal(chunk.products)
    assert [part.dtype for part in found] == [torch.float32, torch.float32, torch.float64]
    logp, entropy, lse = (part.cpu() for part in found)
    exact, peer = (scores(chunk, chunk.products.to(dtype)) for dtype in (torch.double, torch.float))
    assert_close(logp, exact[0], peer[0], floor(chunk))
    assert_close(entropy, exact[1], peer[1], floor(chunk))
    z, head = log_probabilities(chunk, chunk.products.double()) + lse.double().unsqueeze(1), chunk.head
    torch.testing.assert_close(z.logsumexp(dim=1), lse.double(), rtol=1e-6, atol=1e-6)
    allowed = next(v for v in range(chunk.products.shape[1]) if head.forbidden is None or v not in head.forbidden)
    bias = 0.0 if head.bias is None else head.bias.double()
    logits = (chunk.products.double() + bias)[:, allowed] / head.temperature
    off = (logits - z[:, allowed])[z[:, allowed].isfinite()]
    assert not off.numel() or float(off.abs().max()) <= 10 * floor(chunk)


@FEW
@given(chunk=chunks(), parts=st.sampled_from(["logp", "entropy", "both"]), in_place=st.booleans())
def test_gradients(chunk: Chunk, parts: str, in_place: bool, kernels: Any) -> None:
    num_rows = len(chunk.targets)
    by_logp = None if parts == "entropy" else torch.linspace(-1, 2, num_rows)
    by_entropy = None if parts == "logp" else torch.linspace(0.5, -1, num_rows)

    def gradient(dtype: torch.dtype) -> Tensor:
        products = chunk.products.to(dtype).requires_grad_()
        logp, entropy = scores(chunk, products)
        terms = [g.to(dtype) * s for g, s in ((by_logp, logp), (by_entropy, entropy)) if g is not None]
        # A target without probability has no gradient through its own logit but pushes the others all the same.
        (grad,) = torch.autograd.grad(sum(t.nan_to_num(neginf=0.0, posinf=0.0) for t in terms).sum(), products)
        return grad

    reachable = scores(chunk, chunk.products.double())[0].isfinite()
    there = chunk.there()
    products = Guarded(there.products)
    _, entropy, lse = kernels.score_rows(products.matrix, there.targets, there.head)
    out = products if in_place else Guarded(torch.full_like(there.products, torch.nan), gap=11)
    upstream = [None if g is None else g.to(DEVICE) for g in (by_logp, by_entropy)]
    kernels.gradient_rows(products.matrix, there.targets, there.head, lse, entropy, *upstream, out.matrix)
    out.assert_untouched_around()
    assert bool(out.matrix.isfinite().all())
    exact, peer = gradient(torch.double), gradient(torch.float).to(chunk.products.dtype)
    assert_close(out.matrix.cpu()[reachable], exact[reachable], peer[reachable], 4 * floor(chunk))
    if there.head.forbidden is not None:
        assert not bool(out.matrix[:, there.head.forbidden].any())
    if chunk.head.support is not None:
        assert not bool(out.matrix.cpu()[~unpack(chunk.head.support, out.matrix.shape[1])].any())


@FEW
@given(drawn=losses())
def test_loss_gradient(drawn: tuple[Chunk, RowTerms, RowSettings], kernels: Any) -> None:
    chunk, terms, settings = drawn

    def gradient(dtype: torch.dtype) -> Tensor:
        products = chunk.products.to(dtype).requires_grad_()
        (grad,) = torch.autograd.grad(token_loss(scores(chunk, products)[0], terms, settings).sum(), products)
        return grad

    reachable = scores(chunk, chunk.products.double())[0].isfinite()
    there = chunk.there()
    on_device = RowTerms(*(None if v is None else v.to(DEVICE) for v in vars_of_terms(terms)))  # type: ignore[arg-type]
    expected = kernels.score_rows(there.products, there.targets, there.head)
    products = Guarded(there.products)
    with outputs_between_margins():
        logp, entropy = kernels.loss_rows(products.matrix, there.targets, there.head, on_device, settings)
    products.assert_untouched_around()
    for found, scored in ((logp, expected[0]), (entropy, expected[1])):
        same = found.equal(scored)
        assert same or (ON_TRITON and torch.allclose(found, scored, rtol=1e-6, atol=10 * floor(chunk)))
    exact, peer = gradient(torch.double)[reachable], gradient(torch.float).to(chunk.products.dtype)[reachable]
    # The slope of a token takes over the error of its log-probability.
    scale = max(float(exact.abs().max()) if exact.numel() else 0.0, 1.0)
    assert_close(products.matrix.cpu()[reachable], exact, peer, 8 * floor(chunk) * scale)


def vars_of_terms(terms: RowTerms) -> list[Tensor | None]:
    return [terms.advantage, terms.weight, terms.old_logp, terms.ref_logp, terms.is_ratio]


def truncated(chunk: Chunk) -> Chunk:
    """Each row with a set of its own, of half of the ids and the target."""
    kept = (torch.rand(chunk.products.shape) < 0.5).scatter(1, chunk.targets[:, None], True)
    return replace(chunk, head=replace(chunk.head, support=pack(kept)))


SIZE = {"width": 1601} if ON_TRITON else {"width": 3001}


def all_results(kernels: Any, chunk: Chunk, rows: Tensor | None = None) -> list[Tensor]:
    """Of score_rows, loss_rows and gradient_rows on these rows."""
    at = torch.arange(len(chunk.targets)) if rows is None else rows
    part = Chunk(chunk.products[at], chunk.targets[at], chunk.head.of(at)).there()
    terms = RowTerms(torch.linspace(-1, 1, len(chunk.targets))[at].to(DEVICE), torch.ones(len(at), device=DEVICE))
    score = kernels.score_rows(part.products, part.targets, part.head)
    grad, loss = torch.empty_like(part.products), part.products.clone()
    kernels.gradient_rows(
        part.products, part.targets, part.head, score[2], score[1], terms.advantage, terms.weight, grad
    )
    more = kernels.loss_rows(loss, part.targets, part.head, terms, PLAIN)
    return [values.cpu() for values in (*score, grad, *more, loss)]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_nothing_but_itself(dtype: torch.dtype, kernels: Any) -> None:
    """Bitwise: threads, order and neighbours do not matter."""
    number = 5 if ON_TRITON else 23
    chunk, order = truncated(a_chunk(number, dtype=dtype, **SIZE)), torch.randperm(number)
    whole = all_results(kernels, chunk)
    torch.set_num_threads(2)
    parts = (torch.arange(2, 4),) if ON_TRITON else (torch.arange(number), *torch.arange(number).split(5))
    for rows in (order, *parts):
        assert same([values[rows] for values in whole], all_results(kernels, chunk, rows))


POISON = [(torch.nan, 0), (torch.inf, 0), (torch.inf, 700), (torch.nan, 700), (torch.nan, -1), (torch.inf, -1)]


@pytest.mark.parametrize(("value", "column"), POISON[::2] if ON_TRITON else POISON)
def test_a_poisoned_row_poisons_no_other(value: float, column: int, kernels: Any) -> None:
    chunk = a_chunk(4, **SIZE)
    clean = all_results(kernels, chunk)
    chunk.products[1, column] = value
    results, others = all_results(kernels, chunk), torch.tensor([0, 2, 3])
    assert same([before[others] for before in clean], [after[others] for after in results])
    for after in (results[0], results[1], results[4], results[5]):
        assert bool(after[1].isnan())
    assert bool(results[3][1].isnan().all()) and bool(results[6][1].isnan().all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_left_out_is_never_read(value: float, kernels: Any) -> None:
    chunk = truncated(a_chunk(3, **SIZE))
    clean = all_results(kernels, chunk)
    chunk.products[:, chunk.head.forbidden] = value
    assert chunk.head.support is not None
    chunk.products[~unpack(chunk.head.support, SIZE["width"])] = value
    assert same(clean, all_results(kernels, chunk))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_support_of_one_id_is_certain(dtype: torch.dtype, kernels: Any) -> None:
    """To the last bit, whatever the logit; another target than that id has no probability."""
    width = SIZE["width"]
    chunk = Chunk((40 * torch.randn(5, width)).to(dtype), torch.tensor([0, 31, 32, width - 1, 700]), Head(None, 0.7))
    kept = torch.zeros(5, width, dtype=torch.bool).scatter(1, chunk.targets[:, None], True)
    kept[4] = kept[4].roll(1)
    logp, entropy, lse, grad, *loss, products = all_results(
        kernels, replace(chunk, head=Head(None, 0.7, None, pack(kept)))
    )
    for got in (logp, entropy, *loss):
        assert not bool(got[:4].any())
    assert not bool(grad[:4].any() | products[:4].any()) and logp[4] == -torch.inf and bool(lse.isfinite().all())
    assert not bool(grad[4][~kept[4]].any())  # what has no probability is pushed nowhere


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_support_of_all_ids_changes_nothing(dtype: torch.dtype, kernels: Any) -> None:
    chunk = a_chunk(3, dtype=dtype, **SIZE)
    everything = pack(torch.ones(chunk.products.shape, dtype=torch.bool))
    whole = replace(chunk, head=replace(chunk.head, support=everything))
    for ours, plain in zip(all_results(kernels, whole), all_results(kernels, chunk), strict=True):
        assert ours.equal(plain) or (ON_TRITON and torch.allclose(ours, plain, rtol=1e-6, atol=1e-6))


def test_a_masked_beginning_does_not_hide_nan(kernels: Any) -> None:
    products = torch.full((2, 2500), -torch.inf)
    products[:, 2000:] = 0.5
    products[1, 5] = torch.nan
    chunk = Chunk(products, torch.tensor([2100, 2100]), Head()).there()
    logp, entropy, _ = (part.cpu() for part in kernels.score_rows(chunk.products, chunk.targets, chunk.head))
    expected = torch.tensor([-1.0, 1.0]) * torch.tensor(500.0).log()
    torch.testing.assert_close(torch.stack([logp[0], entropy[0]]), expected)
    assert bool(logp[1].isnan()) and bool(entropy[1].isnan())


@pytest.mark.parametrize("dtype", DTYPES)
def test_forbidden_target(dtype: torch.dtype, kernels: Any) -> None:
    chunk = replace(a_chunk(2, dtype=dtype, **SIZE), targets=torch.tensor([1500, 7])).there()
    ones = torch.ones(2, device=DEVICE)
    logp, entropy, lse = kernels.score_rows(chunk.products, chunk.targets, chunk.head)
    assert logp[0] == -torch.inf and bool(entropy.isfinite().all())
    out = torch.empty_like(chunk.products)
    kernels.gradient_rows(chunk.products, chunk.targets, chunk.head, lse, entropy, ones, None, out)
    assert bool(out.isfinite().all()) and not bool(out[:, chunk.head.forbidden].any())
    if not ON_TRITON:  # whose loss of such a token is NaN, which the op refuses
        kernels.loss_rows(chunk.products, chunk.targets, chunk.head, RowTerms(ones, ones), PLAIN)
        assert bool(chunk.products.isfinite().all()) and not bool(chunk.products[:, chunk.head.forbidden].any())


def test_forbidden_ids_at_the_ends_of_blocks(kernels: Any) -> None:
    """The list of forbidden ids, in any order and with repetitions, is followed across blocks of 1024."""
    products, targets = torch.randn(3, 3073), torch.tensor([5, 6, 7])
    forbidden = torch.tensor([3072, 1024, 0, 1023, 2047, 2048, 1023, 3071])
    chunk = Chunk(products, targets, Head(None, 1.0, forbidden)).there()
    logp, entropy, _ = (part.cpu() for part in kernels.score_rows(chunk.products, chunk.targets, chunk.head))
    expected = products.double().index_fill(1, forbidden, -torch.inf).log_softmax(1)
    torch.testing.assert_close(logp.double(), expected[range(3), targets], rtol=0, atol=6e-6)
    torch.testing.assert_close(entropy.double(), -(expected.exp() * expected.clamp_min(-1e4)).sum(1), rtol=0, atol=6e-6)


def test_rows_without_a_gradient_become_zero(kernels: Any) -> None:
    """By their advantage or their weight: NaN in the row, and in what its weight leaves out, is not looked at."""
    chunk = a_chunk(3, **SIZE).there()
    chunk.products[1] = torch.nan
    old = torch.tensor([-8.0, torch.nan, -8.0])
    parts = (torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, 1.0]), old)
    kernels.loss_rows(chunk.products, chunk.targets, chunk.head, RowTerms(*(part.to(DEVICE) for part in parts)), PLAIN)
    assert not bool(chunk.products[:2].any()) and bool(chunk.products[2].any())


def test_extreme_logits(kernels: Any) -> None:
    """A certain token has log-probability 0, entropy 0 and no gradient, whatever the size of the logits (on Triton up
    to what row_math.py promises)."""
    most = 1e9 if ON_TRITON else 3e38
    products = torch.tensor([[most, -most, 0.0], [-most, -most, -torch.inf], [8192.0, 8192.0, -1e4]])
    chunk = Chunk(products, torch.tensor([0, 1, 0]), Head()).there()
    logp, entropy, lse = kernels.score_rows(chunk.products, chunk.targets, chunk.head)
    half = torch.tensor(2.0).log()
    torch.testing.assert_close(logp.cpu(), torch.stack([half * 0, -half, -half]))
    torch.testing.assert_close(entropy.cpu(), torch.stack([half * 0, half, half]))
    # At 3e38 log 2 is lost in a float32 logsumexp, at 8192 its last bits are.
    upstream = torch.tensor([1.0, 0.0, 1.0], device=DEVICE)
    kernels.gradient_rows(chunk.products, chunk.targets, chunk.head, lse, entropy, upstream, None, chunk.products)
    expected = torch.tensor([[0.0, 0, 0], [0, 0, 0], [0.5, -0.5, 0]])
    rtol, atol = (1e-6, 1e-7) if ON_TRITON else (1e-3, 0)  # whose logsumexp is float64
    torch.testing.assert_close(chunk.products.cpu(), expected, rtol=rtol, atol=atol)


def test_no_rows(kernels: Any) -> None:
    none = torch.empty(0, 5, device=DEVICE)
    found = kernels.score_rows(none, torch.empty(0, dtype=torch.int64, device=DEVICE), Head())
    assert [part.shape for part in found] == [(0,)] * 3
