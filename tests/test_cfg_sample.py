"""cfg_sample: distribution, independence of the batch, guidance, truncation."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from syncr1.kernels.api import cfg_sample
from syncr1.kernels.reference.philox import philox

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


def test_a_row_does_not_depend_on_its_batch() -> None:
    cond, offsets = torch.randn(64, 501), torch.arange(64) * 1000 + 2**40
    seeds = torch.arange(64) % 3
    whole = cfg_sample(cond, seed=seeds, offset=offsets, top_p=0.9)
    for row in (0, 17, 63):
        alone = cfg_sample(cond[row : row + 1], seed=int(seeds[row]), offset=int(offsets[row]), top_p=0.9)
        assert alone.token.equal(whole.token[row : row + 1])
        assert alone.logp.equal(whole.logp[row : row + 1])
    order = torch.randperm(64)
    assert cfg_sample(cond[order], seed=seeds[order], offset=offsets[order], top_p=0.9).token.equal(whole.token[order])


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


def draw_ids(logits: list[float], **settings: float) -> set[int]:
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
