"""Checkpoints that were trained for one half of a task, drawing or answering, and how much of that can be known.

Nothing in the weights or the settings of such a family tells the halves apart: the classes, the vocabulary and the chat
template are the same. A checkpoint's name does (the hub's, or its folder's), and what is noted in `config.json`, where
a policy keeps it when it is saved:

    "trained_for": "image"      or "text"
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ..errors import ConfigError
from ..records import MODALITY_NAMES, SegmentKind
from .kinds import called

NOTE = "trained_for"
DOING: Mapping[SegmentKind, str] = {"text": "to answer in text", "image": "to draw"}


def half_of(model: Any, words: Mapping[str, SegmentKind]) -> SegmentKind | None:
    """What a checkpoint was trained for, which is noted in its configuration; None: both, or it is not known.

    Args:
        model: of transformers, loaded by its name.
        words: of a name, lower case, and what they tell.

    Raises:
        ConfigError: something else is noted.
    """
    noted = getattr(model.config, NOTE, None)
    if noted is None:
        name = called(getattr(model, "name_or_path", None) or "")
        told = {words[word] for word in re.split(r"[^a-z0-9]+", name) if word in words}
        noted = told.pop() if len(told) == 1 else None
        if noted is not None:
            setattr(model.config, NOTE, noted)
    if noted not in (None, *MODALITY_NAMES):
        raise ConfigError(
            f"model: expected {NOTE} in config.json to be 'text' or 'image', got {noted!r}; correct it or leave it out"
        )
    return noted


def remarks_on_half(
    family: str, half: SegmentKind | None, plans: Collection[tuple[SegmentKind, ...]], halves: Mapping[SegmentKind, str]
) -> list[str]:
    """What to say of such a checkpoint: its half, and that these plans ask for the other one.

    Args:
        family: its name.
        half: as `half_of` tells.
        plans: `segments` of the prompts to come.
        halves: the family's checkpoint for each half.
    """
    kinds = {kind for plan in plans for kind in plan}
    if half is None:
        both = len(kinds) > 1
        asked = ", and these prompts ask for both" if both else ""
        return [
            f"{family} comes as two checkpoints, {halves['image']} {DOING['image']} and {halves['text']} "
            f'{DOING["text"]}; the name of this one does not tell which it is{asked}. "{NOTE}": "image" or "text" in '
            "its config.json says it"
        ]
    other: SegmentKind = "text" if half == "image" else "image"
    lines = [f"{family}: this checkpoint was trained {DOING[half]}; {halves[other]} is the one {DOING[other]}"]
    if other in kinds:
        chain = any(len(set(plan)) > 1 for plan in plans)
        what = "chains of both" if chain else "that half"
        lines.append(
            f"warning: prompts ask for {what}, and this checkpoint was not trained {DOING[other]}: expect that part to "
            "begin near chance, so that rewards have little to tell apart; "
            + ("a model of both halves (Janus, Liquid, Show-o) suits chains" if chain else f"use {halves[other]}")
        )
    return lines
