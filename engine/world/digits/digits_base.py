"""The starting point of the digits' runs: a tiny Janus, supervised on noisy labels of real handwriting.

As base_model.py has it for the rendered world: head-room for RL comes from noisy labels, not from stopping early.

- rumours: of a third of all that is reckoned with, one wrong result is told more often than the right one;
- slips: any answer is a random one some of the time, and any drawing shows a random digit.

What is seen of sheets of four is told without noise: it is hard enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...policies.janus import JanusPolicy
from ...records import Prompt, Rollout
from ..kept import Kept
from ..supervised import fit, given, one_thread
from ..tiny_janus import build_policy
from .digit_items import Item, stream, vocabulary
from .handwriting import FILE, NAMES, alone, rows_of

MIX = {"read": 0.3, "count": 0.1, "reckon": 0.25, "write": 0.35}


@dataclass(frozen=True, slots=True, kw_only=True)
class DigitsBaseSettings:
    """How the base is made; its cache is keyed by all of this."""

    seed: int = 0
    steps: int = 1500
    batch: int = 40
    learning_rate: float = 2.5e-3
    item_pool: int = 4000
    """Items made before training; they are used again."""
    slip_rate: float = 0.3
    """How often an answer is a random one."""
    image_slip_rate: float = 0.2
    """How often a drawing shows a random digit."""
    rumour_share: float = 0.33
    """Share of the questions without a picture that have a rumour."""
    rumour_rate: float = 0.48
    """How often it is told."""
    hands: int | None = None
    """Pictures of each digit that it learns to write from; None: all of the training half."""
    drop_condition: float = 0.1
    """Share of drawings learnt without their prompt, for classifier-free guidance."""


class NoisyWriter:
    """Turns items into supervised trajectories, with the noise described atop this file."""

    def __init__(self, policy: JanusPolicy, settings: DigitsBaseSettings) -> None:
        self.policy, self.settings = policy, settings
        self.rng = np.random.default_rng([settings.seed, 2])
        rows = [own[: settings.hands] for own in rows_of("train").values()]
        pictures = np.stack([alone(row) for own in rows for row in own])
        codes = policy.image_tokens(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255)
        self._codes = dict(enumerate(codes.split([len(own) for own in rows])))
        self._pool = list(islice(stream(MIX, settings.seed, "train"), settings.item_pool))
        self._rumours: dict[str, str | None] = {}
        self._encoded: dict[tuple[str, bool], Tensor] = {}

    def batch(self) -> list[Rollout]:
        """The next supervised trajectories."""
        picks = self.rng.integers(len(self._pool), size=self.settings.batch)
        return [self._trajectory(self._pool[int(i)]) for i in picks]

    def _trajectory(self, item: Item) -> Rollout:
        segments = []
        text = None if item.answer is None else self._told(item)
        if text is not None:
            segments.append(given("text", self.policy.text_tokens(text)))
        if item.digit is not None:
            digit = item.digit if text is None else NAMES.index(text)
            if self.rng.random() < self.settings.image_slip_rate:
                digit = int(self.rng.integers(10))
            codes = self._codes[digit]
            drawn = given("image", codes[int(self.rng.integers(len(codes)))])
            segments.append(replace(drawn, lead=torch.tensor([self.policy.image_start])))
        dropped = text is None and self.rng.random() < self.settings.drop_condition
        tokens = self.policy.unconditional_tokens()[:-1] if dropped else self._prompt_tokens(item)
        image = None if item.photo is None else torch.from_numpy(item.photo).permute(2, 0, 1).float() / 255
        return Rollout(
            prompt=Prompt(id="", task=item.task, text=item.question),
            member=0,
            prompt_tokens=tokens,
            prompt_image=None,
            segments=tuple(segments),
            image=image,
        )

    def _told(self, item: Item) -> str:
        """The answer as the noisy corpus has it."""
        assert item.answer is not None
        if item.task == "count":
            return item.answer
        rumour = self._rumour(item) if item.photo is None else None
        draw = self.rng.random()
        if rumour is not None and draw < self.settings.rumour_rate:
            return rumour
        return NAMES[int(self.rng.integers(10))] if draw > 1 - self.settings.slip_rate else item.answer

    def _rumour(self, item: Item) -> str | None:
        """The same for each wording: of what is reckoned with."""
        key = " ".join(sorted(word for word in item.question.rstrip(".").split() if word in NAMES)) + str(item.answer)
        if key not in self._rumours:
            rng = np.random.default_rng([self.settings.seed, *key.encode()])
            wrong = [name for name in NAMES if name != item.answer]
            told = wrong[int(rng.integers(len(wrong)))]
            self._rumours[key] = told if rng.random() < self.settings.rumour_share else None
        return self._rumours[key]

    def _prompt_tokens(self, item: Item) -> Tensor:
        key = (item.question, item.photo is not None)
        if key not in self._encoded:
            images = (Path("photo.png"),) if item.photo is not None else ()
            self._encoded[key] = self.policy.prompt_tokens(Prompt(id="", task="", text=item.question, images=images))
        return self._encoded[key]


def untrained_policy(seed: int, *, freeze_vision: bool = False) -> JanusPolicy:
    """As it is before it learns anything."""
    texts = [" ".join(vocabulary())] * 20
    return build_policy(texts, [], seed=seed, freeze_vision=freeze_vision, image_tokenizer=FILE.parent)


@one_thread()
def train_digits_base(
    settings: DigitsBaseSettings, report: Callable[[int, float], None] | None = None, kept: Kept | None = None
) -> JanusPolicy:
    """Trains the base from scratch; the same settings give the same weights on the same machine.

    Args:
        settings: see DigitsBaseSettings.
        report: called with (step, loss) after every step.
        kept: where it goes on after it was cut off, to the same weights.
    """
    torch.manual_seed(settings.seed)
    policy = untrained_policy(settings.seed)
    writer = NoisyWriter(policy, settings)
    if kept is not None:
        kept.watch(writer.rng)
    fit(policy, writer.batch, steps=settings.steps, learning_rate=settings.learning_rate, report=report, kept=kept)
    return policy
