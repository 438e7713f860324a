"""The Triton row kernels against float64 autograd, in Triton's interpreter.

test_triton_interpreted.py runs every `check_…` of this file in a process of its own; on a machine with a GPU another
runs them there, compiled.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from triton_child import run_checks

from syncr1.kernels.terms import Head, RowLoss, RowSettings, RowTerms, padded

pytest.importorskip("triton")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# The interpreter truncates float32 to bfloat16: one unit in the last place of an output.
ROUNDING = {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu() -> None:
    run_checks("cuda", __file__)


@pytest.fixture(params=["resident", "swept"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways to hold a row; the swept one in tiles small enough for several of them and a ragged last one."""
    from syncr1.kernels.triton_ops import rows

    if request.param == "swept":
        monkeypatch.setattr(rows, "SCORE_RESIDENT_IDS", 0)
        monkeypatch.setattr(rows, "LOSS_RESIDENT_BYTES", 0)
        for name in ("SCORE_WARPS", "LOSS_WARPS", "GRADIENT_WARPS"):
            monkeypatch.setattr(rows, name, 1)
        monkeypatch.setattr(rows, "STREAM_TILE", 512)
        monkeypatch.setattr(rows, "STREAM_BYTES", 1024)
    yield request.param


@pytest.fixture(params=["aligned", "anywhere"])
def place(request: pytest.FixtureRequest) -> str:
    """Where rows begin: at multiples of 16 bytes, as those of a workspace, or not."""
    return str(request.param)


def guarded(
    num_rows: int, vocabulary: int, dtype: torch.dtype, place: str = "anywhere"
) -> tuple[Tensor, Tensor, Tensor]:
    """(buffer, products, what of the buffer is not theirs): logits of realistic spread inside a band of NaN."""
    before, stride = (16, padded(vocabulary) + 32) if place == "aligned" else (2, vocabulary + 5)
    buffer = torch.full((num_rows + 2, stride), torch.nan, dtype=dtype, device=DEVICE)
    products = buffer[1:-1, before : before + vocabulary]
    products.copy_(3 * torch.randn(num_rows, vocabulary))
    return buffer, products, buffer.isnan()


def band_is_nan(buffer: Tensor, band: Tensor) -> bool:
    return bool(buffer[band].isnan().all())


