"""A UnifyBench++ folder -> `Prompt`s, for training and for evaluation.

Reasoning (Sync-R1's mode r) turns an implicit prompt into an explicit description and draws it; understanding (mode u)
answers a question and then draws the concept; both are one trajectory.  Drawing prompts are drawn at once.
Training sees `concept/train` alone, evaluation `concept/test` alone; anchors are general prompts without a reward, held
in place by their KL term.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import DataError, shown
from ..records import Prompt, SegmentKind
from .unifybench import (
    PAIRS,
    ConceptFolder,
    Question,
    concepts,
    image_attributes,
    photos,
    questions,
    read_json,
    recognition_test,
    recognition_training,
)

__all__ = ["DataError", "load_anchors", "load_benchmark", "load_training_prompts"]

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
                    extra=_class_of(concept),
                )
            )
    return prompts


def _class_of(concept: ConceptFolder) -> dict[str, str]:
    """What kind of thing the concept is (`dog` for <bobo>), for judges that know no concepts."""
    kind = concept.info.get("class")
    return {"concept_class": kind} if isinstance(kind, str) and kind.strip() else {}


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
    return by_task(prompts)


def by_task(prompts: Iterable[Prompt]) -> dict[str, list[Prompt]]:
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
                    extra=_class_of(concept),
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
    entries = read_json(path) if path.is_file() else []
    if not isinstance(entries, list):
        raise DataError(f"{path}: expected a list of captions, got {type(entries).__name__}")
    for index, entry in enumerate(entries):
        caption = entry.get("caption") if isinstance(entry, Mapping) else None
        if not isinstance(caption, str) or not caption.strip():
            raise DataError(f"{path}, entry {index}: column 'caption' must be text, got {shown(caption)}")
        prompts.append(
            Prompt(
                id=f"{split}/general_image/{index}",
                task="general_image",
                text=caption,
                segments=IMAGE_ONLY,
                target=caption,
                attributes=attributes.get(str(entry.get("image"))),
            )
        )
    return prompts
