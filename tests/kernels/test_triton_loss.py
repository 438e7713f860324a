"""The Triton loss and group kernels against `kernels.reference` in float64, in Triton's interpreter.

test_triton_interpreted.py runs every `check_…` of this file in a process of its own; on a machine with a GPU another
runs them there, compiled.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_child import run_checks

from syncr1.kernels.layout import PackedLayout
from syncr1.kernels.options import LOSS_TYPES, LossOptions, encode
from syncr1.kernels.plan import Scores, advantage_energy, entropy_thresholds, policy_mask, score_rewards
from syncr1.kernels.reference import backend as reference
from syncr1.kernels.reference.loss import grpo_loss
from syncr1.kernels.streams import MODALITIES
from syncr1.kernels.terms import METRICS, LossInputs, LossTerms, TokenLoss

pytest.importorskip("triton")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
LENGTHS = [3, 9, 0, 4, 1, 10]
"""With tiles of 16: a sequence over a tile's edge, an empty one, a single token."""
GROUPS = [0, 4, 4, 6]
REWARDS = [[1.0, 0.0, 0.3, 2.0, 0.0, 1.0], [0.5, 0.5, float("nan"), 0.2, 1.0, 1.0]]
BY_MODALITY = {
    "clip_low": {"text": 0.1, "image": 0.3},
    "clip_high": {"text": 0.2, "image": 0.4},
    "delta": {"text": 1.3, "image": 1.6},
    "beta": {"text": 0.1, "image": 0.0},
    "weight": {"text": 0.7, "image": 1.5},
    "bias_corrected_kl": True,
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu() -> None:
    run_checks("cuda", __file__)


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int64)


def batch(lengths: list[int] = LENGTHS, spread: float = 0.4, seed: int = 0) -> dict[str, Any]:
    """Ratios on both sides of every clip bound, both modalities, masked tokens; ratios of the sampler."""
    random = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    logp = -3 * torch.rand(total, generator=random)
    return {
        "logp": logp,
        "old_logp": logp + spread * torch.randn(total, generator=random),
        "ref_logp": logp + 0.3 * torch.randn(total, generator=random),
        "entropy": torch.rand(total, generator=random),
        "is_ratio": 0.5 + torch.rand(total, generator=random),
        "loss_mask": torch.rand(total, generator=random) > 0.2,
        "modality": (torch.rand(total, generator=random) > 0.5).to(torch.uint8),
    }


TENSORS = ("loss", "grad_logp", "advantages", "keep", "metrics")


