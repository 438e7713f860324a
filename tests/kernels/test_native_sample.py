"""The C++ sampler against the reference in float64, under every instruction set of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_library import INSTRUCTION_SETS, Guarded, guarded_outputs, using
from torch import Tensor

from syncr1.kernels import native
from syncr1.kernels.outputs import CFGSample
from syncr1.kernels.reference import sample as reference
from syncr1.kernels.reference.philox import uniform
from syncr1.kernels.reference.sample import truncate
from syncr1.kernels.terms import SampleInputs

pytestmark = pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
PLAIN: dict[str, Any] = {"cfg_weight": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "forbidden": None}
NEAR = 1e-9
"""A token may differ where the reference's own running sum lies this near to the threshold."""


@pytest.fixture(params=INSTRUCTION_SETS, scope="module", autouse=True)
def _instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    with using(request.param):
        yield


def sample(cond: Tensor, uncond: Tensor | None, backend: Any = native, **settings: Any) -> CFGSample:
    drawn: CFGSample = backend.sample(SampleInputs(cond, uncond, **settings, backend=backend.__name__))
    return drawn


def keys(num_rows: int, offset: int = 0) -> dict[str, Tensor]:
    return {"seed": torch.arange(num_rows) * 977 - 5, "offset": torch.arange(num_rows) + offset}


def near_the_threshold(cond: Tensor, uncond: Tensor | None, settings: dict[str, Any]) -> Tensor:
    """[B] bool: in float64 the draw is within rounding of the next id."""
    mixed = cond.double() if uncond is None else torch.lerp(uncond.double(), cond.double(), settings["cfg_weight"])
    mixed = mixed / (settings["temperature"] or 1.0)
    if settings["forbidden"] is not None:
        mixed = mixed.index_fill(1, settings["forbidden"], -torch.inf)
    cumulative = truncate(mixed.log_softmax(dim=1), settings["top_k"], settings["top_p"]).exp().cumsum(dim=1)
    threshold = uniform(settings["seed"], settings["offset"]).unsqueeze(1) * cumulative[:, -1:]
    return ((cumulative - threshold).abs() <= NEAR).any(dim=1)


def assert_agrees(cond: Tensor, uncond: Tensor | None, **settings: Any) -> CFGSample:
    """The reference's token in float64 row by row, and log-probabilities as good as its own in float32."""
    drawn = sample(cond, uncond, **settings)
    exact = sample(cond.double(), None if uncond is None else uncond.double(), reference, **settings)
    same = drawn.token == exact.token
    if not bool(same.all()):
        assert bool(near_the_threshold(cond, uncond, settings)[~same].all())
    finite = cond.double()[cond.isfinite()].abs().max()
    if uncond is not None:
        finite = finite + settings["cfg_weight"] * uncond.double().abs().max()
    floor = 2e-7 * (1 + float(finite)) / min(settings["temperature"] or 1.0, 1.0) * 2
    for name in ("logp", "logp_mixed", "entropy"):
        torch.testing.assert_close(getattr(drawn, name)[same].double(), getattr(exact, name)[same], rtol=0, atol=floor)
    return drawn


@given(
    width=st.sampled_from([1, 2, 15, 16, 17, 64, 65, 1023, 1025, 2100]) | st.integers(1, 3000),
    spread=st.sampled_from([0.0, 1.0, 6.0]),
    dtypes=st.tuples(DTYPES, DTYPES),
    guided=st.booleans(),
    temperature=st.sampled_from([0.0, 0.6, 1.0, 1.5]),
    top_k=st.sampled_from([0, 1, 2, 50, 700, 5000]),
    top_p=st.sampled_from([1e-6, 0.3017, 0.9013, 0.999999, 1.0]),  # no share of equal weights exactly
    num_forbidden=st.integers(0, 3),
    seed=st.integers(0, 1 << 40),
)
def test_tokens_and_log_probabilities(
    width: int,
    spread: float,
    dtypes: tuple[torch.dtype, torch.dtype],
    guided: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    num_forbidden: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    cond, uncond = (torch.randn(2, 16, width, generator=generator) * spread).unbind(0)
    forbidden = torch.randperm(width, generator=generator)[: min(num_forbidden, width - 1)]
    first, second = Guarded(cond.to(dtypes[0])), Guarded((cond + uncond).to(dtypes[1]), gap=12)
    with guarded_outputs():
        assert_agrees(
            first.matrix, second.matrix if guided else None, cfg_weight=4.0 if guided else 1.0, temperature=temperature,
            top_k=top_k, top_p=top_p, forbidden=forbidden, **keys(16, seed),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (200, 1.0), (0, 0.9), (200, 0.9)])
def test_many_rows(dtype: torch.dtype, top_k: int, top_p: float) -> None:
    cond, uncond = (torch.randn(2, 600, 1500) * 2).to(dtype).unbind(0)
    drawn = assert_agrees(cond, uncond, **PLAIN | {"cfg_weight": 3.0, "top_k": top_k, "top_p": top_p}, **keys(600))
    assert drawn.token.unique().numel() > 50


