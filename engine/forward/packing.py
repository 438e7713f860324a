"""Rollouts and their advantages -> PackedBatch: whole groups on one token axis, each prompt once, no padding.

    [ prompt 0 | prompt 1 | … | response 0.0 | response 0.1 | … | response 1.0 | … ]

A response is what follows the prompt: `text | [drawing turn] image_start | image | follow-up turn | text`, or a part of
it; the loss mask covers what the policy sampled.  Pruned trajectories have no tokens.

Dims: T tokens of responses, S sequences, P groups, G members, R image-embedding rows, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from syncr1.kernels.api import SharedPrefixLayout

from ..policies.base import Policy
from ..records import IMAGE, TEXT, PackedBatch, Rollout, Segment
from .free_branch import Drawn, free_branch, free_tokens


def pack(
    policy: Policy,
    rollouts: Sequence[Rollout],
    advantages_S2: Tensor,
    keep_S: Tensor,
    *,
    num_generations: int,
    max_tokens: int,
    share_prefix: bool = True,
    guided: bool = False,
) -> list[PackedBatch]:
    """Packs whole groups into micro-batches of at most `max_tokens` tokens (a larger group stands alone).

    Args:
        policy: for its image placeholders.
        rollouts: S = P * G, members of a group adjacent; they share one prompt.
        advantages_S2: [S, 2] float32: of text and image tokens.
        keep_S: [S] bool; False drops the trajectory's tokens, its place stays.
        num_generations: G.
        max_tokens: token budget of a micro-batch.
        share_prefix: False gives every response its own copy of its prompt: the same loss and gradients, more work.
        guided: adds the classifier-free twin of every image, for a loss on the distribution that was sampled from;
            its tokens count like others.

    Returns:
        Micro-batches in the order of the groups, anchors apart and last. Groups without a kept trajectory
        appear in none. With nothing kept at all there is one batch whose loss mask is empty, so that every rank has a
        forward pass to take part in.

    Raises:
        ValueError: sizes that do not fit, a group whose members have different prompts, or, guided, an image that was
            drawn without guidance.
    """
    S, G = len(rollouts), num_generations
    if S % G or advantages_S2.shape != (S, 2) or keep_S.shape != (S,):
        raise ValueError(
            f"pack: expected S = P * G rollouts with advantages [S, 2] and keep [S]; got S={S}, G={G}, "
            f"advantages {tuple(advantages_S2.shape)}, keep {tuple(keep_S.shape)}"
        )
    groups = [range(start, start + G) for start in range(0, S, G) if bool(keep_S[start : start + G].any())]
    if not groups:
        dummy = keep_S.clone()
        dummy[0] = True
        return [_pack_groups(policy, rollouts, advantages_S2, dummy, [range(G)], share_prefix, guided).without_loss()]
    for group in groups:
        _check_one_prompt([rollouts[i] for i in group])
    batches = []
    for anchor in (False, True):
        mine = [group for group in groups if rollouts[group.start].prompt.rewarded is not anchor]
        sizes = [_group_tokens([rollouts[i] for i in group if keep_S[i]], share_prefix, guided) for group in mine]
        for chunk in _chunks(mine, sizes, max_tokens):
            batch = _pack_groups(policy, rollouts, advantages_S2, keep_S, chunk, share_prefix, guided)
            batches.append(replace(batch, anchor=anchor))
    return batches


def _check_one_prompt(members: list[Rollout]) -> None:
    first = members[0]
    for member in members[1:]:
        same_words = torch.equal(member.prompt_tokens, first.prompt_tokens)
        if not same_words or member.prompt.images != first.prompt.images:
            raise ValueError(
                f"pack: expected members of a group to share one prompt, got {first.prompt.id!r} and "
                f"{member.prompt.id!r}; order rollouts by prompt, or pass num_generations=1"
            )


def _group_tokens(kept: list[Rollout], share_prefix: bool, guided: bool) -> int:
    """Tokens of a group on the packed axis."""
    copies = 1 if share_prefix else len(kept)
    own = kept[0].prompt_tokens.numel() * copies + sum(
        segment.lead.numel() + segment.tokens.numel() for rollout in kept for segment in rollout.segments
    )
    return own + free_tokens(kept, share_prefix) if guided else own


def _chunks(groups: list[range], sizes: list[int], max_tokens: int) -> Iterator[list[range]]:
    chunk: list[range] = []
    used = 0
    for group, size in zip(groups, sizes, strict=True):
        if chunk and used + size > max_tokens:
            yield chunk
            chunk, used = [], 0
        chunk.append(group)
        used += size
    if chunk:
        yield chunk


@dataclass(slots=True)
class _Axis:
    """A token axis while it grows, column by column."""

    tokens: list[Tensor] = field(default_factory=list)
    modality: list[Tensor] = field(default_factory=list)
    loss_mask: list[Tensor] = field(default_factory=list)
    sampled_logp: list[Tensor] = field(default_factory=list)
    support: tuple[list[Tensor | int], list[Tensor | int]] = field(default_factory=lambda: ([], []))
    """Of each modality's sampled tokens; a number of tokens that were drawn from all ids."""
    image_rows: list[Tensor] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    guided: bool = False
    """What was sampled is told by its mixed log-probabilities."""
    length: int = 0

    def give(self, policy: Policy, tokens: Tensor, image: Tensor | None) -> None:
        """Text ids that the policy was given, `image` at their placeholders."""
        if image is not None:
            self.image_rows.append(policy.image_slots(tokens).nonzero().squeeze(1) + self.length)
            self.images.append(image)
        nothing = torch.zeros_like(tokens, dtype=torch.bool)
        self._append(tokens, TEXT, nothing, torch.full((tokens.numel(),), float("nan")))

    def sample(self, policy: Policy, segment: Segment) -> None:
        """Tokens that the policy sampled, and those that stood between them."""
        sampled = torch.ones_like(segment.tokens, dtype=torch.bool)
        logp = segment.logp_mixed if self.guided else segment.logp
        if segment.kind == "image":
            self.drawn.append((self.length, segment))
        forced = policy.forced_image_tokens() if segment.kind == "image" else None
        if forced is not None:
            sampled = forced[: segment.tokens.numel()] < 0
            logp = logp.masked_fill(~sampled, float("nan"))
        modality = IMAGE if segment.kind == "image" else TEXT
        kept = int(sampled.sum()) if segment.support is None else segment.support[sampled]
        self.support[modality].append(kept)
        self._append(segment.tokens, modality, sampled, logp)

    def _append(self, tokens: Tensor, modality: int, sampled: Tensor, logp: Tensor) -> None:
        self.tokens.append(tokens)
        self.modality.append(torch.full(tokens.shape, modality, dtype=torch.uint8))
        self.loss_mask.append(sampled)
        self.sampled_logp.append(logp)
        self.length += tokens.numel()


