"""A trajectory while it is sampled.

Dims: L tokens, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..records import Prompt, Rollout, Segment


@dataclass(slots=True, kw_only=True)
class Draft:
    """A `Rollout` in the making, phase by phase; its place among the drafts is its row in the batch's tables."""

    prompt: Prompt
    member: int
    prompt_tokens: Tensor
    prompt_image: Tensor | None
    follow_up: Tensor | None
    """[L] int64 text ids of the turn behind the image; None where nothing follows it."""
    free_prompt: Tensor | None = None
    """[L] int64 text ids of its classifier-free twin's prompt; None without guidance."""
    uid: int
    segments: list[Segment] = field(default_factory=list)
    text: str = ""
    follow_up_text: str = ""
    image: Tensor | None = None
    attempts: int = 1
    dropped: bool = False

    def finished(self) -> Rollout:
        return Rollout(
            prompt=self.prompt,
            member=self.member,
            prompt_tokens=self.prompt_tokens,
            prompt_image=self.prompt_image,
            segments=tuple(self.segments),
            text=self.text,
            follow_up_text=self.follow_up_text,
            image=self.image,
            attempts=self.attempts,
            dropped=self.dropped,
            uid=self.uid,
        )
