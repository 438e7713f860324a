"""Prompts of benchmarks: how a request to draw and a question about a picture become a `Prompt`, for all of them.

`Prompt.extra` says in `benchmark` which one a prompt is of, and in `group` which of its published categories; with that
the stored folder can be scored without the benchmark's files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from ...data.questions import THINK_THEN_ANSWER, instructed
from ...errors import DataError
from ...pictures import PICTURE, ImageRef
from ...records import Prompt

BY_LETTER = "Answer with the option's letter from the given choices directly."
BY_WORDS = "Answer the question using a single word or phrase."
"""The endings that LLaVA's evaluation made usual; MMMU's own code and VLMEvalKit's Janus have the very same."""
_PLACE = re.compile(r"<image(?: (\d+))?>")
"""Where a question says that a picture goes, and which."""


class Asked(NamedTuple):
    """A question, as a benchmark's reader has it."""

    question: str
    """With its options, without what says how to answer."""
    answer: str
    options: tuple[str, ...] = ()
    ending: str = BY_WORDS
    """What says how to answer, unless the model is asked to think first."""
    opening: str = ""
    """The same, where the benchmark says it before the question."""


def drawing(benchmark: str, key: object, text: str, group: str, **extra: Any) -> Prompt:
    """A request for a picture; `extra` is what its scoring needs."""
    return Prompt(
        id=f"{benchmark}/{key}",
        task=benchmark,
        text=text,
        segments=("image",),
        target=text,
        extra={"benchmark": benchmark, "group": group, **extra},
    )


def question(
    benchmark: str,
    key: object,
    asked: Asked,
    pictures: Sequence[ImageRef],
    *,
    group: str,
    think: bool,
    sample: str | None = None,
    **extra: Any,
) -> Prompt:
    """A question about pictures, in the benchmark's own words, or (`think`) as CoRL's training asks.

    Pictures stand where the question says; those of which it says nothing come first.

    Args:
        benchmark, key: of the id.
        asked: what is asked.
        pictures: that the question shows.
        group: its published category.
        think: asks to think in tags, and to answer in tags.
        sample: what questions that are scored together share.
        extra: what the scoring needs further.
    """
    plain, shown = _in_place(f"{benchmark}/{key}", asked.question, pictures)
    kind: Literal["MC", "OE"] = "MC" if asked.options else "OE"
    if think:
        text = instructed(plain, kind, asked.answer, THINK_THEN_ANSWER)
    else:
        text = "\n".join(part for part in (asked.opening, plain, asked.ending) if part)
    return Prompt(
        id=f"{benchmark}/{key}",
        task=benchmark,
        text=text,
        images=shown,
        segments=("text",),
        answer=asked.answer,
        options=asked.options,
        sample=sample,
        extra={"benchmark": benchmark, "group": group, **extra},
    )


def _in_place(name: str, text: str, pictures: Sequence[ImageRef]) -> tuple[str, tuple[ImageRef, ...]]:
    """The question with a sign for every picture, and the pictures in the order of the signs; without signs there is
    nothing to say of a single picture, which comes first."""
    if not pictures:
        return _PLACE.sub("", text).strip(), ()
    numbers = [int(number or place) for place, number in enumerate(_PLACE.findall(text), 1)]
    if wrong := [number for number in numbers if not 1 <= number <= len(pictures)]:
        raise DataError(f"{name}: the question shows picture {wrong[0]} and has {len(pictures)}; download it again")
    first = [number for number in range(1, len(pictures) + 1) if number not in numbers]
    signs = "" if len(first) == len(pictures) == 1 else f"{PICTURE}\n" * len(first)
    return signs + _PLACE.sub(PICTURE, text).strip(), tuple(pictures[number - 1] for number in (*first, *numbers))


def lettered(options: Sequence[str], form: str = "{letter}. {text}") -> str:
    """The options below each other, each behind its letter."""
    return "\n".join(form.format(letter=chr(ord("A") + place), text=text) for place, text in enumerate(options))
