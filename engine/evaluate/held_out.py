"""The evaluator: held-out items are drawn from a policy, scored and averaged, the same for every method.

A method says which items, how they are drawn (drawing.py) and what is measured of them: `score_rollouts`, or its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor

from ..policies.base import Policy
from ..records import Prompt, Rollout
from ..rewards.judge.attribute_judge import AttributeScorer
from ..rewards.reward import columns_for
from ..rollout.sampler import RolloutEngine
from ..rollout.sampling import Sampling
from ..show.measured import PER_ITEM, Measured
from ..show.names import GENERAL, SUMMARY
from ..show.scores import shown_as
from .drawing import Draw, drawer, texts_alone
from .measures import attribute_metrics
from .tasks import image_task, needs_image, needs_text, text_scores

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
Score = Callable[[Sequence[Rollout], Sequence[Rollout]], "dict[str, TaskScores]"]
"""Greedy and sampled trajectories to what is measured of them."""
Parts = dict[str, list[str]]
"""A number of the summary -> the scores, `task/metric`, that it is the mean of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScores:
    """What was measured of one task, item by item."""

    num_items: int
    """That were asked; a measure may apply to fewer."""
    measures: dict[str, Measured]
    """By metric; `score/greedy` and `score/sampled` are the main ones, in [0, 1]."""


def values_of(tasks: Mapping[str, TaskScores]) -> Scores:
    """task -> metric -> mean over items, and `num_items`."""
    return {
        task: {"num_items": float(of.num_items), **{name: one.value for name, one in of.measures.items()}}
        for task, of in tasks.items()
    }


def summary(scores: Scores) -> Parts:
    """A dozen numbers from a hundred: means of main scores over tasks, every task counting once.

    `understanding/{greedy,sampled}`: tasks scored by their text, recognition among them.  `image/all_right/<scorer>`:
    share of whole drawings right, over tasks scored by their image; `image/<scorer>`: share of attributes right;
    `image/{identity,clip_t,clip_i,clauses}` likewise.  General tasks are kept apart, as `general_vqa/…` and
    `general_image/…`.  What cannot be computed is absent.
    """
    parts: dict[str, list[str]] = {}
    for task, metrics in scores.items():
        is_text = "score/greedy" in metrics or "accuracy/sampled" in metrics
        family = task if task in GENERAL else ("understanding" if is_text else "image")
        for name in metrics:
            head, _, how = name.partition("/")
            if (is_text and head == "score") or head == "attributes":
                parts.setdefault(f"{family}/{how}", []).append(f"{task}/{name}")
            elif head == "all_right" or name in ("identity", "clip_t", "clip_i", "clauses"):
                parts.setdefault(f"{family}/{name}", []).append(f"{task}/{name}")
    return dict(sorted(parts.items()))


def means(scores: Scores, parts: Parts) -> dict[str, float]:
    """The mean of the finite scores that `parts` names; what has none is absent."""
    flat = {f"{task}/{name}": value for task, metrics in scores.items() for name, value in metrics.items()}
    finite = {name: [flat[part] for part in some if math.isfinite(flat[part])] for name, some in parts.items()}
    return {name: math.fsum(values) / len(values) for name, values in finite.items() if values}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Scores of one model, and some of what it said and drew."""

    tasks: dict[str, TaskScores]
    """By task."""
    examples: dict[str, list[Rollout]]
    """By prompt task: some of the sampled rollouts (texts and images)."""
    readings: Mapping[str, Sequence[Mapping[str, str]]] = field(default_factory=dict)
    """By prompt task: what each example's image shows, attribute -> value; {} where nothing reads it."""
    summarise: Callable[[Scores], Parts] = summary

    @property
    def scores(self) -> Scores:
        """Every metric's mean over items; `num_items` is how many were asked."""
        return values_of(self.tasks)

    @property
    def summary(self) -> dict[str, float]:
        """Means over tasks, see `summary`."""
        scores = self.scores
        return means(scores, self.summarise(scores))

    @property
    def table(self) -> dict[str, Any]:
        """Scores and summary under flat names, and what scores.json keeps of single items: `show.scores.Scores`."""
        return table_of(self.tasks, self.summarise)


