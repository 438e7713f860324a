"""Rules over the settings of images that are filled in: what `masked_steps` leaves unbiased, what `masked_logp` can be
corrected by, and what a model of either decoding order has no use for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .modality import value_of

UNBIASED = ("dapo", "bnpo", "cispo", "dr_grpo", "luspo")
"""Loss types that divide by what does not depend on which steps were chosen: tokens of whole images, a length, or the
number of sequences. The others divide by the tokens of a
trajectory that are there (grpo, sapo), or weigh by their product (vespo)."""
KEEPS_ALL = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
OF_MASKED = ("image_steps", "image_noise", "masked_logp", "masked_steps")
"""What models that draw in raster order, or not at all, have no use for."""


def masked_problems(c: Any) -> list[str]:
    """Of any model."""
    found = []
    if c.masked_logp == "step":
        found += _whole_steps(c)
    found += _chosen_steps(c) if c.masked_steps is not None and c.masked_logp != "random_mask" else []
    if c.masked_logp == "random_mask":
        found += _unrecorded(c)
    if c.masked_logp in ("all", "random_mask"):
        found += _kept_elsewhere(c)
    return found


def _whole_steps(c: Any) -> list[str]:
    """One ratio, the product over a step's tokens, and one term of the loss for each step."""
    found = []
    if c.importance_sampling_level != "token":
        found.append(
            "importance_sampling_level: expected token with masked_logp step, which has a ratio for the tokens of a "
            f"step, and one for each token of a text, got {c.importance_sampling_level}; leave it out"
        )
    if c.loss_type != "grpo":
        found.append(
            f"loss_type: expected grpo with masked_logp step, whose loss is a mean over steps, got {c.loss_type}, "
            "which would count a step once for each of its tokens; set --loss_type grpo"
        )
    return found


def _chosen_steps(c: Any) -> list[str]:
    """What the loss of a few steps, weighted, would be another's expectation of."""
    at = f"with masked_steps {c.masked_steps}"
    remedy = "leave masked_steps out to train all steps, or"
    found = []
    if c.masked_logp != "step" and c.loss_type not in UNBIASED:
        why = (
            "which weighs a trajectory by all of its tokens"
            if c.loss_type == "vespo"
            else "which divides by the trajectory's own tokens or steps, and the chosen ones are not all"
        )
        found.append(
            f"loss_type: expected one of {', '.join(UNBIASED)} {at}, got {c.loss_type}, {why}; {remedy} take dapo"
        )
    if c.importance_sampling_level == "sequence" and c.masked_logp != "step":
        found.append(
            f"importance_sampling_level: expected token {at}, got sequence, whose ratio would be that of the chosen "
            f"steps alone; {remedy} take token"
        )
    if c.importance_correction != "none" and c.importance_level == "sequence":
        found.append(
            f"importance_level: expected token {at}, got sequence, whose product would be that of the chosen steps "
            f"alone; {remedy} take token"
        )
    if c.top_entropy_quantile < 1:
        found.append(
            f"top_entropy_quantile: expected 1 {at}, got {c.top_entropy_quantile:g}, whose threshold would be that of "
            f"the chosen steps alone; {remedy} leave it out"
        )
    return found


def _unrecorded(c: Any) -> list[str]:
    """What needs the sampler's log-probabilities, which a masking of afterwards has none of."""
    why = "the sampler was never in such a state, and has no log-probability of it"
    if c.rollout_staleness:
        return [
            f"rollout_staleness: expected 0 with masked_logp random_mask, got {c.rollout_staleness}: older weights "
            f"drew, and {why}; take masked_logp committed, or leave it out"
        ]
    if c.importance_correction != "none":
        return [
            f"importance_correction: expected none with masked_logp random_mask, got {c.importance_correction}: {why}; "
            "take masked_logp committed, or leave it out"
        ]
    return []


def _kept_elsewhere(c: Any) -> list[str]:
    """Truncated sampling keeps ids in the state that a token is settled in; elsewhere the set would be another."""
    found = []
    for name, keeps in KEEPS_ALL.items():
        value = value_of(c, name, "image")
        if value != keeps:
            whose = "" if getattr(c, f"image_{name}") is not None else f" (from {name})"
            found.append(
                f"image_{name}: expected {keeps:g} with masked_logp {c.masked_logp}, which scores tokens in states "
                f"where other ids were kept, got {value:g}{whose}; set --image_{name} {keeps:g}, or take committed"
            )
    return found


def order_problems(c: Any, name: str, order: str, num_image_tokens: int, usual: Mapping[str, Any]) -> list[str]:
    """Of a model that is known.

    Args:
        c: the settings.
        name: of its policy.
        order: `raster` or `masked`.
        num_image_tokens: of an image; 0: it draws none.
        usual: the settings' defaults.
    """
    if order != "masked":
        draws = "draws one token after another" if num_image_tokens else "draws no images"
        return [
            f"{setting}: expected {_word(usual[setting])} for {name}, which {draws}, got {_word(value)}; leave it out"
            for setting in OF_MASKED
            if (value := getattr(c, setting)) != usual[setting]
        ]
    found = []
    if c.image_steps > num_image_tokens:
        found.append(
            f"image_steps: expected at most {num_image_tokens} for {name}, the tokens of an image, of which each step "
            f"settles one or more, got {c.image_steps}; lower it"
        )
    if c.unconditional == "pads":
        found.append(
            f"unconditional: expected fixed for {name}, whose free prompt has no words and no padding, got pads; leave "
            "it out"
        )
    if c.preview_completion != "repeat" and c.preview_fraction > 0:
        found.append(
            f"preview_completion: expected repeat for {name}, got {c.preview_completion}: every step draws a whole "
            "picture, which is its preview; leave it out"
        )
    return found


def _word(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