def _joined(parts: Sequence[Tensor | int]) -> Tensor | None:
    """[N, W] kept sets one after another; None where every token was drawn from all ids."""
    words = next((part.shape[1] for part in parts if isinstance(part, Tensor)), None)
    if words is None:
        return None
    return torch.cat([part if isinstance(part, Tensor) else torch.full((part, words), -1).int() for part in parts])


def _pack_groups(
    policy: Policy,
    rollouts: Sequence[Rollout],
    advantages_S2: Tensor,
    keep_S: Tensor,
    groups: list[range],
    share_prefix: bool,
    guided: bool,
) -> PackedBatch:
    prefixes, responses = _Axis(), _Axis(guided=guided)
    cu_prefixes, cu_seqlens = [0], [0]
    for group in groups:
        kept = [i for i in group if keep_S[i]]
        shared = share_prefix and len(kept) > 1
        if shared:
            prefixes.give(policy, rollouts[kept[0]].prompt_tokens, rollouts[kept[0]].prompt_image)
        cu_prefixes.append(prefixes.length)
        for i in group:
            if keep_S[i]:
                if not shared:
                    responses.give(policy, rollouts[i].prompt_tokens, rollouts[i].prompt_image)
                for segment in rollouts[i].segments:
                    responses.give(policy, segment.lead, segment.lead_image)
                    responses.sample(policy, segment)
            cu_seqlens.append(responses.length)
    images = prefixes.images + responses.images
    rows = [*prefixes.image_rows, *(rows + prefixes.length for rows in responses.image_rows)]
    members = torch.tensor([i for group in groups for i in group], device=advantages_S2.device)
    offsets = torch.tensor([0, *(len(group) for group in groups)]).cumsum(0).int()
    ends = torch.tensor(cu_seqlens, dtype=torch.int32)
    layout = SharedPrefixLayout(torch.tensor(cu_prefixes, dtype=torch.int32), ends, offsets)
    twins = guided and policy.num_image_tokens > 0
    return PackedBatch(
        prefix_tokens=torch.cat(prefixes.tokens) if prefixes.tokens else torch.zeros(0, dtype=torch.long),
        layout=layout,
        tokens=torch.cat(responses.tokens),
        modality=torch.cat(responses.modality),
        loss_mask=torch.cat(responses.loss_mask),
        cu_seqlens=ends,
        group_offsets=offsets,
        advantages=advantages_S2[members].cpu(),
        image_rows=torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long),
        image_embeddings=torch.cat(images).float().cpu() if images else torch.zeros(0, 0),
        sampled_logp=torch.cat(responses.sampled_logp),
        support=(_joined(responses.support[TEXT]), _joined(responses.support[IMAGE])),
        free=free_branch(policy, responses.drawn, layout, share_prefix=share_prefix) if twins else None,
    )
