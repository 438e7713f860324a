"""Sync-R1's process that samples and scores one step ahead: `python -m`, by methods/ahead_start.py alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

from ..learn.ahead_worker import Side, work
from ..processes.group import local_device
from ..settings.yaml_files import from_yaml
from ..show.display import Display
from .bad_rows import BadRows
from .data_checks import chains
from .starting import add_adapters, quieten, starting_policy
from .sync_r1_config import SyncR1Config
from .sync_r1_parts import build_reward_set, own_rewards, prepare_data, stream_of


def side(told: Mapping[str, Any]) -> Side:
    """What `sync_r1.train_and_score` makes of the same settings, as far as it samples and scores."""
    quieten()
    # Its data are read by the model's kind: the hub is not asked for that either.
    config = from_yaml(SyncR1Config, told["settings"])
    config = config if config.model is None else replace(config, model=told["model"])
    rows = BadRows(without=told["skipped"])
    loaded = chains(config, prepare_data(config), rows)  # which the run has checked
    policy = starting_policy(config, told["model"], Display(max_steps=config.max_steps, quiet=True))
    frozen = add_adapters(config, policy).to(local_device())
    return Side(
        config=config,
        policy=policy,
        prompts=stream_of(config, loaded.prompts, loaded.anchors),
        rewards=build_reward_set(config, frozen, loaded.prompts, own_rewards(config)),
    )


if __name__ == "__main__":
    work(side)
