"""Does a frozen copy of the policy find a description truer of an image than others like it? A judge of photographs.

How likely a description is has no scale: e^-15 for a right drawing, e^-15.3 for a wrong one.  How it fares against
other descriptions of the same data has: with d one of them, s the mean log-probability per token and n the tokens of c,

    value(c) = mean over d of p(c) / (p(c) + p(d)),     p(x) = exp(n s(x | image))

1 where the image tells c from all of them, .5 where it says nothing of the difference.  The others are those that share
most words with c, so that what c asks for is asked, and not what all have in common.  Measured on the rendered world's
base, which has read few descriptions (128 drawings of 16 requests, G = 8, eight others): mean .62, standard deviation
within groups .10, correlation with the share of right attributes within groups .54, against .34 of the likelihood,
whose deviation there is 6e-7.

Dims: n images, K descriptions of each, T packed tokens.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ...forward.objective import Objective, PolicyForward
from ...forward.packing import pack
from ...policies.base import Policy
from ...records import Prompt, Rollout, Segment

QUESTION = "describe the photo."
NUM_OTHERS = 8
AT_ONCE = 16
"""Images of one forward pass; each goes through the trunk once, whatever is said of it."""


class CaptionLikelihood:
    """Mean log-probability per token of descriptions, as the answer to a request to describe the image.

    Args:
        policy: frozen; a copy of the policy being trained, or another one.
        question: what it is asked.
    """

    def __init__(self, policy: Policy, question: str = QUESTION) -> None:
        self.policy = policy
        self._forward = PolicyForward(policy, Objective())
        self._prompt = Prompt(id="caption", task="caption", text=question, images=(Path("drawn.png"),))

    @torch.no_grad()
    def __call__(self, images: Tensor, texts: Sequence[Sequence[str]]) -> Tensor:
        """Images [n, 3, H, W] in [0, 1] and K texts of each -> [n, K] float32 nats, at most 0."""
        parts = zip(images.split(AT_ONCE), range(0, len(texts), AT_ONCE), strict=True)
        return torch.cat([self._of_few(some, texts[at : at + AT_ONCE]) for some, at in parts])

    def _of_few(self, images: Tensor, texts: Sequence[Sequence[str]]) -> Tensor:
        policy, size = self.policy, len(texts[0])
        seen, prompt_tokens = policy.see(images), policy.prompt_tokens(self._prompt)
        rollouts = [
            self._described(prompt_tokens, seen[i], policy.text_tokens(text))
            for i, of_image in enumerate(texts)
            for text in of_image
        ]
        everything = torch.ones(len(rollouts), dtype=torch.bool)
        credit = torch.zeros(len(rollouts), 2)
        batch = pack(policy, rollouts, credit, everything, num_generations=size, max_tokens=1 << 30)[0]
        logp = self._forward(batch.to(policy.cache_shape().device))["logp"].cpu()
        bounds = batch.cu_seqlens.tolist()
        means = [logp[start:end][batch.loss_mask[start:end]].mean() for start, end in pairwise(bounds)]
        return torch.stack(means).view(-1, size)

    def _described(self, prompt_tokens: Tensor, image: Tensor, tokens: Tensor) -> Rollout:
        nothing = torch.zeros(tokens.numel())
        segment = Segment(kind="text", tokens=tokens, logp=nothing, logp_mixed=nothing, entropy=nothing)
        return Rollout(
            prompt=self._prompt, member=0, prompt_tokens=prompt_tokens, prompt_image=image, segments=(segment,)
        )


class CaptionContest:
    """How a description fares against others like it, given the image; the module says how.

    Args:
        likelihood: says how likely descriptions are.
        captions: descriptions that the data have; those of one text are always the same ones.
        num_others: that a description is compared with, at most.

    Raises:
        ValueError: there are fewer than two descriptions: nothing to compare.
    """

    def __init__(self, likelihood: CaptionLikelihood, captions: Collection[str], num_others: int = NUM_OTHERS) -> None:
        self.likelihood, self.num_others = likelihood, num_others
        self._captions = sorted({caption for caption in captions if _words(caption)})
        if len(self._captions) < 2 or num_others < 1:
            raise ValueError(
                f"CaptionContest: expected at least two descriptions and num_others >= 1, got {len(self._captions)} "
                f"and {num_others}; without others there is no scale"
            )
        self._others: dict[str, list[str]] = {}

    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Images [n, 3, H, W] in [0, 1] and n texts -> [n] float32 in [0, 1]; NaN for a text without words."""
        some = [i for i, text in enumerate(texts) if _words(text)]
        values = torch.full((len(texts),), torch.nan)
        for count in sorted({len(self.others(texts[i])) for i in some}):
            rows = [i for i in some if len(self.others(texts[i])) == count]
            logp_nK = self.likelihood(images[rows], [[texts[i], *self.others(texts[i])] for i in rows])
            lengths = torch.tensor([[float(self.likelihood.policy.text_tokens(texts[i]).numel())] for i in rows])
            values[rows] = torch.sigmoid(lengths * (logp_nK[:, :1] - logp_nK[:, 1:])).mean(1)
        return values

    def others(self, text: str) -> list[str]:
        """The descriptions that share most words with `text`; of those that share as many, the same ones always."""
        if text not in self._others:
            own = _words(text)

            def rank(other: str) -> tuple[float, bytes]:
                theirs = _words(other)
                mixed = hashlib.blake2b(f"{text}\0{other}".encode("utf-8", "backslashreplace")).digest()
                return -len(own & theirs) / len(own | theirs), mixed

            there = (caption for caption in self._captions if caption != text)
            self._others[text] = sorted(there, key=rank)[: self.num_others]
        return self._others[text]


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))
