"""What gathers one step ahead, in this process: the same worker behind the same messages, asked at once."""

from __future__ import annotations

import json
import os
from typing import Any, cast

from syncr1.engine.learn.ahead import Ahead
from syncr1.engine.learn.ahead_worker import Gathering, Side
from syncr1.engine.learn.trajectories import ResumablePrompts
from syncr1.engine.policies.base import Policy
from syncr1.engine.policies.shared_weights import SharedWeights
from syncr1.engine.processes.beside import Message
from syncr1.engine.rollout.preview_gate import PreviewGate


class Twin:
    """In the place of a `Beside`."""

    what = "the twin"

    def __init__(self, side: Side, weights: SharedWeights) -> None:
        theirs = SharedWeights(side.policy, os.dup(weights.memory.descriptor))
        self._gathering = Gathering(side, theirs)
        self._answers = [Message({"layout": theirs.layout})]

    def send(self, message: Message) -> None:
        self._answers.append(_through_json(self._gathering(_through_json(message))))

    def receive(self) -> Message:
        return self._answers.pop(0)


def _through_json(message: Message) -> Message:
    return Message(json.loads(json.dumps(message.about)), {n: t.clone() for n, t in message.tensors.items()})


def twin_of(side: Side, policy: Policy, prompts: ResumablePrompts, preview: PreviewGate | None) -> Ahead:
    """A trainer's seam to it.

    Args:
        side: parts of its own, the policy as `policy` began.
        policy: whose weights are handed over.
        prompts, preview: the trainer's.
    """
    weights = SharedWeights(policy)
    return Ahead(cast(Any, Twin(side, weights)), weights, prompts, preview)
