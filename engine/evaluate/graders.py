"""What other models say of the items: CLIP similarities, and a language model's verdicts.  Both cost time or money.

Every value is kept in scores.jsonl as soon as it is known, under a hash of all that it depends on (metric, grader,
texts, pixels): an interrupted scoring goes on where it stopped, and nothing is asked twice.

| metric | value |
|---|---|
| clip_t | cosine of image and the explicit prompt |
| clip_i | mean cosine of image and held-out photos of the concept |
| judge | 0, .5 or 1: does the answer say what the ground truth says? for rewritten prompts: do both ask for the same? |
| clauses | share of the explicit prompt's comma clauses that the image shows, each judged 0 or 1 |

Source: UnifyBench++ (`evaluation/scorers/gpt_scorer.py`, `evaluation/tasks.py`); rewritten, with other wordings.

Dims: n items, D features.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from ..errors import ChatError, EvaluationError
from ..pictures import ImageRef, open_picture, to_tensor
from ..whole_files import write_atomically
from .store import Item, Key
from .tasks import IMAGE_METRICS, IMAGE_OF, OF_IMAGES, OF_TEXTS, PUBLISHED, image_task

KEPT = "scores.jsonl"
AT_ONCE = 32
"""Images or questions between two writes to the disk."""

Entry = TypeVar("Entry")
Reading = Callable[[str | None, Item], float | None]
"""A reply and the item that it is about, to the value."""
Values = dict[str, dict[str, list[tuple[str, float | None]]]]
"""task -> metric -> an item's id and its value, of each trajectory; None where the grader had no answer."""


class Clip(Protocol):
    """`ClipScorer`, or anything with these two methods."""

    def clip_t(self, images: Sequence[Tensor], texts: Sequence[str]) -> list[float]:
        """Cosine of each image [3, H, W] in [0, 1] and its text."""

    def clip_i(self, images: Sequence[Tensor], references: Sequence[Sequence[ImageRef]]) -> list[float | None]:
        """Mean cosine of each image and its references; None where it has none."""


class Asker(Protocol):
    """`LLMJudge`, or anything that answers questions about pictures."""

    def ask_many(self, questions: Sequence[str], images: Sequence[Tensor | None]) -> list[str | None]:
        """One answer per question; None where none came."""


class Verdict(Protocol):
    """What GenEval's rules say of one image."""

    @property
    def correct(self) -> bool: ...
    @property
    def reason(self) -> str: ...


class Detector(Protocol):
    """`GenEval`, or anything that finds objects and judges by its rules."""

    def verdicts(self, images: Sequence[Tensor], metadata: Sequence[Mapping[str, Any]]) -> Sequence[Verdict]:
        """One for each image [3, H, W] in [0, 1] and its line of evaluation_metadata.jsonl."""


JUDGED = frozenset({"judge", "clauses", "dpg", "wise", "t2i_compbench", "mathvista"})
"""Metrics that the judge is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graders:
    """The models that grade, each with a name that tells it from others."""

    clip: Clip | None = None
    clip_name: str = ""
    clip_references: int = 1
    """Photos that clip_i compares with, the first ones; 0: all. UnifyBench++ takes one."""
    judge: Asker | None = None
    judge_name: str = ""
    detector: Detector | None = None
    detector_name: str = ""

    def missing(self, metric: str) -> str | None:
        """Why a metric cannot be computed; None when it can."""
        if metric in ("clip_t", "clip_i") and self.clip is None:
            return "no CLIP model was given (--clip)"
        if metric in JUDGED and self.judge is None:
            return "no judge was given (--judge_url, --judge_model)"
        if metric == "geneval" and self.detector is None:
            return "no detector was given (--geneval_detector facebook/mask2former-swin-small-coco-instance)"
        return None


def metrics_of(item: Item) -> list[tuple[str, str]]:
    """(task, metric) of everything that may be said of an item, its image under its image's task."""
    prompt, found = item.prompt, []
    if item.text is not None and prompt.answer is not None:
        found += [(prompt.task, metric) for metric in PUBLISHED.get(prompt.task, ()) if metric not in IMAGE_METRICS]
        found = found or [(prompt.task, metric) for metric in OF_TEXTS]
    if item.drawn is not None:
        task = image_task(prompt)
        drawn = [metric for metric in PUBLISHED.get(task, ()) if metric in IMAGE_METRICS] or OF_IMAGES
        found += [(task, metric) for metric in drawn if metric != "clip_i" or prompt.references]
    return found


