"""WISE: 1,000 prompts that need to be known about: cultural common sense, time, space, biology, physics, chemistry.

    layouts     PKU-YuanGroup/WISE's WISE_legacy/data: the edition of the paper, whose scores papers report;
                its data_verified: prompts mended, and right or wrong in place of three grades
                JSON lists with Prompt, Explanation, Category, Subcategory, prompt_id (1 to 1000)

A judge grades each image: consistency, realism and beauty from 0 to 2 each, of which WiScore is (.7 c + .2 r + .1 b)
/ 2, or, in the verified edition, 0 or 1. The published numbers have GPT-4o (2024-05-13), or Qwen3.5-35B-A3B, and
WISE's own wording, which is longer; `--export wise` writes what its programs read.

Source: WISE `WISE_legacy/gpt_eval.py`, `Calculate.py`, `vllm_eval.py`, `calculate_verified.py`; rewritten.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import ChatError, DataError
from ...records import Prompt
from ...show.measured import Measured
from ..graders import Graders, Kept, Nobody, ask_judge, earlier, one_of
from ..store import Item
from .asking import drawing
from .benchmark_outcome import Outcome, Scored, mean_part, weighted_part
from .layouts import Source, json_rows

LEGACY: Mapping[str, tuple[int, float]] = {
    "culture": (400, 0.4),
    "time": (567, 0.167),
    "space": (700, 0.133),
    "biology": (800, 0.1),
    "physics": (900, 0.1),
    "chemistry": (1000, 0.1),
}
"""Category -> the last prompt of it, and its weight in the overall score."""
VERIFIED: Mapping[str, tuple[int, float]] = {
    "culture": (400, 0.4),
    "time": (520, 0.12),
    "space": (640, 0.12),
    "biology": (760, 0.12),
    "physics": (880, 0.12),
    "chemistry": (1000, 0.12),
}
PLACES = ("WISE_legacy/data", "data_verified", "data")
"""Folders of its repository, and of its older self."""
GRADES = (
    "An image was drawn for a request whose meaning takes knowledge to see. Request: {prompt}\nWhat it means: "
    "{explanation}\nGrade strictly, 0, 1 or 2 each, the lower one in doubt. consistency: 0 misses what is meant, 1 "
    "shows part of it, 2 shows all of it. realism: 0 impossible or plainly artificial, 1 with visible flaws, 2 like a "
    "photograph. beauty: 0 unpleasant, 1 acceptable, 2 a masterpiece.\n"
    "Reply with three lines and nothing else:\nconsistency: <grade>\nrealism: <grade>\nbeauty: <grade>"
)
RIGHT = (
    "An image was drawn for a request whose meaning takes knowledge to see. Request: {prompt}\nWhat it means: "
    "{explanation}\nReply with one number: 1 if the image shows what is meant, its main things and their relations "
    "right and not ruined by faults of the drawing; 0 if it does not, shows only the words' surface, or leaves doubt."
)
_GRADE = re.compile(r"(consistency|realism|beauty)\W{0,8}([0-2])(?![\d.])", re.IGNORECASE)
_WEIGHT = {"consistency": 0.7, "realism": 0.2, "beauty": 0.1}


def load(source: Source) -> list[Prompt]:
    """Its prompts, of one edition.

    Raises:
        DataError: none of its files, both editions, or an entry that cannot be used.
    """
    files = _files(source.path)
    verified = [file.stem == "merge" or file.stem.endswith("_verified") for file in files]
    if len(set(verified)) > 1:
        raise DataError(f"{source.name}: has files of both editions; name data_verified or WISE_legacy/data")
    categories = VERIFIED if verified[0] else LEGACY
    prompts: dict[int, Prompt] = {}
    for row in (row for file in files for row in json_rows(file)):
        number = row.number("prompt_id")
        if number in prompts or not 1 <= number <= 1000:
            raise DataError(f"{row.where}: prompt_id must be 1 to 1000, each once, got {number} again or beyond")
        prompts[number] = drawing(
            "wise",
            number,
            row.text("Prompt"),
            next(name for name, (last, _) in categories.items() if number <= last),
            prompt_id=number,
            explanation=row.text("Explanation"),
            subcategory=row.maybe("Subcategory"),
            edition="verified" if verified[0] else "legacy",
        )
    return [prompts[number] for number in sorted(prompts)]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    inside = [path / place for place in PLACES if (path / place).is_dir()]
    if len(inside) > 1:
        raise DataError(f"{path}: has two editions; name {' or '.join(str(place) for place in inside)}")
    folder = inside[0] if inside else path
    found = [file for file in sorted(folder.glob("*.json")) if not file.stem.endswith("_rewrite")]
    parts = [file for file in found if file.stem != "merge"]
    if not found:
        raise DataError(f"{path}: has none of WISE's files; name WISE_legacy/data or data_verified of its repository")
    return parts or found


def wiscore(reply: str | None) -> float | None:
    """(.7 consistency + .2 realism + .1 beauty) / 2 of a reply that grades each once; None otherwise."""
    grades = {name.lower(): int(grade) for name, grade in _GRADE.findall(reply or "")}
    if len(grades) < len(_WEIGHT) or len(_GRADE.findall(reply or "")) > len(_WEIGHT):
        return None
    return sum(_WEIGHT[name] * grade for name, grade in grades.items()) / 2


def score(items: Sequence[Item], folder: Path, graders: Graders, kept: Kept) -> Scored:
    """By the judge; nothing without one."""
    drawn = [item for item in items if item.drawn is not None]
    verified = any(item.prompt.extra["edition"] == "verified" for item in items)
    title, categories = ("WISE Verified", VERIFIED) if verified else ("WISE", LEGACY)
    wording = RIGHT if verified else GRADES
    asked = [
        (item, wording.format(prompt=item.prompt.text, explanation=item.prompt.extra["explanation"])) for item in drawn
    ]
    read = one_of(0.0, 1.0) if verified else lambda reply, _: wiscore(reply)
    missing = graders.missing("wise")
    at_hand = graders if missing is None else earlier(kept, "wise", graders)
    try:
        values = ask_judge("wise", asked, read, folder, at_hand, kept)
    except (ChatError, Nobody) as error:
        how = "--judge_url grades them here; or `--export wise` and WISE's own program"
        return Scored(outcome=Outcome(benchmark=title, how=how), left_out={"wise": missing or str(error)})
    ids, groups = [item.prompt.id for item in drawn], [str(item.prompt.extra["group"]) for item in drawn]
    of = {
        name: Measured.of(ids, [v if group == name else None for v, group in zip(values, groups, strict=True)])
        for name in categories
    }
    parts = [weighted_part("overall", [(of[name], weight) for name, (_, weight) in categories.items()])]
    parts += [mean_part(name, [one]) for name, one in of.items()]
    lost, absent = sum(value is None for value in values), [name for name, one in of.items() if not one.by_item]
    remarks = ["graded in a wording of ours, and by another judge if yours is not the published one"]
    remarks += [f"without {', '.join(absent)}: the overall score is of the others"] if absent else []
    return Scored(
        outcome=Outcome(
            benchmark=title,
            parts=tuple(part for part in parts if part is not None),
            how=f"{at_hand.judge_name or 'the judge'}, which grades each image",
            remarks=tuple(remarks),
        ),
        measures={"wise": Measured.of(ids, values)},
        left_out={"wise": f"no grade of {lost} of {len(values)} images; score again to ask again"} if lost else {},
    )
