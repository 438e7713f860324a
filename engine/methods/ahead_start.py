"""Starts what gathers one step ahead (learn/ahead.py) with a training's settings, and ends it with the run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError
from ..learn.ahead import Ahead
from ..learn.trajectories import ResumablePrompts
from ..policies.base import Policy
from ..policies.shared_weights import SharedWeights
from ..processes.beside import Beside, Message
from ..processes.group import own_device, place
from ..rollout.preview_gate import PreviewGate
from ..settings.rules import gpus_problem, ranks_problem
from ..settings.train_config import TrainConfig

WHAT = "the process that samples ahead (rollout_staleness 1)"


@dataclass(frozen=True, slots=True)
class AheadOf:
    """How another process makes what a training gathers with."""

    module: str
    """What `python -m` runs there; it calls `ahead_worker.work`."""
    told: Mapping[str, Any]
    """What it makes it from; plain values, as JSON has them."""


@dataclass(frozen=True, slots=True)
class Started:
    """The other process, which loads while this one goes on; with `rollout_staleness` 0 there is none."""

    timeout: float
    """Seconds that it may take to load."""
    beside: tuple[Beside, SharedWeights] | None = None
    """With the memory in which it is handed weights."""

    def of(self, prompts: ResumablePrompts, preview: PreviewGate | None, mark: Callable[..., None]) -> Ahead | None:
        """What the trainer takes its steps from, once it has loaded; None: it draws itself. `mark`: a watchdog's."""
        if self.beside is None:
            return None
        mark("loading what samples ahead", within=self.timeout)
        ahead = Ahead(*self.beside, prompts, preview)
        ahead.wait_until_ready()
        return ahead

    def close(self) -> None:
        """Ends it: nothing is to be drawn any more."""
        if self.beside is not None:
            self.beside[0].close()


@contextmanager
def started_ahead(config: TrainConfig, policy: Policy, ahead: AheadOf | None) -> Iterator[Started]:
    """The process, for the block. An error ends it at once.

    Args:
        config: of the training.
        policy: whose weights it will be handed, on this process's device.
        ahead: what it makes.

    Raises:
        ConfigError: the method has none, there are several ranks, or a GPU and no second one.
    """
    if not config.rollout_staleness:
        yield Started(config.stage_timeout)
        return
    if ahead is None:
        raise ConfigError("rollout_staleness: expected 0 for this method, whose parts no other process can make, got 1")
    if problem := ranks_problem(place()[1]):
        raise ConfigError(problem)
    variables = device_beside(os.environ, own_device())
    weights = SharedWeights(policy)
    descriptor = weights.memory.descriptor
    process = Beside(ahead.module, WHAT, descriptors=[descriptor], variables=variables)
    try:
        first = {"seed": config.seed, "threads": torch.get_num_threads(), "descriptor": descriptor}
        process.send(Message({**first, "told": dict(ahead.told)}))
        yield Started(config.stage_timeout, (process, weights))
    except BaseException:
        process.close(grace=0.0)
        raise
    finally:
        process.close()
        weights.memory.close()


def device_beside(environ: Mapping[str, str], device: torch.device) -> dict[str, str]:
    """The variables by which the other process sees one GPU, the one behind this process's; {} on a CPU.

    Raises:
        ConfigError: there is no other one.
    """
    if device.type != "cuda":
        return {}
    count = torch.cuda.device_count()
    if problem := gpus_problem(count):
        raise ConfigError(problem)
    names = [name.strip() for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    beside = ((device.index or 0) + 1) % count
    return {"CUDA_VISIBLE_DEVICES": names[beside] if names else str(beside)}
