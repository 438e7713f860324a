"""MMBench: multiple choice asked with the options in every order; a question counts where all its orders are right.

    layouts     VLMEvalKit's MMBench_DEV_EN.tsv: index, question, hint, A–D, answer, category, image (base64, or another
                row's index), with the further orders of question i as rows i + 1000000, i + 2000000, …
                lmms-lab/MMBench on the hub: the same columns in parquet, configurations en, cn, cc, splits dev, test

Rows that come in one order only are asked in the others, too (CircularEval). Answers are read by VLMEvalKit's exact
matching. The prompt is its Janus's. Rewritten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import DataError
from ...pictures import ImageRef
from ...records import Prompt
from ...show.measured import Measured
from ..graders import Graders, Kept
from ..store import Item
from .asking import BY_LETTER, Asked, lettered, question
from .benchmark_outcome import PER_CENT, Outcome, Scored, mean_part
from .free_answers import said, sure_choice
from .layouts import EncodedImage, Row, Source, table_rows, tsv_rows

LETTERS = "ABCDEFGH"
ORDERS = 1_000_000
"""An index modulo this is the question's; the rest numbers its orders."""
SHORT = 64
"""Characters: a cell of pictures that is no longer names the row that has the picture."""


def load(source: Source) -> list[Prompt]:
    """Its questions, in every order.

    Raises:
        DataError: nothing of the split, a row that is none of its, or the split without answers (`test`).
    """
    path = source.path
    if path.is_dir() and not any(path.rglob("*.parquet")) and len(files := sorted(path.glob("*.tsv"))) == 1:
        path = files[0]
    if path.suffix == ".tsv":
        rows = list(tsv_rows(path))
        pictures = _encoded(rows, path)
    else:
        rows = list(table_rows(source, "en"))
        pictures = {str(row.number("index")): row.pictures("image") for row in rows}
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.number("index") % ORDERS, []).append(row)
    prompts: list[Prompt] = []
    for number, group in groups.items():
        if len({row.number("index") for row in group}) < len(group):
            raise DataError(f"{group[0].where}: two rows have the index {number}; download it again")
        for row in group:
            shown = pictures[str(row.number("index"))]
            if not shown:
                raise DataError(f"{row.where}: has no picture; download it again")
            orders = [0] if len(group) > 1 else range(len(_options(row)))
            prompts += [_asked(row, number, turn, shown, source) for turn in orders]
    return prompts


def _encoded(rows: Sequence[Row], path: Path) -> Mapping[str, tuple[ImageRef, ...]]:
    """Index -> picture of a TSV; a short cell is the index of the row that has it."""
    cells = {str(row.number("index")): row.maybe("image") for row in rows}
    found: dict[str, tuple[ImageRef, ...]] = {}
    for index, cell in cells.items():
        owner = cell if cell and len(cell) <= SHORT else index
        text = cells.get(owner, "")
        if len(text) <= SHORT:
            raise DataError(f"{path}, index {index}: has no picture, and {owner!r} names no row that has; download it")
        found[index] = (EncodedImage(f"{path.name}, index {owner}", text),)
    return found


def _options(row: Row) -> tuple[str, ...]:
    found: list[str] = []
    for letter in LETTERS:
        value = row.values.get(letter)
        text = "" if value is None else str(value).strip()
        if not text or text.lower() == "nan":
            break
        found.append(text)
    if len(found) < 2:
        raise DataError(f"{row.where}: has {len(found)} options in the columns A, B, …; two are the least")
    return tuple(found)


def _asked(row: Row, number: int, turn: int, pictures: Sequence[ImageRef], source: Source) -> Prompt:
    options, answer = _options(row), row.maybe("answer")
    if len(answer) != 1 or answer not in LETTERS[: len(options)]:
        raise DataError(
            f"{row.where}: the answer must be a letter of its options, got {answer!r}; the split test has none: choose "
            "--split dev"
        )
    turned = options[turn:] + options[:turn]
    letter = LETTERS[(LETTERS.index(answer) - turn) % len(options)]
    hint, text = row.maybe("hint"), row.text("question")
    asked = Asked(
        f"{f'Hint: {hint}' if hint else ''}\n{text}\n{lettered(turned)}\n".lstrip("\n"), letter, turned, BY_LETTER
    )
    index = row.number("index") + turn * ORDERS
    return question(
        "mmbench",
        index,
        asked,
        pictures,
        group=row.maybe("L2-category", "l2-category", "category") or "all",
        think=source.think,
        sample=f"mmbench/{number}",
        index=index,
        category=row.maybe("category"),
        split=row.maybe("split"),
    )


def score(items: Sequence[Item], folder: Path, graders: Graders, kept: Kept) -> Scored:
    """A question is right where every order of its options is; beside it the share of right answers of the first."""
    asked: dict[str, list[Item]] = {}
    for item in items:
        asked.setdefault(item.prompt.sample or item.prompt.id, []).append(item)
    choices = {item.prompt.id: sure_choice(said(item), item.prompt.options) for item in items}
    right = {name: float(choices[name] == item.prompt.answer) for item in items for name in [item.prompt.id]}
    whole = {name: min(right[item.prompt.id] for item in group) for name, group in asked.items()}
    first = {name: right[group[0].prompt.id] for name, group in asked.items()}
    circular = Measured.of(list(whole), list(whole.values()))
    parts = [
        mean_part("overall, every order right", [circular], PER_CENT),
        mean_part("first order", [Measured.of(list(first), list(first.values()))], PER_CENT),
    ]
    groups = list(dict.fromkeys(str(item.prompt.extra["group"]) for item in items))
    for group in sorted(groups) if len(groups) > 1 else ():
        names = [name for name, some in asked.items() if some[0].prompt.extra["group"] == group]
        parts.append(mean_part(group, [Measured.of(names, [whole[name] for name in names])], PER_CENT))
    unread = sum(choice is None for choice in choices.values())
    remarks = [f"{unread} of {len(items)} answers name no option: wrong, as in VLMEvalKit's exact matching"]
    outcome = Outcome(
        benchmark="MMBench",
        parts=tuple(part for part in parts if part is not None),
        how="CircularEval by VLMEvalKit's exact matching, here",
        remarks=tuple(remarks if unread else ()),
    )
    return Scored(outcome=outcome, measures={"accuracy": circular})
