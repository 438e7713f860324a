"""What lies in the data and is not trained on, with the reason: a mistyped name is otherwise found by nobody."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from ..records import Prompt
from .faults import Faults
from .forms.truths import is_lone_letter
from .rows import ANSWER_COLUMNS, QUESTION_COLUMNS, Row, first_of
from .table import Table
from .unifybench import DENSE, PAIRS
from .unifybench_files import PICTURE_SUFFIXES, read_json

Method = Literal["sync_r1", "corl"]

ROOT_NAMES = ("concept", "general", "random_images", "test_data", "concepts_list.json", "prompts_to_eval.json")
PUBLISHED = ("template.json", "black_512x512.png", "world.json", "train_images.json")
"""Lie in the published and in the rendered data and hold nothing to train on."""
TRAIN_NAMES = (
    *("info.json", "conversations.json", "text_only.json", "t2i_conditions.json", "attributes.json"),
    *("positive_recognitions.json", "random_recognitions.json", "negative_example"),
)
TEST_NAMES = ("vqa.json", "text_only.json", "rec.json", "t2i_conditions.json", "attributes.json")
GENERAL_NAMES = ("vqa.json", "captions.json", "attributes.json")
LISTS = (*(name for pair in PAIRS.values() for name in pair), DENSE)
"""Of t2i_conditions.json."""
CHAIN_COLUMNS = ("segments", "follow_up", "follow_up_answer", "task")
"""Read by Sync-R1 alone, whose trajectories may hold text and image."""
PAIR_COLUMNS = ("real_image", "qa_type")
"""Read by CoRL alone."""


# Folders --------------------------------------------------------------------------------------------------------------


def unused_files(root: Path) -> list[str]:
    """Files, folders and lists of prompts in a UnifyBench++ folder that nothing reads."""
    found = list(_strangers(root, root, ROOT_NAMES, pictures=False))
    concept = root / "concept"
    found += _strangers(root, concept, ("train", "test"), pictures=False)
    names = _names(root)
    for split, known in (("train", TRAIN_NAMES), ("test", TEST_NAMES)):
        for folder in _inside(concept / split):
            if folder.name in PUBLISHED:
                continue
            if folder.name not in names:
                why = "concepts_list.json does not name it" if split == "train" else f"no {concept / 'train'} beside it"
                found.append(f"{folder.relative_to(root)}: not used; {why}")
                continue
            found += _strangers(root, folder, known)
            found += _lists(root, folder / "t2i_conditions.json")
    for split in ("train", "test"):
        found += _strangers(root, root / "general" / split, GENERAL_NAMES)
    return found


def _names(root: Path) -> set[str]:
    listed = root / "concepts_list.json"
    names = Faults(keep=True)
    with names.here():
        if listed.is_file() and isinstance(contents := read_json(listed), list):
            return {name for name in contents if isinstance(name, str)}
    return {folder.name for folder in _inside(root / "concept" / "train") if folder.is_dir()}


def _inside(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []


def _strangers(root: Path, folder: Path, known: Sequence[str], *, pictures: bool = True) -> Iterator[str]:
    for path in _inside(folder):
        if path.name in (*known, *PUBLISHED) or (pictures and path.suffix.lower() in PICTURE_SUFFIXES):
            continue
        where = path.relative_to(root)
        nearest = difflib.get_close_matches(path.name, known, n=1)
        if nearest:
            yield f"{where}: not read; did you mean {nearest[0]}?"
        elif pictures and path.is_file() and path.suffix and path.suffix != ".json":
            yield f"{where}: not read; a picture's suffix is one of {' '.join(sorted(PICTURE_SUFFIXES))}"
        else:
            yield f"{where}: not read; what is read there: {', '.join(known)}{' and pictures' if pictures else ''}"


def _lists(root: Path, path: Path) -> Iterator[str]:
    """Lists of t2i_conditions.json that no task takes."""
    contents: object = None
    with Faults(keep=True).here():  # told where it is read
        contents = read_json(path) if path.is_file() else None
    for name in contents if isinstance(contents, dict) else ():
        if name not in LISTS:
            nearest = difflib.get_close_matches(str(name), LISTS, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(LISTS)}"
            yield f"{path.relative_to(root)}: the list {name!r} is not read; {hint}"


# Tables ---------------------------------------------------------------------------------------------------------------


def unused_columns(table: Table, rows: Iterable[Row], prompts: Sequence[Prompt], method: Method) -> list[str]:
    """Values of columns that the other method would read, and answers to what is drawn; other columns go to rewards."""
    rows = list(rows)
    counts = {name: sum(row.get(name) not in (None, "", (), []) for row in rows) for name in table.columns}
    if method == "corl":
        names = [name for name in CHAIN_COLUMNS if counts.get(name)]
        return [f"column {name!r} ({counts[name]} rows): read by recipes/sync_r1.py alone" for name in names]
    asked = next((name for name in QUESTION_COLUMNS if counts.get(name)), None)
    found = []
    if asked is not None:
        found.append(
            f"column {asked!r}: {counts[asked]} questions are not asked; recipes/sync_r1.py reads 'prompt' alone, "
            "recipes/corl.py trains on both"
        )
    found += [
        f"column {name!r} ({counts[name]} rows): read by recipes/corl.py alone"
        + ("; photos of the subject go into 'references'" if name == "real_image" else "")
        for name in PAIR_COLUMNS
        if counts.get(name)
    ]
    column = first_of(ANSWER_COLUMNS, table.columns)
    if column is not None and asked is None:
        drawn = {prompt.id for prompt in prompts if prompt.segments == ("image",) and prompt.answer is not None}
        if drawn:
            found.append(
                f"column {column!r}: {len(drawn)} answers are not looked at, because rows without a picture ask for a "
                'drawing; give them "segments": "text" (or "text+image") to have them answered'
            )
    return found


def lone_letters(prompts: Sequence[Prompt]) -> list[str]:
    """What is said of open-ended questions whose answer is a letter: options that nobody found, more often than not."""
    alone = [p for p in prompts if p.answer and p.qa_type != "MC" and not p.options and is_lone_letter(p.answer)]
    if not alone:
        return []
    return [
        f"options: none were found of {len(alone)} questions whose answer is a letter, e.g. {alone[0].answer!r} of "
        f"{alone[0].id}; they are open-ended; write options as lines 'A. red', or into a column 'options'"
    ]
