"""The C++ decode step against torch's attention in float64, under every instruction set of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from decode_cases import Step, assert_close_to_truth, assert_written, make_step
from hypothesis import given
from hypothesis import strategies as st
from native_library import INSTRUCTION_SETS, guarded_outputs, using
from torch import Tensor

from syncr1.kernels import native
from syncr1.kernels.native.decode_attention import prefix_decode_attention
from syncr1.kernels.terms import DecodeStep

pytestmark = pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=INSTRUCTION_SETS, scope="module", autouse=True)
def _instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    with using(request.param):
        yield


def attend(step: Step, scale: float | None = None) -> Tensor:
    factor = step.query.shape[2] ** -0.5 if scale is None else scale
    return prefix_decode_attention(DecodeStep(*step.tensors(), factor, "native"))


LENGTHS = st.sampled_from([0, 1, 3, 15, 16, 17, 63, 64, 65, 128, 150])


@given(
    prefixes=st.lists(st.tuples(st.sampled_from([1, 2, 3, 5, 9]), LENGTHS), min_size=1, max_size=3),
    lengths=st.lists(LENGTHS, min_size=27, max_size=27),
    heads=st.sampled_from([(1, 1), (3, 3), (8, 2), (7, 1), (40, 1)]),
    width=st.sampled_from([1, 3, 4, 7, 8, 16, 17, 31, 64, 80, 128]),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.0, 1.0, 5.0]),
    scale=st.sampled_from([None, 0.37]),
    seed=st.integers(0, 1 << 30),
)
def test_attention(
    prefixes: list[tuple[int, int]],
    lengths: list[int],
    heads: tuple[int, int],
    width: int,
    dtype: torch.dtype,
    spread: float,
    scale: float | None,
    seed: int,
) -> None:
    own_lengths = lengths[: sum(rows for rows, _ in prefixes)]
    step = make_step(prefixes, own_lengths, heads, width, dtype=dtype, seed=seed, spread=spread)
    after = step.to(dtype)
    with guarded_outputs():
        output = attend(after, scale)
    assert output.dtype == dtype
    assert_close_to_truth(step, output, scale)
    assert_written(step, after)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
@pytest.mark.parametrize("width", [64, 24])
def test_a_row_depends_on_nothing_but_itself(dtype: torch.dtype, heads: tuple[int, int], width: int) -> None:
    """Bitwise: alone, in any company and order, with any number of threads."""
    prefixes, lengths = [(17, 200), (2, 130), (1, 0), (14, 77)], [*range(0, 68, 2)]
    step = make_step(prefixes, lengths, heads, width, dtype=dtype)
    whole = attend(step.to(dtype))
    order = torch.randperm(34)
    for rows in (order, *torch.arange(34).split(5), *order.split(3), *torch.arange(34).split(1)):
        assert attend(step.rows(rows)).equal(whole[rows])
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert attend(step.to(dtype)).equal(whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_that_rise_and_fall(dtype: torch.dtype) -> None:
    """The running maximum changes in every tile, in none, or lies far above what exp can hold."""
    for slope in (0.5, -0.5, 40.0):
        step = make_step([(3, 400)], [200, 130, 0], (2, 2), 32, dtype=dtype)
        ramp = torch.linspace(-5, 5, step.prefix_keys.shape[1])[:, None] * slope
        tall = replace(step, prefix_keys=(step.prefix_keys.float() * 0.1 + ramp).to(dtype), query=step.query.abs())
        assert_close_to_truth(tall, attend(tall.to(dtype)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["query", "own_keys", "own_values", "value"])
def test_a_poisoned_row_poisons_no_other(name: str, value: float) -> None:
    step = make_step([(9, 70)], [5] * 9, (4, 2), 16)
    clean = attend(step.to(torch.float32))
    poisoned = step.to(torch.float32)
    column = int(poisoned.spans[4, 2])
    at = (slice(None), column) if name.startswith("own") else (4,)
    getattr(poisoned, name)[at] = value
    output = attend(poisoned)
    others = torch.arange(9) != 4
    assert output[others].equal(clean[others]) and not bool(torch.isfinite(output[4]).all())


def test_prefixes_that_overlap() -> None:
    """Neighbours share a prefix only where both its start and its length are the same."""
    step = make_step([(6, 100)], [3, 9, 0, 1, 2, 20], (4, 2), 16)
    step.spans[:, 0] += torch.tensor([0, 0, 0, 60, 60, 0])
    step.spans[:, 1] = torch.tensor([100, 100, 30, 30, 40, 30])
    assert_close_to_truth(step, attend(step.to(torch.float32)))


def test_strides_of_rows_heads_and_columns() -> None:
    """Expanded queries, caches whose heads lie between the columns, a prefix that belongs to another's own cache."""
    step = make_step([(4, 33)], [3, 9, 0, 1], (2, 2), 8)
    between = step.map(lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() == 3 else t)
    assert attend(between).equal(attend(step.to(torch.float32)))
    alike = replace(step, query=step.query[:1].expand(4, -1, -1), key=step.key[:, :1].expand(-1, 2, -1))
    assert_close_to_truth(alike, attend(alike.to(torch.float32)))
