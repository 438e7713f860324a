"""correction.py: TRL's weights for the sampler's policy by hand, and which tokens an update's entropies leave out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import own_process_group, packed, sampled, sharp_policy
from torch import Tensor

from syncr1.engine.forward.objective import Objective, PolicyForward
from syncr1.engine.learn.correction import DIFFERENCE, RATIO, of_high_entropy, sampler_ratio
from syncr1.engine.learn.learner import Learner, replay_error
from syncr1.engine.learn.metrics import COUNT, pooled
from syncr1.engine.learn.optimizer import LearnerSettings
from syncr1.engine.records import PackedBatch
from syncr1.kernels.api import linear_grpo_loss

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]
GROUP = 3
NAN = math.nan


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    with own_process_group():
        yield


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> list[PackedBatch]:
    """Every kind of trajectory, a micro-batch per group."""
    policy = sharp_policy()
    return packed(policy, sampled(policy, tmp_path_factory.mktemp("correction"), num_generations=GROUP), GROUP, 1)


def by_hand(batch: PackedBatch, gap_T: Tensor, level: str, correction: str, cap: float) -> list[float]:
    """TRL's, sequence by sequence: exp of the difference, or of its sum; cut off, or 0 beyond."""
    weights = []
    bounds = batch.cu_seqlens.tolist()
    for start, end in pairwise(bounds):
        total = float(gap_T[start:end].double().sum())
        for gap, used in zip(gap_T[start:end].tolist(), batch.loss_mask[start:end].tolist(), strict=True):
            w = math.exp(total if level == "sequence" else gap)
            w = min(w, cap) if correction == "truncate" else w * (w <= cap)
            weights.append(w if used else 1.0)
    return weights


