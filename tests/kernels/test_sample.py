"""The contract of a backend's sampler: the reference's token in float64, row by row. In C++ under every instruction set
of the machine, in Triton with rows that a program holds and rows that it sweeps over.

test_cfg_sample.py proves the reference, and shares of top_p that are known exactly.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from backends import DEVICE, FEW, NATIVE, ON_TRITON
from hypothesis import given
from hypothesis import strategies as st
from native_library import INSTRUCTION_SETS, Guarded, guarded_outputs, using
from tied_logits import SEED, exact_size, late_offset, levels, tied_cases, uniform_shares
from torch import Tensor

from syncr1.kernels import dispatch
from syncr1.kernels.outputs import CFGSample
from syncr1.kernels.reference.philox import uniform
from syncr1.kernels.reference.sample import sample as reference_sample
from syncr1.kernels.reference.sample import truncate
from syncr1.kernels.support import holds, unpack
from syncr1.kernels.terms import SampleInputs

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
PLAIN: dict[str, Any] = {"cfg_weight": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
PLAIN |= {"forbidden": None, "with_support": False}
ROWS = 3 if ON_TRITON else 16
WIDTHS = st.sampled_from([1, 2, 7, 64, 65]) | st.integers(1, 300)
if not ON_TRITON:
    WIDTHS = st.sampled_from([1, 2, 15, 16, 17, 64, 65, 1023, 1025, 2100]) | st.integers(1, 3000)
NEAR = 1e-6 if ON_TRITON else 1e-9
"""A token may differ where the reference's own running sum lies this near to the threshold: sums of float32, of double.
"""
RESOLUTION = 2e-6 if ON_TRITON else 4e-7
NAMES = ("token", "logp", "logp_mixed", "entropy")
WAYS: list[Any] = (
    [pytest.param(form, id=f"triton-{form}") for form in ("resident", "swept")]
    if ON_TRITON
    else [pytest.param(name, id=name, marks=NATIVE) for name in INSTRUCTION_SETS]
)


@pytest.fixture(params=WAYS, scope="module", autouse=True)
def _way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Swept rows in tiles small enough for several of them."""
    if not ON_TRITON:
        with using(request.param):
            yield request.param
        return
    module = importlib.import_module("syncr1.kernels.triton_ops.sample")
    swept = {"MAX_RESIDENT": 0, "STREAM_TILE": 256} if request.param == "swept" else {}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ({"COLUMNS": 32} | swept).items():
            patch.setattr(module, name, value)
        yield request.param


def sample(cond: Tensor, uncond: Tensor | None, **settings: Any) -> CFGSample:
    backend = "triton" if ON_TRITON else "native"
    inputs = SampleInputs(cond, uncond, **settings, backend=backend)
    there = SampleInputs(*(value.to(DEVICE) if isinstance(value, Tensor) else value for value in inputs))
    drawn: CFGSample = dispatch.module_of(backend).sample(there)
    assert drawn.token.dtype == torch.int64
    support = None if drawn.support is None else drawn.support.cpu()
    return CFGSample(*(getattr(drawn, name).cpu() for name in NAMES), support)


def keys(num_rows: int, offset: int = 0) -> dict[str, Tensor]:
    return {"seed": torch.arange(num_rows) * 977 - 5, "offset": torch.arange(num_rows) + offset}


def near_the_threshold(cond: Tensor, uncond: Tensor | None, settings: dict[str, Any]) -> Tensor:
    """[B] bool: in float64 the draw is within rounding of the next id."""
    mixed = cond.double() if uncond is None else torch.lerp(uncond.double(), cond.double(), settings["cfg_weight"])
    mixed = mixed / (settings["temperature"] or 1.0)
    if settings["forbidden"] is not None:
        mixed = mixed.index_fill(1, settings["forbidden"], -torch.inf)
    cuts = (settings["top_k"], settings["top_p"], settings["min_p"])
    cumulative = truncate(mixed.log_softmax(dim=1), *cuts).exp().cumsum(dim=1)
    threshold = uniform(settings["seed"], settings["offset"]).unsqueeze(1) * cumulative[:, -1:]
    return ((cumulative - threshold).abs() <= NEAR).any(dim=1)


