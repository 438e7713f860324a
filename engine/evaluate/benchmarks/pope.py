"""POPE: is this object in the picture? Accuracy, precision, recall, F1 and the share of yes, per kind of question.

    layouts     RUCAIBox/POPE's output/coco: coco_pope_random.json, …_popular.json, …_adversarial.json, JSON lines (its
                SEEM files: lists) with question_id, image, text, label; pictures are COCO's val2014
                lmms-lab/POPE on the hub: parquet with question_id, question, answer, image, category

Yes is the class that counts, and the headline is F1 over all questions, as VLMEvalKit reports it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ...errors import DataError
from ...pictures import ImageRef
from ...records import Prompt
from ...show.measured import Measured
from ..graders import Graders, Kept
from ..store import Item
from .asking import Asked, question
from .benchmark_outcome import PER_CENT, Outcome, Part, Scored, f1_part, mean_part
from .free_answers import said, says_yes
from .layouts import Row, Source, json_rows, picture_file, table_rows

KINDS = ("random", "popular", "adversarial")
PICTURES = ("val2014", "images", "coco/val2014")
"""Where COCO's pictures lie beside the questions."""
_ENDING = re.compile(r"\s*Please answer yes or no\.\s*$")


def load(source: Source) -> list[Prompt]:
    """Its questions.

    Raises:
        DataError: no file of it, a row without a question, an answer that is neither yes nor no, or no picture.
    """
    path = source.path
    if path.is_file() and path.suffix in (".json", ".jsonl"):
        files = [path]
    elif path.is_dir():
        files = [file for kind in KINDS for file in sorted(path.glob(f"*pope*_{kind}.json*"))]
    else:
        files = []
    if not files:
        return [
            _asked(row, row.maybe("category") or "all", row.pictures("image"), source) for row in table_rows(source)
        ]
    prompts = []
    for file in files:
        for row in json_rows(file):
            picture = picture_file(source, row.text("image"), row.where, *PICTURES)
            prompts.append(_asked(row, _kind(file), (picture,), source))
    return prompts


def _kind(file: Path) -> str:
    return next((kind for kind in KINDS if kind in file.stem), file.stem)


def _asked(row: Row, kind: str, pictures: Sequence[ImageRef], source: Source) -> Prompt:
    answer = row.text("label", "answer").lower()
    if answer not in ("yes", "no"):
        raise DataError(f"{row.where}: the answer must be yes or no, got {answer!r}; correct the row")
    if not pictures:
        raise DataError(f"{row.where}: has no picture; download it again")
    number = row.values.get("question_id", row.values.get("index"))
    asked = Asked(_ENDING.sub("", row.text("text", "question")), answer)
    return question("pope", f"{kind}/{number}", asked, pictures, group=kind, think=source.think, question_id=number)


def score(items: Sequence[Item], folder: Path, graders: Graders, kept: Kept) -> Scored:
    """By POPE's own rule for yes and no."""
    answers = [(item, says_yes(said(item)), item.prompt.answer == "yes") for item in items]
    parts: list[Part | None] = [f1_part("F1", [a for _, a, _ in answers], [r for _, _, r in answers], PER_CENT)]
    ids = [item.prompt.id for item, _, _ in answers]
    accuracy = Measured.of(ids, [float(a == r) for _, a, r in answers], chance=0.5)
    parts.append(mean_part("accuracy", [accuracy], PER_CENT))
    parts.append(_share("precision", [(item, r) for item, a, r in answers if a]))
    parts.append(_share("recall", [(item, a) for item, a, r in answers if r]))
    parts.append(_share("share of yes", [(item, a) for item, a, _ in answers]))
    groups = list(dict.fromkeys(str(item.prompt.extra["group"]) for item in items))
    for group in groups if len(groups) > 1 else ():
        of = [(a, r) for item, a, r in answers if item.prompt.extra["group"] == group]
        parts.append(f1_part(f"F1, {group}", [a for a, _ in of], [r for _, r in of], PER_CENT))
    outcome = Outcome(
        benchmark="POPE",
        parts=tuple(part for part in parts if part is not None),
        how="POPE's own rule for yes and no, here",
    )
    return Scored(outcome=outcome, measures={"accuracy": accuracy})


def _share(name: str, marked: Sequence[tuple[Item, bool]]) -> Part | None:
    measured = Measured.of([item.prompt.id for item, _ in marked], [float(mark) for _, mark in marked])
    return mean_part(name, [measured], PER_CENT)
