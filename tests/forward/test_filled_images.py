"""Filled-in images in training: what was sampled is what is trained, in every layout; chosen steps are unbiased; on a
toy that can be enumerated the likelihood is exact.

Dims: S trajectories, N image tokens, K codes, T steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from itertools import combinations, pairwise, product

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import make_prompt
from small_show_o import VQ, phi, pictures, processor, small_show_o
from torch import Tensor

from syncr1.engine.forward.masked_states import MaskedPlan, State, num_steps_of
from syncr1.engine.forward.objective import Objective, PolicyForward
from syncr1.engine.forward.packing import pack
from syncr1.engine.policies.show_o import ShowOPolicy
from syncr1.engine.policies.show_o_model import ShowOConfig, ShowOForUnifiedGeneration
from syncr1.engine.records import PackedBatch, Rollout, Segment
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling
from syncr1.engine.settings.train_config import MaskedLogp, PolicyLogp

STEPS, MEMBERS = 5, 3


@pytest.fixture(scope="module")
def policy() -> ShowOPolicy:
    policy = ShowOPolicy(*small_show_o()).eval()
    shown = (pictures(2, policy.image_size) + 1) / 2
    policy.load_images = lambda paths: torch.stack([shown[int(str(path))] for path in paths])  # type: ignore[method-assign]
    return policy


@cache
def sampled(policy: ShowOPolicy, cfg_weight: float, top_k: int = 0) -> list[Rollout]:
    """Every plan that there is, with pictures and without."""
    prompts = [
        make_prompt("a red cat"),
        make_prompt("a dog", ("image",)),
        make_prompt("who?", ("text",)),
        make_prompt("what?", image="0"),
        make_prompt("what is it?", ("text",), image="1"),
    ]
    sampling = Sampling(
        num_generations=MEMBERS,
        max_text_tokens=5,
        cfg_weight=cfg_weight,
        top_k=top_k,
        image_steps=STEPS,
        keep_proposals=True,
        seed=3,
    )
    return generate(policy, prompts, sampling)


def packed(
    policy: ShowOPolicy,
    rollouts: Sequence[Rollout],
    plan: MaskedPlan,
    how: PolicyLogp,
    *,
    share_prefix: bool = True,
    max_tokens: int = 1 << 30,
) -> list[PackedBatch]:
    S = len(rollouts)
    return pack(
        policy,
        rollouts,
        torch.linspace(-1, 1, S)[:, None].expand(-1, 2).contiguous(),
        torch.ones(S, dtype=torch.bool),
        num_generations=MEMBERS,
        max_tokens=max_tokens,
        share_prefix=share_prefix,
        guided=how != "conditional",
        masked=plan,
    )


@pytest.mark.parametrize("how", ["conditional", "guided", "guided_detached"])
@pytest.mark.parametrize(("masked_logp", "top_k"), [("committed", 0), ("committed", 4), ("step", 4), ("all", 0)])
def test_what_was_sampled_is_what_is_trained(
    policy: ShowOPolicy, how: PolicyLogp, masked_logp: MaskedLogp, top_k: int
) -> None:
    rollouts = sampled(policy, 2.75, top_k)
    for steps, share_prefix, max_tokens in ((None, True, 1 << 30), (None, False, 400), (2, True, 400)):
        plan = MaskedPlan(masked_logp, steps, salt=1)
        told = 0
        for batch in packed(policy, rollouts, plan, how, share_prefix=share_prefix, max_tokens=max_tokens):
            with torch.no_grad():
                logp = PolicyForward(policy, Objective(policy_logp=how))(batch)["logp"]
            known = batch.loss_mask & batch.sampled_logp.isfinite()
            told += int(known.sum())
            torch.testing.assert_close(logp[known], batch.sampled_logp[known], atol=1e-5, rtol=0)
        if steps is None:
            images = [s for r in rollouts for s in r.segments if s.kind == "image"]
            drawn = sum(int(s.proposal_logp[:, 0].isfinite().sum()) for s in images if s.proposal_logp is not None)
            texts = sum(s.tokens.numel() for r in rollouts for s in r.segments if s.kind == "text")
            wanted = drawn if masked_logp == "all" else len(images) * policy.num_image_tokens
            assert told == texts + wanted


class Given(MaskedPlan):
    """With these steps and no others."""

    chosen: tuple[int, ...] = ()

    def states(self, segment: Segment, key: int) -> list[State]:
        every = MaskedPlan(self.masked_logp).states(segment, key)
        return [state for step, state in enumerate(every) if step in self.chosen]


def loss_and_gradient(policy: ShowOPolicy, batches: Sequence[PackedBatch], how: PolicyLogp) -> tuple[float, Tensor]:
    policy.zero_grad()
    forward, total = PolicyForward(policy, Objective(policy_logp=how, loss_type="dapo")), 0.0
    items = sum(batch.filled.num_items for batch in batches if batch.filled is not None)
    texts = sum(int((batch.loss_mask & (batch.modality == 0)).sum()) for batch in batches)
    for batch in batches:
        loss = forward(batch, num_items={"text": float(max(1, texts)), "image": float(items)})["loss"]
        loss.backward()
        total += float(loss.detach())
    head = policy.model.showo.lm_head.weight.grad
    return total, head.flatten().clone()


@pytest.mark.parametrize("k", [None, 2])
def test_a_step_has_one_ratio_and_one_term_of_the_loss(policy: ShowOPolicy, k: int | None) -> None:
    """Mask-GRPO by hand, beside words that have a ratio each: -min(r A, clip(r) A), r the product over a step."""
    rollouts = sampled(policy, 1.0)[: 2 * MEMBERS]
    (batch,) = packed(policy, rollouts, MaskedPlan("step", k), "conditional")
    forward = PolicyForward(policy, Objective(masked_logp="step", loss_type="grpo", epsilon=0.1, epsilon_high=0.2))
    with torch.no_grad():
        logp = PolicyForward(policy, Objective())(batch)["logp"].double()
    shift = torch.linspace(-0.2, 0.2, logp.numel(), dtype=torch.float64)
    out = forward(replace(batch, old_logp=(logp - shift).float()), num_items={"text": 1.0, "image": 1.0})
    terms, empty = [], 0
    for s, (start, end) in enumerate(pairwise(batch.cu_seqlens.tolist())):
        counts = batch.loss_mask[start:end]
        if not bool(counts.any()):
            terms.append(0.0)
            empty += 1
            continue
        ratio, A = shift[start:end][counts].sum().exp(), float(batch.advantages[s, 0])
        terms.append(float(-torch.minimum(ratio * A, ratio.clamp(0.9, 1.2) * A)))
    words = sum(rollout.segments[0].tokens.numel() for rollout in rollouts if rollout.segments[0].kind == "text")
    assert len(terms) - empty == len(rollouts) * (k or STEPS) + words
    assert float(out["loss"].detach()) == pytest.approx(sum(terms) / len(terms), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("masked_logp", ["committed", "all"])
@pytest.mark.parametrize("k", [1, 2])
def test_the_loss_of_chosen_steps_has_the_whole_sum_as_its_mean(
    policy: ShowOPolicy, masked_logp: MaskedLogp, k: int
) -> None:
    """All choices of k of T steps, by their average: exactly the loss and gradient of all steps."""
    rollouts = sampled(policy, 2.0)[MEMBERS : 2 * MEMBERS]
    whole = loss_and_gradient(policy, packed(policy, rollouts, MaskedPlan(masked_logp), "guided"), "guided")
    parts = []
    for chosen in combinations(range(STEPS), k):
        plan = Given(masked_logp, k)
        object.__setattr__(plan, "chosen", chosen)
        parts.append(loss_and_gradient(policy, packed(policy, rollouts, plan, "guided"), "guided"))
    mean = sum(loss for loss, _ in parts) / len(parts)
    gradient = torch.stack([gradient for _, gradient in parts]).mean(0)
    assert mean == pytest.approx(whole[0], rel=1e-5, abs=1e-7)
    torch.testing.assert_close(gradient, whole[1], atol=1e-6, rtol=1e-4)


def test_a_group_may_be_cut_between_its_members(policy: ShowOPolicy) -> None:
    rollouts = sampled(policy, 2.0)[: 2 * MEMBERS]
    whole = packed(policy, rollouts, MaskedPlan(), "guided")
    parts = packed(policy, rollouts, MaskedPlan(), "guided", max_tokens=250)
    assert len(whole) == 1 and len(parts) == 2 * MEMBERS
    (loss, gradient), (summed, added) = (loss_and_gradient(policy, batches, "guided") for batches in (whole, parts))
    assert summed == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(added, gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("masked_logp", ["committed", "step"])
def test_what_was_pruned_counts_as_if_it_taught_nothing(policy: ShowOPolicy, masked_logp: MaskedLogp) -> None:
    """A loss that averages over sequences is the same for a trajectory that was pruned and one without an advantage,
    where each step is a sequence as well."""
    rollouts = sampled(policy, 2.0)[: 2 * MEMBERS]
    advantages = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.0, 0.5])[:, None].expand(-1, 2).contiguous()
    losses = []
    for keep in (advantages[:, 0] != 0, torch.ones(len(rollouts), dtype=torch.bool)):
        plan = MaskedPlan(masked_logp)
        (batch,) = pack(
            policy, rollouts, advantages, keep, num_generations=MEMBERS, max_tokens=1 << 30, guided=True, masked=plan
        )
        words = sum(r.segments[0].tokens.numel() for r in rollouts if r.segments[0].kind == "text")
        wanted = {"committed": len(rollouts), "step": len(rollouts) * STEPS + words}[masked_logp]
        assert batch.cu_seqlens.numel() - 1 == wanted
        objective = Objective(policy_logp="guided", loss_type="grpo", masked_logp=masked_logp)
        with torch.no_grad():
            losses.append(PolicyForward(policy, objective)(batch, num_items={"text": 1.0, "image": 1.0})["loss"])
    torch.testing.assert_close(losses[0], losses[1])


def test_steps_are_drawn_for_each_image_and_each_step_of_training(policy: ShowOPolicy) -> None:
    segment = sampled(policy, 2.0)[MEMBERS].segments[0]
    drawn = {
        tuple(int(state.known.sum()) for state in MaskedPlan("committed", 2, salt=salt).states(segment, key))
        for salt in range(4)
        for key in range(4)
    }
    assert len(drawn) > 3
    same = [MaskedPlan("committed", 2, salt=1).states(segment, 7) for _ in range(2)]
    assert all(torch.equal(a.known, b.known) for a, b in zip(*same, strict=True))
    assert num_steps_of(segment) == STEPS


def test_random_masking_scores_what_it_masks(policy: ShowOPolicy) -> None:
    segment = sampled(policy, 2.0)[MEMBERS].segments[0]
    shares = []
    for key in range(40):
        (state,) = MaskedPlan("random_mask").states(segment, key)
        assert torch.equal(state.known, ~state.scored) and bool(state.scored.any())
        assert bool(state.logp.isnan().all())
        shares.append(float(state.scored.float().mean()))
    assert min(shares) < 0.3 and max(shares) > 0.8


def test_what_was_given_is_never_scored(policy: ShowOPolicy) -> None:
    """Supervised training: visible places have order -1, masked ones 0."""
    order = torch.where(torch.arange(16) % 3 == 0, 0, -1)
    segment = replace(sampled(policy, 2.0)[MEMBERS].segments[0], order=order)
    (state,) = MaskedPlan().states(segment, 0)
    assert torch.equal(state.scored, order == 0) and torch.equal(state.known, order == -1)
    (anew,) = MaskedPlan("random_mask").states(segment, 0)
    assert not bool((anew.scored & (order == -1)).any())


# A toy whose likelihood can be enumerated: two by two codes of four kinds, two steps ---------------------------------


@pytest.fixture(scope="module")
def toy() -> ShowOPolicy:
    made = processor(8)
    vq = replace(VQ, bits=2)
    config = ShowOConfig(text_config=phi(len(made.tokenizer) + 5), vq_config=asdict(vq), image_size=8, text_slots=24)
    config.take_tokens(made.tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ShowOForUnifiedGeneration(config)
    return ShowOPolicy(model.double(), made).eval()


def every_drawing(policy: ShowOPolicy) -> list[Rollout]:
    """Each image in each order of two steps, two places a step, which a random order takes alike."""
    orders = [torch.tensor([int(place not in first) for place in range(4)]) for first in combinations(range(4), 2)]
    prompt = make_prompt("a cat", ("image",))
    tokens, nothing = policy.prompt_tokens(prompt), torch.zeros(4)
    segments = [
        Segment(
            kind="image", tokens=torch.tensor(codes), logp=nothing, logp_mixed=nothing, entropy=nothing, order=order
        )
        for codes in product(range(4), repeat=4)
        for order in orders
    ]
    return [
        Rollout(prompt=prompt, member=i, prompt_tokens=tokens, prompt_image=None, segments=(segment,))
        for i, segment in enumerate(segments)
    ]


def test_the_likelihood_of_a_random_order_is_exact(toy: ShowOPolicy) -> None:
    """Over all images and orders probabilities add up to 1, their gradient to 0; a step's marginal is the model's."""
    rollouts = every_drawing(toy)
    S = len(rollouts)
    (batch,) = pack(
        toy, rollouts, torch.zeros(S, 2), torch.ones(S, dtype=torch.bool), num_generations=S, max_tokens=1 << 30
    )
    logp = PolicyForward(toy, Objective())(batch)["logp"]
    owner = torch.arange(S).repeat_interleave(batch.cu_seqlens.diff())
    joint = (torch.zeros(S, dtype=logp.dtype).index_add(0, owner, logp)).exp() / 6
    assert float(joint.detach().sum()) == pytest.approx(1.0, abs=1e-5)
    toy.zero_grad()
    joint.sum().backward()
    assert float(toy.model.showo.lm_head.weight.grad.abs().max()) < 1e-6
    images = joint.detach().view(4, 4, 4, 4, 6).sum(-1)
    with torch.no_grad():  # by hand: the first two places from masks alone
        start = torch.full((4,), toy.mask_token)
        first = independent(toy, rollouts[0].prompt_tokens, start)
    expected = torch.zeros(4, 4, 4, 4, dtype=first.dtype)
    for chosen in combinations(range(4), 2):
        others = [place for place in range(4) if place not in chosen]
        for codes in product(range(4), repeat=2):
            state = start.clone()
            state[list(chosen)] = torch.tensor(codes)
            second = independent(toy, rollouts[0].prompt_tokens, state)
            given = first[chosen[0], codes[0]] * first[chosen[1], codes[1]]
            for rest in product(range(4), repeat=2):
                image = state.clone()
                image[others] = torch.tensor(rest)
                expected[tuple(image.tolist())] += given * second[others[0], rest[0]] * second[others[1], rest[1]] / 6
    torch.testing.assert_close(images.to(expected.dtype), expected, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def independent(toy: ShowOPolicy, prompt: Tensor, state: Tensor) -> Tensor:
    """[N, K] probabilities at every place of a state, by transformers' own forward and a mask."""
    config = toy.model.config
    soi, eoi = toy.image_frame()
    codes = torch.where(state == toy.mask_token, config.mask_token_id, state + config.text_rows)
    ids = torch.cat([prompt, soi, codes, eoi])
    seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    seen[prompt.numel() :] = True
    model = toy.model.showo
    model.set_attn_implementation("eager")
    mask = torch.zeros(1, 1, *seen.shape, dtype=torch.float64).masked_fill(~seen, -1e30)
    out = model(input_ids=ids[None], attention_mask=mask, position_ids=torch.arange(len(ids))[None], use_cache=False)
    model.set_attn_implementation("syncr1")
    return out.logits[0, -5:-1, config.text_rows : config.text_rows + 4].softmax(-1)
