"""`support`: log-probabilities, losses and gradients over the set that a token was drawn from, against a dense masked
model in float64, and the set that `cfg_sample` returns.

What lies in memory around it is in test_rows.py and test_sample.py, on every instruction set.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import BACKENDS, KERNELS
from torch import Tensor

from syncr1.kernels.api import TokenStream, cfg_sample, linear_grpo_loss, linear_logp, selective_logp
from syncr1.kernels.checks import CHECKS_VARIABLE
from syncr1.kernels.ops import late_gradients
from syncr1.kernels.support import holds, pack, unpack

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ROWS, WIDTH, VOCABULARY = 11, 6, 77
CU_SEQLENS, GROUPS = torch.tensor([0, 3, 7, 11]), torch.tensor([0, 3])
REWARDS = torch.tensor([1.0, 0.0, 0.4])
FORBIDDEN = torch.tensor([76, 12])


def kept_sets(targets: Tensor, share: float = 0.3) -> Tensor:
    """[N, V] bool: row 0 keeps its target alone, row 1 all ids, the others some; no two alike."""
    kept = torch.rand(len(targets), VOCABULARY) < share
    kept[0], kept[1] = False, True
    return kept.scatter(1, targets[:, None], True)


def leaves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = ((ROWS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    return [torch.randn(*shape).to(dtype) for shape in shapes]


def case(share: float = 0.3) -> tuple[list[Tensor], Tensor, Tensor]:
    torch.manual_seed(3)
    targets = torch.randint(20, 70, (ROWS,))
    return leaves(), targets, kept_sets(targets, share)


def dense(logits: Tensor, targets: Tensor, kept: Tensor, forbidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of a categorical over the kept ids alone."""
    if forbidden is not None:
        kept = kept.index_fill(1, forbidden, False)
    logp_NV = logits.masked_fill(~kept, -torch.inf).log_softmax(-1)
    entropy_N = -(logp_NV.exp() * logp_NV.masked_fill(~kept, 0.0)).sum(-1)
    return logp_NV.gather(1, targets[:, None])[:, 0], entropy_N


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("forbidden", [None, FORBIDDEN], ids=["all", "forbidden"])
@pytest.mark.parametrize("op", ["linear_logp", "selective_logp"])
def test_values_and_gradients(op: str, forbidden: Tensor | None, backend: str) -> None:
    exact, targets, kept = case()
    upstream = torch.randn(2, ROWS)

    def run(dtype: torch.dtype, whole: bool) -> list[Tensor]:
        hidden, weight, bias = (leaf.to(dtype).requires_grad_() for leaf in exact)
        trained = [hidden, weight, bias]
        if op == "selective_logp":
            trained = [F.linear(*trained).detach().requires_grad_()]
        if whole:
            logits = (trained[0] if op == "selective_logp" else F.linear(*trained)) / 0.7
            found = dense(logits, targets, kept, forbidden)
        elif op == "selective_logp":
            settings = {"temperature": 0.7, "forbidden": forbidden, "support": pack(kept), "backend": backend}
            found = selective_logp(trained[0], targets, **settings)
        else:
            settings = {"temperature": 0.7, "forbidden": forbidden, "support": pack(kept), "backend": backend}
            found = linear_logp(hidden, weight, targets, bias=bias, **settings)
        total = sum((values * up.to(values.dtype)).sum() for values, up in zip(found, upstream, strict=True))
        return [*found, *torch.autograd.grad(total, trained)]

    for ours, truth in zip(run(torch.float32, False), run(torch.float64, True), strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=2e-5, atol=5e-6)
    if backend == "reference":
        for ours, truth in zip(run(torch.float64, False), run(torch.float64, True), strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)
    logp, entropy, *grads = run(torch.float32, False)
    assert float(logp.detach()[0]) == float(entropy.detach()[0]) == 0
    if op == "selective_logp":
        outside = ~kept if forbidden is None else ~kept.index_fill(1, forbidden, False)
        assert not bool(grads[0][0].any() | grads[0][outside].any())


LOSSES: list[dict[str, Any]] = [
    {},
    {"ratio": "sequence"},
    {"ratio": "product", "clip_low": 0.9, "clip_high": 9.0},
    {"loss_type": "vespo"},
    {"top_entropy_quantile": 0.5},
    {"loss_type": "cispo", "clip_high": 1.3},
    {"beta": 0.1, "score_all": True},
]


