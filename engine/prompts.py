"""Records for one step: a UnifyBench++ folder -> `Prompt`s, and the stream that a training run draws them from.

Reasoning (Sync-R1's mode r) turns an implicit prompt into an explicit description and draws it; understanding (mode u)
answers a question and then draws the concept; both are one trajectory.  Drawing prompts are drawn at once.  Training sees `concept/train` alone,
evaluation `concept/test` alone; anchors are general prompts without a reward, held in place by the KL term.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from syncr1.engine.evaluate.unifybench import (
    PAIRS,
    ConceptFolder,
    DataError,
    Question,
    concepts,
    image_attributes,
    photos,
    questions,
    read_json,
    recognition_test,
    recognition_training,
)
from syncr1.engine.records import Prompt, SegmentKind

__all__ = ["DataError", "PromptStream", "load_anchors", "load_benchmark", "load_training_prompts"]

CHAIN: tuple[SegmentKind, ...] = ("text", "image")
TEXT_ONLY: tuple[SegmentKind, ...] = ("text",)
IMAGE_ONLY: tuple[SegmentKind, ...] = ("image",)

TRAINING_FILES = {"vqa": "conversations.json", "qa": "text_only.json"}
"""Question files of a training folder; a question without a picture is `qa` wherever it stands."""
TEST_KINDS = {"rec": "rec", "vqa": "vqa", "text_only": "qa"}
"""`type` in generated test files -> task; any other type is `choice`."""


# Training -------------------------------------------------------------------------------------------------------------


def load_training_prompts(root: Path, *, chain_understanding: bool = True) -> list[Prompt]:
    """All training prompts of a folder, in a fixed order.

    Args:
        root: folder in the UnifyBench++ layout.
        chain_understanding: an answer is followed by an image of the concept (Sync-R1); False leaves it at the answer.

    Raises:
        DataError: a required file is missing, or an entry cannot be used; names the file, the entry and the remedy.
    """
    prompts: list[Prompt] = []
    for concept in concepts(root):
        references = photos(root, concept.train)
        if not references:
            raise DataError(f"{concept.train}: has no pictures; add the concept's photos as 0.png, 1.png, …")
        found = [
            *_reasoning(concept, references, held_out=False),
            *_understanding(concept, references, chain_understanding),
            *_drawings(concept, references, held_out=False),
        ]
        if not found:
            raise DataError(f"{concept.train}: nothing to train on; add conversations.json or t2i_conditions.json")
        prompts += found
    return prompts


def _reasoning(concept: ConceptFolder, references: tuple[Path, ...], *, held_out: bool) -> list[Prompt]:
    """Implicit prompt -> explicit description -> image, for the lists that this side of the split has.

    Where it is known what the image must show, the description is those values in their order (`round red crown …`),
    which can be scored word by word; else it is the explicit prompt.
    """
    conditions, folder = concept.conditions(held_out=held_out)
    split = "test" if held_out else "train"
    prompts = []
    for task, (implicit, explicit) in PAIRS.items():
        texts = conditions.get(implicit, [])
        wanted = concept.wanted(folder, explicit, len(texts))
        for index, (text, attributes) in enumerate(zip(texts, wanted, strict=True)):
            target = conditions[explicit][index]
            prompts.append(
                Prompt(
                    id=f"{split}/{concept.name}/{task}/{index}",
                    task=task,
                    text=text,
                    segments=CHAIN,
                    answer=" ".join(attributes.values()) if attributes else target,
                    concept=concept.name,
                    target=target,
                    references=references,
                    attributes=attributes,
                )
            )
    return prompts


def _understanding(concept: ConceptFolder, references: tuple[Path, ...], chain: bool) -> list[Prompt]:
    """Question -> answer -> an image of the concept."""
    found = [(task, q) for task, name in TRAINING_FILES.items() for q in questions(concept.root, concept.train / name)]
    found = [("qa" if q.image is None else task, q) for task, q in found]
    found += [("rec", q) for q in recognition_training(concept)]
    prompts = [
        _asked(concept, q, task, f"train/{concept.name}/{task}/{index}") for index, (task, q) in enumerate(found)
    ]
    if not chain:
        return prompts
    identity, target = concept.identity(), f"a photo of {concept.token}"
    return [
        replace(prompt, segments=CHAIN, target=target, references=references, attributes=identity) for prompt in prompts
    ]


def _asked(concept: ConceptFolder, question: Question, task: str, name: str) -> Prompt:
    return Prompt(
        id=name,
        task=task,
        text=question.text,
        image=question.image,
        segments=TEXT_ONLY,
        answer=question.answer,
        options=question.options,
        concept=concept.name,
    )


# Evaluation -----------------------------------------------------------------------------------------------------------


def load_benchmark(root: Path) -> dict[str, list[Prompt]]:
    """Held-out prompts by task: rec, vqa, qa, choice, rea, dense_rea, pure_gen, dense_gen, general_vqa, general_image.

    `rea` and `dense_rea` draw in the same trajectory: their images are what UnifyBench++ calls rea_gen and
    dense_rea_gen. Tasks that a folder has nothing for are absent.

    Raises:
        DataError: as for `load_training_prompts`; also when no task is left.
    """
    prompts = _general(root, "test")
    for concept in concepts(root):
        references = photos(root, concept.test)
        prompts += _held_out_questions(concept)
        prompts += _reasoning(concept, references, held_out=True)
        prompts += _drawings(concept, references, held_out=True)
    if not prompts:
        raise DataError(
            f"{root / 'concept' / 'test'}: nothing to evaluate on; add vqa.json, text_only.json or t2i_conditions.json"
        )
    return _by_task(prompts)


def _by_task(prompts: Iterable[Prompt]) -> dict[str, list[Prompt]]:
    tasks: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        tasks.setdefault(prompt.task, []).append(prompt)
    return tasks


def _held_out_questions(concept: ConceptFolder) -> list[Prompt]:
    root, folder = concept.root, concept.test
    found = [("vqa" if q.image else "qa", q) for q in questions(root, folder / "vqa.json")]
    found += [("qa", q) for q in questions(root, folder / "text_only.json")]
    found += [("rec", q) for q in questions(root, folder / "rec.json")]
    generated = questions(root, root / "test_data" / f"{concept.name}.json", base=root)
    have = {task for task, _ in found}
    found += [(task, q) for q in generated if (task := TEST_KINDS.get(q.kind, "choice")) not in have]
    if all(task != "rec" for task, _ in found):
        found += [("rec", q) for q in recognition_test(concept)]
    return [_asked(concept, q, task, f"test/{concept.name}/{task}/{index}") for index, (task, q) in enumerate(found)]


def _drawings(concept: ConceptFolder, references: tuple[Path, ...], *, held_out: bool) -> list[Prompt]:
    """Image-only tasks: pure_gen draws a personalised prompt without reasoning about it first, dense_gen a dense one.

    Evaluation takes pure_gen from `prompts_to_eval.json` where the folder has it, as UnifyBench++ does.
    """
    conditions, folder = concept.conditions(held_out=held_out)
    split = "test" if held_out else "train"
    shared = concept.shared_prompts() if held_out else []
    implicit, explicit = PAIRS["rea"]
    dense = "dense_prompt_generation"
    tasks: list[tuple[str, list[str], str | None]] = [
        ("pure_gen", shared or conditions.get(implicit, conditions.get(explicit, [])), None if shared else explicit),
        ("dense_gen", conditions.get(dense, []), dense),
    ]
    prompts = []
    for task, texts, key in tasks:
        wanted = [None] * len(texts) if key is None else concept.wanted(folder, key, len(texts))
        for index, (text, attributes) in enumerate(zip(texts, wanted, strict=True)):
            prompts.append(
                Prompt(
                    id=f"{split}/{concept.name}/{task}/{index}",
                    task=task,
                    text=text,
                    segments=IMAGE_ONLY,
                    concept=concept.name,
                    target=text,
                    references=references,
                    attributes=attributes,
                )
            )
    return prompts


# General prompts ------------------------------------------------------------------------------------------------------


def load_anchors(root: Path) -> list[Prompt]:
    """General training prompts, unrewarded; none when the folder has no `general/train`."""
    return [replace(prompt, rewarded=False) for prompt in _general(root, "train")]


def _general(root: Path, split: str) -> list[Prompt]:
    """Questions about pictures of nobody in particular, and captions to draw: `general/<split>/{vqa,captions}.json`."""
    folder = root / "general" / split
    prompts = [
        Prompt(
            id=f"{split}/general_vqa/{index}",
            task="general_vqa",
            text=question.text,
            image=question.image,
            segments=TEXT_ONLY,
            answer=question.answer,
            options=question.options,
        )
        for index, question in enumerate(questions(root, folder / "vqa.json"))
    ]
    path = folder / "captions.json"
    attributes = image_attributes(folder)
    for index, entry in enumerate(read_json(path) if path.is_file() else ()):
        caption = entry.get("caption") if isinstance(entry, Mapping) else None
        if not isinstance(caption, str) or not caption.strip():
            raise DataError(f"{path}, entry {index}: column 'caption' must be text, got {caption!r}")
        prompts.append(
            Prompt(
                id=f"{split}/general_image/{index}",
                task="general_image",
                text=caption,
                segments=IMAGE_ONLY,
                target=caption,
                attributes=attributes.get(entry.get("image")),
            )
        )
    return prompts


# The stream -----------------------------------------------------------------------------------------------------------


class PromptStream:
    """Prompts step by step, endlessly: shuffled anew each epoch, mixed by task, split over ranks.

    Every rank holds the same stream and takes its part of each step, so a state saved on one world size resumes on
    another. A step never holds a prompt twice: a prompt is a group, and the sampler's random numbers are keyed by its
    id.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        anchors: Sequence[Prompt] = (),
        seed: int = 0,
        prompts_per_step: int = 16,
        anchor_fraction: float = 0.0,
        rank: int = 0,
        world_size: int = 1,
        *,
        task_weights: Mapping[str, float] | None = None,
    ) -> None:
        """
        Args:
            prompts: what is trained on.
            anchors: unrewarded prompts; without any, all of a step is `prompts`.
            seed: of the shuffling.
            prompts_per_step: prompts of a step over all ranks, anchors included; a multiple of `world_size`.
            anchor_fraction: share of anchors among them, rounded to whole prompts.
            rank, world_size: this process's place.
            task_weights: share of each task, scaled to sum to 1; tasks left out get none. None: half to reasoning,
            half to
                understanding (Sync-R1's modes), shared equally among the tasks of each.

        Raises:
            ValueError: numbers that do not fit together, or a weight for a task that has no prompts.
        """
        num_anchors = round(prompts_per_step * anchor_fraction) if anchors else 0
        if not 0 <= rank < world_size or prompts_per_step % world_size:
            raise ValueError(
                f"PromptStream: prompts_per_step must be a multiple of the {world_size} ranks, got {prompts_per_step} "
                f"(rank {rank}); take {max(1, round(prompts_per_step / world_size)) * world_size}"
            )
        if not prompts or not 0 < prompts_per_step - num_anchors <= len(prompts) or num_anchors > len(anchors):
            raise ValueError(
                f"PromptStream: a step of {prompts_per_step - num_anchors} prompts and {num_anchors} anchors "
                f"cannot come from {len(prompts)} prompts and {len(anchors)} anchors; lower prompts_per_step"
            )
        ids = [prompt.id for prompt in (*prompts, *anchors)]
        if len(set(ids)) != len(ids):
            raise ValueError(f"PromptStream: {len(ids) - len(set(ids))} ids are not unique; number the prompts")
        self.num_prompts, self.num_anchors = prompts_per_step - num_anchors, num_anchors
        self.rank, self.world_size = rank, world_size
        tasks = _by_task(prompts)
        self._shares = _shares(tasks, task_weights)
        self._piles = {task: _Pile(tasks[task], seed, task) for task in self._shares}
        if sum(len(pile.items) for pile in self._piles.values()) < self.num_prompts:
            raise ValueError(f"PromptStream: {sorted(self._shares)} have fewer than {self.num_prompts} prompts")
        self._anchor_pile = _Pile(anchors, seed, "anchors")
        self._credit = dict.fromkeys(self._shares, 0.0)
        self._fingerprint = _fingerprint([*prompts, *anchors])

    def next_step(self) -> list[Prompt]:
        """This rank's prompts of the next step: prompts_per_step / world_size of them."""
        taken: set[str] = set()
        for task, share in self._shares.items():
            self._credit[task] += share * self.num_prompts
        step = [self._next_prompt(taken) for _ in range(self.num_prompts)]
        step += [anchor for _ in range(self.num_anchors) if (anchor := self._anchor_pile.draw(taken))]
        return step[self.rank :: self.world_size]

    def _next_prompt(self, taken: set[str]) -> Prompt:
        """From the task furthest behind its share; a task whose prompts are all in this step already is passed over."""
        for task in sorted(self._credit, key=lambda name: (-self._credit[name], name)):
            prompt = self._piles[task].draw(taken)
            if prompt is not None:
                self._credit[task] -= 1.0
                return prompt
        raise AssertionError("PromptStream: a step larger than its prompts passed __init__")

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on; plain numbers and text, so it can go into JSON."""
        return {
            "drawn": {task: pile.drawn for task, pile in self._piles.items()},
            "anchors_drawn": self._anchor_pile.drawn,
            "credit": dict(self._credit),
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken; ValueError when the prompts are not the same."""
        if state["fingerprint"] != self._fingerprint or set(state["drawn"]) != set(self._piles):
            raise ValueError(
                "PromptStream: the saved state is of other prompts; resume with the data that the run began with"
            )
        for task, pile in self._piles.items():
            pile.drawn = int(state["drawn"][task])
        self._anchor_pile.drawn = int(state["anchors_drawn"])
        self._credit = {task: float(credit) for task, credit in state["credit"].items()}


