"""Rows of a table -> `Prompt`s: what to draw, what to answer, or both of one row.

A row gives up to two prompts, which share its id in `Prompt.sample`: `<id>/t2i` draws its text, `<id>/mm2t` answers its
question. Which half a row has decides which come out. Understood, by columns:

    CoRL (x2x)     prompt, real_image, qa_problem, qa_solution, qa_type: both halves
    questions      problem or question, solution or answer or ground_truth, image or images
    TRL            prompt (text or messages), image or images; a question when there is a solution, else to draw
    verl           prompt (messages), images, reward_model.ground_truth, data_source, extra_info
    prompts        prompt alone, as in T2I-R1's JSONL: to draw; for a model that draws nothing, to answer, as in TRL

A drawing also takes `attributes`, `concept` and `references`. Everything else lands in `Prompt.extra`, from where
reward functions get it by name, as they do the raw solution.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ..errors import DataError, NoSplitError, shown
from ..pictures import PICTURE, ImageRef
from ..records import Prompt, SegmentKind
from .faults import STRICT, Faults
from .forms.asked import read_question
from .forms.chained import chain_answers, chain_columns
from .forms.choices import choices_of
from .forms.lettered import says_options, shows_options, with_options
from .forms.placed import check_places, problem_of
from .forms.truths import Truths
from .forms.unseen import check_unseen
from .prompts import load_training_prompts
from .questions import THINK_THEN_ANSWER, instructed, letter_of, text_of
from .rows import (
    DRAWN_COLUMNS,
    SHOWN_COLUMNS,
    Layout,
    Reading,
    Row,
    answer_cell,
    asked_in,
    attributes_of,
    extra_of,
    names_of,
    pictures_of,
    qa_type_of,
    references_of,
    truths_of,
)
from .table import Table, open_table

Sample = tuple[Prompt, ...]
"""The prompts of one row, which stay together: at most one of each half."""
Kind = Literal["t2i", "mcq", "oe"]
KINDS: tuple[Kind, ...] = ("t2i", "mcq", "oe")

IMAGE_ONLY: tuple[SegmentKind, ...] = ("image",)
TEXT_ONLY: tuple[SegmentKind, ...] = ("text",)
CHAIN_PICTURES = tuple(column for column in SHOWN_COLUMNS if column != "real_image")
SEGMENTS: tuple[tuple[SegmentKind, ...], ...] = (
    TEXT_ONLY,
    IMAGE_ONLY,
    ("text", "image"),
    ("image", "text"),
    ("text", "image", "text"),
)


def load_samples(
    source: str | Path,
    split: str = "train",
    *,
    kinds: Sequence[Kind] = KINDS,
    instruction: str | None = THINK_THEN_ANSWER,
    image_folder: Path | None = None,
    model_draws: bool = True,
    faults: Faults = STRICT,
) -> list[Sample]:
    """All samples of a source, in its order.

    Args:
        source: whatever `open_table` takes, or a folder in the UnifyBench++ layout, whose prompts come unpaired.
        split: `train`, or another part of the source.
        kinds: which prompts are wanted: drawing, multiple choice, open-ended questions.
        instruction: what a question is put into, with `{question}` and `{form}` in it; questions that speak of
            `<think>` have their own and stay as they are. None: none.
        image_folder: as for `open_table`.
        model_draws: False: a prompt that shows and asks for no picture is to be answered, without a ground truth.
        faults: where rows that cannot be used are told of.

    Raises:
        DataError: the source cannot be read, a row cannot be used, or nothing of these kinds is there; names the
            source, the row, the column and the remedy.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds:
        raise DataError(f"{source}: kinds must be among {list(KINDS)}, got {list(kinds)}")
    if instruction is not None and "{question}" not in instruction:
        raise DataError(f"{source}: the instruction must say where the {{question}} goes, got {instruction!r}")
    if os.path.isdir(Path(source) / "concept"):
        samples: Iterable[Sample] = _of_concepts(Path(source), split, instruction, faults)
    else:
        table = open_table(source, split, image_folder=image_folder, faults=faults)
        samples = samples_of(table, split, instruction, model_draws, faults)
    return of_kinds(samples, kinds, source, split)


def of_kinds(samples: Iterable[Sample], kinds: Sequence[Kind], source: object, split: str) -> list[Sample]:
    """What they have of these kinds; DataError where that is nothing, which names the source and its split."""
    wanted = [tuple(prompt for prompt in sample if prompt.task in kinds) for sample in samples]
    found = [sample for sample in wanted if sample]
    if not found:
        raise DataError(f"{source}: split {split!r} has nothing of the kinds {list(kinds)}; choose others of {KINDS}")
    return found


