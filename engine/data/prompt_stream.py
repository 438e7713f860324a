"""The stream that a training run draws its prompts from: shuffled, mixed by task, split over ranks, resumable."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..records import Prompt
from .prompts import by_task
from .unifybench import PAIRS


class PromptStream:
    """Prompts step by step, endlessly: shuffled anew each epoch, mixed by task, split over ranks.

    Every rank holds the same stream and takes its part of each step, so a state saved on one world size resumes on
    another. A step never holds a prompt twice: a prompt is a group, and the sampler's random numbers are keyed by its
    id.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        anchors: Sequence[Prompt] = (),
        seed: int = 0,
        prompts_per_step: int = 16,
        anchor_fraction: float = 0.0,
        rank: int = 0,
        world_size: int = 1,
        *,
        task_weights: Mapping[str, float] | None = None,
    ) -> None:
        """
        Args:
            prompts: what is trained on.
            anchors: unrewarded prompts; without any, all of a step is `prompts`.
            seed: of the shuffling.
            prompts_per_step: prompts of a step over all ranks, anchors included; a multiple of `world_size`.
            anchor_fraction: share of anchors among them, rounded to whole prompts.
            rank, world_size: this process's place.
            task_weights: share of each task, scaled to sum to 1; tasks left out get none. None: `MODE_SHARES`,
                shared equally among the tasks of each mode.

        Raises:
            ValueError: numbers that do not fit together, or a weight for a task that has no prompts.
        """
        num_anchors = round(prompts_per_step * anchor_fraction) if anchors else 0
        if not 0 <= rank < world_size or prompts_per_step % world_size:
            raise ValueError(
                f"PromptStream: prompts_per_step must be a multiple of the {world_size} ranks, got {prompts_per_step} "
                f"(rank {rank}); take {max(1, round(prompts_per_step / world_size)) * world_size}"
            )
        if not prompts or not 0 < prompts_per_step - num_anchors <= len(prompts) or num_anchors > len(anchors):
            raise ValueError(
                f"PromptStream: a step of {prompts_per_step - num_anchors} prompts and {num_anchors} anchors "
                f"cannot come from {len(prompts)} prompts and {len(anchors)} anchors; lower prompts_per_step"
            )
        ids = [prompt.id for prompt in (*prompts, *anchors)]
        if len(set(ids)) != len(ids):
            raise ValueError(f"PromptStream: {len(ids) - len(set(ids))} ids are not unique; number the prompts")
        self.num_prompts, self.num_anchors = prompts_per_step - num_anchors, num_anchors
        self.rank, self.world_size = rank, world_size
        self._prompts = _Mix(by_task(prompts), _shares(by_task(prompts), task_weights), seed)
        if self._prompts.num_items < self.num_prompts:
            raise ValueError(f"PromptStream: {sorted(self._prompts.shares)} have fewer than {self.num_prompts} prompts")
        tasks = by_task(anchors)
        self._anchors = _Mix(tasks, _shares(tasks, {task: ANCHOR_SHARES.get(task, 1.0) for task in tasks}), seed)
        self._fingerprint = _fingerprint([*prompts, *anchors])

    def next_step(self) -> list[Prompt]:
        """This rank's prompts of the next step: prompts_per_step / world_size of them."""
        taken: set[str] = set()
        step = self._prompts.draw(self.num_prompts, taken) + self._anchors.draw(self.num_anchors, taken)
        if self.world_size > 1:  # all wait for the rank with the most drawings: each kind is dealt out evenly
            step.sort(key=_kind)
        return step[self.rank :: self.world_size]

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on; plain numbers and text, so it can go into JSON."""
        return {
            "prompts": self._prompts.state_dict(),
            "anchors": self._anchors.state_dict(),
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken; ValueError when the prompts are not the same."""
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                "PromptStream: the saved state is of other prompts; resume with the data that the run began with"
            )
        self._prompts.load_state_dict(state["prompts"])
        self._anchors.load_state_dict(state["anchors"])