def loss_case(dtype: torch.dtype, backend: str, **options: Any) -> tuple[Any, list[Tensor], list[Tensor]]:
    """(the op's output, its operands, gradients); the last row is masked and its target lies outside its set."""
    exact, targets, kept = case()
    kept[-1, targets[-1]] = False
    trained = [leaf.to(dtype).requires_grad_() for leaf in exact]
    logp = dense(F.linear(*(leaf.double() for leaf in trained)) / 0.7, targets, kept, FORBIDDEN)[0].detach().float()
    mask = torch.arange(ROWS) < ROWS - 1
    stream = TokenStream(
        trained[0], trained[1], targets, torch.arange(ROWS), trained[2], 0.7, "image", FORBIDDEN,
        pack(kept),
    )  # fmt: skip
    old = logp.nan_to_num(neginf=0.0) + torch.linspace(-0.3, 0.3, ROWS)
    out = linear_grpo_loss(
        [stream],
        REWARDS,
        CU_SEQLENS,
        GROUPS,
        old_logp=old,
        ref_logp=old - 0.1,
        loss_mask=mask,
        backend=backend,
        **options,
    )
    return out, trained, list(torch.autograd.grad(out.loss, trained))


@pytest.mark.parametrize("options", LOSSES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_every_way_through_the_loss(options: dict[str, Any], backend: str) -> None:
    """One sweep, two sweeps, an entropy quantile: against `reference` in float64, whose gradient is autograd's."""
    out, _, grads = loss_case(torch.float32, backend, **options)
    truth, _, exact = loss_case(torch.float64, "reference", **options)
    for ours, theirs in zip(
        [out.loss, out.logp, out.entropy, *grads], [truth.loss, truth.logp, truth.entropy, *exact], strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=2e-5, atol=5e-6)
    assert float(out.logp[0]) == float(out.entropy[0]) == 0 and not bool(grads[0][0].any() | grads[0][-1].any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_heads(backend: str) -> None:
    """Nothing is clipped: a rounded ratio near a bound would switch a whole token off."""
    _, _, grads = loss_case(torch.bfloat16, backend, clip_low=0.9, clip_high=9.0)
    _, _, exact = loss_case(torch.float64, "reference", clip_low=0.9, clip_high=9.0)
    for ours, theirs in zip(grads, exact, strict=True):
        assert float((ours.double() - theirs).norm()) <= 0.03 * float(theirs.norm())
        assert not bool(ours[0].any()) or ours is not grads[0]


def test_reference_loss_is_the_dense_one() -> None:
    """What the other backends are held against: -A logp over the kept set, by autograd of the dense formula."""
    exact, targets, kept = case()
    trained = [leaf.requires_grad_() for leaf in exact]
    stream = TokenStream(trained[0], trained[1], targets, torch.arange(ROWS), trained[2], support=pack(kept))
    out = linear_grpo_loss([stream], REWARDS, CU_SEQLENS, GROUPS, backend="reference")
    assert isinstance(out.advantages, Tensor)
    advantage = out.advantages[torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])].double()
    logp, _ = dense(F.linear(*trained), targets, kept, None)
    loss = -((logp - logp.detach()).exp() * advantage).mean()
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-6, atol=1e-7)
    pairs = zip(torch.autograd.grad(out.loss, trained), torch.autograd.grad(loss, trained), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_late_gradients_carry_it() -> None:
    """Of float16 heads, whose second sweep is in backward: the streams as torch takes them, there and back."""
    exact, targets, kept = case()
    stream = TokenStream(*exact[:2], targets, torch.arange(ROWS), exact[2], 0.7, "image", FORBIDDEN, pack(kept))
    plain = TokenStream(*exact[:2], targets, torch.arange(ROWS))
    back = late_gradients.StreamLists.of([stream, plain]).records()
    assert back[0].support is not None and back[0].support.equal(pack(kept)) and back[1].support is None
    hidden, weight, bias = (leaf.float() for leaf in exact)
    single = TokenStream(hidden, weight, targets, torch.arange(ROWS), bias, 0.7, "text", None, pack(kept))
    trained = [leaf.double().requires_grad_() for leaf in (hidden, weight, bias)]
    logp, entropy = dense(F.linear(*trained) / 0.7, targets, kept, None)
    lse = (F.linear(*trained) / 0.7).masked_fill(~kept, -torch.inf).logsumexp(-1)
    upstream = torch.randn(ROWS)
    scored = (upstream, lse.detach(), entropy.detach().float())
    lists = late_gradients.StreamLists.of([single])
    given = late_gradients.LateGradientInputs(lists, *scored, [True] * 3, "native")
    formed = late_gradients.form_gradients(given)
    for ours, theirs in zip(formed, torch.autograd.grad((logp * upstream).sum(), trained), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=5e-6)


TRUNCATIONS: list[dict[str, Any]] = [
    {"top_k": 9},
    {"top_p": 0.6},
    {"min_p": 0.05},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.01},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", TRUNCATIONS, ids=str)
def test_what_was_drawn_is_replayed(options: dict[str, Any], backend: str) -> None:
    """Guided draws; on policy every ratio is 1 exactly, because both sides are the same sums of the same numbers."""
    (hidden, weight, _), _, _ = case()
    hidden, weight = hidden.float(), weight.float()
    cond, uncond = F.linear(hidden, weight), torch.randn(ROWS, VOCABULARY)
    drawn = cfg_sample(
        cond, uncond, cfg_weight=3.0, temperature=0.8, seed=1, offset=0, forbidden=FORBIDDEN, with_support=True,
        backend=backend, **options,
    )  # fmt: skip
    plain = cfg_sample(
        cond, uncond, cfg_weight=3.0, temperature=0.8, seed=1, offset=0, forbidden=FORBIDDEN, backend=backend, **options
    )
    assert plain.support is None and plain.token.equal(drawn.token) and drawn.support is not None
    kept = unpack(drawn.support, VOCABULARY)
    assert bool(holds(drawn.support, drawn.token).all()) and 1 <= int(kept.sum(1).min()) < VOCABULARY - 2
    mixed = (uncond + 3.0 * (cond - uncond)).double() / 0.8
    for logits, ours in ((cond.double() / 0.8, drawn.logp), (mixed, drawn.logp_mixed)):
        truth, entropy = dense(logits, drawn.token, kept, None)
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=1e-5)
        if ours is drawn.logp:
            torch.testing.assert_close(drawn.entropy.double(), entropy, rtol=0, atol=1e-5)
    settings: dict[str, Any] = {
        "temperature": 0.8,
        "forbidden": FORBIDDEN,
        "support": drawn.support,
        "backend": backend,
    }
    again, _ = linear_logp(hidden, weight, drawn.token, **settings)
    torch.testing.assert_close(again, drawn.logp, rtol=0, atol=2e-6)
    stream = TokenStream(hidden, weight, drawn.token, torch.arange(ROWS), None, 0.8, "text", FORBIDDEN, drawn.support)
    out = linear_grpo_loss([stream], REWARDS, CU_SEQLENS, GROUPS, old_logp=again, score_all=True, backend=backend)
    assert float(out.metrics["ratio_min/text"]) == float(out.metrics["ratio_max/text"]) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_min_p(backend: str) -> None:
    """Of the distribution that is drawn from, at its temperature, after top_k and top_p; equal ids together."""
    probability = torch.tensor([[0.1, 0.4, 0.2, 0.2, 0.1]])

    def kept(**options: Any) -> list[int]:
        settings: dict[str, Any] = {"seed": 0, "offset": 0, "with_support": True, "backend": backend}
        drawn = cfg_sample(probability.log(), **settings | options)
        assert drawn.support is not None
        return unpack(drawn.support, 5)[0].nonzero()[:, 0].tolist()

    assert kept() == kept(min_p=0.25) == [0, 1, 2, 3, 4]  # met to a relative 1e-6
    assert kept(min_p=0.26) == kept(min_p=0.5) == [1, 2, 3]
    assert kept(min_p=0.51) == kept(min_p=1.0) == [1]
    assert kept(min_p=0.26, temperature=2.0) == [0, 1, 2, 3, 4] and kept(min_p=0.26, temperature=0.5) == [1]
    assert kept(min_p=0.26, top_k=2) == [1, 2] and kept(min_p=0.26, top_p=0.59) == [1, 2]
    assert kept(min_p=0.51, top_k=3, top_p=0.9) == [1]
    assert kept(temperature=0.0, top_k=1, min_p=1.0) == [0, 1, 2, 3, 4]  # greedy leaves nothing out


