"""Rollouts and their advantages -> PackedBatch: whole groups on one token axis, each prompt once, no padding.

    [ prompt 0 | prompt 1 | … | response 0.0 | response 0.1 | … | response 1.0 | … ]

Images that were filled in lie on the loss's axis alone; what attention sees of them is filled_images.py.

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
from ..records import IMAGE, TEXT, FilledImages, PackedBatch, Rollout, Segment
from .filled_images import Filling, filled_images
from .free_branch import Drawn, free_branch, free_tokens
from .masked_states import MaskedPlan, State


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
    masked: MaskedPlan | None = None,
) -> list[PackedBatch]:
    """Packs whole groups into micro-batches of at most `max_tokens` tokens.

    Args:
        policy: for its image placeholders.
        rollouts: S = P * G, members of a group adjacent; they share one prompt.
        advantages_S2: [S, 2] float32: of text and image tokens.
        keep_S: [S] bool; False drops the trajectory's tokens, its place stays.
        num_generations: G.
        max_tokens: token budget of a micro-batch; a member that needs more stands alone, and where images are not
            filled in a group.
        share_prefix: False gives every response its own copy of its prompt: the same loss and gradients, more work.
        guided: adds the classifier-free twin of every image, for a loss on the distribution that was sampled from;
            its tokens count like others.
        masked: which states of filled-in images are trained; None: all that they went through.

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
    settings = Settings(policy, share_prefix, guided, masked or MaskedPlan())
    groups = [range(start, start + G) for start in range(0, S, G) if bool(keep_S[start : start + G].any())]
    if not groups:
        dummy = keep_S.clone()
        dummy[0] = True
        return [_pack_groups(settings, rollouts, advantages_S2, dummy, [range(G)]).without_loss()]
    for group in groups:
        _check_one_prompt([rollouts[i] for i in group])
    batches = []
    for anchor in (False, True):
        whole = [group for group in groups if rollouts[group.start].prompt.rewarded is not anchor]
        mine = [part for group in whole for part in settings.parts(rollouts, group, keep_S, max_tokens)]
        sizes = [settings.num_tokens([rollouts[i] for i in group if keep_S[i]]) for group in mine]
        for chunk in _chunks(mine, sizes, max_tokens):
            batch = _pack_groups(settings, rollouts, advantages_S2, keep_S, chunk)
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


@dataclass(frozen=True, slots=True)
class Settings:
    """How a micro-batch is packed; the arguments of `pack` of the same names."""

    policy: Policy
    share_prefix: bool
    guided: bool
    masked: MaskedPlan

    def num_tokens(self, kept: list[Rollout]) -> int:
        """Tokens of a group on the attention axis."""
        copies = 1 if self.share_prefix else len(kept)
        if self.policy.decoding_order == "masked":
            own = sum(r.prompt_tokens.numel() for r in kept[:copies] if not _begins_filled(r))
            return own + sum(self._num_filled(s, rollout) for rollout in kept for s in rollout.segments)
        own = kept[0].prompt_tokens.numel() * copies + sum(
            segment.lead.numel() + segment.tokens.numel() for rollout in kept for segment in rollout.segments
        )
        return own + free_tokens(kept, self.share_prefix) if self.guided else own

    def parts(self, rollouts: Sequence[Rollout], group: range, keep_S: Tensor, max_tokens: int) -> list[Sequence[int]]:
        """A group, or where images are filled in and it is larger than a micro-batch, runs of its members: their states
        share no more than turns, and are the most of it."""
        if self.policy.decoding_order != "masked":
            return [group]
        parts: list[list[int]] = [[]]
        first = rollouts[group.start]
        shared = first.prompt_tokens.numel() if self.share_prefix and not _begins_filled(first) else 0
        used = 0
        for i in group:
            size = self.num_tokens([rollouts[i]]) if keep_S[i] else 0
            if used and size and used + size - shared > max_tokens:
                parts.append([])
                used = 0
            used += size - shared * bool(used and size)
            parts[-1].append(i)
        return list(parts)

    def _num_filled(self, segment: Segment, rollout: Rollout) -> int:
        """Of a trajectory's segment; an image's turn counts once for each member, if not for each state."""
        if segment.order is None:
            return segment.lead.numel() + segment.tokens.numel()
        span = segment.tokens.numel() + sum(ids.numel() for ids in self.policy.image_frame())
        states = len(self.masked.states(segment, rollout.uid))
        prefix = _behind(segment, rollout).numel() * (1 if self.share_prefix else states)
        return (span * states + prefix) * (1 + self.guided)

    def num_sequences(self, rollout: Rollout) -> int:
        """What a trajectory is to the loss: one sequence, or one of each word and of each step of its image."""
        if self.masked.masked_logp != "step":
            return 1
        states = (len(self.masked.states(s, rollout.uid)) for s in rollout.segments if s.order is not None)
        return sum(states) + sum(s.tokens.numel() for s in rollout.segments if s.order is None)


