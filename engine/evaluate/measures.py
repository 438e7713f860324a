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
from ..show.measured import Measured


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


def weighted_recall(ids: Sequence[str], answers: Sequence[str], texts: Sequence[str]) -> Measured:
    """(yes-recall + no-recall) / 2, so that always saying yes scores .5; the recall of one kind where only it is
    asked."""
    kinds = [verdict(answer) for answer in answers]
    said = [float(verdict(text) == kind) for kind, text in zip(kinds, texts, strict=True)]
    return Measured.of(ids, said, kinds, chance=0.5)


def attribute_metrics(
    ids: Sequence[str],
    scorers: Mapping[str, AttributeScorer],
    images: Sequence[Tensor],
    wanted: Sequence[Mapping[str, str]],
) -> dict[str, Measured]:
    """`attributes/<scorer>`: share of a drawing's named attributes that are right; `all_right/<scorer>`: 1 where all
    are; `<attribute>/<scorer>`: 1 where that one is.

    Args:
        ids: n items that the images are of; an item may have several.
        scorers: by name, e.g. `checker` and an independent `cnn`.
        images: n of [3, H, W] in [0, 1].
        wanted: n mappings, none of them empty.
    """
    metrics: dict[str, Measured] = {}
    if not images:
        return metrics
    names = sorted({name for attributes in wanted for name in attributes})
    for scorer_name, scorer in scorers.items():
        hits_nA = _hits(scorer_name, scorer, images, wanted)
        whole_n = (hits_nA.nan_to_num(nan=1.0) == 1.0).all(1).double()
        metrics[f"attributes/{scorer_name}"] = Measured.of(ids, hits_nA.nanmean(1).tolist())
        metrics[f"all_right/{scorer_name}"] = Measured.of(ids, whole_n.tolist())
        for name in names:  # asked for one at a time, since the order of a scorer's columns is its own
            only = [{name: attributes[name]} if name in attributes else {} for attributes in wanted]
            metrics[f"{name}/{scorer_name}"] = Measured.of(
                ids, _hits(scorer_name, scorer, images, only).nanmean(1).tolist()
            )
    return metrics


def _hits(name: str, scorer: AttributeScorer, images: Sequence[Tensor], wanted: Sequence[Mapping[str, str]]) -> Tensor:
    hits_nA = scorer(torch.stack(list(images)), wanted).double().cpu()
    if hits_nA.ndim != 2 or hits_nA.shape[0] != len(images):
        raise ValueError(f"evaluate: scorer {name!r} must give [{len(images)}, attributes], got {tuple(hits_nA.shape)}")
    return hits_nA
