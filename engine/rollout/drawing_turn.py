"""The drawing turn: behind the policy's text a new turn of the user asks for the image, in words made of that text.

    prompt . text . [end of the answer] . turn . image_start . image         raster order
    prompt . text     turn . image                                           masked order: the image's own sequence

What it says is a template's matter (settings/turn_templates.py), the form of a turn the model's (`drawing_tokens`).
The keys of the prompt stay the group's; the turn is the member's own, and the lead of its image segment.

How long it may become is known before anything is sampled: the turn around no text, and `max_text_tokens` and a seam
for the text, which is cut where it needs more (read again, it need not have the tokens that it was sampled in).
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..errors import ConfigError
from ..policies.base import Policy
from ..policies.kinds import DRAWING
from ..records import Prompt
from ..settings.turn_templates import filled, template_of, template_problem

APART = "{prompt} {text}"
"""What a model that draws in sequences of their own is asked for without a drawing turn: what its image follows in the
one sequence of another."""
SEAM = 4
"""Tokens more that a turn may take where its text meets what stands around it."""


class DrawingTurns:
    """The drawing turns of a batch's trajectories.

    Args:
        policy: whose turns they are.
        drawing_turn: none, sync_r1, t2i_r1 or a template, as of the setting.
        max_text_tokens: of the text in a turn.

    Raises:
        ConfigError: the template has an unknown field, or a brace that is not closed; or the policy draws nothing.
    """

    def __init__(self, policy: Policy, drawing_turn: str, max_text_tokens: int) -> None:
        if problem := template_problem(drawing_turn):
            raise ConfigError(f"generate: drawing_turn: {problem}")
        self.policy, self.max_text_tokens = policy, max_text_tokens
        self.apart = policy.decoding_order == "masked"
        self.template = template_of(drawing_turn) or (APART if self.apart else None)
        if self.template is not None and not policy.num_image_tokens:
            raise ConfigError(
                f"generate: drawing_turn: expected none for {type(policy).__name__}, which draws no images, got "
                f"{drawing_turn!r}; leave it out, or use {DRAWING}"
            )
        self._start = torch.tensor([] if self.apart else [policy.image_start], dtype=torch.long)
        self._made: dict[tuple[str, str], Tensor] = {}
        """By prompt and words, which many members have in common."""

    def applies(self, prompt: Prompt) -> bool:
        """Whether its images are drawn in a turn of their own: those behind a text, which that turn is made of. What is
        drawn at once is asked for by the prompt itself."""
        return self.template is not None and prompt.segments[:2] == ("text", "image")

    def words(self, prompt: Prompt, text: str) -> str:
        """What the turn of a member says whose text is `text`."""
        assert self.template is not None
        request = prompt.words if prompt.request is None else prompt.request
        concept = "" if prompt.concept is None else f"<{prompt.concept}>"
        return filled(self.template, {"prompt": request, "text": text, "info": prompt.info, "concept": concept})

    def longest(self, prompt: Prompt) -> int:
        """Tokens before the image, at most."""
        if not self.applies(prompt):
            return self._start.numel()
        return self._closing.numel() + self._room(prompt)

    def _room(self, prompt: Prompt) -> int:
        return self._turn(prompt, "").numel() + SEAM + self.max_text_tokens

    def lead(self, prompt: Prompt, text: str, truncated: bool) -> Tensor:
        """[L] int64: what is fed between a member's text and its image, `image_start` last.

        Args:
            prompt: the member's.
            text: its text, decoded.
            truncated: the text has no end token yet.
        """
        if not self.applies(prompt):
            return self._start
        turn = self._fitted(prompt, text)
        return torch.cat([self._closing, turn]) if truncated else turn

    @cached_property
    def _closing(self) -> Tensor:
        """What ends an answer in whose sequence the turn follows."""
        return self._start if self.apart else self.policy.text_tokens("")

    def _turn(self, prompt: Prompt, text: str) -> Tensor:
        words = self.words(prompt, text)
        key = (prompt.id, words)
        if key not in self._made:
            self._made[key] = self.policy.drawing_tokens(prompt, words)
        return self._made[key]

    def _fitted(self, prompt: Prompt, text: str) -> Tensor:
        """The turn, its text cut from behind until there is room."""
        ids, room = self._turn(prompt, text), self._room(prompt)
        if ids.numel() <= room:
            return ids
        kept = self.policy.encode(text)[: self.max_text_tokens]
        while ids.numel() > room:
            ids = self._turn(prompt, self.policy.decode_text(kept))
            kept = kept[: max(0, kept.numel() - max(1, ids.numel() - room))]
        return ids