class Kept:
    """scores.jsonl: values by key, appended as they come."""

    def __init__(self, folder: Path) -> None:
        """Reads what is there; a last line that was cut off is removed.

        Raises:
            EvaluationError: another line cannot be read.
        """
        self._path = folder / KEPT
        self.values: dict[str, float] = {}
        self.told: dict[str, str] = {}
        """What was said beside a value, where something was."""
        self.graders: dict[str, set[str]] = {}
        """metric -> whose values there are."""
        lines = self._path.read_bytes().split(b"\n") if self._path.is_file() else [b""]
        for number, line in enumerate(lines[:-1], 1):
            try:
                row = json.loads(line)
                self.values[row["key"]] = float(row["value"])
                if "told" in row:
                    self.told[row["key"]] = str(row["told"])
                self.graders.setdefault(row["metric"], set()).add(row["grader"])
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                raise EvaluationError(
                    f"{self._path}, line {number}: cannot be read ({error}); delete the file to score again"
                ) from error
        if lines[-1]:
            write_atomically(self._path, b"".join(line + b"\n" for line in lines[:-1]))

    def add(
        self, metric: str, grader: str, rows: Sequence[tuple[str, Item, float]], told: Sequence[str] | None = None
    ) -> None:
        """Keeps (key, item, value) of each row, and what was told beside it; on disk when this returns."""
        with self._path.open("a", encoding="utf-8") as file:
            for place, (key, item, value) in enumerate(rows):
                self.values[key] = value
                row = {
                    "key": key,
                    "metric": metric,
                    "grader": grader,
                    "id": item.prompt.id,
                    "member": item.member,
                    "value": value,
                }
                if told is not None:
                    row["told"] = self.told[key] = told[place]
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def grade(items: Sequence[Item], folder: Path, graders: Graders) -> tuple[Values, dict[str, str]]:
    """The metrics clip_t, clip_i, judge and clauses, as far as the graders at hand, or earlier ones, can give them.

    Where a grader is not given, the values that an earlier scoring kept are taken, if they are complete and of one
    grader: CLIP may be computed on one machine and the judge asked from another.

    Returns:
        The values; and of each metric without them the reason: no grader, or one that refused (a server that takes no
        such requests). What was answered before that is kept.
    """
    kept = Kept(folder)
    values: Values = {}
    left_out: dict[str, str] = {}
    for metric, grader in _GRADED.items():
        wanted = [(item, task) for item in items for task, name in metrics_of(item) if name == metric]
        if metric == "judge":  # it reads one text per prompt, the first member's
            wanted = [(item, task) for item, task in wanted if item.member == 0]
        if not wanted:
            continue
        missing = graders.missing(metric)
        at_hand = graders if missing is None else earlier(kept, metric, graders)
        try:
            found = grader([item for item, _ in wanted], folder, at_hand, kept)
        except (ChatError, Nobody) as error:
            left_out[metric] = missing or str(error)
            continue
        for item, task in wanted:
            values.setdefault(task, {}).setdefault(metric, []).append((item.prompt.id, found[item.key]))
    return values, left_out


class Nobody(Exception):
    """Takes the place of a grader that was not given; asking it raises itself."""

    def clip_t(self, images: Sequence[Tensor], texts: Sequence[str]) -> list[float]:
        raise self

    def clip_i(self, images: Sequence[Tensor], references: Sequence[Sequence[ImageRef]]) -> list[float | None]:
        raise self

    def ask_many(self, questions: Sequence[str], images: Sequence[Tensor | None]) -> list[str | None]:
        raise self

    def verdicts(self, images: Sequence[Tensor], metadata: Sequence[Mapping[str, Any]]) -> Sequence[Verdict]:
        raise self


