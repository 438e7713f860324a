"""TRL's hooks: which functions get them, what they take, and where it goes when a call fails or runs elsewhere."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import numpy as np
import pytest
import torch
from test_rewards import group, make_rollout

from syncr1.engine.errors import RewardError
from syncr1.engine.rewards.hooks import TrainerState, plain
from syncr1.engine.rewards.scoring import RewardTable, score
from syncr1.engine.rewards.yours.isolated import IsolatedReward

STATE = TrainerState(global_step=3, max_steps=10)


def scored(*functions: Any, texts: tuple[str, ...] = ("a", "bb")) -> RewardTable:
    return score(group(list(texts)), {function.__name__: function for function in functions}, state=STATE)


def test_they_go_to_who_names_them_and_to_who_takes_anything() -> None:
    seen: dict[str, set[str]] = {}

    def names(*, completions: list[str], images: Any, log_metric: Any, **_: Any) -> list[float]:
        seen["names"] = {*_}
        return [0.0] * len(completions)

    def anything(**given: Any) -> list[float]:
        seen["anything"] = {name for name, value in given.items() if not isinstance(value, list)}
        return [float(given["trainer_state"].global_step / given["trainer_state"].max_steps)] * len(
            given["completions"]
        )

    async def later(completions: list[str], trainer_state: Any = None, **_: Any) -> list[float]:
        await asyncio.sleep(0)
        return [float(trainer_state.global_step)] * len(completions)

    table = scored(names, anything, later)
    assert table.values.tolist() == [[0.0, pytest.approx(0.3), 3.0]] * 2
    assert seen["anything"] == {"trainer_state", "log_extra", "log_metric"} and "trainer_state" in seen["names"]


def test_a_column_of_the_data_under_a_hook_s_name_is_not_shown() -> None:
    """As in TRL, which puts its own over it."""

    def mine(*, completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        return [float(trainer_state.global_step)] * len(completions)

    rollouts = group(["a"], extra={"trainer_state": "CA", "log_metric": 1})
    assert score(rollouts, {"mine": mine}, state=STATE).values.tolist() == [[3.0]]


def test_what_is_logged_is_plain_and_one_for_each() -> None:
    def mine(*, completions: list[str], log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
        for value in (1, np.float32(0.5), torch.tensor([2.0]), True):
            log_metric("acc", value)
        log_extra("tensor", torch.tensor([1.5, float("nan")]))
        log_extra("lists", [np.arange(2), {"box": (1, Path("x"))}])
        log_extra("lists", [[0], None])
        return [1.0] * len(completions)

    table = scored(mine)
    assert table.metrics == {"acc": [1.0, 0.5, 2.0, 1.0]}
    assert table.extras == {"tensor": [1.5, None], "lists": [[0], None]}, "the later one of a name stands"
    assert plain(torch.zeros(3, 64, 64)) == "Tensor [3, 64, 64] of torch.float32", "no picture in numbers"
    assert plain({"box": (1, Path("x")), 2: np.arange(2)}) == {"box": [1, "x"], "2": [0, 1]}
    half = {"half\ud800": ["\udc80", Path("\ud800")]}
    assert plain(half) == {"half\\ud800": ["\\udc80", "\\ud800"]}, "as a file of UTF-8 can hold it"


@pytest.mark.parametrize("values", [[1], [1, 2, 3], []])
def test_another_number_of_values_breaks_the_contract(values: list[int]) -> None:
    def mine(*, log_extra: Any, **_: Any) -> list[float]:
        log_extra("n", values)
        return [1.0, 1.0]

    with pytest.raises(RewardError, match=f"expected 2 values, one per trajectory, got {len(values)}"):
        scored(mine)


def test_columns_of_one_name_stay_apart_and_metrics_are_one() -> None:
    def first(*, completions: list[str], log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
        log_metric("length", 1.0)
        log_extra("said", completions)
        log_extra("second", completions)
        return [1.0] * len(completions)

    def second(*, completions: list[str], log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
        log_metric("length", 3.0)
        log_extra("said", ["x"] * len(completions))
        return [1.0] * len(completions)

    table = scored(first, second)
    assert table.metrics == {"length": [1.0, 3.0]}
    said = {"said": ["a", "bb"], "first/second": ["a", "bb"], "second/said": ["x", "x"]}
    assert table.extras == said, "a column called as a reward is that reward's"


def test_a_call_that_failed_or_was_late_logged_nothing() -> None:
    def fails(*, completions: list[str], log_metric: Any, **_: Any) -> list[float]:
        log_metric("acc", 1.0)
        raise OSError("gone")

    def late(*, completions: list[str], log_metric: Any, **_: Any) -> list[float]:
        log_metric("acc", 1.0)
        time.sleep(0.4)
        log_metric("acc", 2.0)
        return [0.0] * len(completions)

    table = score(group(["a"]), {"fails": fails, "late": late}, timeout=0.1)
    assert table.metrics == {} and table.failures == {"fails": 1, "late": 1}


def test_rows_that_are_not_shown_have_none_and_parts_fit_together() -> None:
    def mine(*, completions: list[str], log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
        log_metric("n", len(completions))
        log_extra("said", completions)
        return [1.0] * len(completions)

    anchor = make_rollout("x", "anchor", rewarded=False)
    one, other = (score([anchor, *group([text])], {"mine": mine}) for text in ("a", "b"))
    silent = score(group(["c"]), {"mine": lambda completions, **_: [0.0] * len(completions)})
    assert one.extras == {"said": [None, "a"]}
    both = one.and_then(other).and_then(silent)
    assert both.extras == {"said": [None, "a", None, "b", None]} and both.metrics == {"n": [1.0, 1.0]}
    assert both.of_rows([3, 1]).extras == {"said": ["b", "a"]}
    assert silent.and_then(one).extras == {"said": [None, None, "a"]}


@pytest.mark.slow
def test_they_work_in_a_process_of_their_own(tmp_path: Path) -> None:
    source = tmp_path / "hooked.py"
    source.write_text(
        "def hooked(*, completions, trainer_state, log_metric, log_extra, **_):\n"
        "    log_metric('step', trainer_state.global_step)\n"
        "    log_extra('said', completions)\n"
        "    return [trainer_state.max_steps] * len(completions)\n"
    )
    reward = IsolatedReward(f"{source}:hooked")
    try:
        table = score(group(["a", "bb"]), {"hooked": reward}, timeout=100.0, state=STATE)
    finally:
        reward.close()
    assert table.values.tolist() == [[10.0]] * 2
    assert table.metrics == {"step": [3.0]} and table.extras == {"said": ["a", "bb"]}