class Case:
    """One batch with its settings, for the reference in any dtype and for the kernels."""

    def __init__(
        self,
        tokens: dict[str, Any],
        lengths: list[int] = LENGTHS,
        groups: list[int] = GROUPS,
        rewards: list[list[float]] = REWARDS[:1],
        given: bool = False,
        divisors: Tensor | None = None,
        **options: Any,
    ) -> None:
        self.tokens, self.given, self.divisors = tokens, given, divisors
        self.settings = LossOptions(**{"max_length": 12, **options})
        self.rewards = torch.tensor(rewards, dtype=torch.float64).reshape(len(rewards), -1)
        self.cu_seqlens, self.group_offsets = offsets(lengths), torch.tensor(groups, dtype=torch.int64)
        self.layout = PackedLayout(self.cu_seqlens, self.group_offsets, tokens.get("modality"), tokens.get("loss_mask"))

    def floats(self, dtype: torch.dtype) -> dict[str, Tensor | None]:
        names = ("logp", "old_logp", "ref_logp", "entropy", "is_ratio")
        found = {name: self.tokens.get(name) for name in names}
        return {name: None if value is None else value.to(dtype) for name, value in found.items()}

    def inputs(self, **tokens: Tensor | None) -> LossInputs:
        """As the registered op has them, with these values per token."""
        absent = dict.fromkeys(("old_logp", "ref_logp", "is_ratio", "entropy", "weights"))
        layout = {name: getattr(self.layout, name) for name in ("cu_seqlens", "group_offsets", "loss_mask", "modality")}
        settings = encode("grpo_loss", asdict(self.settings))
        rewards = {"rewards": list(self.rewards.unbind()), "advantages": [], "num_items": self.divisors}
        return LossInputs(**{**absent, **tokens}, **layout, **rewards, settings=settings, backend="reference")

    def scores(self) -> Scores:
        return score_rewards(reference, self.inputs())

    def expected(self, dtype: torch.dtype) -> TokenLoss:
        """The reference, its gradient by autograd."""
        values: dict[str, Any] = self.floats(dtype)
        logp = values.pop("logp").clone().requires_grad_()
        out = grpo_loss(logp, self.inputs(**values))
        out.loss.backward()
        advantages = [out.advantages[m] for m in MODALITIES] if len(self.rewards) == 2 else [out.advantages]
        metrics = torch.stack([out.metrics.get(name, torch.tensor(torch.nan)).double() for name in METRICS])
        grad = torch.zeros_like(logp) if logp.grad is None else logp.grad
        return TokenLoss(out.loss.detach(), grad, torch.stack(advantages), out.keep, metrics)

    def terms(self) -> LossTerms:
        values: dict[str, Any] = {k: v for k, v in self.floats(torch.float32).items() if v is not None}
        per_sequence = "is_ratio" in values and values["is_ratio"].shape != (self.layout.num_tokens,)
        if self.given:
            scores = self.scores()
            values |= {"advantages": scores.advantages.float(), "keep": scores.keep}
            values["frac_reward_zero_std"] = scores.frac_reward_zero_std.float()
        else:
            values["rewards"] = self.rewards
        if self.settings.top_entropy_quantile < 1:
            mask_T = policy_mask(self.layout, self.scores())
            image_T = self.layout.image_tokens
            values["entropy_thresholds"] = entropy_thresholds(self.settings, values["entropy"], mask_T, image_T)
        values |= {"modality": self.tokens.get("modality"), "loss_mask": self.tokens.get("loss_mask")}
        values |= {"num_items": self.divisors, "cu_seqlens": self.cu_seqlens, "group_offsets": self.group_offsets}
        on_device = {name: None if value is None else value.to(DEVICE) for name, value in values.items()}
        return LossTerms(settings=self.settings, is_per_sequence=per_sequence, **on_device)

    def run(self, tile: int = 16) -> TokenLoss:
        from syncr1.kernels.triton_ops import token_loss

        out = token_loss(self.terms(), tile=tile)
        return TokenLoss(*(getattr(out, name).cpu() for name in TENSORS))


def assert_close(name: str, got: Tensor, exact: Tensor, plain: Tensor) -> None:
    """Error ≤ twice that of the float32 reference, plus 16 float32 roundings of the largest value."""
    assert got.shape == exact.shape, name
    if not exact.numel():
        return
    assert bool(torch.isfinite(got).all()), (name, got)
    error, allowed = (got.double() - exact).abs().max(), 2 * (plain.double() - exact).abs().max()
    assert error <= allowed + 1e-6 * exact.abs().max(), (name, float(error), float(allowed), got, exact)


def compare(case: Case, tile: int = 16) -> TokenLoss:
    got, exact, plain = case.run(tile), case.expected(torch.float64), case.expected(torch.float32)
    assert torch.equal(got.keep, exact.keep)
    for name in ("loss", "grad_logp", "advantages"):
        assert_close(name, getattr(got, name), getattr(exact, name), getattr(plain, name))
    assert bool(torch.isfinite(got.metrics).all())
    for i, name in enumerate(METRICS):
        if not torch.isnan(exact.metrics[i]):
            assert_close(name, got.metrics[i], exact.metrics[i], plain.metrics[i])
    return got


