"""Held-out evaluation: the caller generates, this file chooses items, scores and averages.

Texts are drawn twice, greedily and at temperature 1: RL sharpens what a model samples, and greedy answers alone hide
it. Images are drawn at temperature 1 only (greedy image tokens are not how anyone draws).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..records import Prompt, Rollout
from ..rewards.judge.attribute_judge import AttributeScorer
from ..rewards.reward import columns_of
from .measures import attribute_metrics, mean
from .tasks import GENERAL, image_task, needs_image, needs_text, text_scores

Generate = Callable[[Sequence[Prompt], float], Sequence[Rollout]]
"""Prompts and a temperature (0: greedy) to one rollout per prompt, in their order."""
Identity = Callable[..., Sequence[float | None]]
"""`IdentityReward`, or anything with its keyword signature."""

Scores = dict[str, dict[str, float]]
"""task -> metric -> value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Scores of one model, and some of what it said and drew."""

    scores: Scores
    """By task; `score/greedy` and `score/sampled` are the main ones, in [0, 1]; `num_items` is how many were asked."""
    examples: dict[str, list[Rollout]]
    """By prompt task: some of the sampled rollouts (texts and images)."""

    @property
    def summary(self) -> dict[str, float]:
        """Means over tasks, see `summary`."""
        return summary(self.scores)


def evaluate(
    generate: Generate,
    benchmark: Mapping[str, Sequence[Prompt]],
    *,
    image_scorers: Mapping[str, AttributeScorer] | None = None,
    identity: Identity | None = None,
    num_items: int = 96,
    seed: int = 0,
    num_examples: int = 4,
) -> Evaluation:
    """Score a model on held-out items.

    Args:
        generate: draws one rollout per prompt; called once per temperature with all chosen items.
        benchmark: task -> items, from `load_benchmark`.
        image_scorers: readers of attributes by name, most trusted first, e.g. `{"checker": …, "cnn": …}`.
        identity: similarity to the concept's held-out photos.
        num_items: at most this many items per task; the same seed chooses the same ones.
        seed: of that choice.
        num_examples: rollouts kept per task.

    Raises:
        ValueError: `generate` gave another number of rollouts, or other prompts, than it was asked for.
    """
    items = [prompt for task in sorted(benchmark) for prompt in choose(benchmark[task], num_items, seed)]
    asked = [prompt for prompt in items if needs_text(prompt)]
    # A greedy run needs the text alone; the chain's image comes after it and cannot change it.
    greedy = _generate(generate, [replace(prompt, segments=("text",)) for prompt in asked], 0.0)
    sampled = _generate(generate, items, 1.0)
    scores = score_rollouts(greedy, sampled, image_scorers=image_scorers, identity=identity)
    groups = _grouped(sampled, lambda rollout: rollout.prompt.task)
    # Spread over the group, which is in the order of concepts.
    examples = {task: group[:: max(1, len(group) // num_examples)][:num_examples] for task, group in groups.items()}
    return Evaluation(scores=scores, examples=examples)


def score_rollouts(
    greedy: Sequence[Rollout],
    sampled: Sequence[Rollout],
    *,
    image_scorers: Mapping[str, AttributeScorer] | None = None,
    identity: Identity | None = None,
) -> Scores:
    """Every metric that needs no other model, by task.

    Args:
        greedy: trajectories whose text was drawn greedily, for the metrics `…/greedy`; their images do not count.
        sampled: trajectories for the texts' metrics `…/sampled` and for the images' metrics.
        image_scorers: as for `evaluate`.
        identity: as for `evaluate`.
    """
    scores: Scores = {}
    for task, group in _grouped([*sampled, *greedy], lambda rollout: rollout.prompt.task).items():
        scores.setdefault(task, {})["num_items"] = float(len({rollout.prompt.id for rollout in group}))
    _add_texts(scores, greedy, "greedy")
    _add_texts(scores, [rollout for rollout in sampled if needs_text(rollout.prompt)], "sampled")
    drawn = [rollout for rollout in sampled if needs_image(rollout.prompt)]
    for task, group in _grouped(drawn, lambda rollout: image_task(rollout.prompt)).items():
        count = float(len({rollout.prompt.id for rollout in group}))
        scores.setdefault(task, {"num_items": count}).update(_image_scores(group, image_scorers or {}, identity))
    return scores


def choose(prompts: Sequence[Prompt], num_items: int, seed: int) -> list[Prompt]:
    """At most `num_items` of `prompts`, in their order; a fixed choice for a seed."""
    if len(prompts) <= num_items:
        return list(prompts)
    chosen = np.random.default_rng(seed).permutation(len(prompts))[:num_items]
    return [prompts[index] for index in sorted(chosen.tolist())]


def _generate(generate: Generate, prompts: Sequence[Prompt], temperature: float) -> list[Rollout]:
    if not prompts:
        return []
    rollouts = list(generate(prompts, temperature))
    if [rollout.prompt.id for rollout in rollouts] != [prompt.id for prompt in prompts]:
        raise ValueError(
            f"evaluate: generate must give one rollout per prompt, in their order; "
            f"got {len(rollouts)} for {len(prompts)}, or in another order"
        )
    return rollouts


def _grouped(rollouts: Sequence[Rollout], key: Callable[[Rollout], str]) -> dict[str, list[Rollout]]:
    groups: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(key(rollout), []).append(rollout)
    return groups


def _add_texts(scores: Scores, rollouts: Sequence[Rollout], how: str) -> None:
    for task, group in _grouped(rollouts, lambda rollout: rollout.prompt.task).items():
        found = text_scores(task, [rollout.prompt for rollout in group], [rollout.text for rollout in group])
        scores[task].update({f"{name}/{how}": value for name, value in found.items()})


def _image_scores(
    rollouts: Sequence[Rollout], scorers: Mapping[str, AttributeScorer], identity: Identity | None
) -> dict[str, float]:
    """Metrics of one task's images; the main score is the first scorer's attributes, else identity."""
    readable = [rollout for rollout in rollouts if rollout.image is not None and rollout.prompt.attributes]
    found = attribute_metrics(
        scorers,
        [rollout.image for rollout in readable if rollout.image is not None],
        [rollout.prompt.attributes or {} for rollout in readable],
    )
    if identity is not None:
        likeness = mean(identity(**columns_of(rollouts)))
        if likeness is not None:
            found["identity"] = likeness
    main = next(
        (found[f"attributes/{name}"] for name in scorers if f"attributes/{name}" in found), found.get("identity")
    )
    return found if main is None else {**found, "score/sampled": main}


def summary(scores: Scores) -> dict[str, float]:
    """A dozen numbers from a hundred: means of main scores over tasks, every task counting once.

    `understanding/{greedy,sampled}`: tasks scored by their text.  `image/<scorer>`: share of attributes right, over
    tasks scored by their image; `image/{identity,clip_t,clip_i,clauses}` likewise.  General tasks are kept apart, as
    `general_vqa/…` and `general_image/…`.  What cannot be computed is absent.
    """
    kept: dict[str, list[float]] = {}
    for task, metrics in scores.items():
        is_text = "score/greedy" in metrics or "accuracy/sampled" in metrics
        family = task if task in GENERAL else ("understanding" if is_text else "image")
        for name, value in metrics.items():
            head, _, how = name.partition("/")
            if (is_text and head == "score") or head == "attributes":
                kept.setdefault(f"{family}/{how}", []).append(value)
            elif name in ("identity", "clip_t", "clip_i", "clauses"):
                kept.setdefault(f"{family}/{name}", []).append(value)
    finite = {name: [value for value in values if math.isfinite(value)] for name, values in kept.items()}
    return {name: sum(values) / len(values) for name, values in sorted(finite.items()) if values}
