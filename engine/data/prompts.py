"""A UnifyBench++ folder -> `Prompt`s, for training and for evaluation.

Reasoning (Sync-R1's mode r) turns an implicit prompt into an explicit description and draws it; understanding (mode u)
answers a question and then draws the concept; both are one trajectory.  Drawing prompts are drawn at once.
With `concept_info` the policy is told what info.json has (concept_info.py): facts in mode r's questions, which then ask
for the one that is meant, and looks in the drawing turn of both modes.
Training sees `concept/train` alone, evaluation `concept/test` alone; anchors are general prompts without a reward, held
in place by their KL term.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..records import Prompt, SegmentKind
from .concept_info import question
from .faults import STRICT, Faults
from .unifybench import Asked, Concept, Request, Requests, Split, read_concepts, read_general

CHAIN: tuple[SegmentKind, ...] = ("text", "image")
TEXT_ONLY: tuple[SegmentKind, ...] = ("text",)
IMAGE_ONLY: tuple[SegmentKind, ...] = ("image",)


def load_training_prompts(
    root: Path, *, chain_understanding: bool = True, concept_info: bool = False, faults: Faults = STRICT
) -> list[Prompt]:
    """All training prompts of a folder, in a fixed order.

    Args:
        root: folder in the UnifyBench++ layout.
        chain_understanding: an answer is followed by an image of the concept (Sync-R1); False leaves it at the answer.
        concept_info: the policy is told what info.json has of a concept.
        faults: where what cannot be used is told of.

    Raises:
        DataError: a required file is missing, or an entry cannot be used; names the file, the entry and the remedy.
    """
    prompts = []
    for concept in read_concepts(root, "train", identities=chain_understanding, faults=faults):
        drawn: dict[str, Any] = {}
        if chain_understanding:
            drawn = {"segments": CHAIN, "target": f"a photo of <{concept.name}>", "attributes": concept.identity}
            drawn |= {"references": concept.photos, "request": f"A photo of <{concept.name}>."}
            drawn["info"] = concept.told.info if concept_info else ""
        where = f"train/{concept.name}"
        prompts += _chains(concept, where, concept_info)
        prompts += _answers(concept.questions, where, concept=concept.name, **drawn)
        prompts += _drawings(concept.drawings, where, IMAGE_ONLY, **_about(concept))
    return prompts


def load_benchmark(root: Path, faults: Faults = STRICT, *, concept_info: bool = False) -> dict[str, list[Prompt]]:
    """Held-out prompts by task: rec, vqa, qa, choice, rea, dense_rea, pure_gen, dense_gen, general_vqa, general_image.

    `rea` and `dense_rea` draw in the same trajectory: their images are what UnifyBench++ calls rea_gen and
    dense_rea_gen. Tasks that a folder has nothing for are absent.

    Raises:
        DataError: as for `load_training_prompts`; also when no task is left.
    """
    tasks = benchmark_prompts(root, faults, concept_info=concept_info)
    if not tasks:
        raise DataError(
            f"{root / 'concept' / 'test'}: nothing to evaluate on; add vqa.json, text_only.json or t2i_conditions.json"
        )
    return tasks


def benchmark_prompts(root: Path, faults: Faults = STRICT, *, concept_info: bool = False) -> dict[str, list[Prompt]]:
    """As `load_benchmark`; {} for a folder that holds nothing out."""
    prompts = _general(root, "test", faults)
    for concept in read_concepts(root, "test", faults=faults):
        where = f"test/{concept.name}"
        prompts += _answers(concept.questions, where, concept=concept.name)
        prompts += _chains(concept, where, concept_info)
        prompts += _drawings(concept.drawings, where, IMAGE_ONLY, **_about(concept))
    return by_task(prompts)


def load_anchors(root: Path, faults: Faults = STRICT) -> list[Prompt]:
    """General training prompts, unrewarded; none when the folder has no `general/train`."""
    return [replace(prompt, rewarded=False) for prompt in _general(root, "train", faults)]


def by_task(prompts: Iterable[Prompt]) -> dict[str, list[Prompt]]:
    tasks: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        tasks.setdefault(prompt.task, []).append(prompt)
    return tasks


def _general(root: Path, split: Split, faults: Faults) -> list[Prompt]:
    questions, requests = read_general(root, split, faults)
    return _answers(questions, split) + _drawings(requests, split, IMAGE_ONLY)


def _answers(questions: Sequence[Asked], where: str, **more: Any) -> list[Prompt]:
    return [
        Prompt(
            id=f"{where}/{task}/{index}",
            task=task,
            text=asked.text,
            images=() if asked.image is None else (asked.image,),
            answer=asked.answer,
            options=asked.options,
            **{"segments": TEXT_ONLY, **more},
        )
        for index, (task, asked) in enumerate(questions)
    ]


def _chains(concept: Concept, where: str, concept_info: bool) -> list[Prompt]:
    """The requests that are reasoned about and then drawn; held-out ones are asked for in full."""
    prompts = _drawings(concept.reasoning, where, CHAIN, **_about(concept))
    if not concept_info:
        return prompts
    asked = [request for some in concept.reasoning.values() for request in some]
    return [_told(concept, prompt, request.meant) for prompt, request in zip(prompts, asked, strict=True)]


def _told(concept: Concept, prompt: Prompt, meant: str) -> Prompt:
    told = concept.told
    text = question(told, concept.name, prompt.text, recall=bool(meant))
    prompt = replace(prompt, text=text, request=prompt.text, info=told.info)
    return replace(prompt, answer=meant, options=told.facts) if meant else prompt


def _drawings(requests: Requests, where: str, segments: tuple[SegmentKind, ...], **more: Any) -> list[Prompt]:
    """Drawings, made at once or after a description of them.

    Where it is known what the image must show, the description is those values in their order (`round red crown …`),
    which can be scored word by word; else it is the explicit prompt.
    """

    def described(asked: Request) -> str | None:
        if segments == IMAGE_ONLY:
            return None
        return " ".join(asked.attributes.values()) if asked.attributes else asked.target

    return [
        Prompt(
            id=f"{where}/{task}/{index}",
            task=task,
            text=asked.text,
            segments=segments,
            answer=described(asked),
            target=asked.target,
            attributes=asked.attributes,
            **more,
        )
        for task, some in requests.items()
        for index, asked in enumerate(some)
    ]


def _about(concept: Concept) -> dict[str, Any]:
    """For rewards; judges that know no concepts are told what kind of thing it is."""
    extra = {} if concept.kind is None else {"concept_class": concept.kind}
    return {"concept": concept.name, "references": concept.photos, "extra": extra}