def without(tokens: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in tokens.items() if name not in names}


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def check_every_setting_per_modality(loss_type: str, ratio: str) -> None:
    numbers = {"text": 7.0, "image": 5.0}
    options = BY_MODALITY | {"num_items": numbers, "top_entropy_quantile": 0.7}
    compare(Case(batch(), loss_type=loss_type, ratio=ratio, dgs="variance_mass", dgs_mass=0.7, **options))


@pytest.mark.parametrize(("loss_type", "ratio"), [("dapo", "token"), *((name, "sequence") for name in LOSS_TYPES)])
def check_plain_settings(loss_type: str, ratio: str) -> None:
    """On the policy itself: at ratio 1 the whole gradient flows. Two rows of rewards, one is_ratio per sequence."""
    tokens = without(batch(seed=1), "old_logp", "ref_logp", "entropy", "loss_mask")
    tokens["is_ratio"] = torch.linspace(0.5, 1.5, len(LENGTHS))
    compare(Case(tokens, rewards=REWARDS, loss_type=loss_type, ratio=ratio))


@pytest.mark.parametrize(("loss_type", "ratio"), [("dapo", "sequence"), *((name, "token") for name in LOSS_TYPES)])
def check_given_scores_text_only(loss_type: str, ratio: str) -> None:
    """Advantages that need the whole batch arrive ready; ratios out of every bound, no modality."""
    tokens = without(batch(spread=12.0, seed=2), "modality", "is_ratio")
    options = {"scale": "batch", "dgs": "max_variance", "beta": 0.05, "delta": 3.0}
    compare(Case(tokens, given=True, loss_type=loss_type, ratio=ratio, **options))


@pytest.mark.parametrize(
    ("rule", "scale", "keep", "min_keep", "rows"),
    [
        ("variance_mass", "group", None, 0, 2),
        ("variance_mass", "loo", None, 2, 1),
        ("top_k", "none", None, 0, 1),
        ("top_k", "loo", 1, 2, 2),
    ],
)
def check_rules_and_scales(rule: str, scale: str, keep: int | None, min_keep: int, rows: int) -> None:
    lengths, groups = [2, 1, 3, 2, 0, 2, 1], [0, 1, 6, 7]
    rewards = [[1.0, 0.2, 0.2, float("nan"), 0.9, 0.1, 2.0], [0.0, 0.1, 0.4, float("nan"), float("nan"), 0.1, 1.0]]
    options = {"dgs": rule, "dgs_keep": keep, "dgs_min_keep": min_keep, "dgs_mass": 0.6, "scale": scale, "eps": 1e-3}
    out = compare(Case(batch(lengths), lengths, groups, rewards[:rows], **options))
    assert 0 < int(out.keep.sum()) < len(lengths)


def check_a_group_of_seventy() -> None:
    lengths = [0] * 35 + [2, 1, 3] + [0] * 36
    random = torch.Generator().manual_seed(3)
    rewards = [torch.randint(0, 5, (74,), generator=random).double().tolist()]
    compare(Case(batch(lengths), lengths, [0, 1, 4, 74], rewards, dgs="variance_mass", loss_type="grpo"))


@pytest.mark.parametrize("tile", [16, 64])
def check_sequences_over_several_tiles(tile: int) -> None:
    lengths = [0, 70, 1, 0, 0, 33, 0]
    case = Case(batch(lengths), lengths, [0, 0, 2, 7, 7], [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], ratio="sequence")
    compare(case, tile)


