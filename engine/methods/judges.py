"""Judges that more than one method uses: a language model behind a URL, and readers of the embedded worlds."""

from __future__ import annotations

from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..policies.base import Policy
from ..rewards.judge.attribute_judge import AttributeScorer, index_scorer
from ..rewards.judge.llm_judge import LLMJudge
from ..settings.train_config import TrainConfig
from ..world.worlds import Grades, World


def remote_judge(config: TrainConfig) -> LLMJudge | None:
    """The judge behind `judge_url`, which answers well before the step's rewards time out; None without one."""
    if config.judge_url is None or config.judge_model is None:
        return None
    return LLMJudge(
        config.judge_url,
        config.judge_model,
        api_key_env=config.judge_key_env,
        timeout=config.reward_timeout / 2,
        budget=0.9 * config.reward_timeout,
    )


PART = 60
"""Pictures of a world's table that go through the tokenizer at once."""
_graders: WeakKeyDictionary[Policy, dict[str, Grades]] = WeakKeyDictionary()
"""Rewards and scores of a run ask for the same one, which takes seconds to make."""


def grader_of(policy: Policy, world: World) -> Grades:
    """The world's reader of drawings, as this policy's image tokenizer, which does not change, draws the world."""
    known = _graders.setdefault(policy, {})
    if world.title not in known:
        known[world.title] = world.grader(partial(_round_trip, policy))
    return known[world.title]


def _round_trip(policy: Policy, images: Tensor) -> Tensor:
    """[n, 3, H, W] in [0, 1] -> the same, as the policy's image tokenizer gives them back; in parts, since all at once
    a CPU spends two fifths of the time on getting memory."""
    return torch.cat([policy.draw(policy.image_tokens(part)) for part in images.split(PART)])


def world_reader(world: World, images: Tensor) -> list[dict[str, str]]:
    """What pictures of the world [n, 3, 32, 32] show, attribute -> value, by the network that no training sees."""
    rows = world.judge().read_indices(images.float().cpu()).tolist()
    return [{name: values[i] for (name, values), i in zip(world.values.items(), row, strict=True)} for row in rows]


def world_readers(world: World, grader: Grades) -> dict[str, AttributeScorer]:
    """What a picture of the world shows: by `grader`, which also gives rewards, and by a network that no training
    sees."""
    return {
        "checker": index_scorer(grader.read_indices, world.values),
        "cnn": index_scorer(world.judge().read_indices, world.values),
    }
