"""The files of a folder in the UnifyBench++ layout, each read and checked; `unifybench.py` says which are read.

Formats: UniCTokens' README and the code that reads it; forms that differ between its versions are all understood.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, shown
from ..pictures import PICTURE
from .faults import STRICT, Faults

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True, slots=True)
class Question:
    """One question of any of the layout's question files."""

    text: str
    answer: str
    image: Path | None = None
    options: tuple[str, ...] = ()
    kind: str = ""
    """`type` in generated test files: rec, vqa, text_only, or a multiple choice."""


# Files ----------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """Contents of a JSON file; DataError when it is missing or malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path}: missing; a UnifyBench++ folder has it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); rewrite it as UTF-8 JSON") from error


def inside(root: Path, path: Path, named_by: str) -> Path:
    """`path`, resolved; DataError when it is missing or, symbolic links followed, lies outside `root`."""
    try:
        resolved = path.resolve()
        found = resolved.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long; a loop of links; half of a surrogate pair
        raise DataError(f"{named_by}: {shown(str(path))} is no usable path ({error}); rename the picture") from error
    if not resolved.is_relative_to(root.resolve()):
        raise DataError(f"{named_by}: {path} lies outside {root}; copy the picture into the folder")
    if not found:
        raise DataError(f"{named_by}: names a picture that does not exist, {path}; add it or drop the entry")
    return resolved


def photos(root: Path, folder: Path) -> tuple[Path, ...]:
    """The pictures directly in `folder`, in numeric order, then by name."""
    if not folder.is_dir():
        return ()
    found = [p for p in folder.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES]
    found.sort(key=lambda p: (0, int(p.stem), p.name) if p.stem.isdecimal() else (1, 0, p.name))
    return tuple(inside(root, path, str(folder)) for path in found)


def _picture(root: Path, folder: Path, name: Any, where: str, known: dict[str, Path]) -> Path:
    """A picture named in a question file: relative to that file's folder or to the root, with or without its suffix.

    `known`: those that the file has named before, each of which stands beside many questions.
    """
    if isinstance(name, str) and name in known:
        return known[name]
    found = _found(root, folder, name, where)
    known[name] = found
    return found


def _found(root: Path, folder: Path, name: Any, where: str) -> Path:
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: column 'image' must be a file name, got {shown(name)}")
    if len(name) > 4096:  # resolving it would take quadratic time
        raise DataError(f"{where}: column 'image' has {len(name)} characters, which no file has; rename the picture")
    for base in (folder, root):
        if os.path.isfile(base / name):  # unlike Path's, False for a name that no file could have
            return inside(root, base / name, where)
        if not Path(name).suffix:
            for suffix in sorted(PICTURE_SUFFIXES):
                if os.path.isfile(base / f"{name}{suffix}"):
                    return inside(root, base / f"{name}{suffix}", where)
    return inside(root, folder / name, where)  # raises, naming what is wrong


def questions(root: Path, path: Path, *, base: Path | None = None, faults: Faults = STRICT) -> list[Question]:
    """Every question of a file, in order; an absent file has none.

    Understood: `{image: [{query, answer}]}` with the key `text_only` for those without a picture, `[{image?, query,
    answer, options?}]`, and the generated `[{image, type, conversations: [{value}, {value}]}]`; `question` may stand
    for `query`.
    """
    if not path.is_file():
        return []
    found: list[Question] = []
    known: dict[str, Path] = {}
    with faults.here():
        for image, entry, where in _entries(path):
            with faults.here(where):
                found.append(_question(root, base or path.parent, image, entry, where, known))
    return found


def _entries(path: Path) -> Iterator[tuple[Any, Any, str]]:
    """Picture's name, entry, and where it stands."""
    contents = read_json(path)
    if isinstance(contents, Mapping):
        rows = [(image, entry) for image, value in contents.items() for entry in _as_list(value)]
        rows = [(None if image == "text_only" else image, entry) for image, entry in rows]
    else:
        rows = [(entry.get("image") if isinstance(entry, Mapping) else None, entry) for entry in _as_list(contents)]
    for index, (image, entry) in enumerate(rows):
        yield image, entry, f"{path}, entry {index}"