def _begins_filled(rollout: Rollout) -> bool:
    """Its first segment is an image of a sequence of its own, so its prompt stands before that."""
    return bool(rollout.segments) and rollout.segments[0].order is not None


def _behind(segment: Segment, rollout: Rollout) -> Tensor:
    """[L] int64: what a filled-in image was drawn behind."""
    return segment.lead if segment.lead.numel() else rollout.prompt_tokens


def _chunks(groups: Sequence[Sequence[int]], sizes: list[int], max_tokens: int) -> Iterator[list[Sequence[int]]]:
    chunk: list[Sequence[int]] = []
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
    fillings: list[Filling] = field(default_factory=list)
    attended: list[Tensor] = field(default_factory=list)
    """Which of the tokens are on the attention axis."""
    num_attended: int = 0
    length: int = 0

    def begin(self, policy: Policy, rollout: Rollout) -> int:
        """The prompt of a trajectory, but for one whose image's sequence it begins; gives how many of its first tokens
        see each other whole."""
        if _begins_filled(rollout):
            return 0
        self.give(policy, rollout.prompt_tokens, rollout.prompt_image)
        return policy.whole_lead(rollout.prompt_tokens)

    def give(self, policy: Policy, tokens: Tensor, image: Tensor | None) -> None:
        """Text ids that the policy was given, `image` at their placeholders."""
        if image is not None:
            self.image_rows.append(policy.image_slots(tokens).nonzero().squeeze(1) + self.num_attended)
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

    def fill_in(self, segment: Segment, behind: Tensor, states: Sequence[State]) -> None:
        """Image tokens that count in `states`; attention does not see them here."""
        for state in states:
            self.fillings.append(Filling(segment=segment, state=state, first=self.length, behind=behind))
            tokens = state.tokens[state.scored]
            told = (state.logp_mixed if self.guided else state.logp)[state.scored]
            kept = tokens.numel() if segment.support is None else segment.support[state.scored]
            self.support[IMAGE].append(kept)
            self._append(tokens, IMAGE, torch.ones_like(tokens, dtype=torch.bool), told, attended=False)

    def ends(self, count: int) -> set[int]:
        """Where the last `count` states begin and end."""
        last = self.fillings[len(self.fillings) - count :]
        return {end for filling in last for end in (filling.first, filling.first + filling.num_scored)}

    def _append(self, tokens: Tensor, modality: int, sampled: Tensor, logp: Tensor, attended: bool = True) -> None:
        self.tokens.append(tokens)
        self.modality.append(torch.full(tokens.shape, modality, dtype=torch.uint8))
        self.loss_mask.append(sampled)
        self.sampled_logp.append(logp)
        self.attended.append(torch.full(tokens.shape, attended))
        self.num_attended += tokens.numel() * attended
        self.length += tokens.numel()


def _joined(parts: Sequence[Tensor | int]) -> Tensor | None:
    """[N, W] kept sets one after another; None where every token was drawn from all ids."""
    words = next((part.shape[1] for part in parts if isinstance(part, Tensor)), None)
    if words is None:
        return None
    return torch.cat([part if isinstance(part, Tensor) else torch.full((part, words), -1).int() for part in parts])


