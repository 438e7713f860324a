"""Reading a folder in the UnifyBench++ layout; `syncr1.engine.data.prompts` makes records of it.

    concept/train/<c>/   photos, info.json, conversations.json, positive_recognitions.json, random_recognitions.json,
                         t2i_conditions.json*, attributes.json*
    concept/test/<c>/    photos, vqa.json, text_only.json, rec.json*, t2i_conditions.json, attributes.json*
    random_images/       prompts_to_eval.json*      test_data/<c>.json*      general/{train,test}/*      (* optional)

The published data have one t2i_conditions.json per concept, in `test`: there the last `num_testing_info` items are
held out and the others train, as upstream does by index.  Formats: UniCTokens' README and the code that reads it;
forms that differ between its versions are all understood.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import DataError, shown

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})

PAIRS = {
    "rea": ("personalized_driven_generation", "explicit_personalized_driven_generation"),
    "dense_rea": ("personalized_dense_prompt_generation", "explicit_personalized_dense_prompt_generation"),
}
"""Reasoning tasks: the lists of implicit prompts and of what they mean, in t2i_conditions.json."""


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
        raise DataError(f"{path}: not readable as JSON ({error}); write it anew as UTF-8 JSON") from error


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


def _picture(root: Path, folder: Path, name: Any, where: str) -> Path:
    """A picture named in a question file: relative to that file's folder or to the root, with or without its suffix."""
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


def questions(root: Path, path: Path, *, base: Path | None = None) -> list[Question]:
    """Every question of a file, in order; an absent file has none.

    Understood: `{image: [{query, answer}]}` with the key `text_only` for those without a picture, `[{image?, query,
    answer, options?}]`, and the generated `[{image, type, conversations: [{value}, {value}]}]`; `question` may stand
    for `query`.
    """
    if not path.is_file():
        return []
    return [_question(root, base or path.parent, image, entry, where) for image, entry, where in _entries(path)]


def _entries(path: Path) -> Iterator[tuple[Any, Mapping[str, Any], str]]:
    contents = read_json(path)
    if isinstance(contents, Mapping):
        rows = [(image, entry) for image, value in contents.items() for entry in _as_list(value)]
        rows = [(None if image == "text_only" else image, entry) for image, entry in rows]
    else:
        rows = [(entry.get("image") if isinstance(entry, Mapping) else None, entry) for entry in _as_list(contents)]
    for index, (image, entry) in enumerate(rows):
        where = f"{path}, entry {index}"
        if not isinstance(entry, Mapping):
            raise DataError(f"{where}: expected an object with 'query' and 'answer', got {type(entry).__name__}")
        yield image, entry, where


def _as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def _question(root: Path, folder: Path, image: Any, entry: Mapping[str, Any], where: str) -> Question:
    turns = entry.get("conversations")
    if isinstance(turns, list) and len(turns) >= 2 and all(isinstance(turn, Mapping) for turn in turns):
        entry = {**entry, "query": turns[0].get("value"), "answer": turns[1].get("value")}
    text = _column(entry, ("query", "question"), where).replace("<image>", "").strip()
    answer = _column(entry, ("answer",), where)
    options = entry.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise DataError(f"{where}: column 'options' must be a list of texts, got {shown(options)}")
    if options and answer not in options:
        raise DataError(f"{where}: 'answer' {shown(answer)} is not among 'options' {shown(options)}; add it")
    kind = entry.get("type") or ""
    if not isinstance(kind, str):
        raise DataError(f"{where}: column 'type' must be text, got {shown(kind)}")
    picture = None if image is None or kind == "text_only" else _picture(root, folder, image, where)
    return Question(text, answer, picture, tuple(options), kind)


def _column(entry: Mapping[str, Any], names: tuple[str, ...], where: str) -> str:
    for name in names:
        if name in entry:
            if not isinstance(entry[name], str) or not entry[name].strip():
                raise DataError(f"{where}: column {name!r} must be text, got {shown(entry[name])}")
            return entry[name].strip()
    raise DataError(f"{where}: column {' or '.join(map(repr, names))} is missing; found {shown(sorted(entry))}")


