"""The training forward against arithmetic by hand, one sequence at a time, in float64; cutting changes no gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import PlainJanus, all_kinds_of_prompts, packed, random_rewards, sampled, sharp_policy
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from syncr1.engine.forward.objective import Objective, PolicyForward
from syncr1.engine.learn.learner import Learner
from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.records import IMAGE, PackedBatch, Rollout
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling
from syncr1.kernels.api import linear_logp

GROUP = 3


@pytest.fixture(scope="module")
def policy() -> JanusPolicy:
    """In float64, so that what remains is arithmetic and not rounding."""
    return sharp_policy().double()


@pytest.fixture(scope="module")
def rollouts(policy: JanusPolicy, tmp_path_factory: pytest.TempPathFactory) -> list[Rollout]:
    return sampled(policy, tmp_path_factory.mktemp("photos"), num_generations=GROUP)


@pytest.fixture(scope="module")
def reference(policy: JanusPolicy) -> JanusPolicy:
    """A policy a little away from `policy`: old and reference log-probabilities come from it."""
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(0.03 * parameter.std() * torch.randn(parameter.shape, dtype=parameter.dtype))
    return other


def gradients(loss: Tensor, policy: JanusPolicy) -> dict[str, Tensor]:
    named = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {name: g for (name, _), g in zip(named, found, strict=True) if g is not None and g.abs().max() > 0}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest entry of each parameter's gradient."""
    assert set(got) == set(want) and len(want) > 20
    for name, expected in want.items():
        assert float((got[name] - expected).abs().max() / expected.abs().max()) <= tolerance, name


class FakeRanks:
    """`Learner._normalisers` for one rank, without DeepSpeed."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.world_size = objective, 1

    def all_reduce(self, values: Tensor) -> Tensor:
        return values


def update_loss(policy: JanusPolicy, objective: Objective, batches: Sequence[PackedBatch]) -> Tensor:
    """The sum that a learner's update takes the gradient of."""
    num_items, shares = Learner._normalisers(FakeRanks(objective), batches)  # type: ignore[arg-type]
    forward = PolicyForward(policy, objective)
    losses = [forward(b, num_items=num_items, share=s)["loss"] for b, s in zip(batches, shares, strict=True)]
    return torch.stack(losses).sum()


def with_scores(batches: Sequence[PackedBatch], other: JanusPolicy) -> list[PackedBatch]:
    forward = PolicyForward(other, Objective())
    with torch.no_grad():
        scores = [forward(batch)["logp"] for batch in batches]
    return [replace(b, old_logp=s, ref_logp=s) for b, s in zip(batches, scores, strict=True)]


# By hand --------------------------------------------------------------------------------------------------------------


class DifferentiableJanus(PlainJanus):
    """Plain transformers on the policy's own parameters, so that gradients can be compared by name."""

    def __init__(self, policy: JanusPolicy) -> None:
        super().__init__(policy)
        self.model.load_state_dict(policy.model.state_dict())

    def log_probabilities(self, rollout: Rollout) -> list[tuple[str, Tensor]]:
        pieces, out = [self.prompt(rollout.prompt)], []
        for segment in rollout.segments:
            pieces.append(self.lead(segment))
            first = sum(len(piece) for piece in pieces)
            pieces.append(self.text(segment.tokens) if segment.kind == "text" else self.image(segment.tokens))
            hidden = self.hidden(torch.cat(pieces))[first - 1 : -1]
            logits = self.text_logits(hidden) if segment.kind == "text" else self.image_logits(hidden)
            out.append((segment.kind, logits.log_softmax(-1).gather(1, segment.tokens[:, None])[:, 0]))
        return out


