"""What a world's teacher says, as a model is taught it that fills images in: the same answers, the same noise.

An image stands in a sequence of its own, behind what it is asked for by: the prompt, or, behind an answer, the words of
the drawing turn. Some of its places, drawn anew each time, are masked, and those are learnt: as many as MaskGIT has at
a time t ~ U(0, 1), N cos(pi/2 t).

Source: MaskGIT (arXiv 2202.04200); Show-o (arXiv 2408.12528) trains so.

Dims: N tokens of an image, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ...policies.show_o import ShowOPolicy
from ...records import Prompt, Rollout, Segment
from ...rollout.drawing_turn import DrawingTurns
from ...settings.turn_templates import NONE

Request = Callable[[Prompt, str], str | None]
"""(a question, its answer) -> what is then to be drawn, where the question does not say it."""


def as_asked(prompt: Prompt, text: str) -> None:
    """Prompts that say themselves what is to be drawn."""


class FilledLessons:
    """Trajectories of a teacher, as this policy reads and draws.

    Args:
        policy: that is taught.
        teacher: gives batches whose images follow a given start; none may have lost its prompt.
        drop_condition: share of the drawings that are learnt without words, for classifier-free guidance.
        seed: of masks and of what is dropped.
        request: what is drawn behind an answer.
    """

    def __init__(
        self,
        policy: ShowOPolicy,
        teacher: Callable[[], Sequence[Rollout]],
        *,
        drop_condition: float,
        seed: int,
        request: Request = as_asked,
    ) -> None:
        self.policy, self.teacher, self.drop_condition, self.request = policy, teacher, drop_condition, request
        self.rng = np.random.default_rng([seed, 3])
        self._turns = DrawingTurns(policy, NONE, policy.max_positions)
        self._codes: dict[bytes, Tensor] = {}
        self._asked: dict[str, Tensor] = {}

    def batch(self) -> list[Rollout]:
        """The next supervised trajectories."""
        rollouts = self.teacher()
        self._read([photo for rollout in rollouts if (photo := rollout.image) is not None])
        return [self._shown(rollout) for rollout in rollouts]

    def _read(self, photos: Sequence[Tensor]) -> None:
        """Keeps the codes of photos [3, H, W], most of which come again."""
        new = {key: photo for photo in photos if (key := _key(photo)) not in self._codes}
        if new:
            self._codes |= zip(new, self.policy.image_tokens(torch.stack(list(new.values()))), strict=True)

    def _shown(self, rollout: Rollout) -> Rollout:
        *before, last = rollout.segments
        dropped = last.kind == "image" and bool(self.rng.random() < self.drop_condition)
        tokens, seen = rollout.prompt_tokens, None
        if rollout.image is not None:  # with gradient: the codes' rows are learnt by looking, too
            seen = self.policy.embed(self._codes[_key(rollout.image)], "image")
        if last.kind == "image":
            words = self._words(rollout)
            lead = self.policy.unconditional_tokens() if dropped else self._asked_for(words)
            if before:
                last = replace(self._masked(last), lead=lead)
            else:
                tokens, last = lead, replace(self._masked(last), lead=lead[:0])
        return replace(rollout, prompt_tokens=tokens, prompt_image=seen, image=None, segments=(*before, last))

    def _words(self, rollout: Rollout) -> str:
        """What the image is asked for by: the prompt, or what a drawing turn says behind an answer."""
        prompt = rollout.prompt
        if len(rollout.segments) == 1:
            return prompt.text
        text = self.policy.decode_text(rollout.segments[0].tokens)
        return self._turns.words(replace(prompt, request=self.request(prompt, text)), text)

    def _asked_for(self, words: str) -> Tensor:
        if words not in self._asked:
            self._asked[words] = self.policy.drawing_tokens(Prompt(id="", task="", text=""), words)
        return self._asked[words]

    def _masked(self, image: Segment) -> Segment:
        """With some places to be learnt, and the others given."""
        num_tokens = image.tokens.numel()
        masked = max(1, round(num_tokens * math.cos(math.pi / 2 * self.rng.random())))
        order = torch.full((num_tokens,), -1)
        order[torch.from_numpy(self.rng.permutation(num_tokens)[:masked])] = 0
        return replace(image, order=order)


def _key(photo: Tensor) -> bytes:
    return photo.numpy().tobytes()
