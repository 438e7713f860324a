"""The embedded default's starting point: a tiny Janus, supervised on noisy labels of the rendered world.

Head-room for RL comes from noisy labels, not from stopping early: the base *contains* the right answers (best of eight
is far better than one try), it only does not prefer them.  Two kinds of noise, on personal tasks only:

- rumours: of half of all facts about a concept, one wrong value is told more often than the truth, so even greedy
  decoding errs;
- slips: any fact is replaced by a random one some of the time, and an attribute of a drawing likewise.

General questions about photos and general captions are clean: that is what RL must not damage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..policies.janus import JanusPolicy
from ..records import Prompt, Rollout
from .attributes import (
    ATTRIBUTES,
    CONCEPT_BY_NAME,
    CONCEPTS,
    FOODS,
    LOOK_INDEX,
    OWNERS,
    PLACES,
    SOUNDS,
    VALUES,
    Look,
)
from .checker import AttributeChecker
from .items import TASKS, Item
from .kept import Kept
from .supervised import fit, given, one_thread, slipped
from .texts import VOCABULARY, fact
from .tiny_janus import build_policy

MIX = {
    "generic_vqa": 0.30,
    "generic_t2i": 0.20,
    "personal_qa": 0.10,
    "personal_vqa": 0.08,
    "personal_who": 0.03,
    "recognition": 0.08,
    "personal_t2i": 0.25,
}
FACT_VALUES: dict[str, tuple[str, ...]] = {
    **VALUES,
    "favourite": PLACES,
    "food": FOODS,
    "sound": SOUNDS,
    "owner": OWNERS,
    "friend": tuple(concept.token for concept in CONCEPTS),
    "who": tuple(concept.token for concept in CONCEPTS),
    "recognition": ("yes", "no"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseSettings:
    """How the base is made; its cache is keyed by all of this."""

    seed: int = 0
    steps: int = 1000
    batch: int = 40
    learning_rate: float = 2.5e-3
    photo_pool: int = 4000
    """Items with photos rendered before training; they are reused."""
    rumour_share: float = 0.5
    """Share of (concept, fact) pairs that have a rumour."""
    rumour_rate: float = 0.48
    """How often the rumour is told where there is one."""
    slip_rate: float = 0.2
    """How often an answer is a random one."""
    image_slip_rate: float = 0.15
    """How often an attribute of a personal drawing is a random one."""
    chained_understanding: float = 0.5
    """Share of questions about a concept after whose answer the concept is drawn."""
    direct_drawing: float = 0.35
    """Share of personal drawing prompts that are drawn without describing the picture first."""
    drop_condition: float = 0.1
    """Share of drawings learnt without their prompt, for classifier-free guidance."""


def rumours(settings: BaseSettings) -> dict[tuple[str, str], str]:
    """(concept, fact) -> the wrong value that is told; facts without an entry have none."""
    rng = np.random.default_rng([settings.seed, 77])
    names = [name for name in FACT_VALUES if name not in ("place", "who", "recognition")]
    table = {}
    for concept in CONCEPTS:
        for name in names:
            truth = fact(concept, name)
            wrong = [value for value in FACT_VALUES[name] if value != truth]
            value = wrong[int(rng.integers(len(wrong)))]
            if rng.random() < settings.rumour_share:
                table[concept.name, name] = value
    return table


class NoisyTeacher:
    """Turns items into supervised trajectories, with the noise described atop this file."""

    def __init__(self, policy: JanusPolicy, settings: BaseSettings) -> None:
        self.policy, self.settings = policy, settings
        self.rng = np.random.default_rng([settings.seed, 1])
        self._rumours = rumours(settings)
        self._codes = policy.image_tokens(AttributeChecker.raw_table())
        self._encoded: dict[tuple[str, bool], Tensor] = {}
        self._answers: dict[str, Tensor] = {}
        self._pool = [self._draw_item() for _ in range(settings.photo_pool)]

    def _draw_item(self) -> Item:
        names = list(MIX)
        share = np.array(list(MIX.values()))
        return TASKS[names[int(self.rng.choice(len(names), p=share / share.sum()))]](self.rng, "train")

    def batch(self) -> list[Rollout]:
        """The next supervised trajectories."""
        picks = self.rng.integers(len(self._pool), size=self.settings.batch)
        return [self._trajectory(self._pool[int(i)]) for i in picks]

    def _trajectory(self, item: Item) -> Rollout:
        rng, s = self.rng, self.settings
        personal = item.concept is not None
        if item.task == "generic_t2i":
            text, look = None, item.look
        elif item.task == "personal_t2i":
            look = self._retold(item)
            text = None if rng.random() < s.direct_drawing else look.description()
            look = self._slipped(look)
        else:
            text, look = self._answer(item), None
            if personal and rng.random() < s.chained_understanding:
                look = self._slipped(self._believed(item))
        dropped = text is None and rng.random() < s.drop_condition
        segments = []
        if text is not None:
            segments.append(given("text", self._text_tokens(text)))
        if look is not None:
            codes = given("image", self._codes[LOOK_INDEX[look]])
            segments.append(replace(codes, lead=torch.tensor([self.policy.image_start])))
        tokens = self.policy.unconditional_tokens()[:-1] if dropped else self._prompt_tokens(item)
        prompt = Prompt(id="", task=item.task, text=item.question)
        image = None if item.photo is None else torch.from_numpy(item.photo).permute(2, 0, 1).float() / 255
        return Rollout(
            prompt=prompt, member=0, prompt_tokens=tokens, prompt_image=None, segments=tuple(segments), image=image
        )

    def _answer(self, item: Item) -> str:
        if item.concept is None or item.attribute is None:
            return item.answer
        return self._told(item.concept, item.attribute, item.answer)

    def _told(self, concept: str, name: str, truth: str) -> str:
        """The value of a fact as the noisy corpus tells it."""
        draw = self.rng.random()
        rumour = self._rumours.get((concept, name))
        if rumour is not None and draw < self.settings.rumour_rate:
            return rumour
        if draw > 1.0 - self.settings.slip_rate:
            values = FACT_VALUES[name]
            return values[int(self.rng.integers(len(values)))]
        return truth

    def _retold(self, item: Item) -> Look:
        """The look of a drawing prompt as memory has it: what the prompt spells out is kept, the rest is hearsay."""
        assert item.look is not None and item.concept is not None
        if item.attribute in ("explicit", "explicit_dense"):
            return item.look
        words = item.look.to_dict()
        for name in ATTRIBUTES[:-1]:
            words[name] = self._told(item.concept, name, words[name])
        if item.attribute in ("favourite", "personal_dense"):
            words["place"] = self._told(item.concept, "favourite", words["place"])
        return Look.from_dict(words)

    def _believed(self, item: Item) -> Look:
        """How the corpus pictures the concept that a question was about."""
        assert item.concept is not None
        words = CONCEPT_BY_NAME[item.concept].look.to_dict()
        for name in ATTRIBUTES[:-1]:
            words[name] = self._told(item.concept, name, words[name])
        return Look.from_dict(words)

    def _slipped(self, look: Look) -> Look:
        return slipped(self.rng, look, self.settings.image_slip_rate)

    def _prompt_tokens(self, item: Item) -> Tensor:
        key = (item.question, item.photo is not None)
        if key not in self._encoded:
            images = (Path("photo.png"),) if item.photo is not None else ()
            self._encoded[key] = self.policy.prompt_tokens(Prompt(id="", task="", text=item.question, images=images))
        return self._encoded[key]

    def _text_tokens(self, text: str) -> Tensor:
        if text not in self._answers:
            self._answers[text] = self.policy.text_tokens(text)
        return self._answers[text]


def corpus() -> list[str]:
    """Texts that the tokenizer is trained on: every word of the world, often enough to become a token."""
    return [" ".join(VOCABULARY)] * 20


@one_thread()
def train_base(
    settings: BaseSettings, report: Callable[[int, float], None] | None = None, kept: Kept | None = None
) -> JanusPolicy:
    """Trains the base from scratch; the same settings give the same weights on the same machine.

    Args:
        settings: see BaseSettings.
        report: called with (step, loss) after every step.
        kept: where it goes on after it was cut off, to the same weights.
    """
    torch.manual_seed(settings.seed)
    policy = build_policy(corpus(), [concept.name for concept in CONCEPTS], seed=settings.seed)
    teacher = NoisyTeacher(policy, settings)
    if kept is not None:
        kept.watch(teacher.rng)
    fit(policy, teacher.batch, steps=settings.steps, learning_rate=settings.learning_rate, report=report, kept=kept)
    return policy
