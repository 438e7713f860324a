"""Packing: what lies where on the token axis, and that cutting into micro-batches loses and adds nothing."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import CHAIN, given, make_prompt, packed, random_advantages, sampled, sharp_policy
from torch import Tensor

from syncr1.engine.forward.packing import pack
from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.records import IMAGE, TEXT, PackedBatch, Rollout, Segment


@pytest.fixture(scope="module")
def policy() -> JanusPolicy:
    return sharp_policy()


@pytest.fixture(scope="module")
def rollouts(policy: JanusPolicy, tmp_path_factory: pytest.TempPathFactory) -> list[Rollout]:
    """Six groups of three: text, image and both; three with photos."""
    return sampled(policy, tmp_path_factory.mktemp("photos"))


START = 77
"""Stands for the image's start in trajectories by hand."""


def by_hand(prompt_tokens: list[int], *segments: Segment, seen: Tensor | None = None) -> Rollout:
    """A trajectory of given tokens; an image segment gets its start."""
    start = torch.tensor([START])
    ready = tuple(replace(segment, lead=start) if segment.kind == "image" else segment for segment in segments)
    return Rollout(
        prompt=make_prompt("x"), member=0, prompt_tokens=torch.tensor(prompt_tokens), prompt_image=seen, segments=ready
    )


def pack_all(
    policy: JanusPolicy, rollouts: list[Rollout], keep: list[bool], group: int, *, share_prefix: bool = True
) -> list[PackedBatch]:
    advantages = torch.arange(2.0 * len(rollouts)).view(-1, 2)
    return pack(
        policy,
        rollouts,
        advantages,
        torch.tensor(keep),
        num_generations=group,
        max_tokens=1 << 30,
        share_prefix=share_prefix,
    )


def test_every_column_by_hand(policy: JanusPolicy) -> None:
    """Prompts once, then responses `text | image_start | image`; what was given between segments has no loss."""
    slot = policy.image_slot
    seen = torch.arange(6.0).view(2, 3)
    follow_up = replace(given("text", [50]), lead=torch.tensor([60, slot, slot, 61]), lead_image=seen + 20)
    members = [
        by_hand([1, slot, slot, 9], given("text", [30, 31, 2]), given("image", [7, 8]), seen=seen),
        by_hand([1, slot, slot, 9], given("image", [6, 5]), follow_up, seen=seen),
        by_hand([1, slot, slot, 9], given("text", [2]), seen=seen),
        by_hand([5, 1], given("text", [40, 41])),
        by_hand([5, 1], given("text", [42])),
        by_hand([5, 1], given("text", [43])),
    ]
    (batch,) = pack_all(policy, members, [True, True, False, True, False, True], 3)
    assert batch.prefix_tokens.tolist() == [1, slot, slot, 9, 5, 1]
    assert batch.layout.cu_prefixes.tolist() == [0, 4, 6]
    assert batch.tokens.tolist() == [30, 31, 2, START, 7, 8, START, 6, 5, 60, slot, slot, 61, 50, 40, 41, 43]
    assert batch.modality.tolist() == [TEXT] * 4 + [IMAGE] * 2 + [TEXT] + [IMAGE] * 2 + [TEXT] * 8
    assert batch.loss_mask.int().tolist() == [1, 1, 1, 0, 1, 1, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1]
    assert batch.cu_seqlens.tolist() == [0, 6, 14, 14, 16, 16, 17] and batch.group_offsets.tolist() == [0, 3, 6]
    positions = [0, 1, 2, 3, 0, 1, *range(4, 10), *range(4, 12), 2, 3, 2]
    assert batch.layout.position_ids().tolist() == positions
    # The first token of each response is predicted by its prompt's last row, the others by the row before.
    predicting = batch.layout.predicting_rows()
    assert predicting.tolist() == [3, 6, 7, 8, 9, 10, 3, 12, 13, 14, 15, 16, 17, 18, 5, 20, 5]
    assert batch.advantages.tolist() == [[2.0 * i, 2.0 * i + 1] for i in range(6)], "a pruned member keeps its place"
    assert batch.image_rows.tolist() == [1, 2, 16, 17]
    assert torch.equal(batch.image_embeddings, torch.cat([seen, seen + 20]))
    assert batch.sampled_logp[batch.loss_mask].tolist() == [-1, -2, -3, -1, -2, -1, -2, -1, -1, -2, -1]
    assert batch.sampled_logp[~batch.loss_mask].isnan().all()
    assert batch.num_tokens == 23 and batch.num_unshared_tokens == 23 + 4 + 2
    assert batch.cu_seqlens.dtype == batch.group_offsets.dtype == torch.int32 and batch.modality.dtype == torch.uint8


