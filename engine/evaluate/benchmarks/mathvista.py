"""MathVista: mathematics in pictures; a letter, a whole number, a number to a given precision, or a list.

    layouts     AI4Math/MathVista on the hub: parquet with pid, question, decoded_image, choices, unit, precision,
                answer, question_type, answer_type, metadata, query; splits testmini, test (without answers)
                lupantech/MathVista's data/testmini.json, an object of problems, with images/ in or beside its folder

The published protocol has a language model read each answer out of what the model wrote, and rules compare it. Here
rules read what they can be sure of, and the judge the rest; without a judge the rest is wrong, and counted.

Source: lupantech/MathVista `evaluation/`; VLMEvalKit `vlmeval/dataset/utils/mathvista.py`; rewritten.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import ChatError, DataError, shown
from ...records import Prompt
from ...show.measured import Measured
from ..graders import Graders, Kept, Nobody, ask_judge, earlier
from ..store import Item
from .asking import Asked, lettered, question
from .benchmark_outcome import PER_CENT, Outcome, Scored, mean_part
from .free_answers import letters_of, said, sure_choice
from .layouts import Row, Source, json_rows, picture_file, table_rows

HINTS: Mapping[str, str] = {
    "multi_choice": "provide the correct option letter, e.g., A, B, C, D, at the end.",
    "integer": "requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end.",
    "float1": "requiring a floating-point number with one decimal place and provide the final value, e.g., 1.2, 1.3, "
    "1.4, at the end.",
    "float2": "requiring a floating-point number with two decimal places and provide the final value, e.g., 1.23, "
    "1.34, 1.45, at the end.",
    "list": "requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the "
    "end.",
}
"""The published openings of its questions."""
EXTRACT = (
    "Read the final answer out of a response; do not solve anything yourself. Question: {question}\nResponse: "
    "{response}\nReply with the final answer alone: {form}; reply none where the response has none."
)
FORMS = {
    "integer": "a whole number",
    "float": "a number",
    "list": "a list such as [1, 2]",
    "text": "an option's letter",
}
_TOLD = re.compile(r"(?:answer|value|result)(?:\s+is|\s*[:=])\s*([^\n]{1,200})", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")
_LAST = re.compile(rf"(?:^|[\s=$(])({_NUMBER.pattern})\s*[.)$%°]{{0,3}}\s*$")
_LIST = re.compile(r"\[[^\[\]]{1,200}\](?!\s*\])")


def load(source: Source) -> list[Prompt]:
    """Its problems.

    Raises:
        DataError: nothing of the split, a problem that cannot be used, or one without an answer (the split test).
    """
    path = source.path
    files = (
        [path] if path.suffix == ".json" else [path / f"{source.split}.json", path / "data" / f"{source.split}.json"]
    )
    file = next((file for file in files if file.is_file()), None)
    return [_asked(row, source) for row in (table_rows(source) if file is None else json_rows(file))]


def _asked(row: Row, source: Source) -> Prompt:
    kind, form = row.text("question_type"), row.text("answer_type")
    answer = row.maybe("answer")
    if not answer:
        raise DataError(f"{row.where}: has no answer; the split test has none: choose --split testmini")
    options = _choices(row)
    if kind == "multi_choice":
        if options.count(answer) < 1 or len(options) > 26:
            raise DataError(f"{row.where}: the answer {answer!r} is none of the choices {shown(options)}; correct it")
        answer = letters_of(options)[options.index(answer)]
    unit = row.maybe("unit")
    text = f"Question: {row.text('question')}{f' (Unit: {unit})' if unit else ''}"
    if options:
        text += f"\nChoices:\n{lettered(options, '({letter}) {text}')}"
    precision = row.values.get("precision")
    digits = int(precision) if isinstance(precision, int | float) and math.isfinite(precision) else 0
    asked = kind if kind == "multi_choice" else f"{form}{digits}" if form == "float" else form
    if asked not in HINTS:
        raise DataError(f"{row.where}: answer_type must be integer, float (precision 1 or 2) or list, got {asked!r}")
    opening = f"Hint: Please answer the question {'and ' if kind == 'multi_choice' else ''}{HINTS[asked]}"
    pictures = row.pictures("decoded_image") or (picture_file(source, row.text("image"), row.where, "..", "data"),)
    about: Any = row.values.get("metadata")
    return question(
        "mathvista",
        row.text("pid"),
        Asked(text, answer, options if kind == "multi_choice" else (), "", opening),
        pictures,
        group=str(about.get("task", "all")) if isinstance(about, Mapping) else "all",
        think=source.think,
        answer_type=form,
        precision=digits,
    )


def _choices(row: Row) -> tuple[str, ...]:
    found = row.values.get("choices")
    if found is not None and not (isinstance(found, list) and all(isinstance(option, str) for option in found)):
        raise DataError(f"{row.where}: 'choices' must be a list of texts, got {shown(found)}; correct it")
    return tuple(found or ())


def score(items: Sequence[Item], folder: Path, graders: Graders, kept: Kept) -> Scored:
    """By rules, and the judge where rules cannot read the answer."""
    read = {item.prompt.id: value_of(said(item), item, sure=True) for item in items}
    right = {item.prompt.id: _is_right(read[item.prompt.id], item) for item in items}
    unread = [item for item in items if read[item.prompt.id] is None and said(item).strip()]
    asked = [(item, _question(item)) for item in unread]
    missing = graders.missing("mathvista")
    at_hand = graders if missing is None else earlier(kept, "mathvista", graders)
    left_out: dict[str, str] = {}
    try:
        for (item, _), value in zip(asked, ask_judge("mathvista", asked, judged, None, at_hand, kept), strict=True):
            right[item.prompt.id] = bool(value)
        how = "rules" + (f", and {at_hand.judge_name} for {len(asked)} answers that they cannot read" if asked else "")
    except (ChatError, Nobody) as error:
        how = f"rules alone: {len(asked)} answers that they cannot read are wrong; --judge_url reads them"
        left_out["mathvista"] = missing or str(error)
    ids = [item.prompt.id for item in items]
    values = [float(right[name]) for name in ids]
    accuracy = Measured.of(ids, values)
    parts = [mean_part("overall", [accuracy], PER_CENT)]
    groups = sorted({str(item.prompt.extra["group"]) for item in items})
    for group in groups if len(groups) > 1 else ():
        of = [v if item.prompt.extra["group"] == group else None for item, v in zip(items, values, strict=True)]
        parts.append(mean_part(group, [Measured.of(ids, of)], PER_CENT))
    outcome = Outcome(benchmark="MathVista", parts=tuple(part for part in parts if part is not None), how=how)
    return Scored(outcome=outcome, measures={"accuracy": accuracy}, left_out=left_out)


def _question(item: Item) -> str:
    form = FORMS.get(str(item.prompt.extra["answer_type"]), FORMS["text"])
    return EXTRACT.format(question=item.prompt.text, response=said(item), form=form)


def judged(reply: str | None, item: Item) -> float | None:
    """1 where the answer that the judge read is right; None where no reply came."""
    return None if reply is None else float(_is_right(value_of(reply, item, sure=False), item))


Value = str | float | tuple[float, ...]


def _is_right(value: Value | None, item: Item) -> bool:
    """What is not read is not right, also where the truth is not read either."""
    return value is not None and value == value_of(item.prompt.answer or "", item, sure=False)


def value_of(text: str, item: Item, *, sure: bool) -> Value | None:
    """The answer that a text gives, in the form that the question asks for; None where it gives none for sure.

    Args:
        text: what was said, or an answer alone.
        item: of the question.
        sure: the text may hold more than the answer: it counts where it ends with it, or says `the answer is`.
    """
    if item.prompt.options:
        return sure_choice(text, item.prompt.options)
    text, kind = text.strip(), str(item.prompt.extra["answer_type"])
    told = _TOLD.findall(text)
    parts = [text, *(part.strip(" .*$") for part in told[-1:])]
    if sure:
        last = (_LIST.findall(text) if kind == "list" else _LAST.findall(text))[-1:]
        parts += last
    for part in parts:
        value = _of_kind(part, kind, int(item.prompt.extra["precision"]))
        if value is not None:
            return value
    return None


def _of_kind(text: str, kind: str, precision: int) -> Value | None:
    text = text.strip().strip("$").strip()
    if kind == "list":
        try:
            found = json.loads(text)
            return tuple(float(value) for value in found) if isinstance(found, list) else None
        except (ValueError, TypeError, OverflowError, RecursionError):
            return None
    if not _NUMBER.fullmatch(text):
        return None
    number = float(text.replace(",", ""))
    if not math.isfinite(number):
        return None
    return float(int(number)) if kind == "integer" else round(number, precision)
