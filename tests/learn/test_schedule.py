"""The learning rate of each step: ours against transformers' own, and the shape of the default."""

from __future__ import annotations

import itertools
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch

from syncr1.engine.learn.schedule import learning_rate
from syncr1.engine.methods.sync_r1_config import SyncR1Config


def test_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    config = SyncR1Config(max_steps=25, warmup_steps=5, learning_rate=2.0)
    rates = [learning_rate(config, step) for step in range(26)]
    assert rates[:6] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0])
    assert rates[15] == pytest.approx(2.0 * 0.55) and rates[25] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(rates[5:]))
    assert learning_rate(SyncR1Config(warmup_steps=0, learning_rate=1e-3), 0) == 1e-3
    as_ever = [2.0 * (0.1 + 0.9 * (1.0 - (step - 5) / 20)) for step in range(5, 26)]
    assert rates[5:] == as_ever, "the default stays as it is to the last bit"


@pytest.mark.parametrize(
    "shape", ["linear", "cosine", "cosine_with_min_lr", "constant", "constant_with_warmup", "linear_with_min_lr"]
)
def test_learning_rates_are_transformers_behind_the_warm_up(shape: Any) -> None:
    """Our warm-up is one step ahead: transformers' first step learns at 0."""
    from transformers import get_scheduler

    config = SyncR1Config(max_steps=12, warmup_steps=4, learning_rate=2.0, lr_scheduler_type=shape)
    rates = [learning_rate(config, step) for step in range(12)]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    kind, more = shape, {"min_lr_rate": 0.1} if shape == "cosine_with_min_lr" else {}
    if shape == "linear_with_min_lr":
        kind, more = "polynomial", {"power": 1.0, "lr_end": 0.2}
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=4, num_training_steps=12, scheduler_specific_kwargs=more)
    expected = []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step(), theirs.step()
    assert rates[4:] == pytest.approx(expected[4:])
    if shape != "constant":
        assert rates[:3] == pytest.approx(expected[1:4])
