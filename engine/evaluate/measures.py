"""What one answer or one drawing is worth. Each function says what it measures.

Source of BLEU and weighted recall: UnifyBench++ (`evaluation/scorers/text_scorer.py`), with one change: yes and no are
looked for as words, because "unknown" is not "no".

Dims: n images, A attributes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..rewards.builtin.text import normalise
from ..rewards.judge.attribute_judge import AttributeScorer


def accuracy(answer: str, text: str) -> float:
    """1 when equal up to case, width, outer punctuation and white space."""
    return float(normalise(answer) == normalise(text))


def words_in_place(answer: str, text: str) -> float:
    """Share of words that are right where they stand, of the longer of both texts."""
    right, said = normalise(answer).split(), normalise(text).split()
    longer = max(len(right), len(said))
    return sum(a == b for a, b in zip(right, said, strict=False)) / longer if longer else 1.0


def verdict(text: str) -> str | None:
    """`yes` or `no`, whichever comes first as a word; None when neither does."""
    return next(
        (word.strip(".,!?;:") for word in normalise(text).split() if word.strip(".,!?;:") in ("yes", "no")), None
    )


def weighted_recall(answers: Sequence[str], texts: Sequence[str]) -> float:
    """(yes-recall + no-recall) / 2, so that always saying yes scores .5; the recall of one kind where only it is
    asked."""
    recalls = []
    for kind in ("yes", "no"):
        said = [verdict(text) for answer, text in zip(answers, texts, strict=True) if verdict(answer) == kind]
        if said:
            recalls.append(sum(word == kind for word in said) / len(said))
    return sum(recalls) / len(recalls) if recalls else float("nan")


def attribute_metrics(
    scorers: Mapping[str, AttributeScorer], images: Sequence[Tensor], wanted: Sequence[Mapping[str, str]]
) -> dict[str, float]:
    """`attributes/<scorer>`: mean share of named attributes that are right; `all_right/<scorer>`: share of images where
    all are; `<attribute>/<scorer>`: share right of each.

    Args:
        scorers: by name, e.g. `checker` and an independent `cnn`.
        images: n of [3, H, W] in [0, 1].
        wanted: n mappings, none of them empty.
    """
    metrics: dict[str, float] = {}
    if not images:
        return metrics
    names = sorted({name for attributes in wanted for name in attributes})
    for scorer_name, scorer in scorers.items():
        hits_nA = _hits(scorer_name, scorer, images, wanted)
        metrics[f"attributes/{scorer_name}"] = float(hits_nA.nanmean(1).mean())
        metrics[f"all_right/{scorer_name}"] = float((hits_nA.nan_to_num(nan=1.0) == 1.0).all(1).float().mean())
        for name in names:  # asked for one at a time, since the order of a scorer's columns is its own
            only = [{name: attributes[name]} if name in attributes else {} for attributes in wanted]
            metrics[f"{name}/{scorer_name}"] = float(_hits(scorer_name, scorer, images, only).nanmean())
    return metrics


def _hits(name: str, scorer: AttributeScorer, images: Sequence[Tensor], wanted: Sequence[Mapping[str, str]]) -> Tensor:
    hits_nA = scorer(torch.stack(list(images)), wanted).float().cpu()
    if hits_nA.ndim != 2 or hits_nA.shape[0] != len(images):
        raise ValueError(f"evaluate: scorer {name!r} must give [{len(images)}, attributes], got {tuple(hits_nA.shape)}")
    return hits_nA


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of what is there; None when nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
