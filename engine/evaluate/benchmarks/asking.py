"""Prompts of benchmarks: how a request to draw and a question about a picture become a `Prompt`, for all of them.

`Prompt.extra` says in `benchmark` which one a prompt is of, and in `group` which of its published categories; with that
the stored folder can be scored without the benchmark's files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from ...data.questions import THINK_THEN_ANSWER, instructed
from ...pictures import ImageRef
from ...records import Prompt

BY_LETTER = "Answer with the option's letter from the given choices directly."
BY_WORDS = "Answer the question using a single word or phrase."
"""The endings that LLaVA's evaluation made usual; MMMU's own code and VLMEvalKit's Janus have the very same."""
_PLACES = re.compile(r"<image(?: \d+)?>[ \t]*\n?")
"""Where a question says that a picture goes."""


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

    A prompt shows one picture, which comes first: of several the first is shown, as MMMU's own code for LLaVA does.

    Args:
        benchmark, key: of the id.
        asked: what is asked.
        pictures: that the question shows.
        group: its published category.
        think: asks to think in tags, and to answer in tags.
        sample: what questions that are scored together share.
        extra: what the scoring needs further.
    """
    plain = _PLACES.sub("", asked.question).strip()
    kind: Literal["MC", "OE"] = "MC" if asked.options else "OE"
    if think:
        text = instructed(plain, kind, asked.answer, THINK_THEN_ANSWER)
    else:
        text = "\n".join(part for part in (asked.opening, plain, asked.ending) if part)
    return Prompt(
        id=f"{benchmark}/{key}",
        task=benchmark,
        text=text,
        image=pictures[0] if pictures else None,
        segments=("text",),
        answer=asked.answer,
        options=asked.options,
        sample=sample,
        extra={"benchmark": benchmark, "group": group, "num_pictures": len(pictures), **extra},
    )


def lettered(options: Sequence[str], form: str = "{letter}. {text}") -> str:
    """The options below each other, each behind its letter."""
    return "\n".join(form.format(letter=chr(ord("A") + place), text=text) for place, text in enumerate(options))
