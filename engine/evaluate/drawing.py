"""How held-out items are chosen and drawn: which ones, in which batches, greedily or by sampling.

Texts are drawn twice, greedily and at temperature 1: RL sharpens what a model samples, and greedy answers alone hide
it. Images are drawn by sampling only (greedy image tokens are not how anyone draws).

Batches are fixed, since a batch's shape may change the last bit of a logit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..records import Prompt, Rollout
from ..rollout.sampler import RolloutEngine
from ..rollout.sampling import Sampling

Draw = Callable[[Sequence[Prompt], float], Sequence[Rollout]]
"""Prompts and a temperature (0: greedy) to the same number of rollouts of each, in their order."""


def choose(prompts: Sequence[Prompt], num_items: int, seed: int) -> list[Prompt]:
    """At most `num_items` of `prompts`, in their order; a fixed choice for a seed."""
    if len(prompts) <= num_items:
        return list(prompts)
    chosen = np.random.default_rng(seed).permutation(len(prompts))[:num_items]
    return [prompts[index] for index in sorted(chosen.tolist())]


def together(benchmark: Mapping[str, Sequence[Prompt]], num_items: int, seed: int = 0) -> list[list[Prompt]]:
    """One batch of at most `num_items` items of every task; the seed is the choice's."""
    return [[prompt for task in sorted(benchmark) for prompt in choose(benchmark[task], num_items, seed)]]


def by_task(
    benchmark: Mapping[str, Sequence[Prompt]], num_items: int, batch_size: int, seed: int = 0
) -> list[list[Prompt]]:
    """Batches of one task, of at most `batch_size`; otherwise as `together`."""
    chosen = [choose(prompts, num_items, seed) for prompts in benchmark.values()]
    return [items[i : i + batch_size] for items in chosen for i in range(0, len(items), batch_size)]


def drawer(engine: RolloutEngine, sampling: Sampling) -> Draw:
    """Draws from the engine's policy, but for the temperature as `sampling` says."""

    def draw(prompts: Sequence[Prompt], temperature: float) -> list[Rollout]:
        return engine.generate(prompts, replace(sampling, temperature=temperature))

    return draw


def texts_alone(prompts: Sequence[Prompt]) -> list[Prompt]:
    """What a greedy run is asked: an image comes after the text and cannot change it."""
    return [replace(prompt, segments=("text",)) for prompt in prompts]