# Concepts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ConceptFolder:
    """The two folders of one concept and what both splits need to know."""

    root: Path
    name: str
    info: Mapping[str, Any]

    @property
    def train(self) -> Path:
        return self.root / "concept" / "train" / self.name

    @property
    def test(self) -> Path:
        return self.root / "concept" / "test" / self.name

    @property
    def token(self) -> str:
        return f"<{self.name}>"

    def identity(self) -> Mapping[str, str] | None:
        """What every training photo of the concept shows alike (a place that varies is no part of it); None if
        unknown."""
        images = list(image_attributes(self.train).values())
        common = dict(images[0]) if images else {}
        for other in images[1:]:
            common = {name: value for name, value in common.items() if other.get(name) == value}
        return common or None

    def wanted(self, folder: Path, name: str, num_items: int) -> list[Mapping[str, str] | None]:
        """What the image of each item of list `name` of t2i_conditions.json must show; None for each if unknown."""
        rows = _attributes(folder, "t2i").get(name)
        if rows is None:
            return [None] * num_items
        if not isinstance(rows, list) or len(rows) != num_items:
            raise DataError(
                f"{folder / 'attributes.json'}: t2i / {name!r} must be a list of {num_items}, one per prompt"
            )
        where = f"{folder / 'attributes.json'}: t2i / {name!r}"
        return [None if row is None else _texts(row, where) for row in rows]

    def shared_prompts(self) -> list[str]:
        """The prompts of `prompts_to_eval.json` for this concept's generation_type, with its token; [] when not
        given."""
        path = self.root / "prompts_to_eval.json"
        kind = self.info.get("generation_type")
        if not path.is_file():
            return []
        contents = read_json(path)
        listed = contents.get(kind) if isinstance(contents, Mapping) and isinstance(kind, str) else None
        if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
            told = f"{shown(kind)}, the generation_type in {self.train / 'info.json'}"
            raise DataError(f"{path}: has no list of texts {told}")
        return [text.replace("<sks>", self.token) for text in listed]

    def conditions(self, *, held_out: bool) -> tuple[Mapping[str, list[str]], Path]:
        """The prompts of t2i_conditions.json that belong to one side of the split, and the folder they come from."""
        own, shared = self.train / "t2i_conditions.json", self.test / "t2i_conditions.json"
        if own.is_file():
            path = shared if held_out else own
            return (_conditions(path) if path.is_file() else {}), path.parent
        if not shared.is_file():
            return {}, self.test
        contents = _conditions(shared)
        part = dict(contents) if held_out else {}
        for name in PAIRS["rea"]:
            if name in contents:
                cut = self._first_held_out(len(contents[name]), shared)
                part[name] = contents[name][cut:] if held_out else contents[name][:cut]
        return part, self.test

    def _first_held_out(self, num_items: int, path: Path) -> int:
        held_out = self.info.get("num_testing_info", num_items // 2)
        if not isinstance(held_out, int) or isinstance(held_out, bool) or not 0 <= held_out <= num_items:
            raise DataError(
                f"{self.train / 'info.json'}: num_testing_info must be 0 to {num_items}, as many as {path} has, "
                f"got {shown(held_out)}"
            )
        return num_items - held_out


def _attributes(folder: Path, part: str) -> Mapping[str, Any]:
    """`images` (file name -> attributes) or `t2i` (list name -> attributes per prompt) of attributes.json; {} if
    absent."""
    path = folder / "attributes.json"
    contents = read_json(path) if path.is_file() else {}
    found = contents.get(part, {}) if isinstance(contents, Mapping) else None
    if not isinstance(found, Mapping):
        raise DataError(f"{path}: expected objects 'images' and 't2i'")
    return found


def image_attributes(folder: Path) -> Mapping[str, Mapping[str, str]]:
    """What each picture of a folder shows, by file name, as far as attributes.json says."""
    found = _attributes(folder, "images")
    return {name: _texts(values, f"{folder / 'attributes.json'}: images / {name!r}") for name, values in found.items()}


def _texts(values: Any, where: str) -> Mapping[str, str]:
    if not isinstance(values, Mapping) or not all(isinstance(value, str) for value in values.values()):
        raise DataError(f"{where}: expected an object of texts, got {shown(values)}")
    return values


def _conditions(path: Path) -> dict[str, list[str]]:
    contents = read_json(path)
    if isinstance(contents, list):  # the first version of the benchmark: explicit prompts only
        contents = {PAIRS["rea"][1]: contents}
    if not isinstance(contents, Mapping):
        raise DataError(f"{path}: expected an object of lists, got {type(contents).__name__}")
    for name, texts in contents.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(f"{path}: {name!r} must be a list of non-empty texts")
    for implicit, explicit in PAIRS.values():
        sizes = len(contents.get(implicit, ())), len(contents.get(explicit, ()))
        if implicit in contents and sizes[0] != sizes[1]:
            raise DataError(
                f"{path}: {implicit!r} has {sizes[0]} items and {explicit!r} {sizes[1]}; "
                f"item i of the second must say in full what item i of the first asks for"
            )
    return dict(contents)


def concepts(root: Path) -> list[ConceptFolder]:
    """The concepts of a folder: those that concepts_list.json names, else every folder in concept/train."""
    parent, listed = root / "concept" / "train", root / "concepts_list.json"
    if not parent.is_dir():
        raise DataError(f"{parent}: missing; expected a folder in the UnifyBench++ layout, concept/train/<name>/")
    names = read_json(listed) if listed.is_file() else sorted(path.name for path in parent.iterdir() if path.is_dir())
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"{listed if listed.is_file() else parent}: names no concept; add one folder per concept")
    found = []
    for name in names:
        if Path(name).name != name or name in ("", ".", "..") or not os.path.isdir(parent / name):
            raise DataError(f"{listed}: there is no folder {shown(str(parent / name), 300)}; add it or drop the name")
        info = parent / name / "info.json"
        contents = read_json(info) if info.is_file() else {}
        if not isinstance(contents, Mapping):
            raise DataError(f"{info}: expected an object, got {type(contents).__name__}")
        found.append(ConceptFolder(root, name, contents))
    return found