@pytest.mark.parametrize("correction", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_are_trls(level: str, correction: str, batches: list[PackedBatch]) -> None:
    """Over a batch with pruned sequences, given tokens and one whose probability the sampler did not record."""
    batch, generator = max(batches, key=lambda one: int(one.loss_mask.sum())), torch.Generator().manual_seed(0)
    used = batch.loss_mask
    trainer = torch.where(used, batch.sampled_logp + 0.2 * torch.randn(used.shape, generator=generator), 0.0)
    unknown = int(used.nonzero()[3])
    sampled_logp = batch.sampled_logp.clone()
    sampled_logp[unknown] = NAN
    batch = replace(batch, sampled_logp=sampled_logp)
    gap_T = torch.where(used & sampled_logp.isfinite(), trainer - sampled_logp, 0.0)
    objective = Objective(importance_correction=correction, importance_level=level, importance_cap=1.2)  # type: ignore[arg-type]
    found, told = sampler_ratio(batch, trainer, objective)
    want = by_hand(batch, gap_T, level, correction, 1.2)
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx(want, rel=1e-5)
    assert level == "sequence" or found[unknown] == 1
    cut = torch.tensor(want)[used]
    assert bool((cut == (1.2 if correction == "truncate" else 0.0)).any()), "the cap takes part"
    gaps = gap_T[used & sampled_logp.isfinite()].abs()
    assert told[f"{DIFFERENCE}/mean"] == pytest.approx(float(gaps.mean()), rel=1e-5)
    assert told[f"{DIFFERENCE}/max"] == pytest.approx(float(gaps.max()), rel=1e-5)
    each = (
        cut
        if level == "token"
        else torch.tensor([w for w, _ in dict.fromkeys(zip(cut.tolist(), owners(batch), strict=True))])
    )
    assert told[f"{RATIO}/mean"] == pytest.approx(float(each.mean()), rel=1e-5)
    assert (told[f"{RATIO}/min"], told[f"{RATIO}/max"]) == pytest.approx((float(each.min()), float(each.max())))
    assert told[f"{COUNT}{RATIO}/mean"] == each.numel() and told[f"{COUNT}{DIFFERENCE}/mean"] == gaps.numel()
    whole = pooled([told, sampler_ratio(replace(batch, loss_mask=torch.zeros_like(used)), trainer, objective)[1]])
    assert whole == pytest.approx(told), "a batch that only keeps ranks together says nothing"


def owners(batch: PackedBatch) -> list[int]:
    """Of each loss token: its sequence."""
    lengths = batch.cu_seqlens.diff().long()
    owner_T = torch.arange(lengths.numel()).repeat_interleave(lengths)
    return owner_T[batch.loss_mask].tolist()


def test_high_entropy_is_of_the_whole_update(batches: list[PackedBatch]) -> None:
    """A share of each modality's tokens over all micro-batches and ranks, not of each; anchors keep theirs."""
    generator = torch.Generator().manual_seed(1)
    entropies = [torch.rand(batch.tokens.shape, generator=generator) * (1 + i) for i, batch in enumerate(batches)]
    batches = [replace(batch, anchor=i == 2) for i, batch in enumerate(batches)]
    others = torch.rand(40, generator=generator)  # of a second rank
    masks = of_high_entropy(batches, entropies, 0.25, lambda own: torch.cat([own, others]))
    assert bool(masks[2].all()) and any(
        not bool(mask[b.loss_mask].any()) for mask, b in zip(masks, batches, strict=True)
    )
    for code in (0, 1):
        rows = [b.loss_mask & (b.modality == code) & (not b.anchor) for b in batches]
        values = torch.cat([e[row] for e, row in zip(entropies, rows, strict=True)])
        stays = torch.cat([mask[row] for mask, row in zip(masks, rows, strict=True)])
        threshold = torch.cat([values, others]).sort().values[int(0.75 * (values.numel() + 40))]
        assert torch.equal(stays, values >= threshold) and 0 < int(stays.sum()) < stays.numel()
    assert all(bool(mask[~b.loss_mask].all()) for mask, b in zip(masks, batches, strict=True))
    assert all(bool(mask.all()) for mask in of_high_entropy(batches, entropies, 1.0, lambda own: own))


def learner_of(num_iterations: int = 1, **objective: Any) -> Learner:
    settings = LearnerSettings(learning_rate=0.0, num_iterations=num_iterations)
    return Learner(sharp_policy(), Objective(**objective), settings)


@pytest.mark.slow
def test_what_the_update_is_multiplied_by(batches: list[PackedBatch]) -> None:
    """By 1 where sampler and trainer agree; by 2 where the sampler thought all half as likely; a cap ends it."""
    plain, corrected = learner_of(), learner_of(importance_correction="truncate")
    scored = corrected.score(batches)
    assert all(b.old_logp is None and b.is_ratio is not None for b in scored), "one update: the ratio of updates is 1"
    assert all(float((b.is_ratio - 1).abs().max()) < 1e-4 for b in scored if b.is_ratio is not None)
    assert 0 < corrected.scoring[f"{DIFFERENCE}/max"] < 1e-4 and abs(corrected.scoring[f"{RATIO}/mean"] - 1) < 1e-4
    want = plain.update(plain.score(batches))
    assert plain.scoring == {} and corrected.update(scored)["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-3)
    unlikely = [replace(batch, sampled_logp=batch.sampled_logp - math.log(2)) for batch in batches]
    twice = corrected.update(corrected.score(unlikely))
    assert twice["grad_norm"] == pytest.approx(2 * want["grad_norm"], rel=1e-3)
    assert corrected.scoring[f"{DIFFERENCE}/mean"] == pytest.approx(math.log(2), rel=1e-4)
    capped = learner_of(importance_correction="mask", importance_cap=1.5)
    assert capped.update(capped.score(unlikely))["grad_norm"] == 0 and capped.scoring[f"{RATIO}/max"] == 0
    several = learner_of(2, importance_correction="truncate", top_entropy_quantile=0.5)
    for batch in several.score(batches):
        assert batch.old_logp is not None and replay_error(batch, batch.old_logp) < 1e-4 and batch.is_ratio is not None
        assert set(batch.is_ratio.round(decimals=3).tolist()) <= {0.0, 1.0}


@pytest.mark.slow
def test_tokens_of_low_entropy_keep_their_kl_term(batches: list[PackedBatch]) -> None:
    """Their advantage is not learnt from: without a KL term nothing is left of them."""
    few, all_of_them = learner_of(top_entropy_quantile=0.2), learner_of()
    scored = few.score(batches)
    kept = sum(float(b.is_ratio[b.loss_mask].sum()) for b in scored if b.is_ratio is not None)
    total = sum(int(batch.loss_mask.sum()) for batch in batches)
    assert kept / total == pytest.approx(0.2, abs=0.01)
    found, want = few.update(scored), all_of_them.update(all_of_them.score(batches))
    assert found["tokens/image"] == want["tokens/image"], "divisors and metrics are of all tokens"
    assert 0 < found["grad_norm"] != pytest.approx(want["grad_norm"], rel=0.05)


@pytest.mark.slow
def test_of_one_micro_batch_the_quantile_is_the_kernels(batches: list[PackedBatch]) -> None:
    """`top_entropy_quantile` of `linear_grpo_loss`, which knows one call alone: the same loss and gradient."""
    batch = max(batches, key=lambda one: int((one.modality == 0).sum()))
    learner, items = learner_of(top_entropy_quantile=0.3), {"text": 20.0, "image": 50.0}
    forward = PolicyForward(learner.policy, Objective())
    (scored,) = learner.score([batch])
    losses = [
        forward(scored, num_items=items)["loss"],
        linear_grpo_loss(
            forward._streams(batch),
            None,
            batch.cu_seqlens,
            batch.group_offsets,
            advantages=batch.advantages[:, 0],
            loss_mask=batch.loss_mask,
            modality=batch.modality,
            num_items=items,
            top_entropy_quantile=0.3,
        ).loss,
    ]
    trained = [p for p in learner.policy.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(loss, trained, allow_unused=True) for loss in losses)
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=1e-6) and float(losses[0]) != 0
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
