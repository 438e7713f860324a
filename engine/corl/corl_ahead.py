"""CoRL's process that samples and scores one step ahead: `python -m`, by methods/ahead_start.py alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

from ..learn.ahead_worker import Side, work
from ..methods.bad_rows import BadRows
from ..methods.starting import add_adapters, quieten, starting_policy
from ..settings.yaml_files import from_yaml
from ..show.display import Display
from .config import CorlConfig
from .parts import Parts, credit_of_training, data_of
from .training_data import stream_of


def side(told: Mapping[str, Any]) -> Side:
    """What `CorlRun` puts a training together from, as far as it samples and scores."""
    quieten()
    run, config = (from_yaml(CorlConfig, told[part]) for part in ("run", "training"))
    name = told["name"]
    data = data_of(run, BadRows(without=told["skipped"]))  # which the run has checked
    parts = Parts(replace(run, eval_samples=0), lambda line: None, data)
    samples = data.samples(name)
    policy = starting_policy(config, told["model"], Display(max_steps=config.max_steps, quiet=True))
    if config.lora_rank:
        add_adapters(config, policy)
    rewards = parts.rewards(name, policy, samples)
    return Side(
        config=config,
        policy=policy,
        prompts=stream_of(config, name, samples, 0, 1),
        rewards=rewards,
        credit=credit_of_training(config, name, rewards),
    )


if __name__ == "__main__":
    work(side)