@dataclass(slots=True)
class _Pile:
    """The prompts of one task in an endless order; `drawn` is the whole state."""

    items: Sequence[Prompt]
    seed: int
    name: str
    drawn: int = 0
    _epoch: int = -1
    _order: Sequence[int] = ()

    def draw(self, taken: set[str]) -> Prompt | None:
        """The next prompt that is not in `taken`, which it joins; None when all are. Passed-over ones wait an epoch."""
        if all(prompt.id in taken for prompt in self.items):
            return None
        while True:
            prompt = self._at(self.drawn)
            self.drawn += 1
            if prompt.id not in taken:
                taken.add(prompt.id)
                return prompt

    def _at(self, position: int) -> Prompt:
        epoch, index = divmod(position, len(self.items))
        if epoch != self._epoch:
            key = int.from_bytes(hashlib.blake2b(f"{self.seed}/{self.name}/{epoch}".encode(), digest_size=8).digest())
            self._epoch, self._order = epoch, np.random.default_rng(key).permutation(len(self.items)).tolist()
        return self.items[self._order[index]]


MODE_SHARES = {"reasoning": 0.4, "drawing": 0.2, "understanding": 0.4}
"""Share of a step's rewarded prompts: Sync-R1's modes r and u alike, and direct drawing, which neither exercises."""
DRAWING_TASKS = ("pure_gen", "dense_gen")


def _mode(task: str) -> str:
    return "reasoning" if task in PAIRS else "drawing" if task in DRAWING_TASKS else "understanding"


def _shares(tasks: Mapping[str, Sequence[Prompt]], weights: Mapping[str, float] | None) -> dict[str, float]:
    """Share of each task, in name order; sums to 1."""
    if weights is None:
        modes = {mode: [task for task in sorted(tasks) if _mode(task) == mode] for mode in MODE_SHARES}
        weights = {task: MODE_SHARES[mode] / len(mine) for mode, mine in modes.items() for task in mine}
    unknown = sorted(set(weights) - set(tasks))
    total = sum(weights.values())
    if unknown or total <= 0 or min(weights.values()) < 0:
        raise ValueError(
            f"PromptStream: task_weights must be at least 0 and of the tasks {sorted(tasks)}, got {dict(weights)}"
        )
    return {task: weights[task] / total for task in sorted(weights) if weights[task] > 0}


def _fingerprint(prompts: Iterable[Prompt]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for prompt in prompts:
        digest.update(f"{prompt.id}\0{prompt.text}\0{prompt.answer}\0".encode())
    return digest.hexdigest()
