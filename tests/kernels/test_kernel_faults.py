"""Extreme and broken inputs through the public ops, one test per row of the fault table, on every CPU backend.

Rows 1 to 9; those about groups and steps are in `test_kernel_group_faults.py`.

Dims: `T` packed tokens, `S` sequences, `N` rows, `V` vocabulary, `D` hidden, `B` decode rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import BACKENDS
from kernel_cases import offsets_of, outcome, sequence_of_token
from torch import Tensor

from syncr1.kernels.api import (
    BackendError,
    NonFiniteError,
    TokenStream,
    cfg_sample,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logp,
    selective_logp,
)
from syncr1.kernels.options import LOSS_TYPES, RATIOS

BACKEND = pytest.mark.parametrize("backend", BACKENDS)
LOSS_TYPE = pytest.mark.parametrize("loss_type", LOSS_TYPES)
LENGTHS = [3, 5, 0, 4, 1, 6]
T = sum(LENGTHS)
LAYOUT: dict[str, Any] = {"cu_seqlens": offsets_of(LENGTHS), "group_offsets": offsets_of([4, 2])}
REWARDS = torch.tensor([1.0, 0.0, 0.25, 2.0, 0.0, 1.0])


def unit_stream(width: int = 5, size: int = 7) -> dict[str, Any]:
    """One text head over all tokens."""
    return {
        "hidden": torch.randn(T, width).requires_grad_(),
        "weight": torch.randn(size, width).requires_grad_(),
        "targets": torch.randint(size, (T,)),
        "rows": torch.arange(T),
    }


@BACKEND
@LOSS_TYPE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_1_log_ratio_of_a_hundred_on_one_token(loss_type: str, backend: str, dtype: torch.dtype) -> None:
    logp = (-3 * torch.rand(T)).to(dtype)
    served = backend == "reference" or dtype != torch.float16
    for name in ("old_logp", "ref_logp"):
        for gap in (100.0, -100.0):
            for ratio in RATIOS:
                given = {"old_logp": (logp + 0.1).to(dtype), "ref_logp": (logp - 0.2).to(dtype)}
                given[name] = given[name].clone()
                given[name][4] = logp[4] + gap
                options = {"loss_type": loss_type, "ratio": ratio, "beta": 0.1, "max_length": 9}

                def run(backend: str | None, dtype: torch.dtype, given: Any = given, options: Any = options) -> Any:
                    leaf = logp.to(dtype).requires_grad_()
                    cast = {key: value.to(dtype) for key, value in given.items()}
                    out = grpo_loss(leaf, rewards=REWARDS, **LAYOUT, **cast, **options, backend=backend)
                    return out.loss.detach(), torch.autograd.grad(out.loss, leaf)[0]

                if not served:
                    with pytest.raises(BackendError, match="grpo_loss: backend='native' cannot serve"):
                        run(backend, dtype)
                loss, grad = run(backend if served else None, dtype)
                exact, exact_grad = run("reference", torch.float64)
                assert grad.dtype == dtype
                # float16 ends at 65504: what float64 says beyond that is its infinity
                representable = exact_grad.abs() < torch.finfo(dtype).max
                assert bool(loss.isfinite()) and bool(grad[representable].isfinite().all())
                assert bool(representable.all()) or dtype == torch.float16
                close: dict[str, Any] = {"rtol": 1e-5 if dtype == torch.float32 else 1e-2, "check_dtype": False}
                torch.testing.assert_close(loss, exact, atol=1e-5, rtol=1e-5, check_dtype=False)
                size = float(exact_grad[representable].abs().max())
                torch.testing.assert_close(grad[representable], exact_grad[representable], atol=1e-5 * size, **close)


@BACKEND
@LOSS_TYPE
@pytest.mark.parametrize("kept", ["all but one row", "none"])
def test_2_all_tokens_masked(kept: str, loss_type: str, backend: str) -> None:
    """A sequence without loss tokens changes nothing; a micro-batch without any has loss 0 and gradient 0."""
    sequence_T = sequence_of_token(LENGTHS)
    mask = sequence_T != 1 if kept == "all but one row" else torch.zeros(T, dtype=torch.bool)
    modality = (torch.arange(T) % 2).to(torch.uint8)
    options: dict[str, Any] = {
        "loss_type": loss_type,
        "max_length": 9,
        "beta": 0.1,
        "num_items": {"text": 0, "image": 0},
    }
    given = {"old_logp": -torch.rand(T), "ref_logp": -torch.rand(T), "loss_mask": mask, **LAYOUT, **options}
    logp, heads = (-torch.rand(T)).requires_grad_(), unit_stream()
    streams = [TokenStream(**heads)]
    results = [
        (grpo_loss(logp, rewards=REWARDS, modality=modality, entropy=torch.rand(T), backend=backend, **given), [logp]),
        (linear_grpo_loss(streams, REWARDS, backend=backend, **given), [heads["hidden"], heads["weight"]]),
    ]
    for out, leaves in results:
        assert bool(out.loss.isfinite()) and all(bool(v.isfinite()) for v in out.metrics.values())
        grads = torch.autograd.grad(out.loss, leaves)
        assert not bool(grads[0][~mask].any())
        if kept == "none":
            assert out.loss == 0 and not any(bool(grad.any()) for grad in grads)
            assert out.metrics["tokens/text"] == 0 and out.metrics["ratio_max/text"] == 1
        else:
            assert out.loss != 0 and bool(grads[0].any())


@BACKEND
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_3_non_finite_at_masked_and_at_loss_tokens(value: float, backend: str) -> None:
    """Masked: as if it were not there. Unmasked: an error with the op's name and the token's."""
    mask = torch.ones(T, dtype=torch.bool)
    mask[[2, 9]] = False
    heads = unit_stream()
    given: dict[str, Any] = {"rewards": REWARDS, "loss_mask": mask, "old_logp": -torch.rand(T), **LAYOUT}

    def from_logits(logits: Tensor) -> Any:
        logits = logits.clone().requires_grad_()
        logp, _ = selective_logp(logits, heads["targets"], backend=backend)
        out = grpo_loss(logp, backend=backend, **given)
        (grad,) = torch.autograd.grad(out.loss, logits)
        # plain PyTorch hands a NaN row a NaN gradient, of that row alone; the kernels hand it 0
        assert backend == "reference" or not bool(grad[~mask].any())
        return {**outcome(out, {}), "grad": grad[mask]}

    def from_hidden(hidden: Tensor) -> Any:
        leaves = {"hidden": hidden.detach().clone().requires_grad_(), "weight": heads["weight"]}
        stream = TokenStream(**{**heads, **leaves})
        return outcome(linear_grpo_loss([stream], backend=backend, **given), leaves)

    for run, clean in ((from_logits, torch.randn(T, 7)), (from_hidden, heads["hidden"])):
        dirty = clean.detach().clone()
        dirty[2], dirty[9, 0] = value, value
        expected, found = run(clean), run(dirty)
        assert all(found[name].equal(values) for name, values in expected.items())
        dirty[11] = value
        op = "linear_grpo_loss" if run is from_hidden else "grpo_loss"
        with pytest.raises(NonFiniteError, match=rf"^{op}: logp must be finite at every loss token, .* at token 11"):
            run(dirty)


@BACKEND
def test_3_non_finite_old_and_reference_log_probabilities(backend: str) -> None:
    for name in ("old_logp", "ref_logp", "entropy"):
        given = {"old_logp": -torch.rand(T), name: -torch.rand(T)}
        given[name][7] = torch.nan
        with pytest.raises(NonFiniteError, match=rf"^grpo_loss: {name} .* got nan at token 7;"):
            grpo_loss(-torch.rand(T), rewards=REWARDS, backend=backend, **given, **LAYOUT)


@BACKEND
def test_4_a_row_beyond_two_to_the_31_elements(backend: str) -> None:
    """Two rows 2³¹ + 64 elements apart; the pages between them are never touched."""
    size, gap = 129, (1 << 31) + 64
    try:
        buffer = torch.empty(gap + size, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("4 GiB of address space are not to be had")
    logits = buffer.as_strided((2, size), (gap, 1))
    logits[0], logits[1] = torch.randn(size), torch.randn(size)
    targets = torch.tensor([3, 128])
    grads = []
    for operand in (logits, logits.clone()):
        leaf = operand.detach().requires_grad_()
        logp, entropy = selective_logp(leaf, targets, backend=backend)
        grads.append((logp, entropy, *torch.autograd.grad((logp - entropy).sum(), leaf)))
        drawn = cfg_sample(operand, operand.flip(0), cfg_weight=2.0, seed=1, offset=torch.arange(2), backend=backend)
        grads[-1] += (drawn.token, drawn.logp, drawn.logp_mixed)
    assert all(far.equal(near) for far, near in zip(*grads, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_4_more_than_two_to_the_31_logits(backend: str) -> None:
    """36,000 × 60,000 without the memory: all rows lie in the same place. The reference would need a float32 copy."""
    num_rows, size = 36_000, 60_000
    row = torch.randn(size)
    targets = torch.arange(num_rows) % size
    logp, entropy = selective_logp(row.expand(num_rows, -1), targets, backend=backend)
    exact = row.double().log_softmax(0)
    torch.testing.assert_close(logp.double(), exact[targets], rtol=1e-6, atol=1e-5)
    assert bool((entropy == entropy[0]).all())
    torch.testing.assert_close(entropy[0].double(), -(exact.exp() * exact).sum(), rtol=1e-6, atol=1e-5)


@BACKEND
@pytest.mark.parametrize("total", [65_535, 65_536, 65_537])
@pytest.mark.parametrize("split", ["tokens", "sequences"])
def test_5_two_to_the_16_tokens_sequences_and_rows(split: str, total: int, backend: str) -> None:
    lengths = [1, total - 1] if split == "tokens" else [1] * total
    groups = [2] if split == "tokens" else [1, 3, *[4] * (total // 4 - 1), total % 4]
    layout = {"cu_seqlens": offsets_of(lengths), "group_offsets": offsets_of(groups)}
    rewards = torch.randint(0, 9, (len(lengths),)) / 8
    hidden, weight = torch.randn(total, 2).double(), torch.randn(3, 2).double()
    targets, rows, old = torch.randint(3, (total,)), torch.arange(total), -2 * torch.rand(total)

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).clone().requires_grad_() for t in (hidden, weight)]
        logp, entropy = linear_logp(leaves[0], leaves[1], targets, backend=backend)
        out = grpo_loss(logp, old.to(dtype), rewards, entropy=entropy.detach(), backend=backend, **layout)
        stream = TokenStream(leaves[0], leaves[1], targets, rows)
        linear = linear_grpo_loss([stream], rewards, old_logp=old.to(dtype), backend=backend, **layout)
        grads = [torch.autograd.grad(loss, leaves) for loss in (out.loss, linear.loss)]
        draw = cfg_sample(leaves[0].detach(), seed=3, offset=rows, backend=backend)
        advantages = group_advantages(rewards.to(dtype), layout["group_offsets"], backend=backend)
        return [out.loss, linear.loss, advantages, draw.logp.exp().mean(), *grads[0], *grads[1]]

    for found, exact in zip(run(backend, torch.float32), run("reference", torch.float64), strict=True):
        size = float(exact.detach().abs().max())
        torch.testing.assert_close(found.double(), exact.double(), rtol=1e-4, atol=1e-5 * size)


@BACKEND
@pytest.mark.parametrize("size", [16_384, 102_400, 102_401, 4_097, 1])
def test_6_strided_and_expanded_logits(size: int, backend: str) -> None:
    """Views give what copies give, bit for bit."""
    values, targets = torch.randn(3, size), torch.randint(size, (3,))
    columns, padded = torch.full((3, 2 * size), torch.nan), torch.full((3, size + 5), torch.nan)
    views = {
        "every other column": columns[:, 1::2],
        "rows apart": padded[:, 2 : size + 2],
        "transposed": torch.full((size, 3), torch.nan).t(),
    }
    for view in views.values():
        view.copy_(values)
    views["one row for all"] = values[1].expand(3, -1)
    for name, view in views.items():
        results = []
        for operand in (view, view.contiguous()):
            leaf = operand.detach().requires_grad_()
            logp, entropy = selective_logp(leaf, targets, temperature=0.7, backend=backend)
            (grad,) = torch.autograd.grad((2 * logp - entropy).sum(), leaf)
            drawn = cfg_sample(leaf, operand, cfg_weight=3.0, top_k=9, seed=5, offset=torch.arange(3), backend=backend)
            results.append([logp, entropy, grad, drawn.token, drawn.logp, drawn.logp_mixed, drawn.entropy])
        assert all(found.equal(expected) for found, expected in zip(*results, strict=True)), name
    logp = selective_logp(values, targets, temperature=0.7, backend=backend)[0]
    exact = (values.double() / 0.7).log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logp.double(), exact, rtol=1e-6, atol=1e-5)


@BACKEND
def test_7_upstream_gradients_and_token_weights(backend: str) -> None:
    """Per-token weights in front of logp and entropy, a factor on the loss: the gradients are autograd's."""
    hidden, weight, bias = torch.randn(T, 4).double(), torch.randn(9, 4).double(), torch.randn(9).double()
    targets, by_logp, by_entropy = torch.randint(9, (T,)), torch.randn(T).double(), torch.randn(T).double()
    exact = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    logp_all = (F.linear(*exact) / 0.8).log_softmax(1)
    logp, entropy = logp_all.gather(1, targets[:, None])[:, 0], -(logp_all.exp() * logp_all).sum(1)
    expected = torch.autograd.grad((by_logp * logp + by_entropy * entropy).sum(), exact)

    leaves = [t.float().requires_grad_() for t in (hidden, weight, bias)]
    fused = linear_logp(leaves[0], leaves[1], targets, bias=leaves[2], temperature=0.8, backend=backend)
    logits = F.linear(*leaves)
    for pair in (fused, selective_logp(logits, targets, temperature=0.8, backend=backend)):
        grads = torch.autograd.grad(pair, leaves, (by_logp.float(), by_entropy.float()))
        for grad, truth in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad.double(), truth, rtol=1e-5, atol=1e-5)
    values = (-torch.rand(T)).requires_grad_()
    loss = grpo_loss(values, None, REWARDS, **LAYOUT, backend=backend).loss
    (once,) = torch.autograd.grad(loss, values, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss, values, torch.tensor(-2.5))
    torch.testing.assert_close(scaled, -2.5 * once)


