"""A folder in the UnifyBench++ layout, read once into plain records; `prompts.py` makes prompts of them.

    concept/train/<c>/   photos, info.json, conversations.json, positive_recognitions.json, random_recognitions.json,
                         t2i_conditions.json*, attributes.json*
    concept/test/<c>/    photos, vqa.json, text_only.json, rec.json*, t2i_conditions.json, attributes.json*
    random_images/       prompts_to_eval.json*      test_data/<c>.json*      general/{train,test}/*      (* optional)

The published data have one t2i_conditions.json per concept, in `test`: there the last `num_testing_info` items are
held out and the others train, as upstream does by index.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import DataError, shown
from .concept_info import Told, meant_by, told_of
from .faults import STRICT, Faults
from .unifybench_files import (
    PICTURE_SUFFIXES,
    Question,
    captions,
    lists_of_texts,
    photos,
    picture_attributes,
    prompt_attributes,
    questions,
    read_json,
)

PAIRS = {
    "rea": ("personalized_driven_generation", "explicit_personalized_driven_generation"),
    "dense_rea": ("personalized_dense_prompt_generation", "explicit_personalized_dense_prompt_generation"),
}
"""Reasoning tasks: the lists of implicit prompts and of what they mean, in t2i_conditions.json."""
DENSE = "dense_prompt_generation"
TRAINING_FILES = {"vqa": "conversations.json", "qa": "text_only.json"}
"""Question files of a training folder; a question without a picture is `qa` wherever it stands."""
TEST_KINDS = {"rec": "rec", "vqa": "vqa", "text_only": "qa"}
"""`type` in generated test files -> task; any other type is `choice`."""

Split = Literal["train", "test"]
Asked = tuple[str, Question]
"""Task and question."""


@dataclass(frozen=True, slots=True)
class Request:
    """Something to draw."""

    text: str
    target: str
    """What `text` means, in full."""
    attributes: Mapping[str, str] | None
    """What the image must show; None if unknown."""
    meant: str = ""
    """The item of its concept's `extra_info` that it means; "" if none is known, and of what is held out."""


