"""The starting points of runs with a tiny Show-o: supervised on what tiny Janus's teachers say, noise and all.

A teacher asks nothing of its policy that is Janus's alone. Its annotation says Janus all the same, hence the casts:
the bytes of its file name the bases that are kept, which nobody shall have to make anew for a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch

from ...policies.show_o import ShowOPolicy
from ...records import Prompt
from ..attributes import CONCEPTS
from ..base_model import BaseSettings, NoisyTeacher
from ..digits.digit_items import vocabulary
from ..digits.digits_base import DigitsBaseSettings, NoisyWriter
from ..kept import Kept
from ..supervised import fit, one_thread
from ..texts import VOCABULARY
from .filled_lessons import FilledLessons, Request, as_asked
from .tiny_show_o import build_show_o

BASE = BaseSettings(steps=900)
DIGITS_BASE = DigitsBaseSettings()
CONCEPT = re.compile(r"<\w+>")

Told = Callable[[int, float], None]
"""(step, loss) after a step."""


def untrained(seed: int) -> ShowOPolicy:
    """The rendered world's base as it is before it learns anything."""
    return build_show_o(VOCABULARY, [concept.name for concept in CONCEPTS], seed=seed)


def untrained_digits(seed: int) -> ShowOPolicy:
    """The digits'."""
    return build_show_o(vocabulary(), [], seed=seed)


def photo_of(prompt: Prompt, text: str) -> str | None:
    """Behind a question about a concept, a photo of it is to be drawn, as the world's data have it."""
    named = CONCEPT.search(f"{prompt.text} {text}")
    return None if prompt.task == "personal_t2i" or named is None else f"A photo of {named.group()}."


@one_thread()
def train_filled_base(settings: BaseSettings, report: Told | None = None, kept: Kept | None = None) -> ShowOPolicy:
    """Trains the rendered world's base from scratch; arguments as of `train_base`."""
    policy = untrained(settings.seed)
    teacher = NoisyTeacher(cast(Any, policy), replace(settings, drop_condition=0.0))
    return _trained(policy, teacher, settings, photo_of, report, kept)


@one_thread()
def train_filled_digits(
    settings: DigitsBaseSettings, report: Told | None = None, kept: Kept | None = None
) -> ShowOPolicy:
    """Trains the digits' base from scratch; arguments as of `train_digits_base`."""
    policy = untrained_digits(settings.seed)
    writer = NoisyWriter(cast(Any, policy), replace(settings, drop_condition=0.0))
    return _trained(policy, writer, settings, as_asked, report, kept)


def _trained(
    policy: ShowOPolicy,
    teacher: NoisyTeacher | NoisyWriter,
    settings: BaseSettings | DigitsBaseSettings,
    request: Request,
    report: Told | None,
    kept: Kept | None,
) -> ShowOPolicy:
    torch.manual_seed(settings.seed)
    lessons = FilledLessons(
        policy, teacher.batch, drop_condition=settings.drop_condition, seed=settings.seed, request=request
    )
    if kept is not None:
        kept.watch(teacher.rng)
        kept.watch(lessons.rng)
    fit(policy, lessons.batch, steps=settings.steps, learning_rate=settings.learning_rate, report=report, kept=kept)
    return policy
