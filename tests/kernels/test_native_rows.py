"""Row functions of the C++ backend against float64, under every instruction set of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_library import INSTRUCTION_SETS, Guarded, guarded_outputs, using
from torch import Tensor

from syncr1.kernels import native
from syncr1.kernels.native.rows import gradient_rows, loss_rows, score_rows
from syncr1.kernels.terms import Head, RowLoss, RowSettings, RowTerms

pytestmark = pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
WIDTHS = st.sampled_from([1, 2, 3, 15, 16, 17, 63, 1023, 1024, 1025, 2049]) | st.integers(1, 3000)
RESOLUTION = 2e-7
"""Of float32, twice: the floor of every comparison, times the greatest logit."""


@pytest.fixture(params=INSTRUCTION_SETS, scope="module", autouse=True)
def _instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    with using(request.param):
        yield


@dataclass(frozen=True)
class Case:
    products: Tensor
    targets: Tensor
    head: Head


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype | None = None) -> Case:
    num_rows, width = draw(st.integers(1, 5)), draw(WIDTHS)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    products = torch.randn(num_rows, width, generator=generator) * draw(st.sampled_from([0.01, 1.0, 9.0]))
    if width > 1 and draw(st.booleans()):  # a masked vocabulary
        products[:, torch.randperm(width, generator=generator)[: width // 2]] = -torch.inf
    bias = torch.randn(width, generator=generator) if draw(st.booleans()) else None
    order = torch.randperm(width, generator=generator)
    forbidden = order[: draw(st.integers(0, min(3, width - 1)))] if draw(st.booleans()) else None
    products[:, order[-1]] = products[:, order[-1]].clamp_min(-9)  # something is left
    head = Head(bias, draw(st.sampled_from([1.0, 0.3, 1.7])), forbidden)
    targets = torch.randint(width, (num_rows,), generator=generator)
    return Case(products.to(dtype or draw(DTYPES)), targets, head)


def log_probabilities(case: Case, products: Tensor) -> Tensor:
    """[C, V] in the dtype of `products`, the way the reference forms them."""
    bias = 0.0 if case.head.bias is None else case.head.bias.to(products.dtype)
    logits = (products + bias) / case.head.temperature
    if case.head.forbidden is not None:
        logits = logits.index_fill(1, case.head.forbidden, -torch.inf)
    return logits - logits.logsumexp(dim=1, keepdim=True)


def scores(case: Case, products: Tensor) -> tuple[Tensor, Tensor]:
    logp_CV = log_probabilities(case, products)
    entropy_C = -(logp_CV.exp() * logp_CV.clamp_min(-1e4)).sum(dim=1)
    return logp_CV.gather(1, case.targets.unsqueeze(1)).squeeze(1), entropy_C


def floor(case: Case) -> float:
    logits = case.products.detach().double() + (0.0 if case.head.bias is None else case.head.bias.double())
    return RESOLUTION * (1 + float(logits[logits.isfinite()].abs().max())) / min(case.head.temperature, 1.0)


def assert_close(actual: Tensor, exact: Tensor, peer: Tensor, floor: float) -> None:
    """Not further from float64 than twice what plain PyTorch is in the same dtype."""
    assert actual.isnan().equal(exact.isnan())
    finite = exact.isfinite()
    assert actual[~finite].nan_to_num().equal(exact[~finite].to(actual.dtype).nan_to_num())
    error, allowed = ((t.double() - exact)[finite].abs() for t in (actual, peer))
    assert float(error.max() if error.numel() else 0.0) <= 2 * float(allowed.max() if error.numel() else 0.0) + floor


@given(case=cases())
def test_scores(case: Case) -> None:
    products = Guarded(case.products)
    with guarded_outputs():
        logp, entropy, lse = score_rows(products.matrix, case.targets, case.head)
    assert products.matrix.equal(case.products)
    (logp_64, entropy_64), (logp_32, entropy_32) = (
        scores(case, case.products.to(d)) for d in (torch.double, torch.float)
    )
    assert_close(logp, logp_64, logp_32, floor(case))
    assert_close(entropy, entropy_64, entropy_32, floor(case))
    z = log_probabilities(case, case.products.double()) + lse.double().unsqueeze(1)
    torch.testing.assert_close(z.logsumexp(dim=1), lse.double(), rtol=1e-6, atol=1e-6)
    head = case.head
    allowed = next(v for v in range(case.products.shape[1]) if head.forbidden is None or v not in head.forbidden)
    bias = 0.0 if head.bias is None else head.bias.double()
    logits = (case.products.double() + bias)[:, allowed] / head.temperature
    seen = logits.isfinite()
    torch.testing.assert_close((logits - z[:, allowed])[seen], torch.zeros(int(seen.sum()), dtype=torch.double),
                               rtol=0, atol=10 * floor(case))  # fmt: skip


@given(case=cases(), parts=st.sampled_from(["logp", "entropy", "both"]), in_place=st.booleans())
def test_gradients(case: Case, parts: str, in_place: bool) -> None:
    num_rows = len(case.targets)
    by_logp = None if parts == "entropy" else torch.linspace(-1, 2, num_rows)
    by_entropy = None if parts == "logp" else torch.linspace(0.5, -1, num_rows)

    def gradient(dtype: torch.dtype) -> Tensor:
        products = case.products.to(dtype).requires_grad_()
        logp, entropy = scores(case, products)
        terms = [g.to(dtype) * s for g, s in ((by_logp, logp), (by_entropy, entropy)) if g is not None]
        # A target without probability has no gradient through its own logit but pushes the others all the same.
        (grad,) = torch.autograd.grad(sum(t.nan_to_num(neginf=0.0, posinf=0.0) for t in terms).sum(), products)
        return grad

    reachable = scores(case, case.products.double())[0].isfinite()
    products = Guarded(case.products)
    _, entropy, lse = score_rows(products.matrix, case.targets, case.head)
    out = products if in_place else Guarded(torch.full_like(case.products, torch.nan), gap=11)
    gradient_rows(products.matrix, case.targets, case.head, lse, entropy, by_logp, by_entropy, out.matrix)
    out.assert_untouched_around()
    assert bool(out.matrix.isfinite().all())
    exact, peer = gradient(torch.double), gradient(torch.float).to(case.products.dtype)
    assert_close(out.matrix[reachable], exact[reachable], peer[reachable], 4 * floor(case))
    if case.head.forbidden is not None:
        assert not bool(out.matrix[:, case.head.forbidden].any())


def token_loss(logp: Tensor, terms: RowTerms, settings: RowSettings) -> Tensor:
    """[C]; the formulas of kernels/reference/loss.py."""
    terms = RowTerms(*(None if t is None else t.to(logp.dtype) for t in (
        terms.advantage, terms.weight, terms.old_logp, terms.ref_logp, terms.is_ratio)))  # type: ignore[arg-type]  # fmt: skip
    old = logp.detach() if terms.old_logp is None else terms.old_logp
    ratio = (logp - old).clamp(-20, 20).exp()
    if settings.loss == "cispo":
        loss = -ratio.clamp(max=settings.clip_high).detach() * terms.advantage * logp
    elif settings.loss == "sapo":
        tau = torch.where(terms.advantage > 0, settings.sapo_temperature_pos, settings.sapo_temperature_neg)
        loss = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * terms.advantage
    else:
        clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
        bounded = ratio if settings.delta is None else ratio.clamp(max=settings.delta)
        loss = -torch.minimum(bounded * terms.advantage, clipped * terms.advantage)
    if terms.is_ratio is not None:
        loss = loss * terms.is_ratio
    if terms.ref_logp is not None:
        difference = (terms.ref_logp - logp).clamp(-20, 20)
        kl = difference.exp() - difference - 1
        loss = loss + settings.beta * (kl * ratio if settings.bias_corrected_kl else kl)
    return loss * terms.weight


@st.composite
def losses(draw: st.DrawFn) -> tuple[Case, RowTerms, RowSettings]:
    case = draw(cases())
    logp = scores(case, case.products.double())[0].float().clamp_min(-30)
    advantage, weight, noise, reference, ratio = torch.randn(5, len(logp), generator=torch.Generator().manual_seed(1))
    parts = draw(st.lists(st.booleans(), min_size=3, max_size=3))
    terms = RowTerms(
        advantage, weight.exp() / 4,
        logp + 0.3 * noise if parts[0] else None,
        logp + 0.5 * reference if parts[1] else None,
        ratio.exp() if parts[2] else None,
    )  # fmt: skip
    kind: RowLoss = draw(st.sampled_from(["clip", "cispo", "sapo"]))
    clip_high = 1.5 if kind == "cispo" else 0.28
    return case, terms, RowSettings(kind, 0.2, clip_high, draw(st.sampled_from([None, 1.4])),
                                    0.1 if parts[1] else 0.0, draw(st.booleans()), 1.0, 1.05)  # fmt: skip


@given(drawn=losses())
def test_loss_gradient(drawn: tuple[Case, RowTerms, RowSettings]) -> None:
    case, terms, settings = drawn

    def gradient(dtype: torch.dtype) -> Tensor:
        products = case.products.to(dtype).requires_grad_()
        (grad,) = torch.autograd.grad(token_loss(scores(case, products)[0], terms, settings).sum(), products)
        return grad

    reachable = scores(case, case.products.double())[0].isfinite()
    expected = score_rows(case.products, case.targets, case.head)
    products = Guarded(case.products)
    with guarded_outputs():
        logp, entropy = loss_rows(products.matrix, case.targets, case.head, terms, settings)
    products.assert_untouched_around()
    assert logp.equal(expected[0]) and entropy.equal(expected[1])
    exact, peer = gradient(torch.double)[reachable], gradient(torch.float).to(case.products.dtype)[reachable]
    # The slope of a token takes over the error of its log-probability.
    scale = max(float(exact.abs().max()) if exact.numel() else 0.0, 1.0)
    assert_close(products.matrix[reachable], exact, peer, 8 * floor(case) * scale)


def chunk(num_rows: int = 6, width: int = 3001, dtype: torch.dtype = torch.float32) -> Case:
    products = (torch.randn(num_rows, width) * 4).to(dtype)
    return Case(products, torch.randint(width, (num_rows,)), Head(torch.randn(width), 0.9, torch.tensor([1500, 3, 4])))


PLAIN = RowSettings("clip", 0.2, 0.2, None, 0.0, False, 1.0, 1.05)


def all_results(case: Case, rows: Tensor) -> list[Tensor]:
    """Of score_rows, loss_rows and gradient_rows on these rows."""
    products, targets = case.products[rows], case.targets[rows]
    terms = RowTerms(torch.linspace(-1, 1, len(case.targets))[rows], torch.ones(len(rows)))
    score = score_rows(products, targets, case.head)
    grad, loss = torch.empty_like(products), products.clone()
    gradient_rows(products, targets, case.head, score[2], score[1], terms.advantage, terms.weight, grad)
    return [*score, grad, *loss_rows(loss, targets, case.head, terms, PLAIN), loss]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_on_nothing_but_itself(dtype: torch.dtype) -> None:
    """Bitwise: threads, order and neighbours do not matter."""
    case = chunk(num_rows=23, dtype=dtype)
    everything = torch.arange(23)
    whole = all_results(case, everything)
    torch.set_num_threads(2)
    assert all(a.equal(b) for a, b in zip(whole, all_results(case, everything), strict=True))
    order = torch.randperm(23)
    assert all(a[order].equal(b) for a, b in zip(whole, all_results(case, order), strict=True))
    for part in everything.split(5):
        assert all(a[part].equal(b) for a, b in zip(whole, all_results(case, part), strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 1700, 3000])
def test_a_poisoned_row_poisons_no_other(value: float, column: int) -> None:
    case = chunk()
    clean = all_results(case, torch.arange(6))
    case.products[2, column] = value
    results = all_results(case, torch.arange(6))
    others = torch.tensor([0, 1, 3, 4, 5])
    for before, after in zip(clean, results, strict=True):
        assert before[others].equal(after[others])
    for after in (results[0], results[1], results[4], results[5]):
        assert bool(after[2].isnan())
    assert bool(results[3][2].isnan().all()) and bool(results[6][2].isnan().all())


def test_nan_at_a_forbidden_id_is_never_read() -> None:
    case = chunk()
    clean = all_results(case, torch.arange(6))
    case.products[:, case.head.forbidden] = torch.nan
    assert all(a.equal(b) for a, b in zip(clean, all_results(case, torch.arange(6)), strict=True))


def test_a_masked_beginning_does_not_hide_nan() -> None:
    products = torch.full((2, 2500), -torch.inf)
    products[:, 2000:] = 0.5
    products[1, 5] = torch.nan
    logp, entropy, _ = score_rows(products, torch.tensor([2100, 2100]), Head())
    torch.testing.assert_close(
        torch.stack([logp[0], entropy[0]]), torch.tensor([-1.0, 1.0]) * torch.tensor(500.0).log()
    )
    assert bool(logp[1].isnan()) and bool(entropy[1].isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forbidden_target(dtype: torch.dtype) -> None:
    case = replace(chunk(2, dtype=dtype), targets=torch.tensor([1500, 7]))
    logp, entropy, lse = score_rows(case.products, case.targets, case.head)
    assert logp[0] == -torch.inf and bool(entropy.isfinite().all())
    out = torch.empty_like(case.products)
    gradient_rows(case.products, case.targets, case.head, lse, entropy, torch.ones(2), None, out)
    assert bool(out.isfinite().all()) and not bool(out[:, case.head.forbidden].any())
    loss_rows(case.products, case.targets, case.head, RowTerms(torch.ones(2), torch.ones(2)), PLAIN)
    assert bool(case.products.isfinite().all()) and not bool(case.products[:, case.head.forbidden].any())


def test_forbidden_ids_at_the_ends_of_blocks() -> None:
    """The list of forbidden ids, in any order and with repetitions, is followed across blocks of 1024."""
    products, targets = torch.randn(3, 3073), torch.tensor([5, 6, 7])
    forbidden = torch.tensor([3072, 1024, 0, 1023, 2047, 2048, 1023, 3071])
    logp, entropy, _ = score_rows(products, targets, Head(None, 1.0, forbidden))
    expected = products.double().index_fill(1, forbidden, -torch.inf).log_softmax(1)
    torch.testing.assert_close(logp.double(), expected[range(3), targets], rtol=0, atol=2e-6)
    torch.testing.assert_close(entropy.double(), -(expected.exp() * expected.clamp_min(-1e4)).sum(1), rtol=0, atol=2e-6)


def test_rows_without_a_gradient_become_zero() -> None:
    case = chunk(3)
    case.products[1] = torch.nan
    terms = RowTerms(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, 1.0]), torch.full((3,), -8.0))
    loss_rows(case.products, case.targets, case.head, terms, PLAIN)
    assert not bool(case.products[:2].any()) and bool(case.products[2].any())


def test_extreme_logits() -> None:
    """A certain token has log-probability 0, entropy 0 and no gradient, whatever the size of the logits."""
    products = torch.tensor([[3e38, -3e38, 0.0], [-3e38, -3e38, -torch.inf], [8192.0, 8192.0, -1e4]])
    targets, head = torch.tensor([0, 1, 0]), Head()
    logp, entropy, lse = score_rows(products, targets, head)
    half = torch.tensor(2.0).log()
    torch.testing.assert_close(logp, torch.stack([half * 0, -half, -half]))
    torch.testing.assert_close(entropy, torch.stack([half * 0, half, half]))
    # At 3e38 log 2 is lost in a float32 logsumexp, at 8192 its last bits are.
    gradient_rows(products, targets, head, lse, entropy, torch.tensor([1.0, 0.0, 1.0]), None, products)
    torch.testing.assert_close(products, torch.tensor([[0.0, 0, 0], [0, 0, 0], [0.5, -0.5, 0]]), rtol=1e-3, atol=0)


def test_no_rows() -> None:
    none = torch.empty(0, 5)
    assert [t.shape for t in score_rows(none, torch.empty(0, dtype=torch.int64), Head())] == [(0,)] * 3