def assert_agrees(cond: Tensor, uncond: Tensor | None, **settings: Any) -> CFGSample:
    """The reference's token in float64 row by row, and log-probabilities as good as its own in float32."""
    drawn, other = sample(cond, uncond, **settings), None if uncond is None else uncond.double()
    exact = reference_sample(SampleInputs(cond.double(), other, **settings, backend="reference"))
    same = drawn.token == exact.token
    if not bool(same.all()):
        assert bool(near_the_threshold(cond, uncond, settings)[~same].all())
    finite = cond.double()[cond.isfinite()].abs().max()
    if uncond is not None:
        finite = finite + abs(settings["cfg_weight"]) * uncond.double().abs().max()
    if settings["with_support"]:
        same &= assert_support(drawn, exact, cond)
    floor = RESOLUTION * (1 + float(finite)) / min(settings["temperature"] or 1.0, 1.0)
    for name in NAMES[1:]:
        torch.testing.assert_close(getattr(drawn, name)[same].double(), getattr(exact, name)[same], rtol=0, atol=floor)
    return drawn


def assert_support(drawn: CFGSample, exact: CFGSample, cond: Tensor) -> Tensor:
    """Every row's set holds its token and is the reference's, but for one id whose share is a matter of rounding:
    [B] bool, where the sets are alike."""
    assert drawn.support is not None and exact.support is not None
    assert bool(holds(drawn.support, drawn.token).all())
    ours, theirs = (unpack(support, cond.shape[1]) for support in (drawn.support, exact.support))
    assert int((ours ^ theirs).sum(dim=1).max()) <= 1
    return (ours == theirs).all(dim=1)


def guarded(cond: Tensor, other: Tensor, weight: float | None, **settings: Any) -> CFGSample:
    """Rows between NaN; guided where there is a weight."""
    first, second = Guarded(cond), Guarded(other, gap=12)
    with nullcontext() if ON_TRITON else guarded_outputs():
        uncond = None if weight is None else second.matrix
        return assert_agrees(first.matrix, uncond, **settings | {"cfg_weight": 1.0 if weight is None else weight})