def test_without_sharing_every_response_brings_its_prompt(policy: JanusPolicy) -> None:
    """So does the only kept member of a group, where nothing can be shared."""
    members = [by_hand([5, 1], given("text", [40 + i])) for i in range(4)]
    for keep, share in (([True] * 4, False), ([True, False] * 2, True)):
        (batch,) = pack_all(policy, members, keep, 2, share_prefix=share)
        kept = [40 + i for i in range(4) if keep[i]]
        assert batch.prefix_tokens.numel() == 0 and batch.layout.cu_prefixes.tolist() == [0, 0, 0]
        assert batch.tokens.tolist() == [t for token in kept for t in (5, 1, token)]
        assert batch.loss_mask.int().tolist() == [0, 0, 1] * len(kept)
        assert batch.layout.position_ids().tolist() == [0, 1, 2] * len(kept)
        assert batch.num_unshared_tokens == batch.num_tokens == 3 * len(kept)


def test_a_group_with_two_prompts_is_refused(policy: JanusPolicy) -> None:
    """Their responses would silently be trained behind the wrong prompt."""
    members = [by_hand([5, 1], given("text", [40])), by_hand([5, 2], given("text", [41]))]
    with pytest.raises(ValueError, match="expected members of a group to share one prompt"):
        pack_all(policy, members, [True, True], 2)
    other = replace(members[0], prompt=replace(members[0].prompt, images=(Path("b.png"),)))
    with pytest.raises(ValueError, match="pass num_generations=1"):
        pack_all(policy, [members[0], other], [True, True], 2)


def test_budgets_cut_between_groups_only(policy: JanusPolicy, rollouts: list[Rollout]) -> None:
    """Whole groups in order, at most the budget each; a group above the budget stands alone."""
    whole = packed(policy, rollouts, 3)[0]
    counts_seen = set()
    for budget in (1, 100, 150, 250, 400, whole.num_tokens - 1, whole.num_tokens):
        batches = packed(policy, rollouts, 3, budget)
        counts_seen.add(len(batches))
        for batch in batches:
            groups = batch.group_offsets.diff()
            assert (groups == 3).all() and int(groups.sum()) == len(batch.advantages) == batch.cu_seqlens.numel() - 1
            assert batch.num_tokens <= budget or len(groups) == 1
        for a, b in itertools.pairwise(batches):
            first_group_of_b = int(b.layout.cu_prefixes[1]) + int(b.cu_seqlens[int(b.group_offsets[1])])
            assert a.num_tokens + first_group_of_b > budget, "the next group would have fitted"
        for name in ("prefix_tokens", "tokens", "modality", "loss_mask", "advantages"):
            parts = [getattr(b, name) for b in batches if getattr(b, name).numel()]
            assert torch.equal(torch.cat(parts), getattr(whole, name)), name
    assert {1, 2, 6} <= counts_seen