def samples_of(
    table: Table,
    split: str = "train",
    instruction: str | None = THINK_THEN_ANSWER,
    model_draws: bool = True,
    faults: Faults = STRICT,
) -> list[Sample]:
    """The samples of a table, one per row; arguments and errors as for `load_samples`."""
    reading = Reading(table, faults)
    rows = reading.rows()
    layout = Layout.of(table, rows)
    check_unseen(table, rows)
    truths = truths_of(table, rows, layout.answer or "")
    names = names_of(table, rows, split)
    halves = [_halves(reading, index, row, layout) for index, row in enumerate(rows)]
    texts_alone = [layout.question is None or PICTURE not in str(row.get(layout.question)) for row in rows]
    shown = pictures_of(reading, rows, SHOWN_COLUMNS, [asks for _, asks in halves], texts_alone)
    drawn = pictures_of(reading, rows, DRAWN_COLUMNS, [draws for draws, _ in halves], [False] * len(rows))
    samples = []
    for index, (row, (draws, asks)) in enumerate(zip(rows, halves, strict=True)):
        extra = extra_of(row)
        prompts = []
        with reading.at(index):
            if draws and not model_draws and not asks and not drawn[index]:
                prompts.append(_writing(row, layout, names[index], extra))
            elif draws:
                prompts.append(_drawing(row, layout, names[index], drawn[index], extra))
            if asks:
                prompts.append(_asking(row, layout, names[index], shown[index], extra, instruction, truths))
        if index not in reading.bad:
            samples.append(tuple(prompts))
    return samples


# Halves ---------------------------------------------------------------------------------------------------------------


def _halves(reading: Reading, index: int, row: Row, layout: Layout) -> tuple[bool, bool]:
    """Whether the row has something to draw, and a question; neither where it is of no use."""
    draws = layout.drawing is not None and row.get(layout.drawing) is not None
    question = None if layout.question is None else row.get(layout.question)
    if index in reading.bad:
        return False, False
    with reading.at(index):
        answer = None if layout.answer is None else answer_cell(row, layout.answer)
        if (question is None) != (answer is None):
            missing, other = layout.question, layout.answer
            if question is not None:
                missing, other = other, missing
            if missing == other:
                raise DataError(f"column {missing!r} ends without an answer of the assistant; add one or drop the row")
            raise DataError(f"column {missing!r} is missing or None where {other!r} is given; fill it or drop the row")
        if not draws and question is None:
            wanted = [name for name in (layout.drawing, layout.question) if name]
            raise DataError(f"column {' and '.join(map(repr, wanted))} is missing or None; fill it or drop the row")
        return draws, question is not None
    return False, False


# Prompts --------------------------------------------------------------------------------------------------------------


def _drawing(row: Row, layout: Layout, name: str, pictures: tuple[ImageRef, ...], extra: Row) -> Prompt:
    assert layout.drawing is not None
    if len(pictures) > 1:
        raise DataError(
            f"there are {len(pictures)} pictures to compare the drawing with, and it is compared with one; keep that "
            "one, in column 'real_image'"
        )
    value = row[layout.drawing]
    text = text_of(value, layout.drawing)
    if PICTURE in text:
        raise DataError(
            f"column {layout.drawing!r} shows a picture ({PICTURE}), and no column of answers says what is right; add "
            "one, or take the sign out"
        )
    concept = row.get("concept")
    return Prompt(
        id=f"{name}/t2i",
        task="t2i",
        text=text,
        segments=IMAGE_ONLY,
        target=text,
        real_image=pictures[0] if pictures else None,
        concept=concept if isinstance(concept, str) else None,
        references=references_of(row),
        attributes=attributes_of(row) if isinstance(row.get("attributes"), Mapping) else None,
        sample=name,
        extra=extra,
    )


def _writing(row: Row, layout: Layout, name: str, extra: Row) -> Prompt:
    """A prompt without a ground truth: rewards of the user's own say what a good text is."""
    assert layout.drawing is not None
    text, _ = problem_of(row[layout.drawing], layout.drawing, ())
    return Prompt(id=f"{name}/mm2t", task="oe", text=text, segments=TEXT_ONLY, sample=name, extra=extra)


def _asking(
    row: Row,
    layout: Layout,
    name: str,
    pictures: tuple[ImageRef, ...],
    extra: Row,
    instruction: str | None,
    truths: Truths,
) -> Prompt:
    assert layout.question is not None and layout.answer is not None
    problem, leads = problem_of(asked_in(row[layout.question], layout.question), layout.question, pictures)
    asked = read_question(
        row,
        problem,
        answer_cell(row, layout.answer),
        truths,
        kind=qa_type_of(row.get("qa_type")),
    )
    check_places(asked.text, leads, pictures, layout.question)
    return Prompt(
        id=f"{name}/mm2t",
        task="mcq" if asked.kind == "MC" else "oe",
        text=instructed(asked.text, asked.kind, asked.answer, instruction, several=bool(asked.several)),
        images=pictures,
        segments=TEXT_ONLY,
        answer=asked.answer,
        right_answers=asked.several,
        options=asked.options,
        qa_type=asked.kind,
        sample=name,
        extra=extra,
    )


# Chains ---------------------------------------------------------------------------------------------------------------


def load_prompts(
    source: str | Path, split: str = "train", *, image_folder: Path | None = None, model_draws: bool = True
) -> list[Prompt]:
    """Prompts of which one trajectory may hold text and image, as Sync-R1's; columns are named as `Prompt`'s fields.

    Only `prompt` must be there. `segments` is a list or `text+image`; without it a row with a picture is answered and
    one without is drawn, by a model that draws (`model_draws`). An answer may be in any of the columns that samples
    take it from; `references` are pictures.

    Raises:
        DataError: as for `load_samples`.
    """
    return chains_of(open_table(source, split, image_folder=image_folder), split, model_draws)


