"""The classifier-free branch in training: the images of a micro-batch once more, and what is mixed from both.

    log pi = log softmax(W h + b),   h = u + w (c - u)

A head is linear, and the weights 1 - w and w of u and c sum to 1: the logits of mixed hidden states are the mixed
logits, bias included, and every fused op serves the distribution that was sampled from.

    attention   [ prompts | free prompts | responses | images ]      one more group, shared by all members of all groups
    loss                                 [ responses ]

Where the branch has a gradient it lies on the axis of the batch; where it has none it is a pass of its own, which keeps
no activations and has no backward.

Source: classifier-free guidance (arXiv 2207.12598); Sync-R1's released code trains (1 + g) c - g u, so w = 1 + g.

Dims: Tu tokens of free prompts, T tokens of responses, Tf image tokens, N rows of the image head, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from syncr1.kernels.api import SharedPrefixLayout

from ..policies.base import Head, Policy
from ..records import FreeBranch, Rollout, Segment

Drawn = tuple[int, Segment]
"""An image: where on [T] its first token is, and what was sampled."""


def free_branch(
    policy: Policy, images: Sequence[Drawn], layout: SharedPrefixLayout, *, share_prefix: bool
) -> FreeBranch:
    """Lays every image of a micro-batch behind the free prompt beside which it was drawn.

    Args:
        policy: whose free prompt stands alone where the micro-batch has no image, so that every rank has the same
            passes to take part in.
        images: of the micro-batch.
        layout: of its prompts and responses.
        share_prefix: False gives every image a copy of its prompt.
    """
    groups: dict[tuple[int, ...], list[Drawn]] = {}
    for number, (first, segment) in enumerate(images):
        prompt = free_prompt_of(segment).tolist()
        groups.setdefault((*prompt, *(() if share_prefix else (-1, number))), []).append((first, segment))
    in_order = [image for group in groups.values() for image in group]
    prompts = [free_prompt_of(group[0][1]) for group in groups.values()] or [policy.unconditional_tokens()]
    lengths = [segment.tokens.numel() for _, segment in in_order]
    nothing = [torch.zeros(0, dtype=torch.long)]
    weights = [torch.full((n,), float(image.guidance)) for (_, image), n in zip(in_order, lengths, strict=True)]
    alone = SharedPrefixLayout(
        _offsets(prompt.numel() for prompt in prompts),
        _offsets(lengths),
        _offsets([len(group) for group in groups.values()] or [0]),
    )
    return FreeBranch(
        prompt_tokens=torch.cat(prompts),
        rows=torch.cat([torch.arange(n) + first for (first, _), n in zip(in_order, lengths, strict=True)] or nothing),
        weight=torch.cat(weights or [torch.zeros(0)]),
        layout=alone,
        joined=joined(layout, alone),
    )


def free_prompt_of(segment: Segment) -> Tensor:
    if segment.free_prompt is None:
        raise ValueError(
            "pack: expected images that were drawn beside a free prompt, as the loss is to score the guided "
            "distribution, got one without; draw with a cfg_weight other than 1, or pack with guided=False"
        )
    return segment.free_prompt


def free_tokens(kept: Iterable[Rollout], share_prefix: bool) -> int:
    """Tokens that the free branch of a group takes; groups of one micro-batch may share its prompt, and take fewer."""
    images = [segment for rollout in kept for segment in rollout.segments if segment.kind == "image"]
    prompts = [tuple(free_prompt_of(segment).tolist()) for segment in images]
    shared = set(prompts) if share_prefix else prompts
    return sum(segment.tokens.numel() for segment in images) + sum(map(len, shared))


def _offsets(lengths: Iterable[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def joined(first: SharedPrefixLayout, second: SharedPrefixLayout) -> SharedPrefixLayout:
    """Both on one axis: all prefixes, then all responses."""
    one, other = first.host_offsets, second.host_offsets
    offsets = [torch.cat([a, a[-1] + b[1:]]) for a, b in zip(one[:3], other[:3], strict=True)]
    counts = [(a.numel() - 1, b.numel() - 1) for a, b in zip(one[:2], other[:2], strict=True)]
    whole = [
        None if a is None and b is None else torch.cat([_whole(a, n), _whole(b, m)])
        for a, b, (n, m) in zip(one[3:], other[3:], counts, strict=True)
    ]
    return SharedPrefixLayout(*offsets, *whole)


def _whole(counts: Tensor | None, number: int) -> Tensor:
    return torch.zeros(number, dtype=torch.int32) if counts is None else counts


def mixed_head(policy: Policy, conditional: Tensor, unconditional: Tensor, weight: Tensor, *, detached: bool) -> Head:
    """The image head on u + w (c - u).

    Args:
        policy: whose layers before the last linear map run on both branches.
        conditional: [N, D] hidden states of the decoder.
        unconditional: [N, D] those of the same tokens behind the free prompt.
        weight: [N] float32: w.
        detached: u has no gradient.
    """
    if detached:
        with torch.no_grad():
            u = policy.head(unconditional, "image").hidden
        head = policy.head(conditional, "image")
        c = head.hidden
    else:
        head = policy.head(torch.cat([conditional, unconditional]), "image")
        c, u = head.hidden.tensor_split(2)
    # In float32 at least: at w = 6 a difference of bfloat16's last bit would be six of them.
    dtype = torch.promote_types(c.dtype, torch.float32)
    return replace(head, hidden=u.to(dtype).lerp(c.to(dtype), weight[:, None].to(dtype)).to(c.dtype))