def test_pruned_trajectories_cost_no_tokens(policy: JanusPolicy, rollouts: list[Rollout]) -> None:
    """Their places on [S] stay; groups without a kept trajectory appear in no batch."""
    keep = torch.ones(18, dtype=torch.bool)
    keep[[0, 1, 2, 4, 10, 11]] = False
    (batch,) = packed(policy, rollouts, 3, keep=keep, share_prefix=False)
    lengths = batch.cu_seqlens.diff()
    assert len(lengths) == 15 and torch.equal(lengths > 0, keep[3:])
    torch.testing.assert_close(batch.advantages, random_advantages(18, 3)[3:])
    sampled_tokens = sum(len(s.tokens) for r, k in zip(rollouts, keep, strict=True) if k for s in r.segments)
    assert int(batch.loss_mask.sum()) == sampled_tokens
    kept = [r for r, k in zip(rollouts, keep, strict=True) if k]
    alone = torch.cat([packed(policy, [r], 1)[0].tokens for r in kept])
    assert torch.equal(batch.tokens, alone)
    (shared,) = packed(policy, rollouts, 3, keep=keep)
    assert torch.equal(shared.tokens[shared.loss_mask], batch.tokens[batch.loss_mask])
    assert shared.num_unshared_tokens == batch.num_tokens


def test_nothing_kept_leaves_one_batch_without_loss(policy: JanusPolicy, rollouts: list[Rollout]) -> None:
    """Every rank has a forward pass to take part in; it teaches nothing."""
    (batch,) = packed(policy, rollouts, 3, keep=torch.zeros(18, dtype=torch.bool))
    assert batch.num_tokens > 0 and not batch.loss_mask.any()
    assert batch.cu_seqlens.diff().tolist() == [batch.num_tokens, 0, 0] and batch.group_offsets.tolist() == [0, 3]


def test_anchors_lie_in_batches_of_their_own(policy: JanusPolicy, rollouts: list[Rollout]) -> None:
    """Marked as such, after the others, none lost: they have their own KL weight."""
    mixed = [replace(r, prompt=replace(r.prompt, rewarded=i // 3 not in (1, 4))) for i, r in enumerate(rollouts)]
    batches = packed(policy, mixed, 3)
    assert [batch.anchor for batch in batches] == [False, True]
    torch.testing.assert_close(batches[1].advantages, random_advantages(18, 3)[[3, 4, 5, 12, 13, 14]])
    torch.testing.assert_close(
        batches[0].advantages, random_advantages(18, 3)[[0, 1, 2, 6, 7, 8, 9, 10, 11, 15, 16, 17]]
    )
    assert sum(batch.num_tokens for batch in batches) == packed(policy, rollouts, 3)[0].num_tokens
    only = packed(policy, [replace(r, prompt=replace(r.prompt, rewarded=False)) for r in rollouts], 3)
    assert [batch.anchor for batch in only] == [True]


@pytest.mark.parametrize(
    ("advantages", "num_keep", "group"),
    [((4, 2), 4, 3), ((3, 2), 4, 2), ((4, 1), 4, 2), ((4, 2), 3, 2)],
    ids=["group", "advantages", "columns", "keep"],
)
def test_sizes_that_do_not_fit_are_refused(
    policy: JanusPolicy, advantages: tuple[int, int], num_keep: int, group: int
) -> None:
    rollouts = [by_hand([1], given("text", [2]))] * 4
    with pytest.raises(ValueError, match="pack: expected S = P \\* G rollouts"):
        pack(
            policy,
            rollouts,
            torch.zeros(advantages),
            torch.ones(num_keep, dtype=torch.bool),
            num_generations=group,
            max_tokens=10,
        )


def test_the_packed_axis_is_what_was_fed_while_sampling(policy: JanusPolicy, tmp_path: Path) -> None:
    """A truncated text is followed by the hand-over just as an ended one is."""
    from syncr1.engine.rollout.sampler import generate
    from syncr1.engine.rollout.sampling import Sampling

    (rollout,) = generate(policy, [make_prompt("draw it.", CHAIN)], Sampling(num_generations=1, max_text_tokens=1))
    (batch,) = packed(policy, [rollout], 1)
    text, image = rollout.segments
    expected = [*rollout.prompt_tokens.tolist(), *text.tokens.tolist(), policy.image_start, *image.tokens.tolist()]
    assert batch.tokens.tolist() == expected
    moved = batch.to(torch.device("cpu"))
    assert moved.ref_logp is None and torch.equal(moved.tokens, batch.tokens) and moved is not batch
    assert replace(batch, old_logp=batch.sampled_logp).old_logp is batch.sampled_logp
