"""The C++ loss and group statistics against the reference in float64. Skipped where the library was not built."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from syncr1.kernels import native
from syncr1.kernels.native.groups import dgs_select, group_advantages
from syncr1.kernels.native.loss import token_loss
from syncr1.kernels.options import LOSS_TYPES, RULES, SCALES, LossOptions, encode
from syncr1.kernels.plan import entropy_thresholds
from syncr1.kernels.reference.advantage import standardize
from syncr1.kernels.reference.loss import grpo_loss
from syncr1.kernels.reference.select import dgs_select as reference_select
from syncr1.kernels.streams import MODALITIES
from syncr1.kernels.terms import METRICS, LossInputs, LossTerms, TokenLoss

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason())),
]
REWARD = st.sampled_from([0.0, 0.1, 0.2, 0.3, 1.0, -4.5, math.nan]) | st.floats(-9, 9, width=32)
GROUPS = st.lists(st.lists(REWARD, max_size=9), max_size=5)
LENGTHS = [3, 200, 0, 170, 1, 600, 300, 5, 330]
TENSORS = [field.name for field in fields(TokenLoss) if field.name != "finite"]
TOLERANCE = 2.0
"""Allowed error in units of the float32 reference's own."""
FLOOR = 3e-7
"""And added to it, relative to the largest value: about 5 units in the last place."""


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])


def banded(values: Tensor) -> Tensor:
    """The same values between bands of NaN (or ones): reading past an end shows."""
    filler = torch.nan if values.is_floating_point() else 1
    buffer = torch.full((values.numel() + 64,), filler, dtype=values.dtype)
    buffer[32 : 32 + values.numel()] = values.reshape(-1)
    return buffer[32 : 32 + values.numel()].view(values.shape)


