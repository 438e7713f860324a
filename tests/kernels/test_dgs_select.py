"""dgs_select against brute force over all subsets."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from backends import BACKENDS, DEVICE, FEW
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from syncr1.kernels.api import dgs_select, group_advantages
from syncr1.kernels.options import RULES

pytestmark = pytest.mark.usefixtures("poisoned_memory")
NAN = math.nan
GROUP = st.lists(st.floats(-2, 2, width=16) | st.just(NAN), min_size=1, max_size=7)


def select(rewards: Any, offsets: list[int], backend: str, **options: Any) -> Tensor:
    """On the device of the backend."""
    there = {k: v.to(DEVICE) for k, v in rewards.items()} if isinstance(rewards, dict) else rewards.to(DEVICE)
    return dgs_select(there, torch.tensor(offsets, device=DEVICE), backend=backend, **options).cpu()


def variance(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values)


@pytest.mark.parametrize("backend", BACKENDS)
@FEW
@given(rewards=GROUP, mass=st.sampled_from([0.3, 0.5, 0.9, 1.0]))
def test_variance_mass_is_the_smallest_set(rewards: list[float], mass: float, backend: str) -> None:
    tensor, offsets = torch.tensor(rewards), [0, len(rewards)]
    keep = select(tensor, offsets, backend, mass=mass, min_keep=0)
    energy = group_advantages(tensor, torch.tensor(offsets)).double().square().tolist()
    held = sum(e for e, k in zip(energy, keep.tolist(), strict=True) if k)
    wanted = mass * sum(energy)
    assert held >= wanted * (1 - 1e-6)
    for size in range(int(keep.sum())):
        best = max(sum(subset) for subset in itertools.combinations(energy, size))
        assert best < wanted * (1 + 1e-6)
    assert not keep[torch.tensor(rewards).isnan()].any()


@pytest.mark.parametrize("backend", BACKENDS)
@FEW
@given(rewards=GROUP, size=st.integers(1, 7))
def test_max_variance_and_top_k(rewards: list[float], size: int, backend: str) -> None:
    tensor, offsets = torch.tensor(rewards), [0, len(rewards)]
    valid = [r for r in rewards if not math.isnan(r)]
    settings = {"keep": size, "min_keep": 0}
    spread = select(tensor, offsets, backend, rule="max_variance", **settings)
    top = select(tensor, offsets, backend, rule="top_k", **settings)
    if not valid or max(valid) == min(valid):
        assert not spread.any() and not top.any()
        return
    size = min(size, len(valid))
    assert int(spread.sum()) == int(top.sum()) == size
    best = max(variance(list(subset)) for subset in itertools.combinations(valid, size))
    assert variance(tensor[spread].tolist()) >= best * (1 - 1e-6)
    assert sorted(tensor[top].tolist()) == sorted(valid)[-size:]


@pytest.mark.parametrize("backend", BACKENDS)
def test_size_follows_variance_and_flat_groups_keep_nothing(backend: str) -> None:
    rewards = torch.tensor([0.0, 0.0, 0.0, 10.0, 0.0, 0.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5])
    keep = select(rewards, [0, 4, 8, 12], backend, mass=0.7, min_keep=1)
    assert keep.tolist() == [False] * 3 + [True] + [True, True, True, False] + [False] * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_min_keep_holds_where_there_is_variance(backend: str) -> None:
    rewards = torch.tensor([0.0, 0.0, 0.0, 10.0, 5.0, 5.0])
    keep = select(rewards, [0, 4, 6], backend, mass=0.5, min_keep=3)
    assert keep.tolist() == [True, True, False, True, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lower_index(backend: str) -> None:
    keep = select(torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0]), [0, 8], backend, mass=0.5)
    assert keep.tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_mass_is_float64(backend: str) -> None:
    """A float32 0.6 is above 0.6 and would cost a group of ten equal energies a seventh trajectory."""
    assert int(select(torch.tensor([0.0, 1.0] * 5), [0, 10], backend, mass=0.6, min_keep=0).sum()) == 6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_groups_of_any_size_under_every_rule(rule: str, backend: str) -> None:
    """As the reference decides, which the tests beside this one prove."""
    offsets = [0, 1, 1, 4, 10, 74]
    rewards = torch.randint(0, 6, (74,), generator=torch.Generator().manual_seed(5)).float()
    rewards[1:4], rewards[6] = 1.0, NAN
    for mass, keep, min_keep in ((0.6, None, 2), (1.0, 3, 0), (0.1, 1, 4)):
        options: dict[str, Any] = {"rule": rule, "mass": mass, "keep": keep, "min_keep": min_keep, "seed": 3}
        want = dgs_select(rewards, torch.tensor(offsets), backend="reference", **options)
        assert select(rewards, offsets, backend, **options).equal(want), (mass, keep, min_keep)


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_keeps_as_many_and_depends_on_the_seed(backend: str) -> None:
    rewards, offsets = torch.rand(60), [0, 20, 40, 60]
    size = select(rewards, offsets, backend).view(3, 20).sum(1)
    draws = [select(rewards, offsets, backend, rule="random", seed=seed) for seed in (0, 0, 1)]
    assert all(draw.view(3, 20).sum(1).equal(size) for draw in draws)
    assert draws[0].equal(draws[1]) and not draws[0].equal(draws[2])


def test_none_keeps_everything() -> None:
    assert dgs_select(torch.tensor([NAN, 1.0, 1.0]), torch.tensor([0, 3]), rule="none").all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rewards_per_modality_add_their_energies(backend: str) -> None:
    text, image = torch.tensor([0.0, 1.0, 0.5, 0.5]), torch.tensor([0.5, 0.5, 0.0, 1.0])
    flat = torch.full((4,), 0.5)
    both = select({"text": text, "image": image}, [0, 4], backend, mass=1.0)
    assert both.all()
    alone = select({"text": text, "image": flat}, [0, 4], backend, mass=1.0)
    assert alone.tolist() == [True, True, False, False]
