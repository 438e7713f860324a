"""cfg_sample: distribution, guidance, truncation; independence of the batch is in test_kernel_invariances.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backends import BACKENDS
from scipy import stats
from tied_logits import SEED, exact_size, late_offset, levels, tied_cases, uniform_shares

from syncr1.kernels.api import cfg_sample
from syncr1.kernels.reference.philox import philox, uniform

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_philox_known_answers() -> None:
    """From Random123's kat_vectors."""
    ones = 0xFFFFFFFF
    counter, key = torch.tensor([[0, ones]] * 4), torch.tensor([[0, ones]] * 2)
    words = philox(counter, key).T.tolist()
    assert words[0] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words[1] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (3.0, 0.7), (0.0, 2.0)])
def test_distribution(weight: float, temperature: float) -> None:
    num_draws = 20_000
    cond, uncond = torch.randn(2, 1, 12)
    out = cfg_sample(
        cond.expand(num_draws, -1),
        uncond.expand(num_draws, -1),
        cfg_weight=weight,
        temperature=temperature,
        seed=7,
        offset=torch.arange(num_draws),
    )
    expected = ((uncond + weight * (cond - uncond)) / temperature).double().softmax(-1)[0] * num_draws
    observed = torch.bincount(out.token, minlength=12)
    used = expected > 5
    p_value = stats.chisquare(observed[used], expected[used] / expected[used].sum() * observed[used].sum()).pvalue
    assert p_value > 1e-3


def test_log_probabilities_and_entropy() -> None:
    cond, uncond = torch.randn(2, 50, 33, dtype=torch.float64)
    settings = {"cfg_weight": 5.0, "temperature": 0.8, "top_k": 4, "seed": 0, "offset": torch.arange(50)}
    out = cfg_sample(cond, uncond, **settings)
    index = out.token[:, None]
    logp = (cond / 0.8).log_softmax(-1)
    mixed = ((uncond + 5 * (cond - uncond)) / 0.8).log_softmax(-1)
    torch.testing.assert_close(out.logp, logp.gather(1, index)[:, 0])
    torch.testing.assert_close(out.logp_mixed, mixed.gather(1, index)[:, 0])
    torch.testing.assert_close(out.entropy, torch.distributions.Categorical(logits=cond / 0.8).entropy())


def test_seed_and_offset_change_the_draw() -> None:
    cond, offset = torch.zeros(200, 1000), torch.arange(200)
    first = cfg_sample(cond, seed=1, offset=offset).token
    assert first.equal(cfg_sample(cond, seed=1, offset=offset).token)
    assert (first == cfg_sample(cond, seed=2, offset=offset).token).float().mean() < 0.05
    assert (first == cfg_sample(cond, seed=1, offset=offset + 200).token).float().mean() < 0.05
    assert first.unique().numel() > 150


def test_guidance_of_weight_one_is_the_conditional() -> None:
    cond, uncond = torch.randn(2, 40, 17)
    guided = cfg_sample(cond, uncond, cfg_weight=1.0, seed=3, offset=torch.arange(40))
    plain = cfg_sample(cond, seed=3, offset=torch.arange(40))
    assert guided.token.equal(plain.token) and guided.logp_mixed.equal(plain.logp)


def test_greedy_takes_the_guided_maximum() -> None:
    cond, uncond = torch.randn(2, 40, 17)
    out = cfg_sample(cond, uncond, cfg_weight=4.0, temperature=0.0, seed=0, offset=0)
    assert out.token.equal((uncond + 4 * (cond - uncond)).argmax(-1))
    torch.testing.assert_close(out.logp, cond.log_softmax(-1).gather(1, out.token[:, None])[:, 0])


def draw_ids(logits: list[float], **settings: Any) -> set[int]:
    rows = torch.tensor([logits]).expand(4000, -1)
    return set(cfg_sample(rows, seed=0, offset=torch.arange(4000), **settings).token.tolist())


def test_top_k_and_top_p() -> None:
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.2, 0.1)]
    assert draw_ids(logits, top_k=2) == {1, 2}  # ties go to the lower id
    assert draw_ids(logits, top_p=0.59) == {1, 2}
    assert draw_ids(logits, top_p=0.61) == {1, 2, 3}
    assert draw_ids(logits, top_p=1e-6) == {1}
    assert draw_ids(logits, top_k=3, top_p=0.7) == {1, 2}  # of what top_k left: 0.4, 0.2, 0.2 of 0.8
    assert draw_ids(logits, top_k=99) == {0, 1, 2, 3, 4}