@pytest.mark.parametrize("top_k", [1, 3, 300])
@pytest.mark.parametrize("top_p", [1e-3, 0.4013, 1.0])
def test_ties_go_to_the_lower_id(top_k: int, top_p: float) -> None:
    cond = torch.randint(0, 3, (64, 1100)).float()
    settings = PLAIN | {"top_k": top_k, "top_p": top_p}
    drawn = assert_agrees(cond, None, **settings, **keys(64))
    order = cond.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    assert bool((order == drawn.token.unsqueeze(1)).any(dim=1).all())


def test_top_p_tiny_and_top_k_one_are_greedy() -> None:
    cond = torch.randn(40, 900)
    cond[:, 500] = cond[:, 20] = 9.0
    for settings in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 0.0}):
        assert bool((sample(cond, None, **PLAIN | settings, **keys(40)).token == 20).all())


def test_masked_vocabulary() -> None:
    """-inf logits and forbidden ids, a NaN among the latter, are never drawn, even where top_k asks for more."""
    cond = torch.full((50, 2000), -torch.inf)
    allowed = torch.tensor([3, 700, 1999])
    cond[:, allowed] = torch.randn(50, 3)
    cond[:, 1200] = torch.nan
    settings = PLAIN | {"top_k": 10, "top_p": 0.99, "forbidden": torch.tensor([1200, 700])}
    drawn = sample(cond, None, **settings, **keys(50))
    assert set(drawn.token.tolist()) == {3, 1999}
    assert all(bool(t.isfinite().all()) for t in (drawn.logp, drawn.logp_mixed, drawn.entropy))
    clean = cond[:, [3, 1999]]
    torch.testing.assert_close(drawn.logp, clean.log_softmax(1).gather(1, (drawn.token == 1999).long()[:, None])[:, 0])


def test_a_row_depends_on_nothing_but_itself() -> None:
    """Bitwise: threads, order and neighbours do not matter."""
    cond, uncond = torch.randn(2, 37, 2500).unbind(0)
    key = keys(37, 1 << 40)

    def draw(rows: Tensor) -> list[Tensor]:
        settings = PLAIN | {"cfg_weight": 5.0, "top_k": 300, "top_p": 0.8, "seed": key["seed"][rows]}
        out = sample(cond[rows], uncond[rows], offset=key["offset"][rows], **settings)
        return [out.token, out.logp, out.logp_mixed, out.entropy]

    everything = torch.arange(37)
    whole = draw(everything)
    torch.set_num_threads(2)
    order = torch.randperm(37)
    for rows in (everything, order, *everything.split(6)):
        assert all(a[rows].equal(b) for a, b in zip(whole, draw(rows), strict=True))


def test_offsets_beyond_32_bits_and_expanded_arguments() -> None:
    """The upper words of seed and offset count; one row of logits may stand for many, and so may one seed."""
    cond = torch.randn(1, 400).expand(300, -1)
    tokens = {}
    for seed, offset in ((5, 0), (5, 1 << 32), (5 + (1 << 32), 0), (-5, 1 << 62)):
        key = {"seed": torch.tensor(seed).expand(300), "offset": torch.arange(300) + offset}
        tokens[seed, offset] = tuple(assert_agrees(cond, None, **PLAIN, **key).token.tolist())
    assert len(set(tokens.values())) == 4


def test_strided_logits() -> None:
    cond = torch.randn(300, 12).t()
    assert_agrees(cond, torch.randn(1, 300).expand(12, -1), **PLAIN | {"cfg_weight": 2.0}, **keys(12))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_poisoned_row_poisons_no_other(value: float) -> None:
    cond = torch.randn(9, 300)
    clean = sample(cond, None, **PLAIN, **keys(9))
    cond[4, 100] = value
    drawn = sample(cond, None, **PLAIN, **keys(9))
    others = torch.arange(9) != 4
    assert drawn.token[others].equal(clean.token[others]) and drawn.logp[others].equal(clean.logp[others])
    assert drawn.token[4] == 0 and bool(drawn.logp[4].isnan() & drawn.logp_mixed[4].isnan() & drawn.entropy[4].isnan())


def test_frequencies() -> None:
    """chi-square of 20000 draws against the truncated, guided distribution."""
    cond, uncond = torch.randn(2, 1, 40).unbind(0)
    num = 20000
    settings = PLAIN | {"cfg_weight": 2.0, "temperature": 1.2, "top_k": 20, "top_p": 0.95}
    drawn = sample(cond.expand(num, -1), uncond.expand(num, -1), **settings, **keys(num))
    logp = ((uncond + 2.0 * (cond - uncond)).double() / 1.2).log_softmax(1)
    kept = truncate(logp, 20, 0.95).exp()[0]
    expected = kept / kept.sum() * num
    counts = drawn.token.bincount(minlength=40)
    assert not bool(counts[expected == 0].any())
    seen = expected > 0
    chi_square = float(((counts - expected).square() / expected)[seen].sum())
    degrees = int(seen.sum()) - 1
    assert abs(chi_square - degrees) < 5 * (2 * degrees) ** 0.5


def test_no_rows() -> None:
    drawn = sample(torch.empty(0, 7), None, **PLAIN, **keys(0))
    assert drawn.token.shape == drawn.logp.shape == (0,)