Requests = Mapping[str, Sequence[Request]]
"""By task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Concept:
    """What one side of the split has of one concept."""

    name: str
    kind: str | None
    """What kind of thing it is (`dog` for <bobo>)."""
    told: Told
    """What info.json tells of it."""
    photos: tuple[Path, ...]
    reasoning: Requests
    """What is described first and then drawn."""
    questions: Sequence[Asked]
    identity: Mapping[str, str] | None
    """What every training photo shows alike (a place that varies is no part of it); None if unknown."""
    drawings: Requests
    """What is drawn at once."""


def read_concepts(root: Path, split: Split, *, identities: bool = False, faults: Faults = STRICT) -> list[Concept]:
    """One side of every concept; `identities`: with what its training photos show alike.

    Raises:
        DataError: a required file is missing, or an entry cannot be used; names the file, the entry and the remedy.
    """
    folders, training = _folders(root, faults), split == "train"
    albums: dict[str, tuple[Path, ...]] = {}
    for folder in folders:
        albums[folder.name] = ()
        with faults.here():
            albums[folder.name] = photos(root, folder.train if training else folder.test)
    found = []
    for folder in folders:
        with faults.here():
            found.append(_concept(folder, albums, training, identities))
    return found


def told_of_concepts(root: Path) -> dict[str, Told]:
    """What info.json tells of each training concept, by name; its faults are told where concepts are read."""
    found, quiet = dict[str, Told](), Faults(keep=True)
    with quiet.here():
        for folder in _folders(root, quiet):
            with quiet.here():
                found[folder.name] = told_of(folder.info, folder.train / "info.json")
    return found


def _concept(folder: _Folder, albums: Mapping[str, tuple[Path, ...]], training: bool, identities: bool) -> Concept:
    if training and not albums[folder.name]:
        raise DataError(f"{folder.train}: has no pictures; {folder.photos_wanted()}")
    num_faults = len(folder.faults.found)
    lists: Mapping[str, list[str]] = {}
    place = folder.train
    with folder.faults.here():
        lists, place = folder.conditions(held_out=not training)
    told = Told()
    with folder.faults.here():
        told = told_of(folder.info, folder.train / "info.json")
    shared: list[str] = []
    with folder.faults.here():
        shared = [] if training else folder.shared_prompts()
    concept = Concept(
        name=folder.name,
        kind=folder.kind,
        told=told,
        photos=albums[folder.name],
        reasoning=_reasoning(lists, place, told if training else Told(), by_place=place == folder.test),
        questions=_training_questions(folder, albums) if training else _held_out_questions(folder, albums),
        identity=folder.identity() if identities else None,
        drawings=_drawings(lists, place, shared),
    )
    empty = training and not any((*concept.reasoning.values(), concept.questions, *concept.drawings.values()))
    if empty and len(folder.faults.found) == num_faults:
        raise DataError(
            f"{folder.train}: nothing to train on; add conversations.json, or t2i_conditions.json with the list "
            f"{PAIRS['rea'][0]!r} and its 'explicit_' one{_lists_found(lists)}"
        )
    return concept


def _lists_found(lists: Mapping[str, list[str]]) -> str:
    return f"; found lists {sorted(lists)}" if lists else ""


def read_general(root: Path, split: Split, faults: Faults = STRICT) -> tuple[list[Asked], Requests]:
    """Questions about pictures that show no concept, and captions to draw: `general/<split>/{vqa,captions}.json`."""
    folder = root / "general" / split
    asked = questions(root, folder / "vqa.json", faults=faults)
    requests: list[Request] = []
    with faults.here():
        shows = picture_attributes(folder)
        requests = [Request(said, said, shows.get(name)) for said, name in captions(folder / "captions.json", faults)]
    return [("general_vqa", question) for question in asked], {"general_image": requests}


# Folders --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Folder:
    """The two folders of one concept and what both splits need to know."""

    root: Path
    name: str
    info: Mapping[str, Any]
    faults: Faults

    def photos_wanted(self) -> str:
        """The remedy for a folder without photos: what lies there instead is named."""
        other = sorted(path.name for path in self.train.iterdir() if path.suffix.lower() not in ("", ".json"))
        found = f"found {', '.join(other[:3])}, whose suffix is not one of {' '.join(sorted(PICTURE_SUFFIXES))}; "
        return (found if other else "") + "add the concept's photos as 0.png, 1.png, …"

    @property
    def train(self) -> Path:
        return self.root / "concept" / "train" / self.name

    @property
    def test(self) -> Path:
        return self.root / "concept" / "test" / self.name

    def questions(self, path: Path, base: Path | None = None) -> list[Question]:
        return questions(self.root, path, base=base, faults=self.faults)

    @property
    def kind(self) -> str | None:
        kind = self.info.get("class")
        return kind if isinstance(kind, str) and kind.strip() else None

    def identity(self) -> Mapping[str, str] | None:
        images = list(picture_attributes(self.train).values())
        common = dict(images[0]) if images else {}
        for other in images[1:]:
            common = {name: value for name, value in common.items() if other.get(name) == value}
        return common or None

    def shared_prompts(self) -> list[str]:
        """The prompts of `prompts_to_eval.json` for this concept's generation_type, with its token; [] when not
        given."""
        path = self.root / "prompts_to_eval.json"
        kind = self.info.get("generation_type")
        if not path.is_file():
            return []
        contents = read_json(path)
        lists = contents if isinstance(contents, Mapping) else {}
        if not isinstance(kind, str) or kind not in lists:
            raise DataError(
                f"{self.train / 'info.json'}: generation_type must name one of the lists of {path}, "
                f"{shown(sorted(map(str, lists)))}, got {shown(kind)}; name one, or remove that file"
            )
        listed = lists[kind]
        if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
            raise DataError(f"{path}: {kind!r} must be a list of texts, got {shown(listed)}")
        return [text.replace("<sks>", f"<{self.name}>") for text in listed]

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


def _folders(root: Path, faults: Faults) -> list[_Folder]:
    """The concepts of a folder: those that concepts_list.json names, else every folder in concept/train."""
    parent, listed = root / "concept" / "train", root / "concepts_list.json"
    if not parent.is_dir():
        raise DataError(f"{parent}: missing; expected a folder in the UnifyBench++ layout, concept/train/<name>/")
    names = read_json(listed) if listed.is_file() else sorted(path.name for path in parent.iterdir() if path.is_dir())
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"{listed if listed.is_file() else parent}: names no concept; add one folder per concept")
    found = []
    for name in names:
        with faults.here():
            found.append(_Folder(root, name, _info(parent, name, listed), faults))
    return found


def _info(parent: Path, name: str, listed: Path) -> Mapping[str, Any]:
    """What a concept's info.json says; {} without one."""
    if Path(name).name != name or name in ("", ".", "..") or not os.path.isdir(parent / name):
        raise DataError(f"{listed}: there is no folder {shown(str(parent / name), 300)}; add it or drop the name")
    info = parent / name / "info.json"
    contents = read_json(info) if info.is_file() else {}
    if not isinstance(contents, Mapping):
        raise DataError(f"{info}: expected an object, got {type(contents).__name__}")
    return contents


# What is to be drawn --------------------------------------------------------------------------------------------------


def _conditions(path: Path) -> dict[str, list[str]]:
    lists = lists_of_texts(path, alone=PAIRS["rea"][1])
    for implicit, explicit in PAIRS.values():
        sizes = len(lists.get(implicit, ())), len(lists.get(explicit, ()))
        if implicit in lists and sizes[0] != sizes[1]:
            raise DataError(
                f"{path}: {implicit!r} has {sizes[0]} items and {explicit!r} {sizes[1]}; "
                f"item i of the second must say in full what item i of the first asks for"
            )
    return lists


