"""Rollouts and rewards -> PackedBatch: whole groups on one token axis, no padding, pruned trajectories without tokens.

    [ prompt | text | image_start | image ]  one sequence; the loss mask covers what the policy sampled

Dims: T packed tokens, S sequences, P groups, G members, K rewards, R image-embedding rows, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from syncr1.engine.policies.base import Policy
from syncr1.engine.records import IMAGE, TEXT, PackedBatch, Rollout


def pack(
    policy: Policy,
    rollouts: Sequence[Rollout],
    rewards_SK: Tensor,
    keep_S: Tensor,
    *,
    num_generations: int,
    max_tokens: int,
) -> list[PackedBatch]:
    """Packs whole groups into micro-batches of at most `max_tokens` tokens (a larger group stands alone).

    Args:
        policy: for its control tokens.
        rollouts: S = P * G, members of a group adjacent.
        rewards_SK: [S, K] float32; NaN = none.
        keep_S: [S] bool; False drops the trajectory's tokens but keeps its reward in the group's statistics.
        num_generations: G.
        max_tokens: token budget of a micro-batch.

    Returns:
        Micro-batches in the order of the groups, anchors apart and last. Groups without a kept trajectory
        appear in none. With nothing kept at all there is one batch whose loss mask is empty, so that every rank has a
        forward pass to take part in.
    """
    S, G = len(rollouts), num_generations
    if S % G or rewards_SK.shape[0] != S or keep_S.shape != (S,):
        raise ValueError(
            f"pack: expected S = P * G rollouts with rewards [S, K] and keep [S]; got S={S}, G={G}, "
            f"rewards {tuple(rewards_SK.shape)}, keep {tuple(keep_S.shape)}"
        )
    groups = [range(start, start + G) for start in range(0, S, G) if bool(keep_S[start : start + G].any())]
    if not groups:
        dummy = keep_S.clone()
        dummy[0] = True
        return [_pack_groups(policy, rollouts, rewards_SK, dummy, [range(G)], learn=False)]
    lengths = [_length(rollout) * bool(k) for rollout, k in zip(rollouts, keep_S, strict=True)]
    batches = []
    for anchor in (False, True):
        mine = [group for group in groups if rollouts[group.start].prompt.rewarded is not anchor]
        for chunk in _chunks(mine, lengths, max_tokens):
            batch = _pack_groups(policy, rollouts, rewards_SK, keep_S, chunk, learn=True)
            batches.append(replace(batch, anchor=anchor))
    return batches


def _length(rollout: Rollout) -> int:
    """Tokens of a trajectory on the packed axis."""
    segments = sum(segment.tokens.numel() + (segment.kind == "image") for segment in rollout.segments)
    return rollout.prompt_tokens.numel() + segments


def _chunks(groups: list[range], lengths: list[int], max_tokens: int) -> Iterator[list[range]]:
    chunk: list[range] = []
    used = 0
    for group in groups:
        size = sum(lengths[i] for i in group)
        if chunk and used + size > max_tokens:
            yield chunk
            chunk, used = [], 0
        chunk.append(group)
        used += size
    if chunk:
        yield chunk


def _pack_groups(
    policy: Policy, rollouts: Sequence[Rollout], rewards_SK: Tensor, keep_S: Tensor, groups: list[range], *, learn: bool
) -> PackedBatch:
    members = [i for group in groups for i in group]
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    lengths, image_rows, images = [], [], []
    start = 0
    for i in members:
        if not keep_S[i]:
            lengths.append(0)
            continue
        column = _sequence(policy, rollouts[i])
        seen = rollouts[i].prompt_image
        if seen is not None:
            image_rows.append(policy.image_slots(rollouts[i].prompt_tokens).nonzero().squeeze(1) + start)
            images.append(seen)
        columns.append(column)
        lengths.append(column[0].numel())
        start += lengths[-1]
    tokens, modality, loss_mask, sampled = (torch.cat(parts) for parts in zip(*columns, strict=True))
    lengths_S = torch.tensor(lengths)
    device = rewards_SK.device
    return PackedBatch(
        tokens=tokens,
        modality=modality,
        loss_mask=loss_mask if learn else torch.zeros_like(loss_mask),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.cat([lengths_S.new_zeros(1), lengths_S.cumsum(0)]).int(),
        group_offsets=torch.tensor([0, *(len(group) for group in groups)]).cumsum(0).int(),
        rewards=rewards_SK[torch.tensor(members, device=device)].cpu(),
        image_rows=torch.cat(image_rows) if image_rows else torch.zeros(0, dtype=torch.long),
        image_embeddings=torch.cat(images).float().cpu() if images else torch.zeros(0, 0),
        sampled_logp=sampled,
    )


def _sequence(policy: Policy, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, modality, loss mask and the sampler's log-probabilities of one trajectory, [L] each."""
    prompt = rollout.prompt_tokens
    tokens, kinds, masks = [prompt], [torch.full_like(prompt, TEXT)], [torch.zeros_like(prompt)]
    logps = [torch.full((prompt.numel(),), float("nan"))]
    for segment in rollout.segments:
        if segment.kind == "image":
            tokens.append(prompt.new_tensor([policy.image_start]))
            kinds.append(prompt.new_tensor([TEXT]))
            masks.append(prompt.new_tensor([0]))
            logps.append(torch.full((1,), float("nan")))
        tokens.append(segment.tokens)
        kinds.append(torch.full_like(segment.tokens, IMAGE if segment.kind == "image" else TEXT))
        masks.append(torch.ones_like(segment.tokens))
        logps.append(segment.logp)
    return torch.cat(tokens), torch.cat(kinds).to(torch.uint8), torch.cat(masks).bool(), torch.cat(logps)
