"""The order of Sync-R1's prompts: reshuffled each epoch and mixed by task, anchors among them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..records import Prompt
from .prompts import by_task
from .row_digests import RowDigests
from .samples import Sample
from .stream import permutation
from .unifybench import PAIRS

MODE_SHARES = {"reasoning": 0.4, "drawing": 0.2, "understanding": 0.4}
"""Share of a step's rewarded prompts: Sync-R1's modes r and u alike, and direct drawing, which neither exercises."""
ANCHOR_SHARES = {"general_image": 3.0, "general_vqa": 1.0}
"""Relative shares of anchors: a drawing's many tokens drift more than an answer's one or two."""
DRAWING_TASKS = ("pure_gen", "dense_gen", "write")


class Mixture:
    """Every task has its share of the steps, and is reshuffled once all of it has been used."""

    kinds_dealt_out = True

    def __init__(
        self,
        prompts: Sequence[Prompt],
        anchors: Sequence[Prompt] = (),
        *,
        seed: int,
        prompts_per_step: int,
        anchor_fraction: float = 0.0,
    ) -> None:
        """
        Args:
            prompts: what is trained on; the shares are `MODE_SHARES`, shared equally among the tasks of each mode.
            anchors: unrewarded prompts; without any, all of a step is `prompts`.
            seed: of the shuffling.
            prompts_per_step: prompts of a step over all ranks, anchors included.
            anchor_fraction: share of anchors among them, rounded to whole prompts.

        Raises:
            ConfigError: there are fewer prompts or anchors than a step takes.
        """
        self.num_anchors = round(prompts_per_step * anchor_fraction) if anchors else 0
        self.num_prompts = prompts_per_step - self.num_anchors
        if not 0 < self.num_prompts <= len(prompts) or self.num_anchors > len(anchors):
            raise ConfigError(_too_many(self.num_prompts, self.num_anchors, len(prompts), len(anchors)))
        self.prompts_per_step = prompts_per_step
        self.samples: Sequence[Sample] = tuple((prompt,) for prompt in (*prompts, *anchors))
        self.fingerprint = _fingerprint([*prompts, *anchors])
        self.rows = RowDigests(self.samples, [(p.id, p.task, p.rewarded) for (p,) in self.samples])
        tasks = sorted(by_task(prompts))
        modes = {mode: [task for task in tasks if _mode(task) == mode] for mode in MODE_SHARES}
        self._prompts = _Mix(
            prompts, {task: MODE_SHARES[mode] / len(mine) for mode, mine in modes.items() for task in mine}, seed
        )
        self._anchors = _Mix(anchors, {task: ANCHOR_SHARES.get(task, 1.0) for task in by_task(anchors)}, seed)
        self._taken: set[str] = set()

    def next_step(self) -> list[Sample]:
        self._taken = set()
        step = self._prompts.draw(self.num_prompts, self._taken) + self._anchors.draw(self.num_anchors, self._taken)
        return [(prompt,) for prompt in step]

    def more(self, count: int) -> list[Sample]:
        """By the tasks' shares, whatever the tasks of those that they replace."""
        left = sum(prompt.id not in self._taken for (prompt,) in self.samples if prompt.rewarded)
        return [(prompt,) for prompt in self._prompts.draw(min(count, left), self._taken)]

    def used(self) -> set[int]:
        drawn = self._prompts.used() | self._anchors.used()
        return {index for index, (prompt,) in enumerate(self.samples) if prompt.id in drawn}

    def state_dict(self) -> dict[str, Any]:
        return {"prompts": self._prompts.state_dict(), "anchors": self._anchors.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._prompts.load_state_dict(state["prompts"])
        self._anchors.load_state_dict(state["anchors"])


def _too_many(prompts: int, anchors: int, prompts_there: int, anchors_there: int) -> str:
    """A step takes different ones."""
    step, there = f"{prompts}", f"{prompts_there} prompts"
    if anchors or anchors_there:
        step, there = f"{prompts} prompts and {anchors} anchors", f"{there} and {anchors_there} anchors"
    return f"prompts_per_step: expected a step of at least 1 and at most {there}, got {step}; lower prompts_per_step"


class _Mix:
    """Piles by task, drawn from in proportion to their weights."""

    def __init__(self, prompts: Sequence[Prompt], weights: Mapping[str, float], seed: int) -> None:
        tasks, total = by_task(prompts), sum(weights.values())
        self._shares = {task: weights[task] / total for task in sorted(weights)}
        self._piles = {task: _Pile(tasks[task], f"{seed}/{task}") for task in self._shares}
        self._credit = dict.fromkeys(self._shares, 0.0)

    def draw(self, count: int, taken: set[str]) -> list[Prompt]:
        """The next `count` prompts that are not in `taken`, which they join."""
        for task, share in self._shares.items():
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

    def used(self) -> set[str]:
        """Ids of what has been drawn, or passed over, so far."""
        return {prompt.id for pile in self._piles.values() for prompt in pile.used()}

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
    key: str
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

    def used(self) -> list[Prompt]:
        """What has come so far, each once."""
        return [self._at(position) for position in range(min(self.drawn, len(self.items)))]

    def _at(self, position: int) -> Prompt:
        epoch, index = divmod(position, len(self.items))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(f"{self.key}/{epoch}", len(self.items))
        return self.items[self._order[index]]


def _mode(task: str) -> str:
    return "reasoning" if task in PAIRS or task == "reckon" else "drawing" if task in DRAWING_TASKS else "understanding"


def _fingerprint(prompts: Iterable[Prompt]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for prompt in prompts:
        digest.update(f"{prompt.id}\0{prompt.text}\0{prompt.answer}\0".encode())
        digest.update(prompt.info.encode())  # nothing, where nothing is told
    return digest.hexdigest()
