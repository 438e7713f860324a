"""The C++ trunk ops against float64 and torch's own formulas, under every instruction set of the machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_library import INSTRUCTION_SETS, Guarded, guarded_outputs, using
from torch import Tensor
from torch.nn.functional import silu

from syncr1.kernels import native
from syncr1.kernels.native.trunk import rms_norm, rope, silu_mul

pytestmark = pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))
DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 31, 63, 64, 65, 512, 1024, 1025, 1408]) | st.integers(1, 2100)
HEAD_WIDTHS = st.sampled_from([1, 2, 3, 7, 8, 16, 30, 31, 33, 64, 80, 128, 130])
SCALES = st.sampled_from([1e-3, 1.0, 30.0])
EPS = 1e-5


@pytest.fixture(params=INSTRUCTION_SETS, scope="module", autouse=True)
def _instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    with using(request.param):
        yield


def torch_rms_norm(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """As LlamaRMSNorm; of float64 all of it is float64."""
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def torch_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos[:, None] + torch.cat((-high, low), dim=-1) * sin[:, None]


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def assert_as_good_as(output: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """Each row's greatest error is at most twice that of torch, or the roundings that a row of few values may show."""
    assert output.dtype == theirs.dtype and output.shape == truth.shape and output.is_contiguous()
    error, allowed = ((t.double() - truth).abs().amax(-1) for t in (output, theirs))
    floor = truth.abs().amax(-1) * torch.finfo(output.dtype).eps * (2 if output.dtype == torch.float32 else 1)
    assert bool((error <= torch.maximum(2 * allowed, floor)).all()), (error, allowed)


@given(
    num_rows=st.integers(1, 5), width=WIDTHS, scale=SCALES, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1 << 30)
)
def test_rms_norm(num_rows: int, width: int, scale: float, dtype: torch.dtype, seed: int) -> None:
    x = Guarded(randn(num_rows, width, seed=seed, dtype=dtype, scale=scale)).matrix
    weight = randn(width, seed=seed + 1, dtype=dtype)
    with guarded_outputs():
        output = rms_norm(x, weight, EPS)
    assert_as_good_as(output, torch_rms_norm(x, weight), torch_rms_norm(x.double(), weight.double()))


def test_rms_norm_of_equal_values_does_not_drift() -> None:
    """Float sums of many equal squares err in one direction."""
    x, weight = torch.full((2, 60001), 1.1), torch.ones(60001)
    truth = torch_rms_norm(x.double(), weight.double())
    assert float((rms_norm(x, weight, EPS).double() - truth).abs().max()) < 1.5e-7


@given(
    num_rows=st.integers(1, 5), width=WIDTHS, scale=SCALES, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1 << 30)
)
def test_silu_mul(num_rows: int, width: int, scale: float, dtype: torch.dtype, seed: int) -> None:
    gate = Guarded(randn(num_rows, width, seed=seed, dtype=dtype, scale=scale)).matrix
    up = Guarded(randn(num_rows, width, seed=seed + 1, dtype=dtype), gap=12).matrix
    with guarded_outputs():
        output = silu_mul(gate, up)
    assert_as_good_as(output, silu(gate) * up, silu(gate.double()) * up.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_far_out(dtype: torch.dtype) -> None:
    """Relative error over the whole line, and what is no number."""
    gate = torch.linspace(-86, 86, 4001).to(dtype)[None]
    output, truth = (silu_mul(gate, torch.ones_like(gate)), silu(gate.double()))
    relative = (output.double() - truth).abs() / truth.abs().clamp_min(1e-35)
    assert float(relative.max()) < (5e-7 if dtype == torch.float32 else 4e-3)
    far = torch.tensor([[-1e4, -200.0, -0.0, 0.0, 200.0, 3e38, torch.inf, torch.nan, -torch.inf]], dtype=dtype)
    output, theirs = silu_mul(far, torch.ones_like(far)), silu(far)
    torch.testing.assert_close(output, theirs, rtol=0, atol=1e-30, equal_nan=True)


@given(
    num_rows=st.integers(1, 4),
    heads=st.sampled_from([(1, 1), (3, 3), (8, 2), (5, 1)]),
    width=HEAD_WIDTHS,
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1 << 30),
)
def test_rope(num_rows: int, heads: tuple[int, int], width: int, dtype: torch.dtype, seed: int) -> None:
    """Bitwise torch's; queries and keys are parts of one product, the angles' rows lie apart."""
    num_heads, num_kv_heads = heads
    both = Guarded(randn(num_rows, sum(heads) * width, seed=seed, dtype=dtype)).matrix
    q, k = both.unflatten(1, (-1, width)).split(heads, dim=1)
    angles = randn(num_rows, width, seed=seed + 1, scale=9.0)
    cos, sin = (Guarded(t.to(dtype), gap).matrix for t, gap in ((angles.cos(), 7), (angles.sin(), 10)))
    with guarded_outputs():
        q_output, k_output = rope(q, k, cos, sin)
    assert q_output.shape == (num_rows, num_heads, width) and k_output.shape == (num_rows, num_kv_heads, width)
    for output, x in ((q_output, q), (k_output, k)):
        assert output.is_contiguous() and output.equal(torch_rope(x, cos, sin))
        truth = torch_rope(x.double(), angles.cos().to(dtype).double(), angles.sin().to(dtype).double())
        torch.testing.assert_close(output.double(), truth, rtol=0, atol=20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_strides(dtype: torch.dtype) -> None:
    """Heads outside rows, and one row of angles for all."""
    q, k = randn(4, 6, 24, seed=0, dtype=dtype).transpose(0, 1), randn(2, 6, 24, seed=1, dtype=dtype).transpose(0, 1)
    cos, sin = (randn(1, 24, seed=seed, dtype=dtype).expand(6, -1) for seed in (2, 3))
    outputs = rope(q, k, cos, sin)
    assert outputs[0].equal(torch_rope(q, cos, sin)) and outputs[1].equal(torch_rope(k, cos, sin))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1000, 4099])
def test_a_row_depends_on_nothing_but_itself(dtype: torch.dtype, width: int) -> None:
    """Bitwise: alone, in any company, with any number of threads, beside a poisoned row."""
    x, up = (randn(97, width, seed=seed, dtype=dtype) for seed in (0, 1))
    weight = randn(width, seed=2, dtype=dtype)
    heads = width // 20

    def turn(a: Tensor, b: Tensor) -> Tensor:
        q, k = (t[:, : heads * 20].unflatten(1, (heads, 20)) for t in (a, b))
        return torch.cat(rope(q, k, b[:, -20:], a[:, -20:]), dim=1)

    calls: list[Callable[[Tensor, Tensor], Tensor]] = [lambda a, _: rms_norm(a, weight, EPS), silu_mul, turn]
    for call in calls:
        whole = call(x, up)
        for rows in (torch.randperm(97), *torch.arange(97).split(31), torch.tensor([96])):
            assert call(x[rows], up[rows]).equal(whole[rows])
        poisoned = x.clone()
        poisoned[40] = torch.nan
        output = call(poisoned, up)
        others = torch.arange(97) != 40
        assert output[others].equal(whole[others]) and bool(torch.isnan(output[40].float()).all())
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            assert call(x, up).equal(whole)
        torch.set_num_threads(1)
