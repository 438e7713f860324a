"""How a model is given its pictures and prompts where that can be chosen, and what its checkpoint says of sampling.

Sampling settings of a checkpoint (temperature, guidance) are told and not taken: RL samples the model's own
distribution, unless a setting says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from PIL import Image

from ..settings.template_kwargs import arguments_of
from ..settings.train_config import PictureFit
from .base import Policy

P = TypeVar("P", bound=Policy)
RECOMMENDED = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "guidance_scale": None,
}
"""Sampling settings that a generation configuration may have, with the values that say nothing."""


class Prepared(Protocol):
    """Settings that say how inputs are prepared."""

    @property
    def picture_fit(self) -> PictureFit: ...
    @property
    def chat_template_kwargs(self) -> Sequence[str]: ...


@dataclass(frozen=True, slots=True)
class Inputs:
    """Both settings, resolved."""

    picture_fit: PictureFit = "processor"
    chat_template_kwargs: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Prepared) -> Inputs:
        return cls(config.picture_fit, tuple(config.chat_template_kwargs))

    def given_to(self, policy: P) -> P:
        """The policy, which prepares its inputs so from now on."""
        policy.picture_fit = self.picture_fit
        policy.template_kwargs = arguments_of(self.chat_template_kwargs)
        return policy


def check_fit(policy: P) -> P:
    """The policy, once a picture that is no square has been brought to its size; ConfigError where it cannot be."""
    if policy.image_size:
        policy.fit()(Image.new("RGB", (48, 32)), policy.image_size)
    return policy


def checkpoint_notes(policy: Policy) -> list[str]:
    """What somebody who trains a checkpoint should know of its own settings, a line each."""
    notes = []
    if said := recommended(policy):
        words = ", ".join(f"{name} {value}" for name, value in said.items())
        notes.append(f"its generation_config.json samples with {words}; this run with its own settings")
    template = str(getattr(policy.processor, "chat_template", None) or "")
    if "strftime_now" in template and not policy.template_kwargs:
        notes.append(
            "its chat template writes today's date into prompts; --chat_template_kwargs date_string=... or its like "
            "keeps a run of several days, and a later evaluation, on one"
        )
    unread = [name for name in policy.template_kwargs if not re.search(rf"\b{name}\b", template)]
    if unread:
        notes.append(f"its chat template reads no {', '.join(unread)}: of --chat_template_kwargs that changes nothing")
    return notes


def recommended(policy: Policy) -> dict[str, Any]:
    """Sampling settings of the checkpoint's generation configuration that say something."""
    generation = getattr(policy.model, "generation_config", None)
    found = {name: getattr(generation, name, None) for name in RECOMMENDED}
    return {name: value for name, value in found.items() if value is not None and value != RECOMMENDED[name]}