def _pack_groups(
    settings: Settings,
    rollouts: Sequence[Rollout],
    advantages_S2: Tensor,
    keep_S: Tensor,
    groups: Sequence[Sequence[int]],
) -> PackedBatch:
    policy, guided = settings.policy, settings.guided
    prefixes, responses = _Axis(), _Axis(guided=guided)
    cu_prefixes, cu_seqlens, cu_attended = [0], [0], [0]
    members: list[int] = []
    sizes: list[int] = []
    whole: tuple[list[int], list[int]] = ([], [])
    filled: list[tuple[float, int]] = []
    for group in groups:
        kept = [i for i in group if keep_S[i]]
        shared = settings.share_prefix and len(kept) > 1
        whole[0].append(prefixes.begin(policy, rollouts[kept[0]]) if shared else 0)
        cu_prefixes.append(prefixes.length)
        before = len(members)
        for i in group:
            ratios: set[int] = set()
            whole[1].append(responses.begin(policy, rollouts[i]) if keep_S[i] and not shared else 0)
            for segment in rollouts[i].segments if keep_S[i] else ():
                if segment.order is not None:
                    states = settings.masked.states(segment, rollouts[i].uid)
                    responses.fill_in(segment, _behind(segment, rollouts[i]), states)
                    ratios |= responses.ends(len(states)) if settings.masked.masked_logp == "step" else set()
                    filled.append((settings.masked.scale(segment), settings.masked.num_items(segment, states)))
                    continue
                responses.give(policy, segment.lead, segment.lead_image)
                begins = responses.length
                responses.sample(policy, segment)
                ratios |= set(range(begins + 1, responses.length)) if settings.masked.masked_logp == "step" else set()
            # What has a ratio of its own, a step, and beside steps a word, is a sequence of its own to the loss.
            own = sorted({end for end in ratios if end > cu_seqlens[-1]} | {responses.length})
            own = own if keep_S[i] else own * settings.num_sequences(rollouts[i])
            cu_seqlens.extend(own)
            members.extend([i] * len(own))
            cu_attended.append(responses.num_attended)
        sizes.append(len(members) - before)
    images = prefixes.images + responses.images
    rows = [*prefixes.image_rows, *(rows + prefixes.length for rows in responses.image_rows)]
    of_loss = torch.tensor([0, *sizes]).cumsum(0).int()
    offsets = torch.tensor([0, *(len(group) for group in groups)]).cumsum(0).int()
    ends = torch.tensor(cu_attended, dtype=torch.int32)
    leads = [torch.tensor(counts, dtype=torch.int32) if any(counts) else None for counts in whole]
    layout = SharedPrefixLayout(torch.tensor(cu_prefixes, dtype=torch.int32), ends, offsets, *leads)
    twins = guided and policy.num_image_tokens > 0 and policy.decoding_order == "raster"
    return PackedBatch(
        prefix_tokens=torch.cat(prefixes.tokens) if prefixes.tokens else torch.zeros(0, dtype=torch.long),
        layout=layout,
        tokens=torch.cat(responses.tokens),
        modality=torch.cat(responses.modality),
        loss_mask=torch.cat(responses.loss_mask),
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
        group_offsets=of_loss,
        advantages=advantages_S2[torch.tensor(members, device=advantages_S2.device)].cpu(),
        image_rows=torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long),
        image_embeddings=torch.cat(images).float().cpu() if images else torch.zeros(0, 0),
        sampled_logp=torch.cat(responses.sampled_logp),
        support=(_joined(responses.support[TEXT]), _joined(responses.support[IMAGE])),
        free=free_branch(policy, responses.drawn, layout, share_prefix=settings.share_prefix) if twins else None,
        filled=_filled(settings, responses, layout, filled) if policy.decoding_order == "masked" else None,
    )


def _filled(
    settings: Settings, responses: _Axis, layout: SharedPrefixLayout, images: Sequence[tuple[float, int]]
) -> FilledImages:
    """The filled-in images of a micro-batch, of each of which the weight of its loss and what divides it are given.

    Raises:
        ValueError: images of different numbers of steps, which one weight cannot make unbiased.
    """
    scales = {scale for scale, _ in images} or {1.0}
    if len(scales) > 1:
        raise ValueError(
            f"pack: expected images that were drawn in one number of steps, as masked_steps chooses among them, got "
            f"several (loss weights {sorted(scales)}); leave masked_steps out, or pack them apart"
        )
    return filled_images(
        settings.policy,
        responses.fillings,
        torch.cat(responses.attended).nonzero().squeeze(1),
        layout,
        scale=scales.pop(),
        num_items=sum(count for _, count in images),
        guided=settings.guided,
        share_prefix=settings.share_prefix,
    )