@pytest.mark.parametrize("loss_type", ["bnpo", "grpo", "vespo"])
def check_nothing_to_learn(loss_type: str) -> None:
    """Everything masked, everything pruned, no token, no sequence: loss and gradients are 0, metrics finite."""
    tokens = batch()
    masked = tokens | {"loss_mask": torch.zeros_like(tokens["loss_mask"])}
    equal = [[0.5] * len(LENGTHS)]
    missing = [[float("nan")] * len(LENGTHS)]
    for case in (
        Case(masked, loss_type=loss_type, ratio="sequence"),
        Case(tokens, rewards=equal, dgs="variance_mass", loss_type=loss_type),
        Case(without(tokens, "ref_logp"), rewards=missing, loss_type=loss_type),
        Case(batch([]), [0, 0], [0, 2], [[1.0, 2.0]], loss_type=loss_type),
        Case(batch([]), [], [0], [[]], loss_type=loss_type),
    ):
        out = compare(case)
        assert float(out.loss) == 0
        assert bool((out.grad_logp == 0).all())


def check_poison_at_masked_tokens() -> None:
    """NaN and infinity where no loss is never reach anything; their gradient is exactly 0."""
    clean = batch()
    keep_S = Case(clean, dgs="top_k", dgs_keep=1, dgs_min_keep=0).scores().keep
    dead = ~(clean["loss_mask"] & torch.repeat_interleave(keep_S, torch.tensor(LENGTHS)))
    options = BY_MODALITY | {"dgs": "top_k", "dgs_keep": 1, "dgs_min_keep": 0, "top_entropy_quantile": 0.8}
    assert 2 < int(dead.sum()) < dead.numel()
    poison = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.arange(dead.numel()) % 3]
    names = ("logp", "old_logp", "ref_logp", "entropy", "is_ratio")
    poisoned = clean | {name: torch.where(dead, poison, clean[name]) for name in names}
    for loss_type, ratio in (("grpo", "sequence"), ("vespo", "token")):
        settings = options | {"loss_type": loss_type, "ratio": ratio}
        want, got = Case(clean, **settings).run(), Case(poisoned, **settings).run()
        for name in TENSORS:
            assert torch.equal(getattr(got, name), getattr(want, name)), (name, loss_type)
        assert bool((got.grad_logp[dead] == 0).all())


def check_poison_of_sequences_without_loss() -> None:
    """is_ratio per sequence may be NaN where a sequence carries no loss."""
    tokens = batch() | {"is_ratio": torch.linspace(0.5, 1.5, len(LENGTHS))}
    options = {"dgs": "top_k", "dgs_keep": 1, "dgs_min_keep": 0}
    for loss_type in ("dapo", "vespo"):
        want = Case(tokens, loss_type=loss_type, **options).run()
        poisoned = tokens | {"is_ratio": torch.where(want.keep, tokens["is_ratio"], torch.nan)}
        got = Case(poisoned, loss_type=loss_type, **options).run()
        assert torch.equal(got.grad_logp, want.grad_logp)
        assert torch.equal(got.loss, want.loss)


@pytest.mark.parametrize("loss_type", ["cispo", "bnpo"])
def check_num_items_as_a_tensor(loss_type: str) -> None:
    """The divisors are read on the device: no synchronisation. bnpo counts its own tokens all the same."""
    one, two = torch.tensor([6.0]), torch.tensor([6.0, 4.0])
    compare(Case(batch(), divisors=one, num_items=1.0, loss_type=loss_type))
    compare(Case(batch(), divisors=two, num_items={"text": 1.0, "image": 1.0}, loss_type=loss_type))


def check_writes_stay_inside() -> None:
    """Inputs between NaN guard bands give the same bits; no input changes; a second run gives the same bits."""
    case = Case(batch(), rewards=REWARDS, dgs="variance_mass", loss_type="grpo", ratio="sequence", **BY_MODALITY)
    first = case.run()
    terms, before = case.terms(), case.terms()
    guarded = {}
    for name in LossTerms.__slots__:
        value = getattr(terms, name)
        if isinstance(value, Tensor) and value.is_floating_point():
            band = torch.full((8,), torch.nan, dtype=value.dtype, device=value.device)
            value = torch.cat([band, value.flatten(), band])[8:-8].view(value.shape)
        guarded[name] = value
    from syncr1.kernels.triton_ops import token_loss

    again = token_loss(LossTerms(**guarded), tile=16)
    for name in TENSORS:
        assert torch.equal(getattr(again, name).cpu(), getattr(first, name)), name
    for name in LossTerms.__slots__:
        value = guarded[name]
        if isinstance(value, Tensor):
            assert torch.equal(value.nan_to_num(), getattr(before, name).nan_to_num()), name


