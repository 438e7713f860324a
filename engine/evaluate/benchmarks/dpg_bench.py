"""DPG-Bench: 1,065 paragraphs, each with questions about what its image must show, of which some depend on others.

    layout      TencentQQGYLab/ELLA's dpg_bench: prompts/<name>.txt, and dpg_bench.csv with item_id, proposition_id,
                dependency, category_broad, tuple, question_natural_language

An image's score is the share of its questions that are answered yes, where a question counts as no whose parents are.
For the published numbers mPLUG-large answers, in ELLA's own program (`--export dpg`); the judge here is another reader,
which the table says. ELLA's program leaves out the table's first question by mistake; it is asked here.

Source: ELLA `dpg_bench/compute_dpg_bench.py`; rewritten.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import ChatError, DataError
from ...records import Prompt
from ...show.measured import Measured
from ..graders import Graders, Kept, Nobody, ask_judge, earlier, one_of
from ..sources import load_dpg
from ..store import Item, Key
from .benchmark_outcome import PER_CENT, Outcome, Scored, mean_part
from .layouts import Source

QUESTIONS = "dpg_bench.csv"
QUESTION = (
    "A question about the image: {question}\nReply with one number: 1 if the answer is yes, 0 if it is no or cannot be "
    "told from the image."
)


def load(source: Source) -> list[Prompt]:
    """Its prompts, with their questions where dpg_bench.csv lies in or beside the folder of prompts.

    Raises:
        DataError: no folder of prompts, or a table of questions that cannot be used.
    """
    path = source.path
    clones = [place for place in (path / "dpg_bench" / "prompts", path / "prompts") if place.is_dir()]
    prompts = load_dpg(clones[0] if clones else path)
    places = [place / QUESTIONS for place in (path, path.parent, path / "dpg_bench")]
    table = next((place for place in places if place.is_file()), None)
    if table is None:
        return prompts
    asked = _questions(table)
    return [
        replace(prompt, extra={**prompt.extra, "dpg_questions": asked[name]})
        if (name := str(prompt.extra["dpg_name"])) in asked
        else prompt
        for prompt in prompts
    ]


def _questions(path: Path) -> Mapping[str, list[dict[str, Any]]]:
    """By prompt: id, parents, category and words of each question."""
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                parents = [int(part) for part in row["dependency"].split(",")]
                one = {
                    "id": int(row["proposition_id"]),
                    "parents": [parent for parent in parents if parent],
                    "category": row["tuple"].partition("(")[0].partition("-")[0].strip(),
                    "question": row["question_natural_language"],
                }
                found.setdefault(row["item_id"], []).append(one)
    except (OSError, ValueError, KeyError, AttributeError, csv.Error) as error:
        raise DataError(
            f"{path}: expected the columns item_id, proposition_id, dependency, tuple and question_natural_language "
            f"({type(error).__name__}: {error}); download it again"
        ) from error
    return found


def score(items: Sequence[Item], folder: Path, graders: Graders, kept: Kept) -> Scored:
    """By the judge; nothing without one, or without the questions."""
    how = "`--export dpg`, then ELLA's own program, which prints the published number"
    asked = [(item, one) for item in items if item.drawn for one in item.prompt.extra.get("dpg_questions", ())]
    if not asked:
        why = f"no questions: name the folder that has {QUESTIONS} and prompts/ as --data, for the judge to answer"
        return Scored(outcome=Outcome(benchmark="DPG-Bench", how=how), left_out={"dpg": why})
    missing = graders.missing("dpg")
    at_hand = graders if missing is None else earlier(kept, "dpg", graders)
    words = [(item, QUESTION.format(question=one["question"])) for item, one in asked]
    try:
        answers = ask_judge("dpg", words, one_of(0.0, 1.0), folder, at_hand, kept)
    except (ChatError, Nobody) as error:
        outcome = Outcome(benchmark="DPG-Bench", how=f"--judge_url answers its questions here; or {how}")
        return Scored(outcome=outcome, left_out={"dpg": missing or str(error)})
    by_image: dict[Key, dict[int, float | None]] = {}
    for (item, one), value in zip(asked, answers, strict=True):
        by_image.setdefault(item.key, {})[one["id"]] = value
    drawn = [item for item in items if item.key in by_image]
    scores = [image_score(item.prompt.extra["dpg_questions"], by_image[item.key]) for item in drawn]
    whole = Measured.of([item.prompt.id for item in drawn], scores)
    parts = [mean_part("overall", [whole], PER_CENT)]
    for category in sorted({one["category"] for _, one in asked}):
        values = [v if one["category"] == category else None for (_, one), v in zip(asked, answers, strict=True)]
        ids = [f"{item.prompt.id}/{one['id']}" for item, one in asked]
        parts.append(mean_part(category, [Measured.of(ids, values)], PER_CENT))
    lost = sum(value is None for value in answers)
    return Scored(
        outcome=Outcome(
            benchmark="DPG-Bench",
            parts=tuple(part for part in parts if part is not None),
            how=f"{at_hand.judge_name or 'the judge'}, which answers its questions",
            remarks=("not mPLUG-large, as for the published numbers, reads the images",),
        ),
        measures={"dpg": whole},
        left_out={"dpg": f"no answer to {lost} of {len(asked)} questions; score again to ask again"} if lost else {},
    )


def image_score(questions: Sequence[Mapping[str, Any]], answers: Mapping[int, float | None]) -> float | None:
    """The share of yes among an image's questions; None where one is unanswered.

    In their order, a question is 0 where one of its parents is: because of the answer, or of its own parents.
    """
    found: dict[int, float] = {}
    for one in questions:
        answer = answers.get(one["id"])
        if answer is None:
            return None
        found[one["id"]] = (
            0.0 if any(found.get(parent, answers.get(parent)) == 0 for parent in one["parents"]) else answer
        )
    return sum(found.values()) / len(found)
