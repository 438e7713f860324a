"""The prompts of the classifier-free branch: which there are, and which stands beside which prompt.

Dims: P prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import ConfigError
from ..policies.base import Policy
from ..settings.train_config import Unconditional


@dataclass(frozen=True, slots=True)
class FreePrompts:
    """Each is run once for all members of all prompts that it stands beside."""

    tokens: tuple[Tensor, ...] = ()
    """Distinct ones; none without guidance."""
    beside: tuple[int, ...] = ()
    """[P] index of a prompt's; of one that draws nothing any."""

    @classmethod
    def of(
        cls, policy: Policy, lengths: Sequence[int], images: Sequence[bool], unconditional: Unconditional
    ) -> FreePrompts:
        """
        Args:
            policy: says what they are.
            lengths: [P] tokens of the prompts.
            images: [P] an image is drawn.
            unconditional: as in `Sampling`.

        Raises:
            ConfigError: the policy has none, or none of a length that is asked for.
        """
        if unconditional == "fixed":
            return cls((policy.unconditional_tokens(),), (0,) * len(lengths))
        different = sorted({length for length, drawn in zip(lengths, images, strict=True) if drawn})
        # The image's start included, which the prompt has behind it.
        tokens = tuple(policy.unconditional_tokens(length + 1) for length in different)
        for length, ids in zip(different, tokens, strict=True):
            if ids.numel() != length + 1:
                raise ConfigError(
                    f"unconditional: expected {length + 1} tokens of {type(policy).__name__}.unconditional_tokens for "
                    f"a prompt of {length}, got {ids.numel()}; take fixed, or let it pad to the length that it is given"
                )
        place = {length: index for index, length in enumerate(different)}
        return cls(tokens, tuple(place.get(length, 0) for length in lengths))
