"""Images that were filled in, in training: the states that count, as spans behind their turns on one attention axis.

    attention   [ prompts | turns | free prompts | text | states behind turns | states behind free prompts ]
    loss                                         [ text and image tokens, trajectory by trajectory ]

Each distinct turn stands there once, for all states of all members that share it. A state's span sees its turn and
itself, whole, and a token is predicted at its own place. With guidance the same states stand once more behind the
prompts beside which they were drawn; where those have no gradient, in a pass of their own.

Dims: T loss tokens, Ta of them on the attention axis as text, M states, N places of an image, L = N and its frame, Tt
tokens of turns, Tf scored image tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from syncr1.kernels.api import SharedPrefixLayout

from ..policies.base import Policy
from ..records import FilledImages, FilledStates, Segment
from .free_branch import free_prompt_of, joined
from .masked_states import State


@dataclass(frozen=True, slots=True, kw_only=True)
class Filling:
    """A state of a micro-batch."""

    segment: Segment
    state: State
    first: int
    """Where on [T] its first scored token is."""
    behind: Tensor
    """[L'] int64 text ids of its turn."""

    @property
    def num_scored(self) -> int:
        return int(self.state.scored.sum())

    @property
    def rows(self) -> Tensor:
        """[n] int64: which of [T] its scored tokens are."""
        return torch.arange(self.num_scored) + self.first


def filled_images(
    policy: Policy,
    fillings: Sequence[Filling],
    attended: Tensor,
    layout: SharedPrefixLayout,
    *,
    scale: float,
    num_items: int,
    guided: bool,
    share_prefix: bool,
) -> FilledImages:
    """Lays the states of a micro-batch behind what they were drawn behind.

    Args:
        policy: for its frame and mask; its free prompt stands alone where no image is there, so that every rank has the
            same passes to take part in.
        fillings: of the micro-batch.
        attended: [Ta] which of [T] are text on the attention axis.
        layout: of the prompts and that text.
        scale, num_items: see `FilledImages`.
        guided: with the twins behind free prompts.
        share_prefix: False gives every state a copy of its turn.
    """
    drawn = _states(policy, fillings, [f.behind for f in fillings], share_prefix)
    free, both = None, None
    if guided:
        prompts = [free_prompt_of(f.segment) for f in fillings] or [policy.unconditional_tokens()]
        free = _states(policy, fillings, prompts, share_prefix)
        both = joined(joined(layout, drawn.layout), free.layout)
    weight = torch.cat([torch.full((f.num_scored,), float(f.segment.guidance)) for f in fillings] or [torch.zeros(0)])
    return FilledImages(
        rows=_cat([f.rows for f in fillings]),
        weight=weight,
        attended=attended,
        drawn=drawn,
        free=free,
        layout=joined(layout, drawn.layout),
        both=both,
        scale=scale,
        num_items=num_items,
    )


def _states(
    policy: Policy, fillings: Sequence[Filling], prefixes: Sequence[Tensor], share_prefix: bool
) -> FilledStates:
    """All of the states, grouped by what they stand behind."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in range(len(fillings)):
        alone = () if share_prefix else (-1, i)
        groups.setdefault((*prefixes[i].tolist(), *alone), []).append(i)
    in_order = [fillings[i] for group in groups.values() for i in group]
    prompts = [prefixes[group[0]] for group in groups.values()] or list(prefixes)
    start, end = (ids.numel() for ids in policy.image_frame())
    span = start + policy.num_image_tokens + end
    codes = [torch.where(f.state.known, f.segment.tokens, policy.mask_token) for f in in_order]
    places = [f.state.scored.nonzero().squeeze(1) + start + n * span for n, f in enumerate(in_order)]
    lengths = [span] * len(in_order)
    layout = SharedPrefixLayout(
        _offsets(ids.numel() for ids in prompts),
        _offsets(lengths),
        _offsets([len(group) for group in groups.values()] or [0] * len(prompts)),
        None,
        torch.tensor(lengths, dtype=torch.int32),
    )
    return FilledStates(
        prompt_tokens=_cat(prompts),
        codes=torch.stack(codes) if codes else torch.zeros(0, policy.num_image_tokens, dtype=torch.long),
        at=_cat(places),
        rows=_cat([f.rows for f in in_order]),
        layout=layout,
    )


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.zeros(0, dtype=torch.long)


def _offsets(lengths: Iterable[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()