class _Mix:
    """Piles by task, drawn from in proportion to their shares."""

    def __init__(self, tasks: Mapping[str, Sequence[Prompt]], shares: Mapping[str, float], seed: int) -> None:
        self.shares = shares
        self._piles = {task: _Pile(tasks[task], seed, task) for task in shares}
        self._credit = dict.fromkeys(shares, 0.0)

    @property
    def num_items(self) -> int:
        return sum(len(pile.items) for pile in self._piles.values())

    def draw(self, count: int, taken: set[str]) -> list[Prompt]:
        """The next `count` prompts that are not in `taken`, which they join."""
        for task, share in self.shares.items():
            self._credit[task] += share * count
        return [self._next(taken) for _ in range(count)]

    def _next(self, taken: set[str]) -> Prompt:
        """From the task furthest behind its share; a task whose prompts are all in this step already is passed over."""
        for task in sorted(self._credit, key=lambda name: (-self._credit[name], name)):
            prompt = self._piles[task].draw(taken)
            if prompt is not None:
                self._credit[task] -= 1.0
                return prompt
        raise AssertionError("PromptStream: a step larger than its prompts passed __init__")

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": {task: pile.drawn for task, pile in self._piles.items()}, "credit": dict(self._credit)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for task, pile in self._piles.items():
            pile.drawn = int(state["drawn"][task])
        self._credit = {task: float(state["credit"][task]) for task in self._piles}


@dataclass(slots=True)
class _Pile:
    """The prompts of one task in an endless order; `drawn` is the whole state."""

    items: Sequence[Prompt]
    seed: int
    name: str
    drawn: int = 0
    _epoch: int = -1
    _order: Sequence[int] = ()

    def draw(self, taken: set[str]) -> Prompt | None:
        """The next prompt that is not in `taken`, which it joins; None when all are. Passed-over ones wait an epoch."""
        if all(prompt.id in taken for prompt in self.items):
            return None
        while True:
            prompt = self._at(self.drawn)
            self.drawn += 1
            if prompt.id not in taken:
                taken.add(prompt.id)
                return prompt

    def _at(self, position: int) -> Prompt:
        epoch, index = divmod(position, len(self.items))
        if epoch != self._epoch:
            key = int.from_bytes(hashlib.blake2b(f"{self.seed}/{self.name}/{epoch}".encode(), digest_size=8).digest())
            self._epoch, self._order = epoch, np.random.default_rng(key).permutation(len(self.items)).tolist()
        return self.items[self._order[index]]


MODE_SHARES = {"reasoning": 0.4, "drawing": 0.2, "understanding": 0.4}
"""Share of a step's rewarded prompts: Sync-R1's modes r and u alike, and direct drawing, which neither exercises."""
ANCHOR_SHARES = {"general_image": 3.0, "general_vqa": 1.0}
"""Relative shares of anchors: a drawing's many tokens drift more than an answer's one or two."""
DRAWING_TASKS = ("pure_gen", "dense_gen")


def _kind(prompt: Prompt) -> int:
    """What draws lies together in this order, and so does what writes; either is then even over ranks, to one."""
    return ("text" in prompt.segments) + ("image" not in prompt.segments)


def _mode(task: str) -> str:
    return "reasoning" if task in PAIRS else "drawing" if task in DRAWING_TASKS else "understanding"


def _shares(tasks: Mapping[str, Sequence[Prompt]], weights: Mapping[str, float] | None) -> dict[str, float]:
    """Share of each task, in name order; sums to 1."""
    if not tasks:
        return {}
    if weights is None:
        modes = {mode: [task for task in sorted(tasks) if _mode(task) == mode] for mode in MODE_SHARES}
        weights = {task: MODE_SHARES[mode] / len(mine) for mode, mine in modes.items() for task in mine}
    unknown = sorted(set(weights) - set(tasks))
    total = sum(weights.values())
    if unknown or total <= 0 or min(weights.values()) < 0:
        raise ValueError(
            f"PromptStream: task_weights must be at least 0 and of the tasks {sorted(tasks)}, got {dict(weights)}"
        )
    return {task: weights[task] / total for task in sorted(weights) if weights[task] > 0}


def _fingerprint(prompts: Iterable[Prompt]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for prompt in prompts:
        digest.update(f"{prompt.id}\0{prompt.text}\0{prompt.answer}\0".encode())
    return digest.hexdigest()
