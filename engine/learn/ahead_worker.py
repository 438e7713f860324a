"""The process that gathers one step ahead (ahead.py): a method's own module calls `work` there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..checkpoints.random_states import load_random_state, random_state
from ..policies.base import Policy
from ..policies.shared_weights import SharedWeights
from ..processes.beside import Answers, Message, serve
from ..processes.heaps import bound_heaps
from ..rewards.ensemble import RewardSet
from ..rewards.preview_scorer import build_preview
from ..settings.train_config import TrainConfig
from ..stopwatch import Stopwatch
from .ahead import RANDOM
from .carried import carried
from .credit import CreditRule, credit_of
from .from_settings import sampler_of
from .trajectories import Gatherer, ResumablePrompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What a method gathers with, made from its settings as the run itself makes it."""

    config: TrainConfig
    policy: Policy
    """The starting model on this process's device, with its adapters."""
    prompts: ResumablePrompts
    rewards: RewardSet
    credit: CreditRule | None = None


def work(make: Callable[[Mapping[str, Any]], Side]) -> None:
    """The process's whole life.

    Args:
        make: from what the run's `AheadOf` tells.
    """
    serve(partial(_begin, make))


def _begin(make: Callable[[Mapping[str, Any]], Side], first: Message) -> tuple[Message, Answers]:
    bound_heaps()
    torch.manual_seed(first.about["seed"])
    side = make(first.about["told"])
    torch.set_num_threads(first.about["threads"])
    side.policy.eval()
    weights = SharedWeights(side.policy, first.about["descriptor"])
    return Message({"layout": weights.layout}), Gathering(side, weights)


class Gathering:
    """Answers with a step's trajectories and rewards."""

    def __init__(self, side: Side, weights: SharedWeights) -> None:
        self.side, self.weights = side, weights
        self.preview = build_preview(side.config, side.rewards)
        self.time = Stopwatch()
        self.gatherer = Gatherer(
            side.config,
            sampler_of(side.config, side.policy),
            side.prompts,
            side.rewards,
            side.credit or credit_of(side.config, side.rewards),
            self.preview,
            stage=lambda stage: self.time(stage),
            sampling=nullcontext,
        )

    def __call__(self, asked: Message) -> Message:
        about, step = asked.about, asked.about["step"]
        self.weights.read(self.side.policy)
        self.side.prompts.load_state_dict(about["prompts"])
        if self.preview is not None:
            self.preview.load_state_dict(about["preview"])
        if asked.tensors:
            load_random_state({name.removeprefix(RANDOM): tensor for name, tensor in asked.tensors.items()})
        self.time = Stopwatch()
        gathered = self.gatherer.gather(step)
        seconds = {f"ahead/{stage}_seconds": value for stage, value in self.time.seconds.items()}
        told = carried(replace(gathered, staleness=step - about["trained"], seconds=seconds))
        gate = None if self.preview is None else self.preview.state_dict()
        generators = {f"{RANDOM}{name}": value for name, value in random_state().items()}
        return Message({**told.about, "gate": gate}, {**told.tensors, **generators})
