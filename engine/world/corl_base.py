"""The embedded CoRL recipe's starting point: a tiny Janus that answers in tags and draws captions, taught with noise.

As in `base_model.py`, head-room for RL comes from noisy labels: the base *contains* right answers, well-formed ones
and right drawings, it only does not prefer them enough. Four kinds of noise:

- confusions: half of all attribute values are told as one certain other value more often than as themselves, so even
  greedy decoding errs;
- slips: what is seen, or the answer given to it, is a random one some of the time;
- broken format: a tag is missing or out of place;
- drawings: an attribute is a random one some of the time.

On held-out looks and wordings (100 samples): multiple choice .60 greedy, .42 sampled, .92 best of eight; open questions
.60, .49, .84; format kept 1.0 and .79; attributes of drawings .80, and .87 with guidance 1.5.

An answer reads `<think> the hat is crown </think><answer> B </answer>`: the thought names what is seen, the answer
says it, or the letter of the option that says it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ..policies.janus import JanusPolicy
from ..records import Prompt, Rollout
from .attributes import ATTRIBUTES, LOOK_INDEX, TRAIN_LOOKS, VALUES, Look
from .checker import AttributeChecker
from .items import pick
from .kept import Kept
from .supervised import fit, given, one_thread, slipped
from .texts import VOCABULARY
from .tiny_janus import build_policy
from .x2x import LETTERS, QAType, Question, ask, caption_of, photograph

TAGS: Final = ("<think>", "</think>", "<answer>", "</answer>")
BROKEN: Final = (
    " {thought} </think><answer> {answer} </answer>",
    "<think> {thought}<answer> {answer} </answer>",
    "<think> {thought} </think> {answer} </answer>",
    "<think> {thought} </think><answer> {answer}",
    "<answer> {answer} </answer><think> {thought} </think>",
    " {answer}",
)
"""Answers as they should not be: one tag left out, thought and answer swapped, no tags at all."""
WELL_FORMED: Final = "<think> {thought} </think><answer> {answer} </answer>"
DESCRIBE: Final = "name the shape, the colour, the hat, the pattern, the place."


@dataclass(frozen=True, slots=True, kw_only=True)
class CorlBaseSettings:
    """How the base is made; its cache is keyed by all of this."""

    seed: int = 0
    steps: int = 420
    batch: int = 44
    learning_rate: float = 2.5e-3
    photo_pool: int = 4000
    """Photos rendered before training; they are reused with other questions."""
    noise_start: float = 0.55
    """Share of the steps that are taught without noise: seeing and drawing are learnt far sooner that way."""
    drawing_share: float = 0.4
    """Share of captions to be drawn; the rest are photos."""
    describe_share: float = 0.2
    """Share of photos that are described in five words: that is what trains the vision tower fast."""
    multiple_choice_share: float = 0.5
    """Share of multiple-choice questions."""
    confusion_share: float = 0.5
    """Share of attribute values that are confused with another one."""
    confusion_rate: float = 0.5
    """How often a confused value is told as the other one."""
    slip_rate: float = 0.15
    """How often a random value is seen."""
    answer_slip_rate: float = 0.05
    """How often the answer is not what the thought says."""
    broken_rate: float = 0.2
    """How often the format is broken."""
    image_slip_rate: float = 0.2
    """How often an attribute of a drawing is a random one."""
    drop_condition: float = 0.1
    """Share of drawings learnt without their caption, for classifier-free guidance."""


def confusions(settings: CorlBaseSettings) -> dict[tuple[str, str], str]:
    """(attribute, value) -> the value that it is mistaken for; values without an entry are seen as they are."""
    rng = np.random.default_rng([settings.seed, 78])
    table = {}
    for name in ATTRIBUTES:
        for value in VALUES[name]:
            other = pick(rng, tuple(v for v in VALUES[name] if v != value))
            if rng.random() < settings.confusion_share:
                table[name, value] = other
    return table


class NoisyTutor:
    """Turns looks into supervised trajectories, with the noise described atop this file."""

    def __init__(self, policy: JanusPolicy, settings: CorlBaseSettings) -> None:
        self.policy, self.settings = policy, settings
        self.rng = np.random.default_rng([settings.seed, 2])
        self.confused = confusions(settings)
        self.num_batches = 0
        """How many were drawn: the noise begins late."""
        self.noisy = True
        self._codes = policy.image_tokens(AttributeChecker.raw_table())
        self._encoded: dict[tuple[str, bool], Tensor] = {}
        looks = [pick(self.rng, TRAIN_LOOKS) for _ in range(settings.photo_pool)]
        self._pool = [(look, _pixels(photograph(self.rng, look))) for look in looks]

    def batch(self) -> list[Rollout]:
        """The next supervised trajectories."""
        s = self.settings
        self.noisy = self.num_batches >= s.noise_start * s.steps
        self.num_batches += 1
        draws = self.rng.random(s.batch)
        return [self._drawing() if draw < s.drawing_share else self._understanding() for draw in draws]

    def _drawing(self) -> Rollout:
        look = pick(self.rng, TRAIN_LOOKS)
        caption = caption_of(self.rng, look, "train")
        drawn = slipped(self.rng, look, self.settings.image_slip_rate) if self.noisy else look
        segment = replace(given("image", self._codes[LOOK_INDEX[drawn]]), lead=torch.tensor([self.policy.image_start]))
        if self.rng.random() < self.settings.drop_condition:
            tokens = self.policy.unconditional_tokens()[:-1]
        else:
            tokens = self._prompt_tokens(caption, shows_image=False)
        prompt = Prompt(id="", task="t2i", text=caption)
        return Rollout(prompt=prompt, member=0, prompt_tokens=tokens, prompt_image=None, segments=(segment,))

    def _understanding(self) -> Rollout:
        look, photo = self._pool[int(self.rng.integers(len(self._pool)))]
        if self.rng.random() < self.settings.describe_share:
            text, reply = DESCRIBE, look.description()
        else:
            question = ask(self.rng, look, "train", self._qa_type())
            text, reply = question.text, self.answer(look, question)
        return Rollout(
            prompt=Prompt(id="", task="vqa", text=text),
            member=0,
            prompt_tokens=self._prompt_tokens(text, shows_image=True),
            prompt_image=None,
            segments=(given("text", self.policy.text_tokens(reply)),),
            image=photo,
        )

    def _qa_type(self) -> QAType:
        return "MC" if self.rng.random() < self.settings.multiple_choice_share else "OE"

    def answer(self, look: Look, question: Question) -> str:
        """A reply as the noisy corpus has it: thought, answer and tags."""
        rng, s = self.rng, self.settings
        truth = str(getattr(look, question.attribute))
        if not self.noisy:
            return WELL_FORMED.format(thought=f"the {question.attribute} is {truth}", answer=question.solution)
        seen = self._seen(question.attribute, truth)
        values = question.options or VALUES[question.attribute]
        said = seen if seen in values and rng.random() >= s.answer_slip_rate else pick(rng, values)
        answer = LETTERS[question.options.index(said)] if question.options else said
        form = pick(rng, BROKEN) if rng.random() < s.broken_rate else WELL_FORMED
        return form.format(thought=f"the {question.attribute} is {seen}", answer=answer)

    def _seen(self, name: str, truth: str) -> str:
        draw = self.rng.random()
        if draw < self.settings.confusion_rate and (name, truth) in self.confused:
            return self.confused[name, truth]
        if draw > 1.0 - self.settings.slip_rate:
            return pick(self.rng, VALUES[name])
        return truth

    def _prompt_tokens(self, text: str, *, shows_image: bool) -> Tensor:
        key = (text, shows_image)
        if key not in self._encoded:
            images = (Path("photo.png"),) if shows_image else ()
            self._encoded[key] = self.policy.prompt_tokens(Prompt(id="", task="", text=text, images=images))
        return self._encoded[key]


def _pixels(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1).float() / 255


def corl_corpus() -> list[str]:
    """Texts that the tokenizer is trained on: every word, and the options' letters, often enough to become tokens."""
    return [" ".join([*VOCABULARY, *LETTERS])] * 20


@one_thread()
def train_corl_base(
    settings: CorlBaseSettings, report: Callable[[int, float], None] | None = None, kept: Kept | None = None
) -> JanusPolicy:
    """Trains the base from scratch; the same settings give the same weights on the same machine.

    Args:
        settings: see CorlBaseSettings.
        report: called with (step, loss) after every step.
        kept: where it goes on after it was cut off, to the same weights.
    """
    torch.manual_seed(settings.seed)
    policy = build_policy(corl_corpus(), [], seed=settings.seed, tags=TAGS)
    tutor = NoisyTutor(policy, settings)
    if kept is not None:
        kept.watch(tutor.rng)
        tutor.num_batches = kept.steps
    fit(policy, tutor.batch, steps=settings.steps, learning_rate=settings.learning_rate, report=report, kept=kept)
    return policy