def test_a_far_greatest_logit_keeps_itself() -> None:
    """In float32 the maximum that weights are relative to is rounded; min_p = 1 keeps the greatest id all the same."""
    for scale in (1e2, 1e4, 1e6):
        cond, uncond = scale * torch.randn(2, 40, 63)
        drawn = cfg_sample(
            cond, uncond, cfg_weight=1.7, min_p=1.0, temperature=0.3, seed=0, offset=0, with_support=True
        )
        assert drawn.support is not None and bool(holds(drawn.support, drawn.token).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_misfits_are_refused(backend: str) -> None:
    (hidden, weight, _), targets, kept = case()
    hidden, weight, support = hidden.float(), weight.float(), pack(kept)

    def score(words: Tensor, forbidden: Tensor | None = None) -> Any:
        given: dict[str, Any] = {"support": words, "forbidden": forbidden, "backend": backend}
        selective_logp(hidden @ weight.t(), targets, **given)
        return linear_logp(hidden, weight, targets, **given)

    for wrong in (
        support.long(),
        support.float(),
        kept,
        support[:-1],
        support[:, :-1],
        support[0],
        F.pad(support, (0, 1)),
    ):
        with pytest.raises(ValueError, match=r"selective_logp: support must be .*, got .*; pass the rows of CFGSample"):
            score(wrong)
    without = kept.clone()
    without[4, targets[4]] = False
    message = (
        f"support must be a set that holds the row's own target, got one without target {int(targets[4])} at row 4"
    )
    with pytest.raises(ValueError, match=f"selective_logp: {message}"):
        score(pack(without))
    with pytest.raises(ValueError, match="support must be a set"):
        score(support, forbidden=targets[:1])
    stream = TokenStream(hidden, weight, targets, torch.arange(ROWS), support=pack(without))
    with pytest.raises(ValueError, match=f"linear_grpo_loss: {message}"):
        linear_grpo_loss([stream], REWARDS, CU_SEQLENS, GROUPS, backend=backend, score_all=True)
    stream = TokenStream(hidden, weight, targets, torch.arange(ROWS), support=support[:, :2])
    with pytest.raises(ValueError, match=r"linear_grpo_loss: stream.support must be \[11, 3\] \(32 ids of 77 a word\)"):
        linear_grpo_loss([stream], REWARDS, CU_SEQLENS, GROUPS, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_values_are_not_checked_a_lost_target_is_minus_infinity(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where reading it back would make the host wait: neither a wrong finite number nor a crash."""
    monkeypatch.setenv(CHECKS_VARIABLE, "never")
    (hidden, weight, _), targets, kept = case()
    kept[4, targets[4]] = False
    logp, entropy = linear_logp(hidden.float(), weight.float(), targets, support=pack(kept), backend=backend)
    assert bool((logp == -torch.inf).nonzero().equal(torch.tensor([[4]]))) and bool(entropy.isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_strides_and_no_rows(backend: str) -> None:
    (hidden, weight, bias), targets, kept = case()
    hidden, weight, bias = hidden.float(), weight.float(), bias.float()
    wide = torch.empty(3, ROWS, dtype=torch.int32).copy_(pack(kept).t()).t()
    assert not wide.is_contiguous()
    plain = linear_logp(hidden, weight, targets, bias=bias, support=pack(kept), backend=backend)
    strided = linear_logp(hidden, weight, targets, bias=bias, support=wide, backend=backend)
    assert all(a.equal(b) for a, b in zip(plain, strided, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = linear_logp(hidden, weight, targets, bias=bias, support=pack(kept), backend=backend)
    torch.testing.assert_close(rounded[0], plain[0], rtol=0.02, atol=0.05)
    nothing = linear_logp(hidden[:0], weight, targets[:0], support=pack(kept)[:0], backend=backend)
    assert nothing[0].shape == (0,)


@pytest.mark.slow
def test_traced_whole() -> None:
    (hidden, weight, _), targets, kept = case()

    def run(hidden: Tensor, weight: Tensor, support: Tensor) -> Tensor:
        stream = TokenStream(2 * hidden, weight, targets, torch.arange(ROWS), support=support)
        old = torch.zeros(ROWS)
        loss = linear_grpo_loss([stream], REWARDS, CU_SEQLENS, GROUPS, old_logp=old).loss
        drawn = cfg_sample(hidden.detach() @ weight.detach().t(), seed=0, offset=0, top_k=5, with_support=True)
        logp, entropy = linear_logp(hidden, weight, drawn.token, support=drawn.support)
        return loss + logp.sum() + entropy.sum()

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found = []
    for function in (run, compiled):
        trained = [leaf.float().requires_grad_() for leaf in (hidden.detach(), weight.detach())]
        total = function(*trained, pack(kept))
        found.append([total, *torch.autograd.grad(total, trained)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)
    meta = [leaf.float().to("meta") for leaf in (hidden, weight)]
    logp, _ = linear_logp(*meta, targets.to("meta"), support=pack(kept).to("meta"))
    assert logp.shape == (ROWS,) and logp.is_meta
    drawn = cfg_sample(torch.empty(4, 77, device="meta"), seed=0, offset=0, with_support=True)
    assert drawn.support is not None and drawn.support.shape == (4, 3) and drawn.support.dtype == torch.int32


def test_bits() -> None:
    for vocabulary in (1, 31, 32, 33, 64, 100):
        kept = torch.rand(5, vocabulary) < 0.5
        words = pack(kept)
        assert words.dtype == torch.int32 and unpack(words, vocabulary).equal(kept)
        ids = torch.randint(vocabulary, (5,))
        assert holds(words, ids).equal(kept.gather(1, ids[:, None])[:, 0])