def make_terms(
    lengths: list[int] = LENGTHS,
    groups: list[int] | None = None,
    *,
    seed: int = 0,
    sampler: str | None = None,
    two_rewards: bool = False,
    mixed: bool = True,
    density: float = 0.8,
    leave_out: tuple[str, ...] = (),
    **options: Any,
) -> LossTerms:
    """Ratios on both sides of every bound, both modalities; NaN and infinity at every masked token."""
    random = torch.Generator().manual_seed(seed)
    total, num_sequences = sum(lengths), len(lengths)
    mask_T = torch.rand(total, generator=random) < density
    logp_T = -3 * torch.rand(total, generator=random)
    noise = [torch.randn(total, generator=random) for _ in range(3)]
    tokens = {"logp": logp_T, "old_logp": logp_T + 0.3 * noise[0], "ref_logp": logp_T + 0.3 * noise[1],
              "entropy": 3 * torch.rand(total, generator=random)}  # fmt: skip
    is_ratio = {
        None: None, "token": (0.3 * noise[2]).exp(), "sequence": (torch.randn(num_sequences, generator=random)).exp()
    }[sampler]  # fmt: skip
    if sampler == "token":
        tokens["is_ratio"] = is_ratio  # type: ignore[assignment]
    for index, values_T in enumerate(tokens.values()):
        values_T[~mask_T] = (math.nan, math.inf, -math.inf)[index % 3]
    settings = LossOptions(**{"max_length": 9, **options})
    modality_T = (torch.rand(total, generator=random) > 0.4).to(torch.uint8)
    given = {
        "settings": settings,
        "cu_seqlens": offsets_of(lengths),
        "group_offsets": offsets_of(groups or [num_sequences // 2, 0, num_sequences - num_sequences // 2]),
        "loss_mask": mask_T,
        "modality": modality_T if mixed else None,
        "is_ratio": is_ratio,
        "rewards": torch.randn(2 if two_rewards else 1, num_sequences, generator=random, dtype=torch.float64),
        **tokens,
    }
    values = {name: banded(v) if isinstance(v, Tensor) else v for name, v in given.items() if name not in leave_out}
    return LossTerms(**values, is_per_sequence=sampler == "sequence")


def with_thresholds(terms: LossTerms, keep: Tensor) -> LossTerms:
    """The quantile of the loss tokens, as `syncr1.kernels.ops.loss` hands it over."""
    assert terms.loss_mask is not None and terms.modality is not None and terms.entropy is not None
    mask_T = terms.loss_mask & torch.repeat_interleave(keep, terms.cu_seqlens.diff())
    thresholds = entropy_thresholds(terms.settings, terms.entropy, mask_T, terms.modality.bool())
    return replace(terms, entropy_thresholds=thresholds)


def reference(terms: LossTerms, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradient by autograd, advantages and keep; metrics."""

    def cast(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.detach().to(dtype)

    logp = terms.logp.to(dtype).requires_grad_()
    assert terms.rewards is not None
    is_ratio = cast(terms.is_ratio)
    inputs = LossInputs(
        old_logp=cast(terms.old_logp),
        rewards=list(terms.rewards),
        advantages=[],
        cu_seqlens=terms.cu_seqlens,
        group_offsets=terms.group_offsets,
        loss_mask=terms.loss_mask,
        modality=terms.modality,
        ref_logp=cast(terms.ref_logp),
        is_ratio=is_ratio[:, None] if is_ratio is not None and terms.is_per_sequence else is_ratio,
        entropy=cast(terms.entropy),
        weights=None,
        num_items=terms.num_items,
        settings=encode("grpo_loss", asdict(terms.settings)),
        backend="reference",
    )
    out = grpo_loss(logp, inputs)
    (grad,) = torch.autograd.grad(out.loss, logp)
    advantages = out.advantages
    rows = torch.stack([advantages[m] for m in MODALITIES]) if isinstance(advantages, Mapping) else advantages[None]
    return {"loss": out.loss.detach(), "grad_logp": grad, "advantages": rows, "keep": out.keep}, out.metrics


def assert_close_to_reference(terms: LossTerms, mine: TokenLoss) -> None:
    """Every output within twice the error of the float32 reference."""
    exact, exact_metrics = reference(terms)
    single, single_metrics = reference(terms, torch.float32)
    assert mine.keep.equal(exact["keep"])
    named = {name: (getattr(mine, name), single[name], exact[name]) for name in ("loss", "grad_logp", "advantages")}
    for name, value in exact_metrics.items():
        named[name] = (mine.metrics[METRICS.index(name)], single_metrics[name], value)
    assert torch.isfinite(mine.metrics).all()
    for name, (got, theirs, truth) in named.items():
        assert got.dtype == torch.float32 and got.shape == truth.shape, name
        if truth.numel():
            error, allowed = (got - truth).abs().max(), (theirs - truth).abs().max()
            # The terms of a loss may cancel; their sizes are about those of their gradients.
            scale = truth.abs() + exact["grad_logp"].abs().sum() if name == "loss" else truth.abs().max()
            assert error <= TOLERANCE * allowed + FLOOR * scale, (name, error, allowed, scale)
    if terms.loss_mask is not None:
        used_T = terms.loss_mask & torch.repeat_interleave(mine.keep, terms.cu_seqlens.diff())
        assert (mine.grad_logp[~used_T] == 0).all()


PER_MODALITY: dict[str, Any] = {
    "clip_low": {"text": 0.1, "image": 0.3},
    "clip_high": {"text": 0.15, "image": 0.4},
    "delta": {"text": 1.2, "image": 1.6},
    "beta": {"text": 0.2, "image": 0.7},
    "weight": {"text": 0.5, "image": 2.0},
    "num_items": {"text": 50.0, "image": 80.0},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all text": {"mixed": False, "beta": 0.1},
    "kl, delta, number of items": {"beta": 0.3, "delta": 1.3, "num_items": 110.0, "num_sequences": 7.5},
    "per modality": PER_MODALITY,
    "per modality, all text": {**PER_MODALITY, "mixed": False},
    "bias corrected": {"beta": 0.4, "bias_corrected_kl": True, "delta": 1.4},
    "bias corrected per modality": {**PER_MODALITY, "bias_corrected_kl": True, "sampler": "token"},
    "sampler per token": {"sampler": "token", "beta": 0.1},
    "sampler per sequence": {"sampler": "sequence"},
    "rewards per modality": {"two_rewards": True, "dgs": "variance_mass"},
    "items of one tensor": {"num_items": 1.0, "tensor": [77.0]},
    "items of two tensors": {"num_items": {"text": 1.0, "image": 1.0}, "tensor": [77.0, 0.25]},
    "on policy, nothing optional": {"leave_out": ("old_logp", "ref_logp", "entropy")},
    "on policy, bias corrected": {"leave_out": ("old_logp",), "beta": 0.4, "bias_corrected_kl": True},
    "thresholds": {"top_entropy_quantile": 0.4, "beta": 0.1, "sampler": "token", "dgs": "variance_mass"},
}


def build(setting: Mapping[str, Any], **more: Any) -> LossTerms:
    options = {**setting, **more}
    tensor = options.pop("tensor", None)
    terms = make_terms(**options)
    if tensor is not None:
        # The tensor replaces the number: the reference gets the same two.
        terms = replace(terms, num_items=torch.tensor(tensor))
    return terms if terms.settings.top_entropy_quantile == 1 else with_thresholds(terms, reference(terms)[0]["keep"])


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_gradient_and_metrics(loss_type: str, ratio: str, setting: str) -> None:
    terms = build(SETTINGS[setting], loss_type=loss_type, ratio=ratio)
    if loss_type == "cispo" and not isinstance(terms.settings.clip_high, Mapping):
        terms = replace(terms, settings=replace(terms.settings, clip_high=1.2))
    assert_close_to_reference(terms, token_loss(terms))


def test_the_data_lies_on_both_sides_of_every_bound() -> None:
    terms = make_terms()
    assert terms.old_logp is not None and terms.loss_mask is not None
    advantage_T = torch.repeat_interleave(token_loss(terms).advantages[0], terms.cu_seqlens.diff())[terms.loss_mask]
    ratio_T = (terms.logp - terms.old_logp).exp()[terms.loss_mask]
    for of_sign_T in (advantage_T > 0, advantage_T < 0):
        edges = torch.tensor([0.0, 0.7, 0.8, 0.9, 1.0, 1.15, 1.2, 1.3, 1.4, 1.6, 9.0])
        assert (torch.histogram(ratio_T[of_sign_T], edges).hist > 0).all()


@pytest.mark.parametrize("two_rewards", [False, True])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("rule", RULES)
def test_advantages_and_keep(rule: str, scale: str, two_rewards: bool) -> None:
    for keep, seed in ((None, 0), (3, 1)):
        terms = make_terms(two_rewards=two_rewards, scale=scale, dgs=rule, dgs_keep=keep, dgs_seed=2**40 + 3, seed=seed)
        assert terms.rewards is not None
        terms.rewards[:, [1, 6]] = math.nan
        terms.rewards[-1, 2] = terms.rewards[0, 4] = math.nan
        assert_close_to_reference(terms, token_loss(terms))


def test_given_advantages_are_those_computed() -> None:
    for ratio in ("token", "sequence"):
        terms = make_terms(two_rewards=True, dgs="top_k", ratio=ratio, beta=0.1)
        computed = token_loss(terms)
        scores = {"advantages": computed.advantages, "keep": computed.keep,
                  "frac_reward_zero_std": computed.metrics[0].clone()}  # fmt: skip
        again = token_loss(replace(terms, rewards=None, **scores))
        assert_same(computed, again)
        assert again.keep.data_ptr() != computed.keep.data_ptr()  # an op's output is never its input


def assert_same(left: TokenLoss, right: TokenLoss) -> None:
    """Bitwise."""
    for field in fields(TokenLoss):
        a, b = getattr(left, field.name), getattr(right, field.name)
        assert a.equal(b) if isinstance(a, Tensor) else a == b, field.name


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "sapo", "cispo", "vespo"])
def test_same_bits_under_any_number_of_threads_and_repeatedly(loss_type: str, ratio: str) -> None:
    lengths = [14001, 0, 30000, *range(1, 60), 8333]
    terms = make_terms(lengths, loss_type=loss_type, ratio=ratio, beta=0.1, dgs="variance_mass", sampler="token")
    results = []
    for num_threads in (1, 2, 3, 1):
        torch.set_num_threads(num_threads)
        results.append(token_loss(terms))
    for other in results[1:]:
        assert_same(results[0], other)


def test_log_ratios_of_a_hundred_stay_finite() -> None:
    for loss_type in LOSS_TYPES:
        for ratio in ("token", "sequence"):
            terms = make_terms(loss_type=loss_type, ratio=ratio, beta=0.1, bias_corrected_kl=True, density=1.0)
            for name, sign in (("old_logp", 100.0), ("ref_logp", -100.0)):
                values = getattr(terms, name)
                values[::3] = terms.logp[::3] + sign
                values[1::3] = terms.logp[1::3] - sign
            mine = token_loss(terms)
            assert mine.finite and all(torch.isfinite(getattr(mine, name).float()).all() for name in TENSORS)
            assert_close_to_reference(terms, mine)


def test_nan_at_a_pruned_sequence_and_at_a_loss_token() -> None:
    terms = make_terms(dgs="top_k", dgs_keep=1, dgs_min_keep=0, beta=0.1, sampler="sequence")
    keep = token_loss(terms).keep
    pruned_T = torch.repeat_interleave(~keep, terms.cu_seqlens.diff())
    assert pruned_T.any() and not pruned_T.all()
    before = token_loss(terms)
    for values in (terms.logp, terms.old_logp, terms.ref_logp, terms.entropy):
        assert values is not None
        values[pruned_T] = math.nan
    assert terms.is_ratio is not None and terms.loss_mask is not None
    terms.is_ratio[~keep] = math.nan
    found = token_loss(terms)
    assert before.finite and not found.finite  # the op says which token; nothing else notices
    assert_same(before, replace(found, finite=True))
    first = int((terms.loss_mask & ~pruned_T).nonzero()[0])
    terms.logp[first] = math.nan
    poisoned = token_loss(terms)
    assert poisoned.loss.isnan()  # a fault of the caller shows
    others = torch.arange(terms.logp.numel()) != first
    assert poisoned.grad_logp[others].equal(before.grad_logp[others])


@contextmanager
def bands_around_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Every tensor that `torch.empty` makes lies between bands of a pattern."""
    buffers: list[Tensor] = []

    def empty(*shape: Any, dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        buffers.append(torch.full((size.numel() + 128,), 1 if dtype == torch.bool else math.nan, dtype=dtype))
        return buffers[-1][64 : 64 + size.numel()].view(size)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield buffers


@pytest.mark.parametrize("lengths", [[1], [15, 1], [511], [512], [513, 0, 2], [4, 4, 4, 4]])
def test_nothing_beside_the_outputs_is_written(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    for ratio in ("token", "sequence"):
        terms = make_terms(lengths, [len(lengths)], ratio=ratio, beta=0.1)
        plain = token_loss(terms)
        with bands_around_outputs(monkeypatch) as buffers:
            assert_same(plain, token_loss(terms))
        assert len(buffers) == len(TENSORS)
        for buffer in buffers:
            band = torch.cat([buffer[:64], buffer[-64:]])
            assert band.all() if band.dtype == torch.bool else band.isnan().all()


@given(
    groups=st.lists(st.lists(st.integers(0, 4) | st.sampled_from([17, 40]), max_size=4), max_size=4),
    seed=st.integers(0, 10),
    density=st.sampled_from([0.0, 0.5, 1.0]),
    mixed=st.booleans(),
    two_rewards=st.booleans(),
    equal=st.sampled_from([None, 0.25, math.nan]),
    loss_type=st.sampled_from(LOSS_TYPES),
    ratio=st.sampled_from(["token", "sequence"]),
    rule=st.sampled_from(RULES),
    split=st.booleans(),
)
def test_any_layout(
    groups: list[list[int]], density: float, equal: float | None, rule: str, split: bool, **settings: Any
) -> None:
    """No tokens, no sequences, empty groups, everything masked or pruned, equal rewards and none."""
    lengths = [length for group in groups for length in group]
    num_items = {"text": 3.0, "image": 0.5} if split else None
    sizes = [len(group) for group in groups] or [0]
    terms = make_terms(lengths, sizes, density=density, dgs=rule, num_items=num_items, beta=0.2, **settings)
    assert terms.rewards is not None
    if equal is not None:
        terms.rewards[:] = equal
    elif terms.rewards.shape[1] > 2:
        terms.rewards[:, 1] = math.nan
    assert_close_to_reference(terms, token_loss(terms))


def packed(groups: list[list[float]]) -> tuple[Tensor, Tensor]:
    rewards = torch.tensor([r for g in groups for r in g], dtype=torch.float64)
    return rewards, offsets_of([len(g) for g in groups])


@pytest.mark.parametrize("scale", SCALES)
@given(groups=GROUPS)
def test_group_advantages(groups: list[list[float]], scale: str) -> None:
    rewards, offsets = packed(groups)
    mine, exact = group_advantages(rewards, offsets, scale, 1e-4), standardize(rewards, offsets, scale, 1e-4)
    torch.testing.assert_close(mine, exact.float(), rtol=1e-6, atol=1e-6)
    assert (mine == 0).equal(exact.float() == 0)


@pytest.mark.parametrize("rule", RULES)
@given(groups=GROUPS, mass=st.sampled_from([0.25, 0.5, 0.9, 1.0]), keep=st.none() | st.integers(1, 5))
def test_dgs_select(groups: list[list[float]], rule: str, mass: float, keep: int | None) -> None:
    rewards, offsets = packed(groups)
    energy = standardize(rewards, offsets, "group", 1e-4).float().double().square()
    settings = {"rule": rule, "mass": mass, "keep": keep, "min_keep": 1, "seed": 2**40 + 3}
    expected = reference_select(energy, rewards, offsets, **settings)  # type: ignore[arg-type]
    assert dgs_select(energy, rewards, offsets, **settings).equal(expected)  # type: ignore[arg-type]
