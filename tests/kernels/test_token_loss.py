"""The contract of a backend's `token_loss`: the reference in float64, whatever the settings, the layout and the memory.

test_grpo_loss.py proves the reference. NaN and infinity lie at every masked token of every batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from backends import KERNELS, NIGHTLY, ON_TRITON
from loss_contract import (
    TENSORS,
    assert_close_to_reference,
    assert_same,
    given_scores,
    make_terms,
    moved,
    reference,
    run,
    with_thresholds,
)
from torch import Tensor

from syncr1.kernels import dispatch
from syncr1.kernels.options import LOSS_TYPES, RATIOS, RULES, SCALES
from syncr1.kernels.terms import LossTerms

pytestmark = pytest.mark.usefixtures("poisoned_memory")
BACKEND = pytest.mark.parametrize("backend", KERNELS)
FORMULAS = ("dapo", "cispo", "sapo", "vespo")
"""The other types divide by something else."""
PER_MODALITY: dict[str, Any] = {
    "clip_low": {"text": 0.1, "image": 0.3},
    "clip_high": {"text": 0.15, "image": 0.4},
    "delta": {"text": 1.2, "image": 1.6},
    "beta": {"text": 0.2, "image": 0.7},
    "weight": {"text": 0.5, "image": 2.0},
    "num_items": {"text": 50.0, "image": 80.0},
}
SPLIT: dict[str, dict[str, Any]] = {
    "per modality": PER_MODALITY,
    "per modality, all text": {**PER_MODALITY, "mixed": False},
    "bias corrected per modality": {**PER_MODALITY, "bias_corrected_kl": True, "sampler": "token"},
    "items of two tensors": {"num_items": {"text": 1.0, "image": 1.0}, "tensor": [77.0, 0.25]},
}
"""Text and image are divided by numbers of their own."""
WHOLE: dict[str, dict[str, Any]] = {
    "plain": {},
    "all text": {"mixed": False, "beta": 0.1},
    "kl, delta, number of items": {"beta": 0.3, "delta": 1.3, "num_items": 110.0, "num_sequences": 7.5},
    "bias corrected": {"beta": 0.4, "bias_corrected_kl": True, "delta": 1.4},
    "sampler per token": {"sampler": "token", "beta": 0.1},
    "sampler per sequence": {"sampler": "sequence"},
    "rewards per modality": {"two_rewards": True, "dgs": "variance_mass"},
    "items of one tensor": {"num_items": 1.0, "tensor": [77.0]},
    "on policy, nothing optional": {"leave_out": ("old_logp", "ref_logp", "entropy", "loss_mask")},
    "on policy, bias corrected": {"leave_out": ("old_logp",), "beta": 0.4, "bias_corrected_kl": True},
    "thresholds": {"top_entropy_quantile": 0.4, "beta": 0.1, "sampler": "token", "dgs": "variance_mass"},
    "scores given": {"given": True, "dgs": "max_variance", "scale": "batch", "beta": 0.05},
}
SETTINGS = SPLIT | WHOLE


def grid() -> list[tuple[str, str, str]]:
    """(loss type, ratio, setting): all of them at night, else every pair; on Triton every form of a kernel and every
    setting."""
    if NIGHTLY:
        return list(itertools.product(LOSS_TYPES, RATIOS, SETTINGS))
    if not ON_TRITON:
        pairs = itertools.product(enumerate(LOSS_TYPES), enumerate(SETTINGS))
        return [(kind, RATIOS[(i + j) % len(RATIOS)], setting) for (i, kind), (j, setting) in pairs]
    places: dict[bool, list[tuple[str, str]]] = {True: [], False: [("luspo", "token"), ("luspo", "sequence")]}
    for i, kind in enumerate(LOSS_TYPES):
        for j, ratio in enumerate(RATIOS):
            for split in (True, False) if kind in FORMULAS[1:] else ((i + j) % 2 == 0,):
                places[split].append((kind, ratio))
    settings = [(places[True], SPLIT), (places[False], WHOLE)]
    return [(*place, name) for where, names in settings for place, name in zip(where, itertools.cycle(names))]


def build(setting: Mapping[str, Any], **more: Any) -> LossTerms:
    options = {**setting, **more}
    tensor, given = options.pop("tensor", None), options.pop("given", False)
    if options["loss_type"] == "cispo" and not isinstance(options.get("clip_high"), Mapping):
        options["clip_high"] = 1.2
    if "loss_mask" in options.get("leave_out", ()):
        options["density"] = 1.0
    terms = make_terms(**options)
    if tensor is not None:
        # The tensor replaces the number: the reference gets the same two.
        terms = replace(terms, num_items=torch.tensor(tensor))
    if terms.settings.top_entropy_quantile < 1:
        terms = with_thresholds(terms, reference(terms)[0]["keep"])
    return given_scores(terms) if given else terms


@BACKEND
@pytest.mark.parametrize(("loss_type", "ratio", "setting"), grid())
def test_loss_gradient_and_metrics(backend: str, loss_type: str, ratio: str, setting: str) -> None:
    terms = build(SETTINGS[setting], loss_type=loss_type, ratio=ratio)
    exact = build(SETTINGS[setting] | {"given": False}, loss_type=loss_type, ratio=ratio)
    assert_close_to_reference(exact, run(terms, backend), backend)


BY_GROUP = ("none", "variance_mass", "top_k") if ON_TRITON else RULES
"""Triton gets the scores of other rules, and those of a whole batch, ready."""
SCALES_BY_GROUP = tuple(scale for scale in SCALES if not (ON_TRITON and scale == "batch"))


@BACKEND
@pytest.mark.parametrize("scale", SCALES_BY_GROUP)
@pytest.mark.parametrize("rule", BY_GROUP)
def test_advantages_and_keep(backend: str, rule: str, scale: str) -> None:
    """Rewards of which some are missing; one of them, and one of each modality."""
    chosen = {"scale": scale, "dgs": rule, "dgs_seed": 2**40 + 3}
    given = [(None, 0, True), (3, 1, False)]
    for keep, seed, two in given if not ON_TRITON else [given[(len(rule) + len(scale)) % 2]]:
        terms = make_terms(two_rewards=two, dgs_keep=keep, dgs_mass=0.6 + 0.2 * two, seed=seed, **chosen)
        assert terms.rewards is not None
        terms.rewards[:, [1, 6]] = math.nan
        terms.rewards[-1, 2] = terms.rewards[0, 4] = math.nan
        assert_close_to_reference(terms, run(terms, backend), backend)


@BACKEND
def test_a_group_of_seventy(backend: str) -> None:
    lengths = [0] * 35 + [2, 1, 3] + [0] * 36
    terms = make_terms(lengths, [1, 3, 70], dgs="variance_mass", loss_type="grpo", density=1.0)
    assert terms.rewards is not None
    terms.rewards[:] = (terms.rewards * 2).round()  # ties
    assert_close_to_reference(terms, run(terms, backend), backend)


@BACKEND
@pytest.mark.parametrize("ratio", RATIOS)
def test_given_scores_are_those_computed(backend: str, ratio: str) -> None:
    terms = make_terms(two_rewards=True, dgs="top_k", ratio=ratio, beta=0.1)
    computed = run(terms, backend)
    scores = {"advantages": computed.advantages, "keep": computed.keep}
    again = run(replace(terms, rewards=None, frac_reward_zero_std=computed.metrics[0].clone(), **scores), backend)
    assert_same(computed, again)


@BACKEND
def test_log_ratios_of_a_hundred_stay_finite(backend: str) -> None:
    pairs = zip(FORMULAS, itertools.cycle(RATIOS)) if ON_TRITON else itertools.product(LOSS_TYPES, RATIOS)
    for loss_type, ratio in pairs:
        terms = make_terms(loss_type=loss_type, ratio=ratio, beta=0.1, bias_corrected_kl=True, density=1.0)
        for name, sign in (("old_logp", 100.0), ("ref_logp", -100.0)):
            values = getattr(terms, name)
            values[::3] = terms.logp[::3] + sign
            values[1::3] = terms.logp[1::3] - sign
        mine = run(terms, backend)
        assert mine.finite and all(torch.isfinite(getattr(mine, name).float()).all() for name in TENSORS)
        assert_close_to_reference(terms, mine, backend)


@BACKEND
@pytest.mark.parametrize("loss_type", ["dapo", "sapo"])
def test_of_a_single_loss_token_all_ratios_are_its_own(backend: str, loss_type: str) -> None:
    """Alone or among masked ones, of either modality, within the bound and beyond it, kept or pruned."""
    lengths = [1, 3, 0, 1, 2, 1, 5, 1, 1]
    first = torch.tensor([0, *itertools.accumulate(lengths)])[:-1][torch.tensor(lengths) > 0]
    results = {}
    for ratio in RATIOS:
        chosen: dict[str, Any] = {"dgs": "top_k", "dgs_keep": 2, "dgs_min_keep": 0, "beta": 0.1, "delta": 1.3}
        terms = make_terms(lengths, density=1.0, ratio=ratio, loss_type=loss_type, bias_corrected_kl=True, **chosen)
        assert terms.loss_mask is not None and terms.old_logp is not None
        terms.loss_mask[:] = False
        terms.loss_mask[first] = True
        terms.old_logp[first[0]] += 100
        results[ratio] = run(terms, backend)
        assert_close_to_reference(terms, results[ratio], backend)
    assert results["token"].grad_logp.any() and not results["token"].keep.all()
    for name, values in {name: getattr(results["token"], name) for name in TENSORS}.items():
        for ratio in RATIOS[1:]:
            torch.testing.assert_close(getattr(results[ratio], name), values, rtol=2e-6, atol=1e-6)


@BACKEND
@pytest.mark.parametrize("sign", [1, -1])
def test_a_product_beyond_the_bound_stays_there_without_gradient(backend: str, sign: int) -> None:
    """Log-ratios of .9 each, 22 of them within 20 together and 23 not; and ±30, each of which has its own bound."""
    lengths = [22, 23, 2]
    terms = make_terms(lengths, [3], density=1.0, ratio="product", loss_type="luspo")
    assert terms.old_logp is not None and terms.rewards is not None
    log_ratio_T = torch.cat([torch.full((45,), 0.9), torch.tensor([30.0, -30.0])]) * sign
    terms.old_logp[:] = 0.0
    terms.logp[:] = log_ratio_T
    advantages = torch.full((1, 3), -1.0 * sign)  # the side that no clip bounds
    keep, no_metric = torch.ones(3, dtype=torch.bool), torch.zeros(())
    terms = replace(terms, rewards=None, advantages=advantages, keep=keep, frac_reward_zero_std=no_metric)
    out = run(terms, backend)
    ratio_S = torch.tensor([22 * 0.9 * sign, 20.0 * sign, 0.0], dtype=torch.float64).exp()
    moved_S = torch.tensor([22 * ratio_S[0], 0.0, 0.0]) * sign / 3
    expected = torch.repeat_interleave(moved_S, torch.tensor(lengths))
    torch.testing.assert_close(out.grad_logp.double(), expected, rtol=2e-5, atol=0)
    loss = (torch.tensor(lengths) * ratio_S).sum() * sign / 3
    torch.testing.assert_close(out.loss.double(), loss, rtol=2e-5, atol=0)


@BACKEND
@pytest.mark.parametrize("loss_type", ["bnpo", "vespo"] if ON_TRITON else ["bnpo", "grpo", "vespo"])
def test_nothing_to_learn(backend: str, loss_type: str) -> None:
    """Everything masked, everything pruned, no reward, no token, no sequence: loss and gradients are 0."""
    flat, missing = make_terms(loss_type=loss_type, dgs="variance_mass"), make_terms(loss_type=loss_type)
    assert flat.rewards is not None and missing.rewards is not None
    flat.rewards[:], missing.rewards[:] = 0.5, math.nan
    for terms in (
        make_terms(loss_type=loss_type, ratio="sequence", density=0.0),
        make_terms(loss_type=loss_type, ratio="product", density=0.0),
        flat,
        missing,
        make_terms([0, 0], [0, 2], loss_type=loss_type),
        make_terms([], [0], loss_type=loss_type),
        make_terms([], [0, 0], loss_type=loss_type, num_items={"text": 0.0, "image": 0.0}),
    ):
        out = run(terms, backend)
        assert_close_to_reference(terms, out, backend)
        assert float(out.loss) == 0 and bool((out.grad_logp == 0).all())


SAMPLED = [("dapo", "sequence"), ("vespo", "sequence"), ("grpo", "token")]


@BACKEND
@pytest.mark.parametrize(("loss_type", "sampler"), SAMPLED[1:] if ON_TRITON else SAMPLED)
def test_nan_at_a_pruned_sequence_and_at_a_loss_token(backend: str, loss_type: str, sampler: str) -> None:
    options = {"dgs": "top_k", "dgs_keep": 1, "dgs_min_keep": 0, "beta": 0.1, "ratio": RATIOS[loss_type == "grpo"]}
    terms = make_terms(sampler=sampler, loss_type=loss_type, **options)
    before = run(terms, backend)
    pruned_T = torch.repeat_interleave(~before.keep, terms.cu_seqlens.diff())
    assert pruned_T.any() and not pruned_T.all()
    for values in (terms.logp, terms.old_logp, terms.ref_logp, terms.entropy):
        assert values is not None
        values[pruned_T] = math.nan
    assert terms.is_ratio is not None and terms.loss_mask is not None
    terms.is_ratio[~before.keep if sampler == "sequence" else pruned_T] = math.nan
    found = run(terms, backend)
    # the op says which token; nothing else notices
    assert before.finite and found.finite is not dispatch.module_of(backend).FINDS_NONFINITE
    assert_same(before, replace(found, finite=True))
    first = int((terms.loss_mask & ~pruned_T).nonzero()[0])
    terms.logp[first] = math.nan
    poisoned = run(terms, backend)
    assert poisoned.loss.isnan()  # a fault of the caller shows
    others = torch.repeat_interleave(torch.arange(len(before.keep)), terms.cu_seqlens.diff())
    others = others != others[first] if loss_type != "dapo" else torch.arange(terms.logp.numel()) != first
    assert poisoned.grad_logp[others].equal(before.grad_logp[others])


@BACKEND
def test_memory_does_not_matter_and_stays_as_it_was(backend: str) -> None:
    """The same bits between bands of NaN and elsewhere; no input changes."""
    terms = make_terms(two_rewards=True, loss_type="grpo", dgs="variance_mass", ratio="sequence", **PER_MODALITY)
    before = moved(terms, copied=True)
    first = run(terms, backend)
    assert_same(run(before, backend), first)
    for field in fields(LossTerms):
        was, now = getattr(before, field.name), getattr(terms, field.name)
        if isinstance(was, Tensor):
            torch.testing.assert_close(now, was.cpu(), rtol=0, atol=0, equal_nan=True)


def check_tiles_of_any_size() -> None:
    """Of Triton alone."""
    terms = make_terms([0, 70, 1, 0, 0, 33, 0], [0, 2, 5, 0], density=1.0, ratio="sequence")
    for tile in (16, 512):
        assert_close_to_reference(terms, run(terms, "triton", tile), "triton")
