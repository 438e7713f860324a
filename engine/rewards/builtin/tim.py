"""Text-image matching: has each patch of a drawing, as the policy reads it, a word near it, and each word a patch?

    TIM = 1/2 (mean_j max_k c_jk + mean_k max_j c_jk),   c_jk = cos(h_j, h_k)

h are last hidden states on the understanding path: j runs over the drawn image's placeholders, k over the words behind
it. Drawings and their words lie one after another on one packed axis, without padding, and nothing behind the words is
computed. The released code slices fixed places (5:581 and 586:, the assistant's tag among the "words"), which is wrong
for another template or under left padding; here the places are read off the tokens.

Source: CoRL (eq. 4) and ULM-R1's released `t2i_match_reward`; rewritten.

Dims: n images, J image places, L words of the longest text, T packed tokens, D hidden.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...forward.objective import Objective, PolicyForward
from ...forward.packing import pack
from ...policies.base import Policy
from ...records import Prompt, Rollout

PROBES = ("a", "b")
"""What prompts made of different words have in common is the chat template's."""


class TextImageMatching:
    """TIM of each drawing and its description, in [-1, 1].

    The policy may be the one in training (as released; the reward then moves with it, and under ZeRO-3 its weights must
    be whole, see `Learner.sampling`) or a frozen one: `Policy.frozen_copy`, or `lora.base_of`, which shares weights.

    Args:
        policy: reads the drawings, which are of one size; put back into the mode it was in, and no gradient flows.
        batch_size: drawings of one forward.
        include_assistant_tag: count the chat template's closing among the words, as the released code does.
    """

    def __init__(self, policy: Policy, *, batch_size: int = 32, include_assistant_tag: bool = False) -> None:
        self._forward = PolicyForward(policy, Objective())
        self.batch_size, self.include_assistant_tag = batch_size, include_assistant_tag
        self.__name__ = "tim"
        self._lock = threading.Lock()  # of the policy's mode
        a, b = (policy.prompt_tokens(_shown(text)) for text in PROBES)
        self._opening, self._closing = a[: _common(a, b)], a[a.numel() - _common(a.flip(0), b.flip(0)) :]

    @torch.no_grad()
    def __call__(
        self, *, prompts: Sequence[str], images: Sequence[Tensor | None], target: Sequence[str | None], **_: Any
    ) -> list[float | None]:
        """One value per trajectory; None without an image or without words (`target`, else the prompt's text).

        Raises:
            ValueError: hidden states are not finite.
        """
        texts = [prompts[i] if target[i] is None else target[i] or "" for i in range(len(prompts))]
        rows = [i for i, image in enumerate(images) if image is not None and texts[i].strip()]
        rewards: list[float | None] = [None] * len(images)
        with self._lock, _evaluating(self._forward.policy):
            for start in range(0, len(rows), self.batch_size):
                chosen = rows[start : start + self.batch_size]
                values = self._match(torch.stack([images[i] for i in chosen]), [texts[i] for i in chosen])  # type: ignore[misc]
                for row, value in zip(chosen, values.tolist(), strict=True):
                    rewards[row] = None if math.isinf(value) else value
        return rewards

    def _match(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """[n, 3, H, W] and n texts -> [n] float32; -inf where the tokenizer left no word."""
        policy, device = self._forward.policy, self._forward.policy.cache_shape().device
        seen = policy.see(images.to(device))
        sequences, spans = zip(*(self._sequence(text) for text in texts), strict=True)
        rollouts = [
            Rollout(prompt=_shown(text), member=0, prompt_tokens=tokens, prompt_image=image, segments=())
            for text, tokens, image in zip(texts, sequences, seen, strict=True)
        ]
        n = len(rollouts)
        everything = torch.ones(n, dtype=torch.bool)
        batch = pack(policy, rollouts, torch.zeros(n, 2), everything, num_generations=1, max_tokens=1 << 62)[0]
        hidden = F.normalize(self._forward.hidden(batch.to(device)).float(), dim=-1)
        if not hidden.isfinite().all():
            raise ValueError("tim reward: expected finite hidden states; the policy's weights or the image are not")
        first = batch.cu_seqlens[:-1].long()
        begin, end = (first + torch.tensor(column) for column in zip(*spans, strict=True))
        return matching(hidden, batch.image_rows.view(n, -1).to(device), begin.to(device), end.to(device))

    def _sequence(self, text: str) -> tuple[Tensor, tuple[int, int]]:
        """[L'] int64 up to the last word, and where the words begin and end; none where they are the template's.

        What lies behind cannot change what a causal decoder makes of it. A text that reaches beyond the model's
        positions is cut there.
        """
        tokens = self._forward.policy.prompt_tokens(_shown(text))
        begin = _common(tokens, self._opening)
        if self.include_assistant_tag:
            end = tokens.numel()
        else:
            end = max(begin, tokens.numel() - _common(tokens.flip(0), self._closing.flip(0)))
        end = min(end, self._forward.policy.max_positions)
        return tokens[:end], (begin, end)


def matching(hidden: Tensor, places: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """Mean of the best cosines in both directions.

    Args:
        hidden: [T, D] float32 unit rows.
        places: [n, J] int64 rows of each image.
        begin, end: [n] int64: the words of a text are rows `begin:end`.

    Returns:
        [n] float32; -inf where a text has no word.
    """
    longest = max(1, int((end - begin).max()))
    columns = torch.arange(longest, device=hidden.device)
    is_word = columns < (end - begin)[:, None]
    words = hidden[torch.where(is_word, begin[:, None] + columns, 0)]
    cosines = hidden[places] @ words.transpose(1, 2)  # [n, J, L]
    cosines = cosines.masked_fill(~is_word[:, None], -torch.inf)
    of_patches = cosines.amax(2).mean(1)
    of_words = torch.where(is_word, cosines.amax(1), 0.0).sum(1) / is_word.sum(1).clamp(min=1)
    return 0.5 * (of_patches + of_words)


def _shown(text: str) -> Prompt:
    return Prompt(id="tim", task="caption", text=text, images=(Path("drawn.png"),))


def _common(a: Tensor, b: Tensor) -> int:
    """How many leading tokens agree."""
    n = min(a.numel(), b.numel())
    return int((a[:n] == b[:n]).long().cumprod(0).sum())


@contextmanager
def _evaluating(policy: Policy) -> Iterator[None]:
    """In eval mode; every module gets its own mode back, whatever happens inside."""
    training = [module for module in policy.modules() if module.training]
    policy.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