def dapo_by_hand(
    plain: DifferentiableJanus,
    other: DifferentiableJanus,
    rollouts: list[Rollout],
    rewards: Tensor,
    beta: float,
    clip: float,
) -> Tensor:
    """Σ over tokens of each modality, over their number; advantages from each group's own mean and deviation."""
    sums: dict[str, list[Tensor]] = {"text": [], "image": []}
    for index, rollout in enumerate(rollouts):
        group = [float(r) for r in rewards[index // GROUP * GROUP :][:GROUP]]
        mean = sum(group) / GROUP
        deviation = math.sqrt(sum((r - mean) ** 2 for r in group) / (GROUP - 1))
        advantage = (group[index % GROUP] - mean) / (deviation + 1e-4)
        with torch.no_grad():
            before = other.log_probabilities(rollout)
        for (kind, logp), (_, old) in zip(plain.log_probabilities(rollout), before, strict=True):
            ratio = (logp - old).exp()
            gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
            kl = (old - logp).exp() - (old - logp) - 1
            sums[kind].append(beta * kl - gain)
    return sum((torch.cat(values).mean() for values in sums.values()), start=torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize(("on_policy", "beta"), [(True, 0.0), (False, 0.1)])
def test_gradient_equals_the_sum_over_sequences_by_hand(
    policy: JanusPolicy, reference: JanusPolicy, rollouts: list[Rollout], on_policy: bool, beta: float
) -> None:
    """Protects everything between a reward and a gradient: packing, positions, both heads, clipping, KL, reduction."""
    objective = Objective(loss_type="dapo", beta=beta, epsilon=0.05)
    batches = packed(policy, rollouts, GROUP, 250)
    other = policy if on_policy else reference
    batches = with_scores(batches, other)
    rewards = random_rewards(len(rollouts))
    got = gradients(update_loss(policy, objective, batches), policy)
    plain = DifferentiableJanus(policy)
    expected_loss = dapo_by_hand(plain, DifferentiableJanus(other), rollouts, rewards, beta, 0.05)
    loss = update_loss(policy, objective, batches)
    assert float(loss) == pytest.approx(float(expected_loss), abs=1e-6)
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    named = [(n, p) for n, p in plain.model.named_parameters() if f"model.{n}" in trained]
    found = torch.autograd.grad(expected_loss, [p for _, p in named], allow_unused=True)
    want = {f"model.{n}": g for (n, _), g in zip(named, found, strict=True) if g is not None and g.abs().max() > 0}
    assert_same(got, want, 1e-6)


LOSSES: list[dict[str, Any]] = [
    *({"loss_type": name} for name in ("grpo", "bnpo", "dapo", "sapo", "luspo", "vespo")),
    {"loss_type": "dr_grpo", "max_length": 24},
    {"loss_type": "cispo", "epsilon_high": 5.0},
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"loss_type": "dapo", "credit": "per_segment"},
    {"loss_type": "dapo", "credit": "image_only", "delta": 2.0},
]


@pytest.fixture(scope="module")
def cuts(policy: JanusPolicy, reference: JanusPolicy, rollouts: list[Rollout]) -> list[list[PackedBatch]]:
    """One pack, a few, and one a group; four members pruned."""
    keep = torch.ones(len(rollouts), dtype=torch.bool)
    keep[[1, 4, 9, 10]] = False
    return [with_scores(packed(policy, rollouts, GROUP, budget, keep=keep), reference) for budget in (1 << 30, 200, 1)]


@pytest.mark.parametrize("settings", LOSSES, ids=lambda s: "-".join(map(str, s.values())))
def test_gradient_does_not_depend_on_the_micro_batches(
    policy: JanusPolicy, cuts: list[list[PackedBatch]], settings: dict[str, Any]
) -> None:
    """`max_tokens_per_microbatch` is about memory alone, for every loss: relative difference at most 1e-6."""
    objective = Objective(beta=0.05, **settings)
    assert len(cuts[0]) == 1 and len(cuts[-1]) == 6 and 1 < len(cuts[1]) < 6
    assert any(batch.prefix_tokens.numel() for batch in cuts[-1]), "prompts are shared"
    whole, *others = (gradients(update_loss(policy, objective, batches), policy) for batches in cuts)
    for got in others:
        assert_same(got, whole, 1e-6)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_shared_prefix_changes_no_gradient(
    policy: JanusPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointed: bool
) -> None:
    """Every plan, follow-up turns included, pruned members and whole groups, in float64: relative difference 1e-9."""

    def exact_norm(module: Any, hidden: Tensor) -> Tensor:
        """transformers' own rounds to float32 whatever comes in, and copies of a row round apart."""
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + module.variance_epsilon) * module.weight

    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    prompts = all_kinds_of_prompts(tmp_path)
    rollouts = generate(policy, prompts, Sampling(num_generations=GROUP, cfg_weight=2.0, max_text_tokens=8))
    keep = torch.ones(len(rollouts), dtype=torch.bool)
    keep[[0, 3, 4, 9, 10, 11]] = False
    probe = torch.randn(len(rollouts) * 64, dtype=torch.float64)
    trained = copy.deepcopy(policy).train()
    if checkpointed:
        trained.checkpoint_activations()
    results = []
    for share in (True, False):
        (batch,) = packed(policy, rollouts, GROUP, keep=keep, share_prefix=share)
        model = trained if share else policy
        sums = torch.zeros((), dtype=torch.float64)
        streams = PolicyForward(model, Objective())._streams(batch)
        for stream, weights in zip(streams, (probe, probe.flip(0)), strict=True):
            logp, entropy = linear_logp(
                stream.hidden, stream.weight, stream.targets, bias=stream.bias, forbidden=stream.forbidden
            )
            sums = sums + (logp * weights[: len(logp)]).sum() + 0.1 * entropy.sum()
        results.append((batch.num_tokens, gradients(sums, model)))
    assert results[0][0] < 0.85 * results[1][0], "the prompts are computed once"
    assert_same(results[0][1], results[1][1], 1e-9)


def test_a_wrong_normaliser_is_seen(policy: JanusPolicy, rollouts: list[Rollout]) -> None:
    """The control: dividing by each micro-batch's own tokens is far outside the tolerance above."""
    objective = Objective(loss_type="dapo", beta=0.0)
    forward = PolicyForward(policy, objective)

    def own(batches: Sequence[PackedBatch]) -> Tensor:
        losses = []
        for batch in batches:
            image = float((batch.loss_mask & (batch.modality == IMAGE)).sum())
            items = {"text": float(batch.loss_mask.sum()) - image, "image": image}
            losses.append(forward(batch, num_items=items)["loss"] / len(batches))
        return torch.stack(losses).sum()

    one, many = (gradients(own(packed(policy, rollouts, GROUP, budget)), policy) for budget in (1 << 30, 1))
    with pytest.raises(AssertionError):
        assert_same(many, one, 0.05)


def test_image_only_credit_leaves_text_alone(policy: JanusPolicy, rollouts: list[Rollout]) -> None:
    batches = packed(policy, rollouts, GROUP)
    got = gradients(update_loss(policy, Objective(credit="image_only"), batches), policy)
    assert not any(name.endswith("lm_head.weight") for name in got)
    assert any("generation_head" in name for name in got)
    shared = gradients(update_loss(policy, Objective(credit="shared"), batches), policy)
    assert any(name.endswith("lm_head.weight") for name in shared)


def test_a_batch_without_loss_gives_zeros(policy: JanusPolicy, rollouts: list[Rollout]) -> None:
    """All pruned: a loss of exactly 0 that still has a graph, and gradients that are finite zeros."""
    batches = packed(policy, rollouts, GROUP, keep=torch.zeros(len(rollouts), dtype=torch.bool))
    loss = update_loss(policy, Objective(loss_type="grpo"), batches)
    assert float(loss) == 0.0 and loss.requires_grad
    assert gradients(loss, policy) == {}
    out = PolicyForward(policy, Objective())(batches[0])
    assert not out["logp"].any() and not out["entropy"].any()
