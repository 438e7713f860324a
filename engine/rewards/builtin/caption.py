"""How likely a frozen copy of the policy finds a description, given an image: a judge for pictures without attributes.

Dims: n images, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ...forward.objective import Objective, PolicyForward
from ...forward.packing import pack
from ...policies.base import Policy
from ...records import Prompt, Rollout, Segment

QUESTION = "describe the photo."


class CaptionLikelihood:
    """Mean log-probability per token of a description, as the answer to a request to describe the image.

    Args:
        policy: frozen; a copy of the policy being trained, or another one.
        question: what it is asked.
    """

    def __init__(self, policy: Policy, question: str = QUESTION) -> None:
        self._forward = PolicyForward(policy, Objective())
        self._prompt = Prompt(id="caption", task="caption", text=question, image=Path("drawn.png"))

    @torch.no_grad()
    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Images [n, 3, H, W] in [0, 1] and n texts -> [n] float32 nats, at most 0; NaN for an empty text."""
        policy = self._forward.policy
        seen = policy.see(images)
        prompt_tokens = policy.prompt_tokens(self._prompt)
        rollouts = [self._described(prompt_tokens, seen[i], policy.text_tokens(text)) for i, text in enumerate(texts)]
        everything = torch.ones(len(texts), dtype=torch.bool)
        batch = pack(policy, rollouts, torch.zeros(len(texts), 2), everything, num_generations=1, max_tokens=1 << 30)[0]
        logp = self._forward(batch.to(policy.cache_shape().device))["logp"].cpu()
        bounds = batch.cu_seqlens.tolist()
        return torch.stack([logp[start:end][batch.loss_mask[start:end]].mean() for start, end in pairwise(bounds)])

    def _described(self, prompt_tokens: Tensor, image: Tensor, tokens: Tensor) -> Rollout:
        nothing = torch.zeros(tokens.numel())
        segment = Segment(kind="text", tokens=tokens, logp=nothing, logp_mixed=nothing, entropy=nothing)
        return Rollout(
            prompt=self._prompt, member=0, prompt_tokens=prompt_tokens, prompt_image=image, segments=(segment,)
        )
