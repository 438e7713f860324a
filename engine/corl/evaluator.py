"""What is measured of held-out drawings and answers, with the run's own rewards and readers of attributes.

`mcq` and `oe` are scored by the paper's binary accuracy, and by how often the form is right; drawings by the attributes
that they show, where the data says which are right, and by every image reward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor

from ..evaluate.drawing import by_task
from ..evaluate.held_out import Evaluator, Parts, Read, Scores, TaskScores, grouped
from ..evaluate.measures import attribute_metrics
from ..evaluate.tasks import tagged_scores
from ..learn.from_settings import held_out_sampling
from ..records import Prompt, Rollout
from ..rewards.ensemble import RewardSet
from ..rewards.hooks import state_of
from ..rewards.judge.attribute_judge import AttributeScorer
from ..rewards.reward import RewardFunction
from ..rewards.scoring import score
from ..show.measured import Measured
from .config import CorlConfig

MAX_ROLLOUTS = 256
"""Sequences that are drawn at once."""


def evaluator_of(
    config: CorlConfig,
    benchmark: Mapping[str, Sequence[Prompt]],
    rewards: RewardSet | None = None,
    readers: Mapping[str, AttributeScorer] | None = None,
    read: Read | None = None,
) -> Evaluator:
    """Scores any policy on the same held-out prompts.

    Args:
        config: sampling settings and the number of items of each task.
        benchmark: task -> prompts: t2i, mcq, oe.
        rewards: the run's; those of images are reported for drawings.
        readers: readers of attributes by name, for data that says what a picture must show.
        read: what says which attributes an example shows, for the same data.
    """
    columns = [] if rewards is None else list(zip(rewards.functions.items(), rewards.kinds, strict=True))
    judges = dict(column for column, kind in columns if kind == "image")
    return Evaluator(
        batches=by_task(benchmark, config.eval_samples, MAX_ROLLOUTS),
        sampling=held_out_sampling(config),
        score=partial(scores_of, readers=readers or {}, rewards=partial(_rewards, judges=judges, config=config)),
        asked=lambda prompt: "text" in prompt.segments,
        summarise=summary,
        read=read,
    )


def scores_of(
    greedy: Sequence[Rollout],
    sampled: Sequence[Rollout],
    *,
    readers: Mapping[str, AttributeScorer],
    rewards: Callable[[Sequence[Rollout]], dict[str, Measured]],
) -> dict[str, TaskScores]:
    """Of each task: `score` and `format` of answers, `all_right/<reader>`, `attributes/<reader>` and `reward/<judge>`
    of drawings."""
    answered = grouped(greedy, lambda rollout: rollout.prompt.task)
    tasks: dict[str, TaskScores] = {}
    for task, group in grouped(sampled, lambda rollout: rollout.prompt.task).items():
        if task in answered:
            measures = _answers(group, "sampled") | _answers(answered[task], "greedy")
        else:
            measures = _attributes(group, readers) | rewards(group)
        tasks[task] = TaskScores(num_items=len(group), measures=measures)
    return tasks


def summary(scores: Scores) -> Parts:
    """Understanding over mcq and oe; drawings that are right as a whole, their attributes, and each reward."""
    parts: Parts = {}
    for task, metrics in scores.items():
        for name in metrics:
            head, _, how = name.partition("/")
            if head in ("score", "format"):
                parts.setdefault(f"{'understanding' if head == 'score' else head}/{how}", []).append(f"{task}/{name}")
            elif head in ("attributes", "reward"):
                parts.setdefault(f"image/{how}", []).append(f"{task}/{name}")
            elif head == "all_right":
                parts.setdefault(f"image/{name}", []).append(f"{task}/{name}")
    return parts


def _ids(rollouts: Sequence[Rollout]) -> list[str]:
    return [rollout.prompt.id for rollout in rollouts]


def _answers(rollouts: Sequence[Rollout], how: str) -> dict[str, Measured]:
    found = tagged_scores([rollout.prompt for rollout in rollouts], [rollout.text for rollout in rollouts])
    return {f"{name}/{how}": found[name] for name in ("score", "format") if name in found}


def _attributes(rollouts: Sequence[Rollout], readers: Mapping[str, AttributeScorer]) -> dict[str, Measured]:
    drawn = [rollout for rollout in rollouts if rollout.image is not None]
    pictures: list[Tensor] = [rollout.image for rollout in drawn if rollout.image is not None]
    wanted = [rollout.prompt.attributes or {} for rollout in drawn]
    return attribute_metrics(_ids(drawn), readers, pictures, wanted) if all(wanted) else {}


def _rewards(
    rollouts: Sequence[Rollout], judges: Mapping[str, RewardFunction], config: CorlConfig
) -> dict[str, Measured]:
    """By the judges as they are at the run's end: one that changes as training goes on would compare nothing."""
    if not judges:
        return {}
    table = score(rollouts, judges, timeout=config.reward_timeout, state=state_of(config, config.max_steps))
    columns = zip(table.names, table.values.double().unbind(1), strict=True)
    found = {f"reward/{name}": Measured.of(_ids(rollouts), column.tolist()) for name, column in columns}
    return {name: one for name, one in found.items() if one.by_item}
