"""group_advantages against arithmetic written out in the test."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise
from typing import Any

import pytest
import torch
from backends import BACKENDS, DEVICE
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from syncr1.kernels.api import group_advantages

pytestmark = pytest.mark.usefixtures("poisoned_memory")
NAN = math.nan


def advantages(rewards: Tensor, offsets: list[int], backend: str, **options: Any) -> Tensor:
    """On the device of the backend."""
    places = torch.tensor(offsets, device=DEVICE)
    return group_advantages(rewards.to(DEVICE), places, backend=backend, **options).cpu()


def by_hand(rewards: list[float], offsets: list[int], scale: str, eps: float) -> list[float]:
    everything = [r for r in rewards if not math.isnan(r)]
    out: list[float] = []
    for start, end in pairwise(offsets):
        group = rewards[start:end]
        valid = [r for r in group if not math.isnan(r)]
        for r in group:
            if math.isnan(r) or len(valid) < 2 or max(valid) == min(valid):
                out.append(0.0)
                continue
            centred = r - statistics.fmean(valid)
            if scale == "group":
                centred /= statistics.stdev(valid) + eps
            elif scale == "batch":
                centred /= statistics.stdev(everything) + eps
            elif scale == "loo":
                others = list(valid)
                others.remove(r)
                centred = r - statistics.fmean(others)
            out.append(centred)
    return out


REWARDS = [1.0, 0.0, 2.0, 0.5, 0.5, 0.5, NAN, 3.0, NAN, 2.5, 3.5, NAN, NAN, 7.0]
REWARDS += [(n * n % 17) / 8 if n % 9 else NAN for n in range(70)]
OFFSETS = [0, 3, 6, 8, 8, 11, 13, 14, 84]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", ["group", "batch", "none", "loo"])
def test_matches_arithmetic(scale: str, backend: str) -> None:
    result = advantages(torch.tensor(REWARDS), OFFSETS, backend, scale=scale, eps=1e-3)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, torch.tensor(by_hand(REWARDS, OFFSETS, scale, 1e-3)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", ["group", "batch", "none", "loo"])
def test_equal_rewards_give_exactly_zero(scale: str, backend: str) -> None:
    rewards = torch.tensor([0.1] * 7 + [1 / 3] * 3 + [0.0, 1.0])
    result = advantages(rewards, [0, 7, 10, 12], backend, scale=scale, eps=0.0)
    assert result[:10].tolist() == [0.0] * 10
    assert result[10:].abs().min() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_spread_is_a_signal(backend: str) -> None:
    rewards = torch.tensor([1000.0, 1000.0 + 2**-10])
    result = advantages(rewards, [0, 2], backend, eps=0.0)
    torch.testing.assert_close(result, torch.tensor([-(0.5**0.5), 0.5**0.5]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", ["group", "batch", "none", "loo"])
def test_a_spread_by_rounding_is_none(scale: str, backend: str) -> None:
    """Four units in the last place of float32, whatever the size of the group and of its rewards."""
    for size, magnitude in ((2, 1.0), (33, -1e6)):
        noise = torch.where(torch.arange(2 * size) % 2 == 0, 2.0**-22, 0.0)
        noise[size:] *= 32  # the second group has a signal
        rewards, offsets = 0.3 * magnitude * (1 + noise), [0, size, 2 * size]
        got = advantages(rewards, offsets, backend, scale=scale, eps=0.0)
        want = group_advantages(rewards.double(), torch.tensor(offsets), scale=scale, eps=0.0)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
        assert not bool(got[:size].any()) and bool(got[size:].all())


def test_float64_stays_float64() -> None:
    result = group_advantages(torch.tensor(REWARDS, dtype=torch.float64), torch.tensor(OFFSETS), eps=0.0)
    expected = torch.tensor(by_hand(REWARDS, OFFSETS, "group", 0.0), dtype=torch.float64)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weighted_components_leave_missing_ones_out(backend: str) -> None:
    rewards = torch.tensor([[1.0, 2.0], [NAN, 1.0], [NAN, NAN], [0.0, 0.0]])
    result = advantages(rewards, [0, 4], backend, weights=torch.tensor([2.0, 0.5], device=DEVICE))
    expected = by_hand([3.0, 0.5, NAN, 0.0], [0, 4], "group", 1e-4)
    torch.testing.assert_close(result, torch.tensor(expected))


def test_normalize_then_sum_is_gdpo() -> None:
    rewards, weights = torch.rand(6, 2, dtype=torch.float64), torch.tensor([1.0, 3.0])
    parts = []
    for column in rewards.T:
        groups = column.view(2, 3)
        parts.append(((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1))
    total = parts[0] + 3 * parts[1]
    expected = (total - total.mean()) / (total.std() + 1e-4)
    offsets = torch.tensor([0, 3, 6])
    result = group_advantages(rewards, offsets, weights=weights, aggregate="normalize_then_sum")
    torch.testing.assert_close(result, expected)


def test_normalize_then_sum_keeps_flat_groups_at_zero() -> None:
    rewards = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, NAN], [1.0, 5.0]])
    result = group_advantages(rewards, torch.tensor([0, 2, 4]), aggregate="normalize_then_sum")
    assert result[:2].tolist() == [0.0, 0.0]
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]])
def test_no_sequences(offsets: list[int], backend: str) -> None:
    assert advantages(torch.zeros(0), offsets, backend).shape == (0,)


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.25, NAN]), max_size=6), min_size=1, max_size=5), st.data())
def test_members_may_be_permuted(groups: list[list[float]], data: st.DataObject) -> None:
    order = [data.draw(st.permutations(range(len(g)))) for g in groups]
    offsets = torch.tensor([0, *torch.tensor([len(g) for g in groups]).cumsum(0).tolist()])
    plain = group_advantages(torch.tensor([r for g in groups for r in g]), offsets)
    moved = [g[i] for g, o in zip(groups, order, strict=True) for i in o]
    back = torch.tensor([int(s) + i for s, o in zip(offsets, order, strict=False) for i in o], dtype=torch.int64)
    torch.testing.assert_close(group_advantages(torch.tensor(moved), offsets), plain[back], rtol=0, atol=1e-6)
