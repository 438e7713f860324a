"""The tasks of UnifyBench++: what is produced, and which metric is a task's main score.

| task | produces | main score |
|---|---|---|
| rec | yes or no | weighted recall |
| vqa, qa, choice, general_vqa | an answer | exact accuracy where answers are short, else character BLEU |
| rea, dense_rea | a description, then its image | words in place where the world is known, else character BLEU |
| rea_gen, dense_rea_gen | that image, scored | attributes right (first scorer), else identity |
| pure_gen, dense_gen, general_image | an image | the same |
| mcq, oe (CoRL: prompts with a `qa_type`) | <think> … <answer> … | the answer in the tags is right |
| t2i (CoRL) | an image | attributes right, where they are known |

The published benchmark also asks a language model to grade answers and CLIP to grade images: see graders.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..records import Prompt, SegmentKind
from ..rewards.builtin.accuracy import AccuracyReward
from ..rewards.builtin.format import format_reward
from ..rewards.builtin.text import char_bleu, normalise
from ..show.measured import Measured
from .measures import accuracy, weighted_recall, words_in_place

IMAGE_OF = {"rea": "rea_gen", "dense_rea": "dense_rea_gen", "reckon": "reckon_write"}
"""Chained tasks: the name that their images are scored under."""
SHORT_ANSWER = 3
"""Words up to which an answer is expected to come back exactly."""

PUBLISHED: Mapping[str, tuple[str, ...]] = {
    "rec": ("recall",),
    "vqa": ("bleu", "judge"),
    "qa": ("bleu", "judge"),
    "rea": ("bleu",),
    "dense_rea": ("bleu", "judge"),
    "pure_gen": ("clip_t", "clip_i"),
    "rea_gen": ("clip_t", "clip_i"),
    "dense_gen": ("clauses", "clip_i"),
    "dense_rea_gen": ("clauses", "clip_i"),
    "mcq": ("accuracy", "format"),
    "oe": ("accuracy", "format"),
    "t2i": ("clip_t",),
}
"""The metrics that papers report of a task: UnifyBench++ (`evaluation/tasks.py`), then CoRL."""
IMAGE_METRICS = frozenset({"clip_t", "clip_i", "clauses"})
"""Those of them that say something about the image; the others are about the text."""
OF_IMAGES = ("clip_t", "clip_i")
"""Metrics of other tasks that draw."""
OF_TEXTS = ("accuracy", "bleu")
"""Metrics of other tasks that answer."""


def needs_text(prompt: Prompt) -> bool:
    """Whether this item is scored by its text."""
    return "text" in prompt.segments and prompt.answer is not None


def needs_image(prompt: Prompt) -> bool:
    """Whether this item is scored by its image."""
    return "image" in prompt.segments


def image_task(prompt: Prompt) -> str:
    """The task that this item's image counts for."""
    return IMAGE_OF.get(prompt.task, prompt.task)


def chance_of(prompts: Sequence[Prompt]) -> float | None:
    """The share of answers that guessing gets right: one of the options that are shown, yes or no; None where some
    answers are open."""
    shares = [_chance(prompt) for prompt in prompts]
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known and len(known) == len(shares) else None


def _chance(prompt: Prompt) -> float | None:
    if prompt.options and (prompt.qa_type == "MC" or all(option in prompt.text for option in prompt.options)):
        return 1.0 / len(prompt.options)
    return 0.5 if normalise(prompt.answer or "") in ("yes", "no") else None


def text_scores(task: str, prompts: Sequence[Prompt], texts: Sequence[str]) -> dict[str, Measured]:
    """Metrics of one task's texts: `accuracy`, `bleu`, what the task adds, and `score`, the main one.

    Args:
        task: of all the prompts.
        prompts: n items with a ground truth, n >= 1.
        texts: what the policy said, n.
    """
    if all(prompt.qa_type is not None for prompt in prompts):
        return tagged_scores(prompts, texts)
    ids, answers = [prompt.id for prompt in prompts], [prompt.answer or "" for prompt in prompts]
    pairs = list(zip(answers, texts, strict=True))
    metrics = {
        "accuracy": Measured.of(ids, [accuracy(*pair) for pair in pairs], chance=chance_of(prompts)),
        "bleu": Measured.of(ids, [char_bleu(*pair) for pair in pairs]),
    }
    if task == "rec":
        metrics["recall"] = weighted_recall(ids, answers, texts)
        main = "recall"
    elif task in IMAGE_OF:
        metrics["words"] = Measured.of(ids, [words_in_place(*pair) for pair in pairs])
        main = "words" if all(prompt.attributes for prompt in prompts) else "bleu"
    else:
        main = "accuracy" if all(len(answer.split()) <= SHORT_ANSWER for answer in answers) else "bleu"
    return {**metrics, "score": metrics[main]}


def tagged_scores(prompts: Sequence[Prompt], texts: Sequence[str]) -> dict[str, Measured]:
    """CoRL's questions: `accuracy`, 1 for right answers, read from the tags, `format`, 1 for texts in the asked form,
    and `score`, the main one. Without any question (a `qa_type` or an answer) only `format` is there.

    Args:
        prompts: n items, n >= 1.
        texts: what the policy said, n.

    Raises:
        RewardError: a question without a ground truth.
    """
    names = ("answer", "options", "qa_type", "right_answers", "id")
    columns = {name: [getattr(prompt, name) for prompt in prompts] for name in names}
    asked: list[tuple[SegmentKind, ...]] = [("text",)] * len(prompts)
    right = AccuracyReward()(completions=list(texts), segments=asked, **columns)
    formed = format_reward(completions=list(texts), segments=asked)
    accurate = Measured.of(columns["id"], right, chance=chance_of(prompts))
    found = {"accuracy": accurate, "format": Measured.of(columns["id"], formed), "score": accurate}
    return {name: measured for name, measured in found.items() if measured.by_item}