@BACKEND
def test_7_inputs_without_gradient(backend: str) -> None:
    """The values stay what they are, and no graph is built; a frozen head leaves the rest alone."""
    heads = unit_stream()
    given: dict[str, Any] = {"old_logp": -torch.rand(T), "backend": backend, **LAYOUT}
    trained = linear_grpo_loss([TokenStream(**heads)], REWARDS, **given)
    (expected,) = torch.autograd.grad(trained.loss, heads["hidden"])
    heads["weight"].requires_grad_(False)
    frozen = linear_grpo_loss([TokenStream(**heads)], REWARDS, **given)
    assert torch.autograd.grad(frozen.loss, heads["hidden"])[0].equal(expected)
    heads["hidden"] = heads["hidden"].detach()
    silent = linear_grpo_loss([TokenStream(**heads)], REWARDS, **given)
    plain = grpo_loss(trained.logp, rewards=REWARDS, **given)
    assert silent.loss.equal(trained.loss.detach()) and not silent.loss.requires_grad and trained.loss != 0
    torch.testing.assert_close(plain.loss, silent.loss)
    assert not plain.loss.requires_grad


@BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_scored_one_by_one_and_by_eights(
    dtype: torch.dtype, backend: str, record_property: Callable[[str, object], None]
) -> None:
    hidden, weight = torch.randn(64, 256).to(dtype), (torch.randn(4096, 256) * 0.2).to(dtype)
    targets = torch.randint(4096, (64,))

    def scored(size: int) -> Tensor:
        parts = zip(hidden.split(size), targets.split(size), strict=True)
        return torch.cat([linear_logp(h, weight, y, backend=backend)[0] for h, y in parts])

    log_ratio = scored(1) - scored(8)
    ratio = log_ratio.exp()
    record_property(f"ratio {backend} {dtype}", (float(ratio.min()), float(ratio.max())))
    record_property(f"outside [0.9, 1.1] {backend} {dtype}", float(((ratio - 1).abs() > 0.1).float().mean()))
    logits = hidden @ weight.t()
    if dtype == torch.float32:
        assert float((ratio - 1).abs().max()) <= 1e-5
    else:  # a product may round to the next bfloat16, and so may those that the sum is made of
        assert float(log_ratio.abs().max()) <= 2 * 2**-8 * float(logits.abs().max())
    whole = selective_logp(logits, targets, backend=backend)[0]
    single = [selective_logp(z, y, backend=backend)[0] for z, y in zip(logits.split(1), targets.split(1), strict=True)]
    assert torch.cat(single).equal(whole)


