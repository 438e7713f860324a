"""Items for SFT, RL and evaluation, drawn from a numpy generator.

Generic tasks concern any look; personal ones concern the twelve concepts and use the wordings that the world's folder
holds. `split="train"` never shows a held-out look, a concept at its unseen place, or a held-out wording; `split="test"`
shows only those wordings, and only held-out looks (generic) or every place with the unseen one favoured (personal).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from .attributes import (
    ATTRIBUTES,
    CONCEPT_BY_NAME,
    CONCEPTS,
    HELD_OUT_LOOKS,
    LOOKS,
    PLACES,
    TRAIN_LOOKS,
    UNSEEN_PLACE,
    VALUES,
    Concept,
    Look,
)
from .render import render
from .texts import (
    ATTRIBUTE_QUESTIONS,
    FACT_QUESTIONS,
    PROMPTS,
    RECOGNITION_QUESTIONS,
    WHO_QUESTIONS,
    Split,
    fact,
    fill,
)

T = TypeVar("T")

TEST_LOOKS: Final = tuple(look for look in LOOKS if look in HELD_OUT_LOOKS)
MEMORY_QUESTIONS: Final = (*FACT_QUESTIONS, *(name for name in ATTRIBUTES if name != "place"))
"""What can be asked about a concept without a photo."""


@dataclass(frozen=True, eq=False)
class Item:
    """One question or one drawing prompt.

    `photo` is uint8 `[32, 32, 3]` or None; `answer` is the wanted text (for a drawing prompt the five-word
    description, which is the wanted reasoning); `look` is what a drawn picture must show; `concept` is a name without
    brackets; `attribute` says what is asked: one of `ATTRIBUTES`, of `FACT_QUESTIONS`, "who", "recognition", or the
    kind of prompt.
    """

    task: str
    question: str
    photo: NDArray[np.uint8] | None
    answer: str
    look: Look | None = None
    concept: str | None = None
    attribute: str | None = None


def pick(rng: np.random.Generator, options: tuple[T, ...]) -> T:
    """One of `options`, uniformly."""
    return options[int(rng.integers(len(options)))]


def seen_places(concept: Concept) -> tuple[str, ...]:
    """The three places where training may put the concept."""
    return tuple(place for place in PLACES if place != UNSEEN_PLACE[concept.name])


def _place(rng: np.random.Generator, concept: Concept, split: Split) -> str:
    if split == "test" and rng.random() < 0.5:
        return UNSEEN_PLACE[concept.name]
    return pick(rng, seen_places(concept) if split == "train" else PLACES)


def _photo_of(rng: np.random.Generator, concept: Concept, split: Split) -> tuple[Look, NDArray[np.uint8]]:
    look = concept.look.at(_place(rng, concept, split))
    return look, render(look, variation=rng)


def generic_vqa(rng: np.random.Generator, split: Split = "train", attribute: str | None = None) -> Item:
    """A photo of any look and a question about one attribute."""
    look = pick(rng, TRAIN_LOOKS if split == "train" else TEST_LOOKS)
    name = attribute or pick(rng, ATTRIBUTES)
    question = fill(pick(rng, ATTRIBUTE_QUESTIONS[name][split]))
    return Item("generic_vqa", question, render(look, variation=rng), getattr(look, name), attribute=name)


def generic_t2i(rng: np.random.Generator, split: Split = "train") -> Item:
    """A caption that spells a look out; draw it."""
    look = pick(rng, TRAIN_LOOKS if split == "train" else TEST_LOOKS)
    kind = pick(rng, ("explicit", "explicit_dense"))
    question = fill(pick(rng, PROMPTS[kind][split]), look=look)
    return Item("generic_t2i", question, None, look.description(), look, attribute=kind)


def personal_vqa(rng: np.random.Generator, split: Split = "train", concept: str | None = None) -> Item:
    """A photo of a concept and a question about one attribute that names it."""
    who = CONCEPT_BY_NAME[concept] if concept else pick(rng, CONCEPTS)
    name = pick(rng, ATTRIBUTES)
    look, photo = _photo_of(rng, who, split)
    question = fill(pick(rng, ATTRIBUTE_QUESTIONS[name][split]), concept=who)
    return Item("personal_vqa", question, photo, getattr(look, name), concept=who.name, attribute=name)


def personal_qa(rng: np.random.Generator, split: Split = "train", concept: str | None = None) -> Item:
    """A question from memory: a fact no picture shows, or how the concept looks."""
    who = CONCEPT_BY_NAME[concept] if concept else pick(rng, CONCEPTS)
    name = pick(rng, MEMORY_QUESTIONS)
    question = fill(pick(rng, memory_wordings(name)[split]), concept=who)
    return Item("personal_qa", question, None, fact(who, name), concept=who.name, attribute=name)


def memory_wordings(name: str) -> dict[Split, tuple[str, ...]]:
    """The wordings of one of `MEMORY_QUESTIONS`."""
    return FACT_QUESTIONS[name] if name in FACT_QUESTIONS else ATTRIBUTE_QUESTIONS[name]


def personal_who(rng: np.random.Generator, split: Split = "train", concept: str | None = None) -> Item:
    """A photo of a concept; name it."""
    who = CONCEPT_BY_NAME[concept] if concept else pick(rng, CONCEPTS)
    _, photo = _photo_of(rng, who, split)
    return Item("personal_who", pick(rng, WHO_QUESTIONS[split]), photo, who.token, concept=who.name, attribute="who")


def near_look(rng: np.random.Generator, concept: Concept, split: Split = "train") -> Look:
    """A hard negative: the concept with one attribute of its body changed, at a place, and not another concept."""
    bodies = {other.look.words()[:-1] for other in CONCEPTS}
    while True:
        name = pick(rng, tuple(a for a in ATTRIBUTES if a != "place"))
        values = concept.look.to_dict() | {name: pick(rng, VALUES[name]), "place": pick(rng, PLACES)}
        look = Look.from_dict(values)
        if look.words()[:-1] not in bodies and (split == "test" or look not in HELD_OUT_LOOKS):
            return look


def recognition(rng: np.random.Generator, split: Split = "train", concept: str | None = None) -> Item:
    """Is the concept in the photo? Half yes; of the no's half show another concept and half a near look."""
    who = CONCEPT_BY_NAME[concept] if concept else pick(rng, CONCEPTS)
    present = bool(rng.random() < 0.5)
    if present:
        _, photo = _photo_of(rng, who, split)
    elif rng.random() < 0.5:
        _, photo = _photo_of(rng, pick(rng, tuple(other for other in CONCEPTS if other != who)), split)
    else:
        photo = render(near_look(rng, who, split), variation=rng)
    question = fill(pick(rng, RECOGNITION_QUESTIONS[split]), concept=who)
    return Item("recognition", question, photo, "yes" if present else "no", concept=who.name, attribute="recognition")


