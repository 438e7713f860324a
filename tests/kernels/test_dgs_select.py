"""dgs_select against brute force over all subsets."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from syncr1.kernels.api import dgs_select, group_advantages

pytestmark = pytest.mark.usefixtures("poisoned_memory")
BACKENDS = ["reference", "native"]
NAN = math.nan
GROUP = st.lists(st.floats(-2, 2, width=16) | st.just(NAN), min_size=1, max_size=7)


def variance(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values)


@pytest.mark.parametrize("backend", BACKENDS)
@given(rewards=GROUP, mass=st.sampled_from([0.3, 0.5, 0.9, 1.0]))
def test_variance_mass_is_the_smallest_set(rewards: list[float], mass: float, backend: str) -> None:
    tensor, offsets = torch.tensor(rewards), torch.tensor([0, len(rewards)])
    keep = dgs_select(tensor, offsets, mass=mass, min_keep=0, backend=backend)
    energy = group_advantages(tensor, offsets, backend=backend).double().square().tolist()
    held = sum(e for e, k in zip(energy, keep.tolist(), strict=True) if k)
    wanted = mass * sum(energy)
    assert held >= wanted * (1 - 1e-6)
    for size in range(int(keep.sum())):
        best = max(sum(subset) for subset in itertools.combinations(energy, size))
        assert best < wanted * (1 + 1e-6)
    assert not keep[torch.tensor(rewards).isnan()].any()


@pytest.mark.parametrize("backend", BACKENDS)
@given(rewards=GROUP, size=st.integers(1, 7))
def test_max_variance_and_top_k(rewards: list[float], size: int, backend: str) -> None:
    tensor, offsets = torch.tensor(rewards), torch.tensor([0, len(rewards)])
    valid = [r for r in rewards if not math.isnan(r)]
    settings = {"keep": size, "min_keep": 0, "backend": backend}
    spread = dgs_select(tensor, offsets, rule="max_variance", **settings)
    top = dgs_select(tensor, offsets, rule="top_k", **settings)
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
    keep = dgs_select(rewards, torch.tensor([0, 4, 8, 12]), mass=0.7, min_keep=1, backend=backend)
    assert keep.tolist() == [False] * 3 + [True] + [True, True, True, False] + [False] * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_min_keep_holds_where_there_is_variance(backend: str) -> None:
    rewards, offsets = torch.tensor([0.0, 0.0, 0.0, 10.0, 5.0, 5.0]), torch.tensor([0, 4, 6])
    keep = dgs_select(rewards, offsets, mass=0.5, min_keep=3, backend=backend)
    assert keep.tolist() == [True, True, False, True, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lower_index(backend: str) -> None:
    keep = dgs_select(torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0]), torch.tensor([0, 8]), mass=0.5, backend=backend)
    assert keep.tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_keeps_as_many_and_depends_on_the_seed(backend: str) -> None:
    rewards, offsets = torch.rand(60), torch.tensor([0, 20, 40, 60])
    size = dgs_select(rewards, offsets, backend=backend).view(3, 20).sum(1)
    draws = [dgs_select(rewards, offsets, rule="random", seed=seed, backend=backend) for seed in (0, 0, 1)]
    assert all(draw.view(3, 20).sum(1).equal(size) for draw in draws)
    assert draws[0].equal(draws[1]) and not draws[0].equal(draws[2])


def test_none_keeps_everything() -> None:
    assert dgs_select(torch.tensor([NAN, 1.0, 1.0]), torch.tensor([0, 3]), rule="none").all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rewards_per_modality_add_their_energies(backend: str) -> None:
    text, image = torch.tensor([0.0, 1.0, 0.5, 0.5]), torch.tensor([0.5, 0.5, 0.0, 1.0])
    flat = torch.full((4,), 0.5)
    offsets = torch.tensor([0, 4])
    both = dgs_select({"text": text, "image": image}, offsets, mass=1.0, backend=backend)
    assert both.all()
    alone = dgs_select({"text": text, "image": flat}, offsets, mass=1.0, backend=backend)
    assert alone.tolist() == [True, True, False, False]
