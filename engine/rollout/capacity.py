"""What a rollout will need, worked out before anything is allocated.

Dims: P prompts, G members.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import nlargest

import torch
from torch import Tensor

from ..errors import DataError, RolloutTooLarge
from ..policies.base import Policy
from ..policies.cache import CacheShape
from ..records import Prompt, SegmentKind
from .drawing_turn import DrawingTurns

SUPPORTED_SEGMENTS: tuple[tuple[SegmentKind, ...], ...] = (
    ("text",),
    ("image",),
    ("text", "image"),
    ("image", "text"),
    ("text", "image", "text"),
)
LOOKED_AT = 16
"""Prompts of a kind of the rendered world whose tokens are counted before a training; a user's own are counted all."""
FREE_SHARE = 0.9
"""Share of the free memory that keys and values may take; activations, logits and pictures need some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Tokens of each prompt's trajectories, at most."""

    before_image: list[int]
    """[P] what a member holds when its first image token is sampled, its prompt apart."""
    own: list[int]
    """[P] what a member holds at the end, its prompt apart."""
    images: list[bool]
    """[P] an image is drawn."""
    apart: list[int]
    """[P] what an image's own sequence has behind the prompt that it may begin with; 0 where it has none of its own."""
    span: int = 0
    """Of that the image and its frame."""

    @classmethod
    def of(
        cls, policy: Policy, prompts: Sequence[Prompt], follow_ups: Sequence[Tensor | None], drawing: DrawingTurns
    ) -> Sizes:
        """
        Args:
            policy: for the number of image tokens.
            prompts: [P].
            follow_ups: [P] the turns behind the image, None where there is none.
            drawing: the turns before it, and the most tokens of each text segment.
        """
        before, own, apart, max_text_tokens = [], [], [], drawing.max_text_tokens
        span = policy.num_image_tokens
        if drawing.apart and span:
            span += sum(ids.numel() for ids in policy.image_frame())
        for prompt, turn in zip(prompts, follow_ups, strict=True):
            drawn = "image" in prompt.segments
            lead = drawing.longest(prompt) if drawn else 0
            text = max_text_tokens * (prompt.segments[0] == "text")
            after = 0 if turn is None else turn.numel() + max_text_tokens
            image = lead + span * drawn
            apart.append(image if drawing.apart else 0)
            before.append(text if drawing.apart else text + lead)
            own.append(text if drawing.apart else text + image + after)
        images = ["image" in prompt.segments for prompt in prompts]
        return cls(before_image=before, own=own, images=images, apart=apart, span=span)

    def turn_columns(self, num_generations: int, prompts: Sequence[int]) -> int:
        """What the sequences of images have before their images, each with a turn of its own; `prompts` are tokens of
        the prompts and of the free one."""
        turns = [apart - self.span for apart, drawn in zip(self.apart, self.images, strict=True) if drawn]
        return num_generations * sum(turns) + sum(prompts)

    def preview_columns(self, num_generations: int, num_tokens: int, guided: bool, reach: int | None = None) -> int:
        """What the tries of a preview after `num_tokens` take, if every image is drawn again; `reach` is what a
        side takes where that is more."""
        per_try = (num_tokens if reach is None else reach) * (1 + guided)
        tries = [before + per_try for before, drawn in zip(self.before_image, self.images, strict=True) if drawn]
        return num_generations * sum(tries) if num_tokens else 0


def check_plans(policy: Policy, prompts: Sequence[Prompt]) -> None:
    """Raises DataError for a segment plan that cannot be sampled."""
    for prompt in prompts:
        if policy.decoding_order == "masked" and "image" in prompt.segments[:-1]:
            raise DataError(
                f"generate: prompt {prompt.id} has text behind its image, expected none with {type(policy).__name__}, "
                "which draws in sequences of their own; ask about a drawn image in a prompt that shows it"
            )
        if prompt.segments not in SUPPORTED_SEGMENTS:
            raise DataError(
                f"generate: prompt {prompt.id} has segments {prompt.segments}, expected one of {SUPPORTED_SEGMENTS}"
            )
        if "image" in prompt.segments and (why := policy.cannot_draw):
            raise DataError(f"generate: prompt {prompt.id} asks for an image, but {why}")


def remarks_on(policy: Policy, prompts: Sequence[Prompt]) -> list[str]:
    """What is worth knowing of a checkpoint that is about to get these prompts, a line each."""
    return policy.remarks({prompt.segments for prompt in prompts})