def _as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def _question(root: Path, folder: Path, image: Any, entry: Any, where: str, known: dict[str, Path]) -> Question:
    if not isinstance(entry, Mapping):
        raise DataError(f"{where}: expected an object with 'query' and 'answer', got {type(entry).__name__}")
    turns = entry.get("conversations")
    if isinstance(turns, list) and len(turns) >= 2 and all(isinstance(turn, Mapping) for turn in turns):
        entry = {**entry, "query": turns[0].get("value"), "answer": turns[1].get("value")}
    text = _column(entry, ("query", "question"), where)
    if (signs := text.count(PICTURE)) > 1:
        raise DataError(f"{where}: the question has {signs} signs {PICTURE} and shows 1 picture; take signs out")
    text = text.replace(PICTURE, "").strip()
    answer = _column(entry, ("answer",), where)
    options = entry.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise DataError(f"{where}: column 'options' must be a list of texts, got {shown(options)}")
    if options and answer not in options:
        raise DataError(f"{where}: 'answer' {shown(answer)} is not among 'options' {shown(options)}; add it")
    kind = entry.get("type") or ""
    if not isinstance(kind, str):
        raise DataError(f"{where}: column 'type' must be text, got {shown(kind)}")
    picture = None if image is None or kind == "text_only" else _picture(root, folder, image, where, known)
    return Question(text, answer, picture, tuple(options), kind)


def _column(entry: Mapping[str, Any], names: tuple[str, ...], where: str) -> str:
    for name in names:
        if name in entry:
            if not isinstance(entry[name], str) or not entry[name].strip():
                raise DataError(f"{where}: column {name!r} must be text, got {shown(entry[name])}")
            return entry[name].strip()
    raise DataError(f"{where}: column {' or '.join(map(repr, names))} is missing; found {shown(sorted(entry))}")


# What is to be drawn --------------------------------------------------------------------------------------------------


def lists_of_texts(path: Path, alone: str) -> dict[str, list[str]]:
    """t2i_conditions.json: name -> prompts; `alone` is the name of a list without one (the benchmark's first
    version)."""
    contents = read_json(path)
    if isinstance(contents, list):
        contents = {alone: contents}
    if not isinstance(contents, Mapping):
        raise DataError(f"{path}: expected an object of lists, got {type(contents).__name__}")
    for name, texts in contents.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(f"{path}: {name!r} must be a list of non-empty texts")
    return dict(contents)


def captions(path: Path, faults: Faults = STRICT) -> list[tuple[str, str]]:
    """Caption and picture's name (`None` where it has none) of each entry; an absent file has none."""
    entries = read_json(path) if path.is_file() else []
    if not isinstance(entries, list):
        raise DataError(f"{path}: expected a list of captions, got {type(entries).__name__}")
    found = []
    for index, entry in enumerate(entries):
        caption = entry.get("caption") if isinstance(entry, Mapping) else None
        with faults.here(f"{path}, entry {index}"):
            if not isinstance(caption, str) or not caption.strip():
                raise DataError(f"{path}, entry {index}: column 'caption' must be text, got {shown(caption)}")
            found.append((caption, str(entry.get("image"))))
    return found


def picture_attributes(folder: Path) -> Mapping[str, Mapping[str, str]]:
    """What each picture of a folder shows, by file name, as far as attributes.json says."""
    path = folder / "attributes.json"
    return {name: _texts(values, f"{path}: images / {name!r}") for name, values in _attributes(path, "images").items()}


def prompt_attributes(folder: Path, name: str, num_items: int) -> list[Mapping[str, str] | None]:
    """What the image of each item of list `name` of t2i_conditions.json must show; None for each if unknown."""
    path = folder / "attributes.json"
    rows = _attributes(path, "t2i").get(name)
    if rows is None:
        return [None] * num_items
    if not isinstance(rows, list) or len(rows) != num_items:
        raise DataError(f"{path}: t2i / {name!r} must be a list of {num_items}, one per prompt")
    return [None if row is None else _texts(row, f"{path}: t2i / {name!r}") for row in rows]


def _attributes(path: Path, part: str) -> Mapping[str, Any]:
    """`images` (file name -> attributes) or `t2i` (list name -> attributes per prompt) of attributes.json; {} if
    absent."""
    contents = read_json(path) if path.is_file() else {}
    found = contents.get(part, {}) if isinstance(contents, Mapping) else None
    if not isinstance(found, Mapping):
        raise DataError(f"{path}: expected objects 'images' and 't2i'")
    return found


def _texts(values: Any, where: str) -> Mapping[str, str]:
    if not isinstance(values, Mapping) or not all(isinstance(value, str) for value in values.values()):
        raise DataError(f"{where}: expected an object of texts, got {shown(values)}")
    return values