def table_of(tasks: Mapping[str, TaskScores], summarise: Callable[[Scores], Parts] = summary) -> dict[str, Any]:
    """`Evaluation.table` of what was measured; of single items it keeps what a table shows."""
    scores = values_of(tasks)
    parts = summarise(scores)
    flat: dict[str, Any] = {f"{task}/{name}": v for task, metrics in scores.items() for name, v in metrics.items()}
    flat |= {f"{SUMMARY}/{name}": value for name, value in means(scores, parts).items()}
    measured = {f"{task}/{name}": one for task, of in tasks.items() for name, one in of.measures.items()}
    kept = {name: one.to_json() for name, one in measured.items() if one.by_item and shown_as(name, flat)}
    for name, some in parts.items():
        finite = [part for part in some if part in kept]
        if finite and f"{SUMMARY}/{name}" in flat:
            kept[f"{SUMMARY}/{name}"] = {"mean_of": finite}
    return {**flat, PER_ITEM: kept}


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
    summarise: Callable[[Scores], Parts] = summary
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
            tasks=self.score(greedy, sampled),
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
) -> dict[str, TaskScores]:
    """Every metric that needs no other model, by task.

    Args:
        greedy: trajectories whose text was drawn greedily, for the metrics `…/greedy`; their images do not count.
        sampled: trajectories for the texts' metrics `…/sampled` and for the images' metrics.
        image_scorers: readers of attributes by name, e.g. `{"checker": …, "cnn": …}`.
        identity: similarity to the concept's held-out photos.
    """
    tasks: dict[str, TaskScores] = {}
    for task, group in grouped([*sampled, *greedy], lambda rollout: rollout.prompt.task).items():
        tasks[task] = TaskScores(num_items=_count(group), measures={})
    _add_texts(tasks, greedy, "greedy")
    _add_texts(tasks, [rollout for rollout in sampled if needs_text(rollout.prompt)], "sampled")
    drawn = [rollout for rollout in sampled if needs_image(rollout.prompt)]
    for task, group in grouped(drawn, lambda rollout: image_task(rollout.prompt)).items():
        of = tasks.setdefault(task, TaskScores(num_items=_count(group), measures={}))
        of.measures.update(_image_scores(group, image_scorers or {}, identity))
    return tasks


def _count(rollouts: Sequence[Made]) -> int:
    return len({rollout.prompt.id for rollout in rollouts})


def _add_texts(tasks: Mapping[str, TaskScores], rollouts: Sequence[Made], how: str) -> None:
    for task, group in grouped(rollouts, lambda rollout: rollout.prompt.task).items():
        found = text_scores(task, [rollout.prompt for rollout in group], [rollout.text for rollout in group])
        tasks[task].measures.update({f"{name}/{how}": one for name, one in found.items()})


def _image_scores(
    rollouts: Sequence[Made], scorers: Mapping[str, AttributeScorer], identity: Identity | None
) -> dict[str, Measured]:
    """Metrics of one task's images; the main score is the first scorer's attributes, else identity."""
    readable = [rollout for rollout in rollouts if rollout.image is not None and rollout.prompt.attributes]
    found = attribute_metrics(
        [rollout.prompt.id for rollout in readable],
        scorers,
        [rollout.image for rollout in readable if rollout.image is not None],
        [rollout.prompt.attributes or {} for rollout in readable],
    )
    if identity is not None:
        prompts, texts, images = zip(*((one.prompt, one.text, one.image) for one in rollouts), strict=True)
        likeness = Measured.of([prompt.id for prompt in prompts], identity(**columns_for(prompts, texts, images)))
        if likeness.by_item:
            found["identity"] = likeness
    main = next(
        (found[f"attributes/{name}"] for name in scorers if f"attributes/{name}" in found), found.get("identity")
    )
    return found if main is None else {**found, "score/sampled": main}
