"""Graphed steps without a GPU: replayed, counted, and watched for reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import Gate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from syncr1.engine.policies.base import Policy
from syncr1.engine.records import Prompt, Rollout
from syncr1.engine.rollout import stepping
from syncr1.engine.rollout.decode import TokenStep
from syncr1.engine.rollout.sampler import RolloutEngine
from syncr1.engine.rollout.sampling import Sampling


class Watch(TorchDispatchMode):
    """Remembers every op that would make a GPU wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.num_ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_ops += 1
        name = func._schema.name.split("::")[1]
        if name in READS_BACK[:-1] or (name == "_to_copy" and (kwargs or {}).get("device") is not None):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class ReplayedStep(stepping.GraphedStep):
    """A graph as a CPU can have it: the same step, run where a GPU would replay it, and watched."""

    watch = Watch()

    def __init__(self, step: TokenStep, pool: Any) -> None:
        self.eager, self.state = step, step.state
        self.addresses = self._addresses()

    def _addresses(self) -> list[int]:
        state, samples = self.state, self.eager.samples
        caches = (self.eager.own.keys, self.eager.own.values, self.eager.prompts.keys, self.eager.prompts.values)
        tensors = (
            *(getattr(state.rows, name) for name in ("spans", "position", "hidden")),
            state.slot,
            state.key,
            state.alive,
            state.step,
            samples.token,
            samples.logp,
            samples.length,
            *caches,
        )
        return [tensor.data_ptr() for tensor in tensors]

    def replay(self) -> None:
        with self.watch:
            self.eager()
        assert self._addresses() == self.addresses, "a replay writes where the capture wrote"


class PromptCount(stepping.LateCount):
    """The count of the step before last, as a busy GPU would deliver it."""

    def __init__(self, device: torch.device) -> None:
        self._asked: list[int] = []

    def ask(self, alive: Tensor) -> None:
        self._asked.append(int(alive.sum()))

    def latest(self) -> int | None:
        return self._asked[-1] if self._asked else None


def same_draws(a: list[Rollout], b: list[Rollout]) -> None:
    for one, other in zip(a, b, strict=True):
        assert (one.uid, one.attempts, one.dropped, one.text) == (other.uid, other.attempts, other.dropped, other.text)
        for mine, theirs in zip(one.segments, other.segments, strict=True):
            assert mine.tokens.tolist() == theirs.tokens.tolist() and mine.truncated == theirs.truncated
            torch.testing.assert_close(mine.logp, theirs.logp, rtol=0, atol=1e-5)


def static_engines(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Callable[[], RolloutEngine]:
    """Makes engines that run as they would on a GPU, step for step, without one."""
    monkeypatch.setattr(stepping, "GraphedStep", ReplayedStep)
    monkeypatch.setattr(stepping, "LateCount", PromptCount)
    monkeypatch.setattr(stepping, "POLL_STEPS", 2)
    monkeypatch.setenv("SYNCR1_CHECKS", "never")  # as on a GPU, where checks of values would make it wait
    monkeypatch.setenv("SYNCR1_BACKEND", "native")
    ReplayedStep.watch = Watch()

    def make() -> RolloutEngine:
        engine = RolloutEngine(policy, cuda_graphs=False)
        engine.stepper.static = True
        return engine

    return make


def sampling_of(step: int = 0) -> Sampling:
    return Sampling(num_generations=3, cfg_weight=2.0, max_text_tokens=8, step=step)


def draws_what_eager_steps_draw(
    engine: RolloutEngine, policy: Policy, prompts: list[Prompt], step: int, *, previewed: bool = False
) -> None:
    gates = [Gate(threshold=0.5, max_attempts=2, min_keep=2) if previewed else None for _ in range(2)]
    expected = RolloutEngine(policy, cuda_graphs=False).generate(prompts, sampling_of(step), gates[0])
    same_draws(engine.generate(prompts, sampling_of(step), gates[1]), expected)


READS_BACK = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "unique", "masked_select", "_to_copy")
"""Ops that make a GPU wait, or whose output's shape depends on values."""
