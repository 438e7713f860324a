"""metrics.py: what the ranks measured, as one rank would have measured it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncr1.engine.learn.metrics import merged

NAN = math.nan


def test_counts_extremes_and_means() -> None:
    ranks = [
        {
            "reward": 0.2,
            "num_tokens": 10.0,
            "step_time": 1.0,
            "ratio_min/text": 0.5,
            "ratio_max/text": 1.5,
            "tokens/text": 1.0,
            "tokens/image": 0.0,
            "kl/text": 1.0,
            "kl/image": NAN,
            "kl": 1.0,
            "rewards/a/mean": 0.5,
        },
        {
            "reward": 0.6,
            "num_tokens": 30.0,
            "step_time": 3.0,
            "ratio_min/text": 0.9,
            "ratio_max/text": 1.1,
            "tokens/text": 3.0,
            "tokens/image": 4.0,
            "kl/text": 2.0,
            "kl/image": 0.5,
            "kl": 8 / 7,
            "rewards/b/mean": NAN,
        },
    ]
    told = merged(ranks)
    assert (told["reward"], told["num_tokens"], told["step_time"]) == (pytest.approx(0.4), 40, 3)
    assert (told["ratio_min/text"], told["ratio_max/text"], told["tokens/text"]) == (0.5, 1.5, 4)
    assert told["kl/text"] == pytest.approx(7 / 4) and told["kl/image"] == 0.5
    assert told["kl"] == pytest.approx((1 * 1 + 3 * 2 + 4 * 0.5) / 8)
    assert told["rewards/a/mean"] == 0.5 and math.isnan(told["rewards/b/mean"])


@given(
    st.dictionaries(st.sampled_from(["reward", "loss", "kl", "entropy/text", "num_tokens"]), st.floats(allow_nan=True))
)
def test_one_rank_is_left_alone(values: dict[str, float]) -> None:
    assert repr(merged([values])) == repr(values)


@given(st.floats(-1e6, 1e6), st.integers(1, 5))
def test_what_all_agree_on_stays_to_the_last_bit(value: float, ranks: int) -> None:
    """The loss's own reductions, the learning rate and thresholds are the same on all."""
    assert merged([{"grad_norm": value, "tokens/text": 3.0}] * ranks)["grad_norm"] == value