def _reasoning(lists: Mapping[str, list[str]], folder: Path, told: Told, by_place: bool) -> Requests:
    """Only `rea` means a single item of what is told; the dense requests mean several."""
    found = {
        task: _requests(folder, explicit, lists.get(implicit, []), lists.get(explicit, []))
        for task, (implicit, explicit) in PAIRS.items()
    }
    meant = meant_by(told, [(asked.text, asked.target) for asked in found["rea"]], by_place=by_place)
    found["rea"] = [replace(asked, meant=item) for asked, item in zip(found["rea"], meant, strict=True)]
    return found


def _drawings(lists: Mapping[str, list[str]], folder: Path, shared: Sequence[str]) -> Requests:
    """pure_gen draws a personalised prompt without reasoning about it first, dense_gen a dense one.

    Evaluation takes pure_gen from `prompts_to_eval.json` where the folder has it, as UnifyBench++ does.
    """
    implicit, explicit = PAIRS["rea"]
    pure, dense = lists.get(implicit, lists.get(explicit, [])), lists.get(DENSE, [])
    return {
        "pure_gen": [Request(text, text, None) for text in shared] or _requests(folder, explicit, pure, pure),
        "dense_gen": _requests(folder, DENSE, dense, dense),
    }


def _requests(folder: Path, name: str, texts: Sequence[str], targets: Sequence[str]) -> list[Request]:
    """`name`: of the list whose attributes tell what the images show. Targets beyond the texts are not asked for."""
    return [Request(*item) for item in zip(texts, targets, prompt_attributes(folder, name, len(texts)), strict=False)]


# Questions ------------------------------------------------------------------------------------------------------------


def _training_questions(folder: _Folder, albums: Mapping[str, tuple[Path, ...]]) -> list[Asked]:
    found = [(task, q) for task, name in TRAINING_FILES.items() for q in folder.questions(folder.train / name)]
    found = [("qa" if q.image is None else task, q) for task, q in found]
    return found + [("rec", q) for q in _recognition_training(folder, albums)]


def _held_out_questions(folder: _Folder, albums: Mapping[str, tuple[Path, ...]]) -> list[Asked]:
    root = folder.root
    found = [("vqa" if q.image else "qa", q) for q in folder.questions(folder.test / "vqa.json")]
    found += [("qa", q) for q in folder.questions(folder.test / "text_only.json")]
    found += [("rec", q) for q in folder.questions(folder.test / "rec.json")]
    generated = folder.questions(root / "test_data" / f"{folder.name}.json", base=root)
    have = {task for task, _ in found}
    found += [(task, q) for q in generated if (task := TEST_KINDS.get(q.kind, "choice")) not in have]
    if all(task != "rec" for task, _ in found):
        found += [("rec", q) for q in _recognition_test(folder, albums)]
    return found


def _recognition_training(folder: _Folder, albums: Mapping[str, tuple[Path, ...]]) -> list[Question]:
    """Yes/no questions of positive_ and random_recognitions.json.

    Entries may name their picture; where they do not, they are wordings: each is asked about every photo of the
    concept, and as often about hard negatives, photos of other concepts, and random images, in turn.
    """
    positive, random = _recognitions(folder, "positive"), _recognitions(folder, "random")
    own = albums[folder.name]
    hard = photos(folder.root, folder.train / "negative_example")
    unrelated = photos(folder.root, folder.root / "random_images")
    pools = [pool for pool in (hard, _others(folder, albums), unrelated) if pool]
    found = [question for question in (*positive, *random) if question.image is not None]
    wordings = [question for question in positive if question.image is None]
    found += [replace(question, image=photo) for question in wordings for photo in own]
    wordings = [question for question in random if question.image is None] if pools else []
    for index in range(len(wordings) * len(own)):
        pool = pools[index % len(pools)]
        picture = pool[index // len(pools) % len(pool)]
        found.append(replace(wordings[index % len(wordings)], image=picture))
    return found


def _recognition_test(folder: _Folder, albums: Mapping[str, tuple[Path, ...]]) -> list[Question]:
    """Yes/no questions about held-out photos, for folders without any: as many of other concepts as of this one."""
    positive, random = _recognitions(folder, "positive"), _recognitions(folder, "random")
    yes = positive[0] if positive else Question(f"Is <{folder.name}> in this photo?", "Yes.")
    no = random[0].answer if random else "No."
    found = [Question(yes.text, yes.answer, photo) for photo in albums[folder.name]]
    return found + [Question(yes.text, no, photo) for photo in _others(folder, albums)]


def _recognitions(folder: _Folder, kind: str) -> list[Question]:
    return folder.questions(folder.train / f"{kind}_recognitions.json")


def _others(folder: _Folder, albums: Mapping[str, tuple[Path, ...]]) -> Sequence[Path]:
    """At most as many photos of other concepts as there are of this one, evenly over all of them."""
    found = [photo for name, album in albums.items() if name != folder.name for photo in album]
    wanted = len(albums[folder.name])
    step = max(1, len(found) // max(1, wanted))
    return found[::step][:wanted]