def chains_of(table: Table, split: str = "train", model_draws: bool = True, faults: Faults = STRICT) -> list[Prompt]:
    """The prompts of a table, one per row; as `load_prompts`."""
    reading = Reading(table, faults)
    rows = reading.rows()
    asked, answered = chain_columns(table, rows)
    check_unseen(table, rows)
    names = names_of(table, rows, split)
    shown = pictures_of(reading, rows, CHAIN_PICTURES, [_shows(row) for row in rows], [False] * len(rows))
    prompts = []
    for index, row in enumerate(rows):
        if index not in reading.bad:
            with reading.at(index):
                prompts.append(_chain(row, names[index], shown[index], (asked, answered), model_draws))
    return prompts


def _shows(row: Row) -> bool:
    """A row need not have a picture because others do: `segments` may make drawings of some and answers of others."""
    return any(row.get(column) for column in CHAIN_PICTURES)


def _chain(
    row: Row, name: str, pictures: tuple[ImageRef, ...], columns: tuple[str, Truths | None], model_draws: bool
) -> Prompt:
    """`columns`: which asks, and which says what is right."""
    draws = model_draws and not pictures
    segments = _segments(row.get("segments"), IMAGE_ONLY if draws else TEXT_ONLY)
    told: dict[str, str | None] = {
        column: None if row.get(column) is None else text_of(row[column], column)
        for column in ("task", "follow_up", "follow_up_answer", "concept", "target")
    }
    if segments[-2:] == ("image", "text") and told["follow_up"] is None:
        raise DataError("column 'follow_up' is missing, and 'segments' has text behind the image; ask something there")
    text, leads = problem_of(asked_in(row.get(columns[0]), columns[0]), columns[0], pictures)
    choices = choices_of(row)
    options = () if choices is None else choices.texts
    if (
        choices
        and segments == TEXT_ONLY
        and not (says_options(text, options) or shows_options(text, options, choices.column))
    ):
        text = with_options(text, options)
    check_places(text, leads, pictures, columns[0])
    answers = chain_answers(row, columns[1], choices)
    return Prompt(
        id=name,
        task=told["task"] or _task(segments, bool(pictures)),
        text=text,
        images=pictures,
        segments=segments,
        answer=answers[0] if answers else None,
        right_answers=answers if len(answers) > 1 else (),
        follow_up=told["follow_up"],
        follow_up_answer=told["follow_up_answer"],
        options=options,
        concept=told["concept"],
        request=row["request"] if isinstance(row.get("request"), str) else None,
        info=row["info"] if isinstance(row.get("info"), str) else "",
        target=told["target"] or (text.replace(PICTURE, "").strip() if segments == IMAGE_ONLY else None),
        references=references_of(row),
        attributes=attributes_of(row),
        extra=extra_of(row),
    )


def _segments(value: Any, otherwise: tuple[SegmentKind, ...]) -> tuple[SegmentKind, ...]:
    if value is None:
        return otherwise
    words = tuple(value.split("+") if isinstance(value, str) else value if isinstance(value, list | tuple) else ())
    if words not in SEGMENTS:
        raise DataError(
            f"column 'segments' must be one of {['+'.join(known) for known in SEGMENTS]}, got {shown(value)}"
        )
    return SEGMENTS[SEGMENTS.index(words)]


def _task(segments: tuple[SegmentKind, ...], shows: bool) -> str:
    """The benchmark's name for prompts of this form."""
    if segments == TEXT_ONLY:
        return "vqa" if shows else "qa"
    return "pure_gen" if segments[0] == "image" else "rea"


# Other forms ----------------------------------------------------------------------------------------------------------


def _of_concepts(root: Path, split: str, instruction: str | None, faults: Faults) -> Iterable[Sample]:
    """A UnifyBench++ folder's training prompts: drawings from the explicit prompt, and questions, each on its own."""
    if split != "train":
        raise NoSplitError(
            f"{root}: a folder of concepts trains with split 'train', got {split!r}; use `load_benchmark`"
        )
    for prompt in load_training_prompts(root, chain_understanding=False, faults=faults):
        extra = {"benchmark_task": prompt.task}
        if "image" in prompt.segments:
            text = prompt.target or prompt.text
            yield (replace(prompt, task="t2i", text=text, target=text, answer=None, segments=IMAGE_ONLY, extra=extra),)
            continue
        letter = letter_of(prompt.answer or "", prompt.options) if prompt.options else None
        kind: Literal["MC", "OE"] = "MC" if letter else "OE"
        answer = letter or prompt.answer or ""
        problem = with_options(prompt.text, prompt.options) if letter else prompt.text
        yield (
            replace(
                prompt,
                task="mcq" if letter else "oe",
                text=instructed(problem, kind, answer, instruction),
                answer=answer,
                qa_type=kind,
                extra=extra,
            ),
        )