@BACKEND
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.6}])
def test_9_log_probabilities_of_a_guided_draw(truncation: dict[str, Any], temperature: float, backend: str) -> None:
    """`logp` is the conditional's and `logp_mixed` that of the mix, at this temperature and before truncation."""
    cond, uncond = torch.randn(2, 40, 33).unbind(0)
    tau = temperature or 1.0
    drawn = cfg_sample(
        cond,
        uncond,
        cfg_weight=5.0,
        temperature=temperature,
        seed=1,
        offset=torch.arange(40),
        backend=backend,
        **truncation,
    )
    logp, entropy = selective_logp(cond, drawn.token, temperature=tau, backend=backend)
    torch.testing.assert_close((drawn.logp, drawn.entropy), (logp, entropy), rtol=1e-5, atol=2e-5)
    fused, _ = linear_logp(cond, torch.eye(33), drawn.token, temperature=tau, backend=backend)
    torch.testing.assert_close(drawn.logp, fused, rtol=1e-5, atol=2e-5)
    mixed = uncond + 5.0 * (cond - uncond)
    torch.testing.assert_close(
        drawn.logp_mixed, selective_logp(mixed, drawn.token, temperature=tau, backend=backend)[0], rtol=1e-5, atol=1e-4
    )
    rank = (mixed > mixed.gather(1, drawn.token[:, None])).sum(1)
    assert bool((rank < (1 if temperature == 0 else truncation.get("top_k", 33))).all())
    with pytest.raises(ValueError, match="cfg_sample: cfg_weight must be 1 without uncond"):
        cfg_sample(cond, cfg_weight=5.0, seed=1, offset=0, backend=backend)
