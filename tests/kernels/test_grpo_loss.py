"""grpo_loss and linear_grpo_loss against a hand-computed example, a loop over sequences and gradcheck.

What may not change a result is in test_kernel_invariances.py, extreme inputs in test_kernel_faults.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from syncr1.kernels.api import TokenStream, grpo_loss, linear_grpo_loss
from syncr1.kernels.options import LOSS_TYPES, RATIOS

pytestmark = pytest.mark.usefixtures("poisoned_memory")
LENGTHS = [3, 5, 0, 4, 1, 6]
GROUPS = torch.tensor([0, 4, 6])
REWARDS = torch.tensor([1.0, 0.0, 0.3, 2.0, 0.0, 1.0], dtype=torch.float64)


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def batch(seed: int = 0) -> dict[str, Any]:
    """Ratios on both sides of every clip bound, both modalities, a masked token, an empty sequence."""
    random = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)
    logp = -3 * torch.rand(total, generator=random, dtype=torch.float64)
    mask = torch.rand(total, generator=random) > 0.2
    return {
        "logp": logp.requires_grad_(),
        "old_logp": logp.detach() + 0.4 * torch.randn(total, generator=random, dtype=torch.float64),
        "rewards": REWARDS,
        "cu_seqlens": offsets_of(LENGTHS),
        "group_offsets": GROUPS,
        "loss_mask": mask,
        "modality": (torch.rand(total, generator=random) > 0.5).to(torch.uint8),
        "ref_logp": logp.detach() + 0.3 * torch.randn(total, generator=random, dtype=torch.float64),
    }


def advantage_loop(rewards: list[float]) -> list[float]:
    out: list[float] = []
    for start, end in ((0, 4), (4, 6)):
        group = torch.tensor(rewards[start:end], dtype=torch.float64)
        out += ((group - group.mean()) / (group.std() + 1e-4)).tolist()
    return out


def pick(value: Any, image: bool) -> Any:
    return value["image" if image else "text"] if isinstance(value, dict) else value


def token_loop(b: dict[str, Any], advantage: Any, o: dict[str, Any]) -> list[list[tuple[Tensor, bool]]]:
    """(loss, is image) of every unmasked token, sequence by sequence, one scalar at a time."""
    sequences: list[list[tuple[Tensor, bool]]] = []
    bounds = b["cu_seqlens"].tolist()
    for s in range(len(bounds) - 1):
        used = [t for t in range(bounds[s], bounds[s + 1]) if b["loss_mask"][t]]
        gaps = [b["logp"][t] - b["old_logp"][t] for t in used]
        rows: list[tuple[Tensor, bool]] = []
        for t, gap in zip(used, gaps, strict=True):
            image = bool(b["modality"][t])
            a = pick(advantage, image)[s]
            ratio = {"token": gap, "sequence": sum(gaps) / len(gaps), "product": sum(gaps)}[o["ratio"]].exp()
            low, high = 1 - pick(o["clip_low"], image), 1 + pick(o["clip_high"], image)
            if o["loss_type"] == "cispo":
                loss = -min(ratio.item(), high - 1) * a * b["logp"][t]
            elif o["loss_type"] == "sapo":
                tau = 1.0 if a > 0 else 1.05
                loss = -(4 / tau) / (1 + torch.exp(-tau * (ratio - 1))) * a
            elif o["loss_type"] == "vespo":
                k, lam = (2.0, 3.0) if a >= 0 else (3.0, 2.0)
                w = math.exp(sum(g.item() for g in gaps))
                loss = -math.exp(lam) * w**k * math.exp(-lam * w) * a * b["logp"][t]
            else:
                bounded = ratio if o["delta"] is None else torch.clamp(ratio, max=pick(o["delta"], image))
                inside = ratio if low <= ratio <= high else torch.tensor(min(max(ratio.item(), low), high))
                loss = -min(bounded * a, inside * a)
            d = b["ref_logp"][t] - b["logp"][t]
            kl = (torch.exp(d) - d - 1) * (ratio if o["bias_corrected_kl"] else 1)
            rows.append((pick(o["weight"], image) * (loss + pick(o["beta"], image) * kl), image))
        sequences.append(rows)
    return sequences


def reduce_loop(sequences: list[list[tuple[Tensor, bool]]], o: dict[str, Any]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    separate = isinstance(o["num_items"], dict)
    for name in ("text", "image") if separate else (None,):
        chosen = [[x for x, image in rows if name is None or image == (name == "image")] for rows in sequences]
        number = sum(len(rows) for rows in chosen)
        divisor = o["num_items"][name] if separate else o["num_items"]
        for rows in chosen:
            for x in rows:
                if o["loss_type"] in ("grpo", "sapo"):
                    total = total + x / len(rows) / len(sequences)
                elif o["loss_type"] == "luspo":
                    total = total + x / len(sequences)
                elif o["loss_type"] == "dr_grpo":
                    total = total + x / (len(sequences) * 9)
                elif o["loss_type"] == "bnpo" or divisor is None:
                    total = total + x / number
                else:
                    total = total + x / divisor
    return total


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kl": {"beta": 0.3, "delta": 1.3, "num_items": 11.0},
    "per modality": {
        "clip_low": {"text": 0.1, "image": 0.3},
        "clip_high": {"text": 0.15, "image": 0.4},
        "delta": {"text": 1.2, "image": 1.6},
        "beta": {"text": 0.2, "image": 0.7},
        "weight": {"text": 0.5, "image": 2.0},
        "num_items": {"text": 5.0, "image": 8.0},
        "bias_corrected_kl": True,
    },
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_matches_a_loop_over_tokens(loss_type: str, ratio: str, setting: str) -> None:
    b, given_options = batch(), {"loss_type": loss_type, "ratio": ratio, "max_length": 9, **SETTINGS[setting]}
    defaults = {"clip_low": 0.2, "clip_high": 0.2, "delta": None, "beta": 0.0, "weight": 1.0, "num_items": None}
    options = {**defaults, "bias_corrected_kl": False, **given_options}
    expected = reduce_loop(token_loop(b, advantage_loop(REWARDS.tolist()), options), options)
    (expected_grad,) = torch.autograd.grad(expected, b["logp"])
    out = grpo_loss(**b, **given_options)
    (grad,) = torch.autograd.grad(out.loss, b["logp"])
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_hand_computed_example() -> None:
    """Two answers of 2 and 1 tokens with rewards 1 and 0: A = ±1/√2; ratios 1.5 (clipped to 1.2), 1 and 0.5."""
    logp = torch.tensor([math.log(1.5), 0.0, math.log(0.5)], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, 0.0], dtype=torch.float64)
    out = grpo_loss(
        logp, torch.zeros(3, dtype=torch.float64), rewards, offsets_of([2, 1]), torch.tensor([0, 2]), eps=0.0
    )
    a = 0.5**0.5
    # −(1.2 a + 1.0 a + max-side: min(0.5·(−a), 0.8·(−a)) = −0.8 a) / 3
    torch.testing.assert_close(out.loss.detach(), torch.tensor(-(1.2 * a + 1.0 * a - 0.8 * a) / 3, dtype=torch.float64))
    (grad,) = torch.autograd.grad(out.loss, logp)
    torch.testing.assert_close(grad, torch.tensor([0.0, -a / 3, 0.0], dtype=torch.float64))
    assert out.metrics["clip_high/text"] == pytest.approx(1 / 3)
    assert out.metrics["clip_low/text"] == pytest.approx(1 / 3)
    assert out.metrics["ratio_max/text"] == pytest.approx(1.5)
    assert "clip_low/image" not in out.metrics


def test_hand_computed_products() -> None:
    """Answers of 2, 1 and 2 tokens, A = 1, 1 and −1, clip [.9, 1.2]: products 1.5 · .7, .8 and 2 · 2 of token ratios.

    A mean would clip the last at 2, token ratios all but one; the first stays, and each of its tokens moves it whole.
    """
    logp = torch.tensor([1.5, 0.7, 0.8, 2.0, 2.0], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    out = grpo_loss(
        logp, torch.zeros(5, dtype=torch.float64), None, offsets_of([2, 1, 2]), torch.tensor([0, 3]),
        advantages=advantages, ratio="product", loss_type="luspo", clip_low=0.1, clip_high=0.2,
    )  # fmt: skip
    torch.testing.assert_close(out.loss.item(), (-2 * 1.05 - 0.8 + 2 * 4.0) / 3)
    (grad,) = torch.autograd.grad(out.loss, logp)
    expected = torch.tensor([-2 * 1.05, -2 * 1.05, -0.8, 8.0, 8.0], dtype=torch.float64) / 3
    torch.testing.assert_close(grad, expected)
    assert out.metrics["ratio_max/text"] == pytest.approx(4.0) and out.metrics["ratio_min/text"] == pytest.approx(0.8)
    assert out.metrics["ratio_mean/text"] == pytest.approx((2 * 1.05 + 0.8 + 2 * 4.0) / 5)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("loss_type", [t for t in LOSS_TYPES if t not in ("cispo", "vespo")])
def test_gradcheck(loss_type: str, ratio: str) -> None:
    """cispo and vespo detach their ratio, so their gradient is not that of their value: the loop above covers them."""
    b = batch(1)
    logp = b.pop("logp")
    settings = {"loss_type": loss_type, "ratio": ratio, "max_length": 9, "beta": 0.2, "bias_corrected_kl": True}
    assert torch.autograd.gradcheck(lambda x: grpo_loss(logp=x, **b, **settings).loss, (logp,))


def streams_of(
    hidden: Tensor, heads: list[Tensor], bias: Tensor, modality: Tensor, targets: Tensor
) -> list[TokenStream]:
    rows = [(modality == code).nonzero()[:, 0] for code in (0, 1)]
    return [
        TokenStream(hidden[rows[0]], heads[0], targets[rows[0]], rows[0], forbidden=torch.tensor([6])),
        TokenStream(hidden[rows[1]], heads[1], targets[rows[1]], rows[1], bias, temperature=1.5, modality="image"),
    ]


@pytest.mark.parametrize("ratio", RATIOS)
def test_linear_gradcheck_of_every_input(ratio: str) -> None:
    b = batch(2)
    total, modality = sum(LENGTHS), b.pop("modality")
    b.pop("logp")
    targets = torch.randint(0, 5, (total,))
    tensors = [torch.randn(*shape, dtype=torch.float64) for shape in ((total, 3), (7, 3), (5, 3), (5,))]
    inputs = tuple(t.requires_grad_() for t in tensors)
    b["old_logp"] = b["old_logp"] - 1

    def loss(hidden: Tensor, text: Tensor, image: Tensor, bias: Tensor) -> Tensor:
        streams = streams_of(hidden, [text, image], bias, modality, targets)
        options = {"beta": 0.1, "loss_type": "sapo", "num_items": {"text": 4, "image": 6}, "ratio": ratio}
        return linear_grpo_loss(streams, **b, **options).loss

    assert torch.autograd.gradcheck(loss, inputs)


def test_linear_is_grpo_loss_of_its_logp() -> None:
    b = batch(3)
    total, modality = sum(LENGTHS), b["modality"]
    hidden = torch.randn(total, 4, dtype=torch.float64)
    heads, bias = [torch.randn(v, 4, dtype=torch.float64) for v in (7, 5)], torch.randn(5, dtype=torch.float64)
    streams = streams_of(hidden, heads, bias, modality, torch.randint(0, 5, (total,)))
    b["loss_mask"][streams[0].rows[0]] = False
    logp = torch.full((total,), torch.nan, dtype=torch.float64)
    for s in streams:
        logits = torch.nn.functional.linear(s.hidden, s.weight, s.bias) / s.temperature
        if s.forbidden is not None:
            logits[:, s.forbidden] = -torch.inf
        logp[s.rows] = logits.log_softmax(-1).gather(1, s.targets[:, None])[:, 0]
    b["logp"] = logp
    settings = {"dgs": "variance_mass", "dgs_mass": 0.6, "beta": 0.1}
    expected = grpo_loss(**b, **settings)
    b.pop("logp")
    out = linear_grpo_loss(streams, **b, **settings)
    torch.testing.assert_close(out.loss, expected.loss)
    assert out.keep.equal(expected.keep) and not out.keep.all()
    for key, value in expected.metrics.items():
        torch.testing.assert_close(out.metrics[key], value)
    assert out.entropy is not None and out.metrics["entropy/image"] > 0


def nothing_cases() -> dict[str, dict[str, Any]]:
    masked = batch(6) | {"loss_mask": torch.zeros(sum(LENGTHS), dtype=torch.bool)}
    flat = batch(6) | {"rewards": torch.ones(6), "dgs": "variance_mass"}
    unrewarded = batch(6) | {"rewards": torch.full((6,), torch.nan)}
    empty: dict[str, Any] = {
        "logp": torch.zeros(0, requires_grad=True),
        "old_logp": None,
        "rewards": REWARDS,
        "cu_seqlens": offsets_of([0] * 6),
        "group_offsets": GROUPS,
    }
    nobody = empty | {"rewards": torch.zeros(0), "cu_seqlens": offsets_of([]), "group_offsets": torch.tensor([0])}
    return {"masked": masked, "flat": flat, "unrewarded": unrewarded, "no tokens": empty, "no sequences": nobody}


@pytest.mark.parametrize("case", nothing_cases())
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nothing_to_learn_gives_zero_and_zero_gradients(loss_type: str, case: str) -> None:
    b = nothing_cases()[case]
    out = grpo_loss(**b, loss_type=loss_type, max_length=9, num_items={"text": 0, "image": 0})
    assert out.loss == 0
    (grad,) = torch.autograd.grad(out.loss, b["logp"])
    assert (grad == 0).all() and all(torch.isfinite(v) for v in out.metrics.values())


@pytest.mark.parametrize("rows", [0, 4])
def test_linear_without_loss_tokens_keeps_the_heads_in_the_graph(rows: int) -> None:
    hidden, weight = torch.randn(rows, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    stream = TokenStream(hidden, weight, torch.zeros(rows, dtype=torch.int64), torch.arange(rows))
    out = linear_grpo_loss([stream], torch.ones(2), offsets_of([rows, 0]), torch.tensor([0, 2]), dgs="variance_mass")
    out.loss.backward()
    assert out.loss == 0
    assert weight.grad is not None and (weight.grad == 0).all() and hidden.grad is not None


def test_on_policy_gradient_flows_at_ratio_one_and_upstream_gradient_is_honoured() -> None:
    b = batch(7) | {"old_logp": None}
    out = grpo_loss(**b, clip_low=0.0, clip_high=0.0)
    (grad,) = torch.autograd.grad(out.loss, b["logp"], torch.tensor(3.0, dtype=torch.float64))
    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    assert isinstance(out.advantages, Tensor)
    expected = -3 * out.advantages[sequence] * b["loss_mask"] / b["loss_mask"].sum()
    torch.testing.assert_close(grad, expected.to(grad.dtype))


def test_rewards_per_modality_give_each_token_its_own_credit() -> None:
    b = batch(9)
    image_rewards = REWARDS.flip(0)
    b["rewards"] = {"text": REWARDS, "image": image_rewards}
    advantage = {"text": advantage_loop(REWARDS.tolist()), "image": advantage_loop(image_rewards.tolist())}
    options = {"loss_type": "dapo", "ratio": "token", "clip_low": 0.2, "clip_high": 0.2, "delta": None, "beta": 0.0}
    options |= {"weight": 1.0, "num_items": None, "bias_corrected_kl": False}
    out = grpo_loss(**b)
    torch.testing.assert_close(out.loss, reduce_loop(token_loop(b, advantage, options), options))
    assert isinstance(out.advantages, dict) and set(out.advantages) == {"text", "image"}


def test_sampler_ratio_per_token_per_sequence_and_vespo() -> None:
    b = batch(10)
    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    per_sequence = torch.rand(len(LENGTHS), dtype=torch.float64) + 0.5
    for loss_type in ("dapo", "cispo"):
        results = [
            grpo_loss(**b, loss_type=loss_type, is_ratio=r).loss
            for r in (per_sequence, per_sequence[:, None], per_sequence[sequence])
        ]
        torch.testing.assert_close(results[0], results[1])
        torch.testing.assert_close(results[0], results[2])
    doubled = grpo_loss(**b, is_ratio=torch.full((len(LENGTHS), 1), 2.0)).loss
    torch.testing.assert_close(doubled, 2 * grpo_loss(**b).loss)
    shifted = dict(b)
    count = torch.bincount(sequence[b["loss_mask"]], minlength=len(LENGTHS)).clamp_min(1)
    shifted["old_logp"] = b["old_logp"] - (per_sequence.log() / count)[sequence]
    expected = grpo_loss(**shifted, loss_type="vespo").loss
    torch.testing.assert_close(grpo_loss(**b, loss_type="vespo", is_ratio=per_sequence).loss, expected)


def test_top_entropy_tokens_alone_carry_the_policy_term() -> None:
    b = batch(11)
    entropy = torch.rand(sum(LENGTHS), dtype=torch.float64)
    out = grpo_loss(**b, entropy=entropy, top_entropy_quantile=0.5)
    (grad,) = torch.autograd.grad(out.loss, b["logp"])
    for code in (0, 1):
        chosen = b["loss_mask"] & (b["modality"] == code)
        silent = chosen & (entropy < entropy[chosen].quantile(0.5, interpolation="higher"))
        assert grad[silent].abs().sum() == 0


def test_frac_reward_zero_std() -> None:
    b = batch(14) | {"rewards": torch.tensor([1.0, 1.0, torch.nan, 1.0, 0.0, 1.0])}
    assert grpo_loss(**b).metrics["frac_reward_zero_std"] == 0.5