def check_prompts(
    policy: Policy, prompts: Sequence[Prompt], tokens: Sequence[Tensor], sizes: Sizes, drawing: DrawingTurns
) -> None:
    """Raises DataError for a prompt without tokens and for one whose trajectory leaves the model's positions."""
    for _, problem in problems_of(policy, prompts, tokens, sizes, drawing):
        raise DataError(problem)


def problems_of(
    policy: Policy, prompts: Sequence[Prompt], tokens: Sequence[Tensor], sizes: Sizes, drawing: DrawingTurns
) -> Iterator[tuple[Prompt, str]]:
    """Such prompts, each with what is wrong with it."""
    for prompt, ids, own, apart in zip(prompts, tokens, sizes.own, sizes.apart, strict=True):
        if not ids.numel():
            yield prompt, f"generate: prompt {prompt.id} is empty: expected at least one token; give it a text"
        longest = max(ids.numel() + own, apart + ids.numel() * (prompt.segments[0] == "image"))
        if longest > policy.max_positions:
            turn = f", {drawing.longest(prompt)} of them in its drawing turn" if drawing.applies(prompt) else ""
            remedy = "the drawing turn, the prompt (and info)" if turn else "the prompt"
            yield (
                prompt,
                f"generate: prompt {prompt.id} has {ids.numel()} tokens and may grow by {own}{turn}, but the model has "
                f"positions for {policy.max_positions}; shorten {remedy} or lower max_completion_length",
            )


def unusable_prompts(
    policy: Policy, prompts: Sequence[Prompt], drawing_turn: str, max_text_tokens: int
) -> Iterator[tuple[Prompt, str]]:
    """Prompts that the policy cannot take: empty, too long, or of a plan that it cannot sample; and why. Arguments as
    for `check_lengths`."""
    drawing = DrawingTurns(policy, drawing_turn, max_text_tokens)
    for prompt in prompts:
        try:
            check_plans(policy, [prompt])
            turn = policy.follow_up_tokens(prompt) if "image" in prompt.segments[:-1] else None
            tokens, sizes = policy.prompt_tokens(prompt), Sizes.of(policy, [prompt], [turn], drawing)
        except DataError as error:
            yield prompt, str(error)
        else:
            yield from problems_of(policy, [prompt], [tokens], sizes, drawing)


def check_lengths(
    policy: Policy, prompts: Sequence[Prompt], drawing_turn: str, max_text_tokens: int, *, most: int | None = None
) -> None:
    """`check_prompts` of a training's, before anything is sampled.

    Args:
        policy: whose positions they are.
        prompts: the training's, or a step's.
        drawing_turn, max_text_tokens: as in `Sampling`.
        most: of each kind only so many, those of most bytes, since tokens of all may take long; None: all.
    """
    drawing = DrawingTurns(policy, drawing_turn, max_text_tokens)

    def num_bytes(prompt: Prompt) -> int:
        turn = drawing.words(prompt, "") if drawing.applies(prompt) else ""
        return len(f"{prompt.text}{turn}{prompt.follow_up or ''}".encode())

    kinds: dict[tuple[object, ...], list[Prompt]] = {}
    for prompt in prompts:
        kinds.setdefault((prompt.segments, len(prompt.images)), []).append(prompt)
    for alike in kinds.values():
        asked = alike if most is None else nlargest(most, alike, key=num_bytes)
        turns = [policy.follow_up_tokens(p) if "image" in p.segments[:-1] else None for p in asked]
        tokens = [policy.prompt_tokens(prompt) for prompt in asked]
        check_prompts(policy, asked, tokens, Sizes.of(policy, asked, turns, drawing), drawing)


def check_fits(
    shape: CacheShape,
    prefix_columns: int,
    own_columns: int,
    num_generations: int,
    max_bytes: int | None,
    held_bytes: int = 0,
) -> None:
    """Raises RolloutTooLarge if the keys and values exceed `max_bytes` (None: what the device has free, and what is
    held for them already)."""
    free = FREE_SHARE * free_bytes(shape.device) + held_bytes if max_bytes is None else max_bytes
    needed = shape.num_bytes(prefix_columns + own_columns)
    if needed <= free:
        return
    per_token = shape.num_bytes(1)
    raise RolloutTooLarge(
        f"generate: expected keys and values of at most {_gib(free)}, which may be used, got {_gib(needed)} "
        f"({prefix_columns} prompt tokens, {own_columns} tokens of members and their guidance, "
        f"{per_token / 1024:.0f} KiB each); lower "
        f"prompts_per_step, num_generations ({num_generations}) or max_completion_length, or use more ranks"
    )


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