@pytest.mark.parametrize("scale", ["group", "batch", "none", "loo"])
def check_group_advantages(scale: str) -> None:
    from syncr1.kernels.triton_ops import group_advantages

    groups = torch.tensor([0, 1, 1, 4, 74])
    random = torch.Generator().manual_seed(4)
    rewards = torch.randn(74, generator=random, dtype=torch.float64)
    rewards[2], rewards[10:12], rewards[1:4] = torch.nan, torch.nan, torch.tensor([0.1, torch.nan, 0.1])
    want = reference.group_advantages(rewards, groups, scale, 1e-4)
    got = group_advantages(rewards.to(DEVICE), groups.to(DEVICE), scale, 1e-4).cpu()
    assert got.dtype == torch.float32
    assert torch.equal(got, want.float())
    empty = group_advantages(rewards[:0].to(DEVICE), groups[:1].to(DEVICE), scale, 1e-4)
    assert empty.shape == (0,)


@pytest.mark.parametrize("rule", ["none", "variance_mass", "top_k", "max_variance", "random"])
def check_dgs_select(rule: str) -> None:
    from syncr1.kernels.triton_ops import dgs_select

    groups = torch.tensor([0, 1, 1, 4, 10, 74])
    rewards = torch.randint(0, 6, (74,), generator=torch.Generator().manual_seed(5)).double()
    rewards[1:4], rewards[6] = 1.0, torch.nan
    energy = advantage_energy(reference.group_advantages(rewards, groups, "group", 1e-4)[None])
    for mass, keep, min_keep in ((0.6, None, 2), (1.0, 3, 0), (0.1, 1, 4)):
        options = {"rule": rule, "mass": mass, "keep": keep, "min_keep": min_keep, "seed": 3}
        want = reference.dgs_select(energy, rewards, groups, **options)
        got = dgs_select(energy.to(DEVICE), rewards.to(DEVICE), groups.to(DEVICE), **options).cpu()
        assert torch.equal(got, want), (rule, mass, keep, min_keep)


def check_mass_is_float64() -> None:
    """A float32 0.6 is above 0.6 and would cost a group of ten equal energies a seventh trajectory."""
    from syncr1.kernels.triton_ops import dgs_select

    energy, groups = torch.ones(10, dtype=torch.float64, device=DEVICE), torch.tensor([0, 10], device=DEVICE)
    keep = dgs_select(energy, energy, groups, rule="variance_mass", mass=0.6, keep=None, min_keep=0, seed=0)
    assert int(keep.sum()) == 6


@pytest.mark.parametrize("scale", ["group", "batch", "none", "loo"])
def check_a_spread_by_rounding_is_none(scale: str) -> None:
    """As the C++ and the PyTorch backend take it: four units in the last place of float32, whatever the size."""
    from syncr1.kernels.triton_ops import group_advantages

    for size in (2, 33):
        groups = torch.tensor([0, size, 2 * size], dtype=torch.int64)
        for magnitude in (1.0, -1e6):
            plain = torch.full((2 * size,), 0.3 * magnitude, dtype=torch.float64)
            noise = torch.where(torch.arange(2 * size) % 2 == 0, 2.0**-22, 0.0)
            noise[size:] *= 32  # the second group has a signal
            rewards = plain * (1 + noise)
            got = group_advantages(rewards.to(DEVICE), groups.to(DEVICE), scale, 0.0).cpu()
            want = reference.group_advantages(rewards, groups, scale, 0.0)
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
            assert not bool(got[:size].any()) and bool(got[size:].all())