def earlier(kept: Kept, metric: str, graders: Graders) -> Graders:
    """The one grader whose values are kept, without itself; nobody where there were several. Asking it raises
    `Nobody`."""
    names = kept.graders.get(metric, set())
    name = next(iter(names)) if len(names) == 1 else ""
    nobody = Nobody()
    return replace(
        graders,
        clip=nobody,
        clip_name=name,
        judge=nobody,
        judge_name=name,
        detector=nobody,
        detector_name=name,
    )


Found = dict[Key, float | None]


def key_of(metric: str, grader: str, *inputs: object) -> str:
    """Names a value by everything that it depends on."""
    text = json.dumps([metric, grader, *map(str, inputs)], ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# CLIP -----------------------------------------------------------------------------------------------------------------


def _clip_t(items: Sequence[Item], folder: Path, graders: Graders, kept: Kept) -> Found:
    texts = {item.key: scored_text(item) for item in items}
    keys = {item.key: key_of("clip_t", graders.clip_name, item.digest, texts[item.key]) for item in items}
    for part in in_parts([item for item in items if keys[item.key] not in kept.values]):
        assert graders.clip is not None
        cosines = graders.clip.clip_t(drawn_images(part, folder), [texts[item.key] for item in part])
        rows = [(keys[item.key], item, cosine) for item, cosine in zip(part, cosines, strict=True)]
        kept.add("clip_t", graders.clip_name, rows)
    return {item.key: kept.values[keys[item.key]] for item in items}


def _clip_i(items: Sequence[Item], folder: Path, graders: Graders, kept: Kept) -> Found:
    photos = {item.key: item.prompt.references[: graders.clip_references or None] for item in items}
    keys = {
        item.key: key_of("clip_i", graders.clip_name, item.digest, *(photo.name for photo in photos[item.key]))
        for item in items
    }
    for part in in_parts([item for item in items if keys[item.key] not in kept.values]):
        assert graders.clip is not None
        shown = [[folder / str(photo) for photo in photos[item.key]] for item in part]
        cosines = graders.clip.clip_i(drawn_images(part, folder), shown)
        found = zip(part, cosines, strict=True)
        rows = [(keys[item.key], item, cosine) for item, cosine in found if cosine is not None]
        kept.add("clip_i", graders.clip_name, rows)
    return {item.key: kept.values.get(keys[item.key]) for item in items}


def drawn_images(items: Sequence[Item], folder: Path) -> list[Tensor]:
    """n of [3, H, W] in [0, 1]: the items' images."""
    pictures = [open_picture(folder / str(item.drawn)) for item in items]
    return [to_tensor(picture, picture.width) for picture in pictures]


def scored_text(item: Item) -> str:
    """What the image should show, in words that CLIP knows: `<concept>` as the kind of thing it is, where known."""
    prompt = item.prompt
    text, kind = prompt.target or prompt.words, prompt.extra.get("concept_class")
    return text.replace(f"<{prompt.concept}>", kind) if prompt.concept and isinstance(kind, str) else text


# The judge ------------------------------------------------------------------------------------------------------------

ANSWER_QUESTION = (
    "Grade an answer against the reference. Question: {question}\nReference: {reference}\nAnswer: {answer}\n"
    "Judge the content alone, not the wording. Reply with one number: 1 if the answer says what the reference says, "
    "0.5 if it says part of it, 0 if it does not."
)
REWRITE_QUESTION = (
    "Two requests for a drawing. Reference: {reference}\nRewritten: {answer}\n"
    "Reply with one number: 1 if both ask for the same picture, 0.5 if they share part of what is asked for, 0 if they "
    "ask for different things."
)
CLAUSE_QUESTION = (
    "Does the image show this: {clause}? Reply with one number: 1 if it does, 0 if it does not or if it cannot be told."
)
_BETWEEN = re.compile(r"[,;.!?:]+(?=\s|$)|[，、；。！？：]+")
_NUMBER = re.compile(r"(?<![\w.-])(?:0(?:\.\d+)?|1(?:\.0+)?|\.\d+)(?![\w]|\.\d)")


def verdict_of(reply: str | None, allowed: Sequence[float]) -> float | None:
    """The only allowed number that a reply names (repetitions allowed); None otherwise."""
    named = {float(found) for found in _NUMBER.findall(reply or "")}
    return named.pop() if len(named) == 1 and named <= set(allowed) else None


def one_of(*allowed: float) -> Reading:
    """Reads the only one of these numbers that a reply names."""
    return lambda reply, _: verdict_of(reply, allowed)


def clauses_of(text: str) -> list[str]:
    """The parts of a text between commas and full stops, without repetitions."""
    return list(dict.fromkeys(part.strip() for part in _BETWEEN.split(text) if part.strip()))


def _judge(items: Sequence[Item], folder: Path, graders: Graders, kept: Kept) -> Found:
    asked = []
    for item in items:
        wording = REWRITE_QUESTION if item.prompt.task in IMAGE_OF else ANSWER_QUESTION
        reference = item.prompt.target if item.prompt.task in IMAGE_OF else item.prompt.answer
        asked.append((item, wording.format(question=item.prompt.text, reference=reference, answer=item.text)))
    verdicts = ask_judge("judge", asked, one_of(0.0, 0.5, 1.0), None, graders, kept)
    return {item.key: value for (item, _), value in zip(asked, verdicts, strict=True)}


def _clauses(items: Sequence[Item], folder: Path, graders: Graders, kept: Kept) -> Found:
    asked = [
        (item, CLAUSE_QUESTION.format(clause=clause)) for item in items for clause in clauses_of(scored_text(item))
    ]
    verdicts = ask_judge("clauses", asked, one_of(0.0, 1.0), folder, graders, kept)
    by_item: dict[Key, list[float | None]] = {item.key: [] for item in items}
    for (item, _), value in zip(asked, verdicts, strict=True):
        by_item[item.key].append(value)
    return {key: mean_of_all(values) for key, values in by_item.items()}


def mean_of_all(values: Sequence[float | None]) -> float | None:
    """Mean; None when one is missing, since a share of an unknown number of clauses would not compare."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def ask_judge(
    metric: str,
    asked: Sequence[tuple[Item, str]],
    read: Reading,
    images: Path | None,
    graders: Graders,
    kept: Kept,
) -> list[float | None]:
    """A value per question, about the items' images when their folder is given; what is kept is not asked.

    Args:
        metric: that the values are kept under.
        asked: items and questions; the same question about the same image is asked once.
        read: a reply, and the item that it is about, to the value; None where the reply has none.
        images: the folder of the items; None: the judge sees no image.
        graders, kept: who is asked, and what was answered before.
    """
    keys = [key_of(metric, graders.judge_name, question, item.digest if images else "") for item, question in asked]
    new = {key: entry for key, entry in zip(keys, asked, strict=True) if key not in kept.values}
    for part in in_parts(list(new.items())):
        assert graders.judge is not None
        shown = [None] * len(part) if images is None else drawn_images([item for _, (item, _) in part], images)
        replies = graders.judge.ask_many([question for _, (_, question) in part], shown)
        values = [read(reply, item) for reply, (_, (item, _)) in zip(replies, part, strict=True)]
        found = zip(part, values, strict=True)
        kept.add(metric, graders.judge_name, [(key, item, v) for (key, (item, _)), v in found if v is not None])
    return [kept.values.get(key) for key in keys]


def in_parts(entries: Sequence[Entry]) -> Iterator[Sequence[Entry]]:
    for start in range(0, len(entries), AT_ONCE):
        yield entries[start : start + AT_ONCE]


_GRADED: Mapping[str, Callable[[Sequence[Item], Path, Graders, Kept], Found]] = {
    "clip_t": _clip_t,
    "clip_i": _clip_i,
    "judge": _judge,
    "clauses": _clauses,
}
