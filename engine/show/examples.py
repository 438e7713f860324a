"""The same requests before and after training, as files: `before_after/examples.jsonl` and its pictures.

A line holds what the page shows of a request: its id, what was asked (text, right answer, attributes that the picture
must show), the photo beside it, and of each side the text, the picture and what a reader saw in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import PictureError
from ..pictures import ImageRef, open_picture
from ..records import Prompt, Rollout
from . import sheets

FOLDER = "before_after"
PHOTO_SIDE = 192
"""Pixels of a photo's longer side: it stands small beside the drawings."""
Reading = Mapping[str, str]
"""Attribute -> value that a picture shows, by a reader that no reward uses; empty where nothing can be read."""


def write_examples(
    folder: Path,
    before: Sequence[Rollout],
    after: Sequence[Rollout],
    read_before: Sequence[Reading] = (),
    read_after: Sequence[Reading] = (),
) -> Path:
    """Writes the examples of both models into a run's folder, and returns the sheet that shows all of them.

    Args:
        folder: of the run.
        before, after: of the same prompts, in the same order.
        read_before, read_after: what each drawing shows; none, or one for each.

    Raises:
        ValueError: the prompts differ.
    """
    if [rollout.prompt.id for rollout in before] != [rollout.prompt.id for rollout in after]:
        raise ValueError("RunLog.scores: examples_before and examples_after must be of the same prompts in order")
    (folder / FOLDER).mkdir(exist_ok=True)
    photos: dict[ImageRef, str | None] = {}
    readings = {"before": read_before or [{}] * len(before), "after": read_after or [{}] * len(after)}
    rows = []
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        row = asked_of(old.prompt) | _photo_of(old.prompt, folder, photos)
        for when, rollout in (("before", old), ("after", new)):
            row[f"{when}_text"] = rollout.text
            row[f"{when}_image"] = None
            if rollout.image is not None:
                row[f"{when}_image"] = f"{FOLDER}/{index:02d}_{when}.png"
                sheets.to_picture(rollout.image).save(folder / row[f"{when}_image"])
            row[f"{when}_shows"] = dict(readings[when][index])
        rows.append(row)
    lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    (folder / FOLDER / "examples.jsonl").write_text(lines, encoding="utf-8")
    path = folder / "before_after.png"
    sheets.before_after_sheet(before, after).save(path)
    return path


def asked_of(prompt: Prompt) -> dict[str, Any]:
    """What a request asks for."""
    return {
        "id": prompt.id,
        "task": prompt.task,
        "prompt": prompt.text,
        "answer": prompt.answer,
        "target": prompt.target,
        "asked": dict(prompt.attributes or {}),
        "concept": prompt.concept,
    }


def _photo_of(prompt: Prompt, folder: Path, known: dict[ImageRef, str | None]) -> dict[str, Any]:
    """The photo's file, small and once for all requests that have it."""
    photo, kind = sheets.photo_beside(prompt)
    if photo is None:
        return {"photo": None, "photo_is": None}
    if photo not in known:
        known[photo] = _save_photo(photo, folder, len(known))
    return {"photo": known[photo], "photo_is": kind}


def _save_photo(photo: ImageRef, folder: Path, number: int) -> str | None:
    """Its name below `folder`; None where it cannot be read."""
    try:
        picture = open_picture(photo)
    except PictureError:
        return None
    small = max(picture.size) <= PHOTO_SIDE
    if not small:
        picture.thumbnail((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.LANCZOS)
    name = f"{FOLDER}/photo_{number:02d}.{'png' if small else 'jpg'}"
    picture.save(folder / name, quality=88)
    return name