def head_of(vocabulary: int, dtype: torch.dtype, bias: bool, forbidden: bool) -> Head:
    return Head(
        torch.randn(vocabulary, device=DEVICE).to(dtype) if bias else None,
        0.7,
        torch.tensor([vocabulary // 2, 0], device=DEVICE) if forbidden else None,
    )


def scores(products: Tensor, targets: Tensor, head: Head, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, logsumexp) in plain PyTorch."""
    z = products.to(dtype) + (0 if head.bias is None else head.bias.to(dtype))
    z = z / head.temperature
    if head.forbidden is not None:
        z = z.index_fill(1, head.forbidden, -torch.inf)
    logp = z.log_softmax(-1)
    entropy = -(logp.exp() * logp.clamp_min(-1e4)).sum(-1)
    return logp.gather(1, targets[:, None])[:, 0], entropy, z.logsumexp(-1)


def is_fused() -> bool:
    """`tl.fma` rounds once: on GPUs, and in the interpreter from Triton 3.9 on. Below, an exponent errs by the rounding
    of a product as large as the logits."""
    import triton

    return DEVICE == "cuda" or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


def no_worse(got: Tensor, plain: Tensor, truth: Tensor, floor: float) -> None:
    """At most twice the error of plain PyTorch, plus a floor."""
    error, allowed = (got.double() - truth).abs().max(), (plain.double() - truth).abs().max()
    assert error <= 2 * allowed + floor, (float(error), float(allowed))


CASES = [
    (1, torch.float32, False, False),
    (33, torch.float16, True, True),
    (1000, torch.bfloat16, True, False),
    (641, torch.float32, True, True),
    (656, torch.bfloat16, False, True),
]


@pytest.mark.parametrize(("vocabulary", "dtype", "bias", "forbidden"), CASES)
def check_scores(form: str, place: str, vocabulary: int, dtype: torch.dtype, bias: bool, forbidden: bool) -> None:
    from syncr1.kernels.triton_ops import score_rows

    _, products, _ = guarded(5, vocabulary, dtype, place)
    if vocabulary > 600:
        products[0, 600:] = -torch.inf
        products[1] += 300  # nothing may be lost where the logits are large
    head = head_of(vocabulary, dtype, bias, forbidden)
    targets = torch.tensor([1, 2, 3, 7, vocabulary - 1], device=DEVICE) % vocabulary
    before = products.clone()
    got = score_rows(products, targets, head)
    assert torch.equal(products, before)
    truth, plain = (scores(products, targets, head, kind) for kind in (torch.float64, torch.float32))
    for ours, theirs, exact, kind in zip(got, plain, truth, (torch.float32, torch.float32, torch.float64), strict=True):
        assert ours.dtype == kind
        no_worse(ours, theirs, exact, 2e-6 if is_fused() else 6e-5)


def token_loss(logp: Tensor, terms: RowTerms, settings: RowSettings) -> Tensor:
    """Σ weight · token loss, differentiable, as `kernels.reference.loss` has it."""
    advantage, weight = terms.advantage.double(), terms.weight.double()
    old, ref, sampler = (None if p is None else p.double() for p in (terms.old_logp, terms.ref_logp, terms.is_ratio))
    ratio = (logp - (logp.detach() if old is None else old)).clamp(-20, 20).exp()
    if settings.loss == "cispo":
        loss = -ratio.detach().clamp(max=settings.clip_high) * advantage * logp
    elif settings.loss == "sapo":
        tau = torch.where(advantage > 0, settings.sapo_temperature_pos, settings.sapo_temperature_neg)
        loss = -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage
    else:
        clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
        bounded = ratio if settings.delta is None else ratio.clamp(max=settings.delta)
        loss = -torch.minimum(bounded * advantage, clipped * advantage)
    if sampler is not None:
        loss = loss * sampler
    if ref is not None:
        difference = (ref - logp).clamp(-20, 20)
        kl = difference.exp() - difference - 1
        loss = loss + settings.beta * (kl * ratio if settings.bias_corrected_kl else kl)
    return (loss * weight).sum()


LOSSES: list[tuple[RowLoss, bool, bool]] = [("clip", True, True), ("clip", False, False), ("cispo", True, False)]
LOSSES.append(("sapo", True, True))


@pytest.mark.parametrize(("loss", "old", "ref"), LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def check_loss_gradient(form: str, place: str, dtype: torch.dtype, loss: RowLoss, old: bool, ref: bool) -> None:
    from syncr1.kernels.triton_ops import loss_rows

    num_rows, vocabulary = 6, 701
    buffer, products, band = guarded(num_rows, vocabulary, dtype, place)
    head = head_of(vocabulary, dtype, loss != "clip", loss != "cispo")
    targets = torch.tensor([1, 2, 3, 7, 513, vocabulary - 1], device=DEVICE)
    leaf = products.double().requires_grad_()
    logp, entropy, _ = scores(leaf, targets, head, torch.float64)
    shift = torch.tensor([0.5, -0.4, 0.1, 0.02, -0.1, 0.0], device=DEVICE)
    known = logp.detach().float()
    settings = RowSettings(loss, 0.2, 0.3 if loss == "clip" else 1.2, 1.5, 0.1, loss == "sapo", 1.0, 1.05)
    terms = RowTerms(
        torch.tensor([1.0, -1.0, 0.7, -0.2, 2.0, 1.0], device=DEVICE),
        torch.tensor([1.0, 0.5, 0.25, 1.0, 2.0, 0.0], device=DEVICE),
        known - shift if old else None,
        known + shift if ref else None,
        1 + shift if ref else None,
    )
    (want,) = torch.autograd.grad(token_loss(logp, terms, settings), leaf)
    if old:
        terms.old_logp[-1] = torch.nan  # type: ignore[index]  # weight 0: not an input of anything
    got_logp, got_entropy = loss_rows(products, targets, head, terms, settings)
    torch.testing.assert_close(got_logp.double(), logp.detach(), rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(got_entropy.double(), entropy.detach(), rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(products.double(), want, rtol=ROUNDING[dtype] + 1e-5, atol=2e-7)
    assert bool((products[-1] == 0).all()) and band_is_nan(buffer, band)
    if head.forbidden is not None:
        assert bool((products[:, head.forbidden] == 0).all())


@pytest.mark.parametrize("which", ["logp", "entropy", "both"])
@pytest.mark.parametrize("in_place", [True, False])
def check_gradient_from_scores(form: str, place: str, which: str, in_place: bool) -> None:
    from syncr1.kernels.triton_ops import gradient_rows, score_rows

    num_rows, vocabulary = 4, 701
    buffer, products, band = guarded(num_rows, vocabulary, torch.float32, place)
    products[1, 600:] = -torch.inf
    head = head_of(vocabulary, torch.float32, True, True)
    targets = torch.tensor([1, 2, 513, 0], device=DEVICE)  # the last one is forbidden
    grad_logp = None if which == "entropy" else torch.tensor([1.0, -0.5, 0.0, 0.0], device=DEVICE)
    grad_entropy = None if which == "logp" else torch.tensor([0.3, 0.7, -1.0, 0.0], device=DEVICE)
    leaf = products.double().requires_grad_()
    logp, entropy, _ = scores(leaf, targets, head, torch.float64)
    rows = slice(0, 3)
    value = torch.zeros((), dtype=torch.float64, device=DEVICE)
    if grad_logp is not None:
        value = value + (grad_logp.double() * logp)[rows].sum()
    if grad_entropy is not None:
        value = value + (grad_entropy.double() * entropy)[rows].sum()
    (want,) = torch.autograd.grad(value, leaf)
    _, entropy_C, lse_C = score_rows(products, targets, head)
    if not in_place:
        buffer, out, band = guarded(num_rows, vocabulary, torch.float32, place)
    else:
        out = products
    gradient_rows(products, targets, head, lse_C, entropy_C, grad_logp, grad_entropy, out)
    torch.testing.assert_close(out.double(), want.nan_to_num(0.0), rtol=2e-5, atol=2e-7)
    assert bool((out[3] == 0).all()) and band_is_nan(buffer, band)


def check_rows_are_independent(form: str) -> None:
    """Repeated, permuted and split calls give the same bits; a NaN row stays alone, and 0 where its gradient is 0."""
    from syncr1.kernels.triton_ops import gradient_rows, loss_rows, score_rows

    _, products, _ = guarded(6, 650, torch.float32)
    products[2, 17] = torch.nan
    head = head_of(650, torch.float32, True, False)
    targets = torch.arange(6, device=DEVICE) * 100
    settings = RowSettings("clip", 0.2, 0.2, None, 0.0, False, 1.0, 1.0)
    terms = RowTerms(torch.ones(6, device=DEVICE), torch.tensor([1.0, 2, 0, 1, 1, 1], device=DEVICE))

    def everything(rows: Tensor) -> list[Tensor]:
        chunk, chunk_targets = products[rows], targets[rows]
        scored = score_rows(chunk, chunk_targets, head)
        out = torch.empty_like(chunk)
        gradient_rows(chunk, chunk_targets, head, scored[2], scored[1], terms.weight[rows], terms.weight[rows], out)
        part = RowTerms(terms.advantage[rows], terms.weight[rows])
        return [*scored, out, *loss_rows(chunk, chunk_targets, head, part, settings), chunk]

    whole = everything(torch.arange(6, device=DEVICE))
    order = torch.tensor([5, 2, 0, 3], device=DEVICE)
    for complete, part in zip(whole, everything(order), strict=True):
        assert torch.equal(complete[order].nan_to_num(7.0), part.nan_to_num(7.0))
    assert bool(whole[0][2].isnan()) and bool((whole[3][2] == 0).all()) and bool((whole[6][2] == 0).all())
    others = torch.tensor([0, 1, 3, 4, 5], device=DEVICE)
    assert all(bool(part[others].isfinite().all()) for part in whole)


def check_no_rows_and_a_forbidden_nan() -> None:
    from syncr1.kernels.triton_ops import score_rows

    _, products, _ = guarded(3, 40, torch.float32)
    head = Head(None, 1.0, torch.tensor([4], device=DEVICE))
    targets = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    assert all(part.shape == (0,) for part in score_rows(products[:0], targets[:0], head))
    want = score_rows(products, targets, head)
    products[:, 4] = torch.nan
    assert all(torch.equal(*pair) for pair in zip(want, score_rows(products, targets, head), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 3, 7, 8, 9, 15, 16, 17, 519, 520, 527, 528, 529])
def check_every_end_of_a_row(form: str, vocabulary: int, dtype: torch.dtype) -> None:
    """Around multiples of 16 bytes, with a bias of another dtype inside a band of NaN, which no call writes to."""
    from syncr1.kernels.triton_ops import gradient_rows, loss_rows, score_rows

    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    band = torch.full((padded(vocabulary) + 32,), torch.nan, dtype=other, device=DEVICE)
    bias = band[16 : 16 + vocabulary].copy_(torch.randn(vocabulary))
    head = Head(bias, 0.7, torch.tensor([vocabulary // 2], device=DEVICE) if vocabulary > 1 else None)
    targets = torch.tensor([0, vocabulary - 1], device=DEVICE)
    before = band.clone()
    buffer, products, outside = guarded(2, vocabulary, dtype, "aligned")
    leaf = products.double().requires_grad_()
    logp, entropy, _ = scores(leaf, targets, head, torch.float64)
    (want,) = torch.autograd.grad(logp[1], leaf)
    got = score_rows(products, targets, head)
    torch.testing.assert_close(got[0].double(), logp.detach(), rtol=1e-6, atol=6e-5)
    torch.testing.assert_close(got[1].double(), entropy.detach(), rtol=1e-6, atol=6e-5)
    out_buffer, out, _ = guarded(2, vocabulary, dtype, "aligned")
    out_buffer.fill_(torch.nan)
    ones = torch.tensor([0.0, 1.0], device=DEVICE)
    gradient_rows(products, targets, head, got[2], got[1], ones, None, out)
    settings = RowSettings("clip", 0.2, 0.2, None, 0.0, False, 1.0, 1.0)
    loss_rows(products, targets, head, RowTerms(-ones, ones), settings)
    for gradient in (out, products):
        torch.testing.assert_close(gradient.double(), want, rtol=ROUNDING[dtype] + 1e-4, atol=2e-6)
    assert band_is_nan(buffer, outside) and band_is_nan(out_buffer, outside)
    assert torch.equal(band.nan_to_num(7.0), before.nan_to_num(7.0))
