"""The embedded worlds, by name: what a run without `--model` and `--data` needs of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ..policies.base import Policy
from ..settings.train_config import TinyPolicy
from .attributes import CONCEPTS, VALUES
from .base_model import BaseSettings, corpus
from .checker import AttributeChecker
from .digits.digit_items import vocabulary
from .digits.digit_readers import VALUES as DIGIT_VALUES
from .digits.digit_readers import NearestDigit
from .digits.digits_base import DigitsBaseSettings, untrained_policy
from .digits.handwriting import FILE
from .embedded import (
    Report,
    digit_cnn,
    digits_base,
    digits_folder,
    filled_base,
    filled_digits,
    judge_cnn,
    tiny_base,
    world_folder,
)
from .filled.filled_bases import untrained as untrained_show_o
from .filled.filled_bases import untrained_digits as untrained_digits_show_o
from .texts import VOCABULARY
from .tiny_janus import build_policy
from .vq import FOLDER

RoundTrip = Callable[[Tensor], Tensor]
"""Pictures [n, 3, 32, 32] in [0, 1], as an image tokenizer gives them back."""


class Reads(Protocol):
    """Says what pictures [n, 3, 32, 32] in [0, 1] show."""

    def read_indices(self, images: Tensor) -> Tensor:
        """int64 [n, A]: the position of each attribute's value among the world's."""


class Grades(Reads, Protocol):
    """Says, too, how sure it is."""

    def posterior(self, images: Tensor) -> Mapping[str, Tensor]:
        """Attribute -> [n, its values], probabilities."""


@dataclass(frozen=True, slots=True)
class TinyBase:
    """A starting model."""

    folder: Callable[[Report | None], Path]
    """Trained on first use."""
    untrained: Callable[[], Policy]
    """As it is before it learns anything."""


@dataclass(frozen=True, slots=True)
class World:
    """One of them."""

    title: str
    """What people call it."""
    values: Mapping[str, tuple[str, ...]]
    """Attribute -> what it may be: what a picture may be asked to show."""
    words: tuple[str, ...]
    """All that its texts have."""
    folder: Callable[[], Path]
    """Its data, written on first use."""
    bases: Mapping[TinyPolicy, TinyBase]
    """Its starting models."""
    grader: Callable[[RoundTrip], Grades]
    """Gives rewards: reads drawings of a policy with this image tokenizer."""
    judge: Callable[[], Reads]
    """Scores alone: no training sees it."""
    image_tokenizer: Path
    """Folder of the VQ model around which its Janus is built; it reads any drawings of the world."""


WORLDS: Mapping[str, World] = {
    "rendered": World(
        "the rendered world",
        VALUES,
        VOCABULARY,
        world_folder,
        {
            "janus": TinyBase(
                lambda report: tiny_base(BaseSettings(), report),
                lambda: build_policy(corpus(), [concept.name for concept in CONCEPTS], seed=0, freeze_vision=True),
            ),
            "show_o": TinyBase(filled_base, lambda: untrained_show_o(0)),
        },
        AttributeChecker.from_round_trip,
        judge_cnn,
        FOLDER,
    ),
    "digits": World(
        "the world of handwritten digits",
        DIGIT_VALUES,
        vocabulary(),
        digits_folder,
        {
            "janus": TinyBase(
                lambda report: digits_base(DigitsBaseSettings(), report),
                lambda: untrained_policy(0, freeze_vision=True),
            ),
            "show_o": TinyBase(filled_digits, lambda: untrained_digits_show_o(0)),
        },
        NearestDigit.from_round_trip,
        digit_cnn,
        FILE.parent,
    ),
}


def world_of(looks: Iterable[Mapping[str, str]]) -> World | None:
    """The world whose attributes and values all of these are; None where there is none, or nothing is named."""
    named = [look for look in looks if look]
    for world in WORLDS.values():
        if named and all(value in world.values.get(name, ()) for look in named for name, value in look.items()):
            return world
    return None