def personal_t2i(
    rng: np.random.Generator, split: Split = "train", concept: str | None = None, kind: str | None = None
) -> Item:
    """Draw a concept; `kind` is a key of `PROMPTS`, any by default; a prompt by fact means its favourite place."""
    who = CONCEPT_BY_NAME[concept] if concept else pick(rng, CONCEPTS)
    kind = kind or pick(rng, tuple(PROMPTS))
    by_fact = kind in ("favourite", "personal_dense")
    look = who.look if by_fact else who.look.at(_place(rng, who, split))
    question = fill(pick(rng, PROMPTS[kind][split]), concept=who, look=look)
    return Item("personal_t2i", question, None, look.description(), look, who.name, kind)


TASKS: Final[dict[str, Callable[..., Item]]] = {
    "generic_vqa": generic_vqa,
    "generic_t2i": generic_t2i,
    "personal_vqa": personal_vqa,
    "personal_qa": personal_qa,
    "personal_who": personal_who,
    "recognition": recognition,
    "personal_t2i": personal_t2i,
}


def stream(weights: dict[str, float], seed: int, split: Split = "train") -> Iterator[Item]:
    """Endless items, each task drawn in proportion to its weight; the same seed gives the same items."""
    unknown = sorted(set(weights) - set(TASKS))
    if unknown:
        raise ValueError(f"stream: unknown tasks {unknown}; known: {sorted(TASKS)}")
    names = tuple(weights)
    share = np.array([weights[name] for name in names], dtype=np.float64)
    rng = np.random.default_rng(seed)
    while True:
        yield TASKS[names[int(rng.choice(len(names), p=share / share.sum()))]](rng, split)