def test_forbidden_ids_are_never_sampled_and_have_no_mass() -> None:
    cond = torch.randn(4000, 9)
    cond[:, 4] = 50.0
    out = cfg_sample(cond, seed=0, offset=torch.arange(4000), forbidden=torch.tensor([4, 8]))
    assert not set(out.token.tolist()) & {4, 8}
    allowed = torch.tensor([0, 1, 2, 3, 5, 6, 7])
    expected = torch.distributions.Categorical(logits=cond[:, allowed])
    torch.testing.assert_close(out.entropy, expected.entropy())
    assert torch.isfinite(out.logp).all()


def test_empty_batch() -> None:
    assert cfg_sample(torch.zeros(0, 5), seed=0, offset=torch.zeros(0, dtype=torch.int64)).token.shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_p_of_equal_logits_is_the_smallest_set_that_holds_it(backend: str) -> None:
    rows = cfg_sample(torch.zeros(2000, 8), top_p=0.5, seed=0, offset=0, backend=backend).token
    assert set(rows.tolist()) == {0, 1, 2, 3}
    for vocabulary in (2, 3, 7, 10, 41, 64):
        for logit in (0.0, -1.3, 700.0):  # sums of 1 are exact, those of other weights are not
            cond = torch.full((1, vocabulary + 1), logit)
            cond[0, -1] = -torch.inf
            for top_p, kept in uniform_shares(vocabulary):
                drawn = cfg_sample(cond, top_p=top_p, seed=SEED, offset=late_offset(), backend=backend)
                assert int(drawn.token) == kept - 1, (vocabulary, top_p)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("largest", "number"), [(12, 400), (300, 150), (3000, 60)])
def test_top_p_of_ties_with_and_without_top_k(backend: str, largest: int, number: int) -> None:
    for counts, weights, share, top_k in tied_cases(largest, number, largest):
        if (top_p := float(share)) == 0 or (share < 1 and 1 - top_p < 1e-5):
            continue
        settings = {"top_p": top_p, "top_k": top_k, "seed": SEED, "offset": late_offset(), "backend": backend}
        drawn = cfg_sample(levels(counts, weights), **settings)
        expected = exact_size(counts, weights, share, top_k)
        assert int(drawn.token) == expected - 1, (counts, weights, share, top_k)


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_p_next_to_one(backend: str) -> None:
    """All but the last few of 100,000 equal ids, and none left out that weighs more than the share allows."""
    cond = torch.zeros(1, 100_000)
    for top_p, kept in ((0.9, 90_000), (0.999, 99_900), (0.9999, 99_990), (0.99997, 99_997), (0.99999, 99_999)):
        for extra, expected in ((0.0, kept), (5e-6, kept + 1)):
            # U is within 1e-5 of 1, which is one id of these: a draw a little below the last one shows the set as well.
            drawn = cfg_sample(cond, top_p=min(top_p + extra, 1.0), seed=SEED, offset=late_offset(), backend=backend)
            assert expected - 1 - int(drawn.token) in (0, 1), (top_p, extra)
    assert draw_ids([0.0] * 8, top_p=math.nextafter(1.0, 0.0), backend=backend) == set(range(8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_one_call_are_independent(backend: str) -> None:
    """One seed and one offset for 20,000 rows; equal numbers only where they are given per row and are equal."""
    num_rows, cond = 20_000, torch.zeros(20_000, 10)
    once = cfg_sample(cond, seed=1, offset=0, backend=backend).token
    counts = torch.bincount(once, minlength=10)
    assert stats.chisquare(counts).pvalue > 1e-3
    pairs = torch.bincount(once[:-1] * 10 + once[1:], minlength=100)
    assert stats.chisquare(pairs).pvalue > 1e-3
    for offset in (0, 5, torch.tensor(5), torch.tensor(5, dtype=torch.int32), 2**62):
        counted = int(offset) + torch.arange(num_rows)
        drawn = cfg_sample(cond, seed=1, offset=offset, backend=backend).token
        assert drawn.equal(cfg_sample(cond, seed=1, offset=counted, backend=backend).token)
        assert drawn.equal((uniform(1, counted) * 10).long())
    everywhere = torch.full((num_rows,), 5)
    assert cfg_sample(cond, seed=1, offset=everywhere, backend=backend).token.unique().numel() == 1
    seeds = torch.arange(num_rows)
    assert cfg_sample(cond, seed=seeds, offset=everywhere, backend=backend).token.unique().numel() == 10
