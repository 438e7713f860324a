"""The evaluator: held-out items are drawn from a policy, scored and averaged, the same for every method.

A method says which items, how they are drawn (drawing.py) and what is measured of them: `score_rollouts`, or its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from torch import Tensor

from ..policies.base import Policy
from ..records import Prompt, Rollout
from ..rewards.judge.attribute_judge import AttributeScorer
from ..rewards.reward import columns_for
from ..rollout.sampler import RolloutEngine, Sampling
from .drawing import Draw, drawer, texts_alone
from .measures import attribute_metrics, mean
from .tasks import GENERAL, image_task, needs_image, needs_text, text_scores

Identity = Callable[..., Sequence[float | None]]
"""`IdentityReward`, or anything with its keyword signature."""

Scores = dict[str, dict[str, float]]
"""task -> metric -> value."""


class Made(Protocol):
    """What is scored of a trajectory: a `Rollout`, or an item that lies in a folder."""

    @property
    def prompt(self) -> Prompt: ...
    @property
    def text(self) -> str: ...
    @property
    def image(self) -> Tensor | None: ...


One = TypeVar("One", bound=Made)
Read = Callable[[Tensor], Sequence[Mapping[str, str]]]
"""Images [n, 3, H, W] in [0, 1] to what each shows, attribute -> value."""
Score = Callable[[Sequence[Rollout], Sequence[Rollout]], Scores]
"""Greedy and sampled trajectories to what is measured of them."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Scores of one model, and some of what it said and drew."""

    scores: Scores
    """By task; `score/greedy` and `score/sampled` are the main ones, in [0, 1]; `num_items` is how many were asked."""
    examples: dict[str, list[Rollout]]
    """By prompt task: some of the sampled rollouts (texts and images)."""
    readings: Mapping[str, Sequence[Mapping[str, str]]] = field(default_factory=dict)
    """By prompt task: what each example's image shows, attribute -> value; {} where nothing reads it."""
    summarise: Callable[[Scores], dict[str, float]] = summary

    @property
    def summary(self) -> dict[str, float]:
        """Means over tasks, see `summary`."""
        return self.summarise(self.scores)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluator:
    """Scores any policy on the same held-out items; the same policy gives the same scores."""

    batches: Sequence[Sequence[Prompt]]
    """Items that are drawn together."""
    sampling: Sampling
    """How, but for the temperature, which is 1, and 0 for greedy texts."""
    score: Score
    """What is measured."""
    asked: Callable[[Prompt], bool] = needs_text
    """Whether an item's text is also drawn greedily."""
    summarise: Callable[[Scores], dict[str, float]] = summary
    num_examples: int = 4
    """Rollouts that are kept of a task."""
    read: Read | None = None
    """What says which attributes an example's image shows, independent of any reward; None: nothing does."""

    def __call__(self, policy: Policy) -> Evaluation:
        """Draws from `policy`, whose weights are whole, and scores."""
        return self.of(drawer(RolloutEngine(policy, cuda_graphs=False), self.sampling))

    def of(self, draw: Draw) -> Evaluation:
        """Scores what `draw` draws.

        Raises:
            ValueError: it gave another number of rollouts, or other prompts, than it was asked for.
        """
        greedy: list[Rollout] = []
        sampled: list[Rollout] = []
        for batch in self.batches:
            greedy += _drawn(draw, texts_alone([prompt for prompt in batch if self.asked(prompt)]), 0.0)
            sampled += _drawn(draw, batch, 1.0)
        groups, most = grouped(sampled, lambda rollout: rollout.prompt.task), self.num_examples
        # Spread over the group, which is in the order of concepts.
        examples = {task: group[:: max(1, len(group) // most)][:most] for task, group in groups.items()}
        return Evaluation(
            scores=self.score(greedy, sampled),
            examples=examples,
            readings={task: self._readings(group) for task, group in examples.items()},
            summarise=self.summarise,
        )

    def _readings(self, rollouts: Sequence[Rollout]) -> list[Mapping[str, str]]:
        """What each image shows of the attributes that its prompt names."""
        read = self.read
        if read is None:
            return [{} for _ in rollouts]
        return [{} if one.image is None or not one.prompt.attributes else read(one.image[None])[0] for one in rollouts]


def _drawn(draw: Draw, prompts: Sequence[Prompt], temperature: float) -> list[Rollout]:
    if not prompts:
        return []
    rollouts = list(draw(prompts, temperature))
    if [rollout.prompt.id for rollout in rollouts] != [prompt.id for prompt in prompts]:
        raise ValueError(
            f"evaluate: generate must give one rollout per prompt, in their order; "
            f"got {len(rollouts)} for {len(prompts)}, or in another order"
        )
    return rollouts


def grouped(rollouts: Sequence[One], key: Callable[[One], str]) -> dict[str, list[One]]:
    """The rollouts by their key, in their order."""
    groups: dict[str, list[One]] = {}
    for rollout in rollouts:
        groups.setdefault(key(rollout), []).append(rollout)
    return groups


def score_rollouts(
    greedy: Sequence[Made],
    sampled: Sequence[Made],
    *,
    image_scorers: Mapping[str, AttributeScorer] | None = None,
    identity: Identity | None = None,
) -> Scores:
    """Every metric that needs no other model, by task.

    Args:
        greedy: trajectories whose text was drawn greedily, for the metrics `…/greedy`; their images do not count.
        sampled: trajectories for the texts' metrics `…/sampled` and for the images' metrics.
        image_scorers: readers of attributes by name, most trusted first, e.g. `{"checker": …, "cnn": …}`.
        identity: similarity to the concept's held-out photos.
    """
    scores: Scores = {}
    for task, group in grouped([*sampled, *greedy], lambda rollout: rollout.prompt.task).items():
        scores.setdefault(task, {})["num_items"] = float(len({rollout.prompt.id for rollout in group}))
    _add_texts(scores, greedy, "greedy")
    _add_texts(scores, [rollout for rollout in sampled if needs_text(rollout.prompt)], "sampled")
    drawn = [rollout for rollout in sampled if needs_image(rollout.prompt)]
    for task, group in grouped(drawn, lambda rollout: image_task(rollout.prompt)).items():
        count = float(len({rollout.prompt.id for rollout in group}))
        scores.setdefault(task, {"num_items": count}).update(_image_scores(group, image_scorers or {}, identity))
    return scores


def _add_texts(scores: Scores, rollouts: Sequence[Made], how: str) -> None:
    for task, group in grouped(rollouts, lambda rollout: rollout.prompt.task).items():
        found = text_scores(task, [rollout.prompt for rollout in group], [rollout.text for rollout in group])
        scores[task].update({f"{name}/{how}": value for name, value in found.items()})


def _image_scores(
    rollouts: Sequence[Made], scorers: Mapping[str, AttributeScorer], identity: Identity | None
) -> dict[str, float]:
    """Metrics of one task's images; the main score is the first scorer's attributes, else identity."""
    readable = [rollout for rollout in rollouts if rollout.image is not None and rollout.prompt.attributes]
    found = attribute_metrics(
        scorers,
        [rollout.image for rollout in readable if rollout.image is not None],
        [rollout.prompt.attributes or {} for rollout in readable],
    )
    if identity is not None:
        prompts, texts, images = zip(*((one.prompt, one.text, one.image) for one in rollouts), strict=True)
        likeness = mean(identity(**columns_for(prompts, texts, images)))
        if likeness is not None:
            found["identity"] = likeness
    main = next(
        (found[f"attributes/{name}"] for name in scorers if f"attributes/{name}" in found), found.get("identity")
    )
    return found if main is None else {**found, "score/sampled": main}