def recognition_training(concept: ConceptFolder) -> list[Question]:
    """Yes/no questions of positive_ and random_recognitions.json.

    Entries may name their picture; where they do not, they are wordings: each is asked about every photo of the
    concept, and as often about hard negatives, photos of other concepts, and random images, in turn.
    """
    positive = questions(concept.root, concept.train / "positive_recognitions.json")
    random = questions(concept.root, concept.train / "random_recognitions.json")
    own = photos(concept.root, concept.train)
    hard, unrelated = (
        photos(concept.root, concept.train / "negative_example"),
        photos(concept.root, concept.root / "random_images"),
    )
    others = [
        p for other in concepts(concept.root) if other.name != concept.name for p in photos(concept.root, other.train)
    ]
    pools = [pool for pool in (hard, _spread(others, len(own)), unrelated) if pool]
    found = [question for question in (*positive, *random) if question.image is not None]
    wordings = [question for question in positive if question.image is None]
    found += [replace(question, image=photo) for question in wordings for photo in own]
    wordings = [question for question in random if question.image is None] if pools else []
    for index in range(len(wordings) * len(own)):
        pool = pools[index % len(pools)]
        picture = pool[index // len(pools) % len(pool)]
        found.append(replace(wordings[index % len(wordings)], image=picture))
    return found


def recognition_test(concept: ConceptFolder) -> list[Question]:
    """Yes/no questions about held-out photos, for folders without any: as many of other concepts as of this one."""
    known = {
        name: questions(concept.root, concept.train / f"{name}_recognitions.json") for name in ("positive", "random")
    }
    yes = known["positive"][0] if known["positive"] else Question(f"Is {concept.token} in this photo?", "Yes.")
    no = known["random"][0].answer if known["random"] else "No."
    own = photos(concept.root, concept.test)
    others = [
        p for other in concepts(concept.root) if other.name != concept.name for p in photos(concept.root, other.test)
    ]
    found = [Question(yes.text, yes.answer, photo) for photo in own]
    return found + [Question(yes.text, no, photo) for photo in _spread(others, len(own))]


def _spread(items: Sequence[Path], num_items: int) -> Sequence[Path]:
    """At most `num_items`, evenly over the whole sequence."""
    step = max(1, len(items) // max(1, num_items))
    return items[::step][:num_items]