@FEW
@given(
    width=WIDTHS,
    spread=st.sampled_from([0.0, 1.0, 6.0]),
    dtypes=st.tuples(DTYPES, DTYPES),
    weight=st.sampled_from([None, 4.0, -0.5]),
    temperature=st.sampled_from([0.0, 0.6, 1.0, 1.5]),
    top_k=st.sampled_from([0, 1, 2, 50, 700, 5000]),
    top_p=st.sampled_from([1e-6, 0.3017, 0.9013, 0.999999, 1.0]),  # no share of equal weights exactly
    min_p=st.sampled_from([0.0, 0.0, 1e-3, 0.1, 1.0]),
    with_support=st.booleans(),
    num_forbidden=st.integers(0, 3),
    seed=st.integers(0, 1 << 40),
)
def test_tokens_and_log_probabilities(
    width: int,
    spread: float,
    dtypes: tuple[torch.dtype, torch.dtype],
    weight: float | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    with_support: bool,
    num_forbidden: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    cond, uncond = (torch.randn(2, ROWS, width, generator=generator) * spread).unbind(0)
    forbidden = torch.randperm(width, generator=generator)[: min(num_forbidden, width - 1)]
    settings = PLAIN | {"temperature": temperature, "top_k": top_k, "top_p": top_p, "forbidden": forbidden}
    settings |= {"min_p": min_p, "with_support": with_support}
    guarded(cond.to(dtypes[0]), (cond + uncond).to(dtypes[1]), weight, **settings, **keys(ROWS, seed))


@pytest.mark.parametrize(
    ("options", "weight"),
    [
        ({}, 3.0),
        ({"top_k": 7}, None),
        ({"top_p": 0.8}, 3.0),
        ({"min_p": 0.05, "with_support": True}, None),
        ({"top_k": 40, "top_p": 0.9, "min_p": 0.02, "with_support": True}, 3.0),
    ],
    ids=str,
)
def test_every_way_to_truncate(options: dict[str, Any], weight: float | None) -> None:
    dtypes = (torch.float32, torch.bfloat16)
    for dtype in dtypes if not ON_TRITON else dtypes[:: 1 if weight else -1][:1]:
        cond, other = (2 * torch.randn(2, ROWS, 301)).to(dtype)
        guarded(cond, other, weight, **PLAIN | {"temperature": 0.8} | options, **keys(ROWS, 2**40))


@pytest.mark.parametrize("width", [1, 7, 8, 9, 297, 303])
def test_what_lies_beside_a_row_is_not_drawn(width: int) -> None:
    """Towards the condition and away from it, where -inf at a forbidden id would become +inf."""
    cond, other = torch.randn(2, ROWS, width)
    forbidden = torch.tensor([width // 2]) if width > 1 else None
    options = [{}, {"top_k": 5, "top_p": 0.9}, {"temperature": 0.0}][width % 3]
    guarded(cond, other, 3.0 if width % 2 else -0.5, **PLAIN | {"forbidden": forbidden} | options, **keys(ROWS))


@pytest.mark.skipif(ON_TRITON, reason="hours in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (200, 1.0), (0, 0.9), (200, 0.9)])
def test_many_rows(dtype: torch.dtype, top_k: int, top_p: float) -> None:
    cond, uncond = (torch.randn(2, 600, 1500) * 2).to(dtype).unbind(0)
    drawn = assert_agrees(cond, uncond, **PLAIN | {"cfg_weight": 3.0, "top_k": top_k, "top_p": top_p}, **keys(600))
    assert drawn.token.unique().numel() > 50


TIES = [(1, 0.4013), (3, 0.4013), (300, 0.4013), (1, 1.0), (3, 1.0), (300, 1.0), (1, 1e-3), (3, 1e-3), (300, 1e-3)]


@pytest.mark.parametrize(("top_k", "top_p"), TIES[2:5:2] if ON_TRITON else TIES)
def test_ties_go_to_the_lower_id(top_k: int, top_p: float) -> None:
    cond = torch.randint(0, 3, (ROWS, 300) if ON_TRITON else (64, 1100)).float()
    settings = PLAIN | {"top_k": top_k, "top_p": top_p}
    drawn = assert_agrees(cond, None, **settings, **keys(len(cond)))
    order = cond.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    assert bool((order == drawn.token.unsqueeze(1)).any(dim=1).all())


def test_top_p_tiny_and_top_k_one_are_greedy() -> None:
    cond = torch.randn(ROWS, 290)
    cond[:, 50] = cond[:, 20] = 9.0
    for settings in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 0.0}):
        assert bool((sample(cond, None, **PLAIN | settings, **keys(ROWS)).token == 20).all())


def test_masked_vocabulary() -> None:
    """-inf logits and forbidden ids, a NaN among the latter, are never drawn, even where top_k asks for more."""
    number, ends = (3, [3, 70, 290]) if ON_TRITON else (50, [3, 700, 1999])
    cond = torch.full((number, ends[2] + 1), -torch.inf)
    cond[:, ends] = torch.randn(number, 3)
    cond[:, 120] = torch.nan
    settings = PLAIN | {"top_k": 10, "top_p": 0.99, "forbidden": torch.tensor([120, ends[1]])}
    drawn = sample(cond, None, **settings, **keys(number))
    assert set(drawn.token.tolist()) <= {ends[0], ends[2]}
    assert all(bool(t.isfinite().all()) for t in (drawn.logp, drawn.logp_mixed, drawn.entropy))
    clean, at = cond[:, [ends[0], ends[2]]], (drawn.token == ends[2]).long()[:, None]
    torch.testing.assert_close(drawn.logp, clean.log_softmax(1).gather(1, at)[:, 0])


def check_minus_infinity_in_both_is_forbidden() -> None:
    """Of Triton alone: the others have NaN there."""
    cond, uncond = torch.randn(2, ROWS, 290)
    settings = PLAIN | {"cfg_weight": 3.0} | keys(ROWS)
    want = sample(cond, uncond, **settings | {"forbidden": torch.arange(50)})
    cond[:, :50] = uncond[:, :50] = -torch.inf
    got = sample(cond, uncond, **settings)
    assert all(torch.equal(getattr(got, name), getattr(want, name)) for name in NAMES[:3])


def check_top_p_of_ties_is_exact() -> None:
    """As test_cfg_sample.py has it of the others."""
    settings = PLAIN | {"seed": torch.tensor([SEED]), "offset": torch.tensor([late_offset()])}
    for counts, weights, share, top_k in tied_cases(5, 6, 600):
        if share == 1 or 1 - float(share) >= 1e-5:
            drawn = sample(levels(counts, weights), None, **settings | {"top_k": top_k, "top_p": float(share)})
            assert int(drawn.token) == exact_size(counts, weights, share, top_k) - 1, (counts, weights, share, top_k)
    for vocabulary in (8, 10, 41):
        for top_p, kept in list(uniform_shares(vocabulary))[::9]:
            drawn = sample(torch.full((1, vocabulary), -1.3), None, **settings | {"top_p": top_p})
            assert int(drawn.token) == kept - 1, (vocabulary, top_p)


def test_a_row_depends_on_nothing_but_itself() -> None:
    """Bitwise: threads, order and neighbours do not matter."""
    number, width = (3, 270) if ON_TRITON else (37, 2500)
    cond, uncond = torch.randn(2, number, width).unbind(0)
    key = keys(number, 1 << 40)

    def draw(rows: Tensor) -> list[Tensor]:
        settings = PLAIN | {"cfg_weight": 5.0, "top_k": 300, "top_p": 0.8, "seed": key["seed"][rows]}
        out = sample(cond[rows], uncond[rows], offset=key["offset"][rows], **settings)
        return [getattr(out, name) for name in NAMES]

    everything = torch.arange(number)
    whole = draw(everything)
    torch.set_num_threads(2)
    parts = everything[1:2].split(1) if ON_TRITON else everything.split(6)
    for rows in (torch.randperm(number), *parts, everything[: 0 if ON_TRITON else None]):
        assert all(a[rows].equal(b) for a, b in zip(whole, draw(rows), strict=True))


def test_offsets_beyond_32_bits_and_expanded_arguments() -> None:
    """The upper words of seed and offset count; one row of logits may stand for many, and so may one seed."""
    number = 3 if ON_TRITON else 300
    cond = torch.randn(1, 200).expand(number, -1)
    tokens = {}
    for seed, offset in ((5, 0), (5, 1 << 32), (5 + (1 << 32), 0), (-5, 1 << 62)):
        key = {"seed": torch.tensor(seed).expand(number), "offset": torch.arange(number) + offset}
        tokens[seed, offset] = tuple(assert_agrees(cond, None, **PLAIN, **key).token.tolist())
    assert len(set(tokens.values())) == 4


def test_strided_logits() -> None:
    cond = torch.randn(300, ROWS).t()
    assert_agrees(cond, torch.randn(1, 300).expand(ROWS, -1), **PLAIN | {"cfg_weight": 2.0}, **keys(ROWS))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_poisoned_row_poisons_no_other(value: float) -> None:
    cond = torch.randn(ROWS, 300)
    clean = sample(cond, None, **PLAIN, **keys(ROWS))
    cond[1, 100] = value
    drawn = sample(cond, None, **PLAIN, **keys(ROWS))
    others = torch.arange(ROWS) != 1
    assert drawn.token[others].equal(clean.token[others]) and drawn.logp[others].equal(clean.logp[others])
    assert bool(drawn.logp[1].isnan() & drawn.logp_mixed[1].isnan() & drawn.entropy[1].isnan())
    assert 0 <= int(drawn.token[1]) < 300 and (ON_TRITON or drawn.token[1] == 0)


@pytest.mark.skipif(ON_TRITON, reason="hours in the interpreter")
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
