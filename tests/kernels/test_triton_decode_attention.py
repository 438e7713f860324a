"""The Triton decode step against torch's attention in float64, in Triton's interpreter.

test_triton_interpreted.py runs every `check_…` of this file in a process of its own.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backends import DEVICE
from decode_cases import Step, assert_close_to_truth, assert_written, attention, make_step
from torch import Tensor

pytest.importorskip("triton")


def attend(step: Step, scale: float | None = None) -> Tensor:
    """On the device, through the public op; the step's own caches receive the new token."""
    from syncr1.kernels.api import prefix_decode_attention

    there = step.map(lambda t: t.to(DEVICE))
    output = prefix_decode_attention(*there.tensors(), scale=scale, backend="triton").cpu()
    step.own_keys.copy_(there.own_keys)
    step.own_values.copy_(there.own_values)
    return output


def assert_close(step: Step, output: Tensor, scale: float | None = None) -> None:
    """The interpreter truncates where a GPU rounds: one unit in the last place of a bfloat16."""
    if DEVICE == "cpu" and output.dtype == torch.bfloat16:
        torch.testing.assert_close(output.double(), attention(step, scale), rtol=2.0**-7, atol=1e-5)
    else:
        assert_close_to_truth(step, output, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "width", "scale"),
    [((2, 2), 64, None), ((1, 1), 128, 0.2), ((6, 2), 16, None), ((5, 1), 5, 0.05), ((8, 1), 80, None)],
)
def check_attention(dtype: torch.dtype, heads: tuple[int, int], width: int, scale: float | None) -> None:
    lengths = [0, 1, 31, 33, 64, 2, 0]
    step = make_step([(3, 70), (1, 0), (2, 1), (1, 32)], lengths, heads, width, dtype=dtype)
    after = step.to(dtype)
    output = attend(after, scale)
    assert output.dtype == dtype and output.is_contiguous()
    assert_close(step, output, scale)
    assert_written(step, after)


def check_a_row_depends_on_nothing_but_itself() -> None:
    """Bitwise: alone, in any company and order."""
    step = make_step([(3, 40), (2, 0)], [5, 0, 36, 7, 1], (4, 2), 16)
    whole = attend(step.to(torch.float32))
    order = [3, 0, 4, 1, 2]
    for rows in (order, [2], [3, 4]):
        assert attend(step.rows(rows)).equal(whole[rows])


def check_rows_of_padding_harm_nobody() -> None:
    step = make_step([(3, 9)], [5, 0, 3], (2, 2), 16)
    alone = attend(step.to(torch.float32))
    dead = torch.tensor([[0, 0, step.own_keys.shape[1] - 1, 0]]).expand(3, -1)
    poisoned = [torch.cat([t, torch.full_like(t, torch.nan)]) for t in step.tensors()[:3]]
    padded = Step(*poisoned, *step.tensors()[3:7], torch.cat([step.spans, dead]))
    assert attend(padded)[:3].equal(alone)


def check_scores_that_rise_and_fall() -> None:
    for slope in (5.0, -5.0, 400.0):
        step = make_step([(1, 100)], [40], (2, 2), 16)
        ramp = torch.linspace(-1, 1, step.prefix_keys.shape[1])[:, None] * slope
        tall = replace(step, prefix_keys=step.prefix_keys * 0.1 + ramp, query=step.query.abs())
        assert_close(tall, attend(tall.to(torch.float32)))


def check_addresses_beyond_32_bits() -> None:
    """A column of a cache with more than 2³¹ elements, of which little is ever touched."""
    width, far = 16, (1 << 31) // 16 + 5
    from syncr1.kernels.terms import DecodeStep
    from syncr1.kernels.triton_ops.decode_attention import prefix_decode_attention

    step = make_step([(1, 6)], [4], (1, 1), width)
    huge = torch.empty(1, far + 20, width, device=DEVICE)
    start = int(step.spans[0, 2])
    huge[:, far : far + 4] = step.own_keys[:, start : start + 4].to(DEVICE)
    values = torch.empty_like(huge)
    values[:, far : far + 4] = step.own_values[:, start : start + 4].to(DEVICE)
    spans = step.spans.clone()
    spans[0, 2] = far
    near = [t.to(DEVICE) for t in step.tensors()[:5]]
    output = prefix_decode_attention(DecodeStep(*near, huge, values, spans.to(DEVICE), 0.25, "triton")).cpu()
    assert_close(step, output)
    assert huge[0, far + 4].cpu().equal(step.key[0, 0])


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def check_inside_a_cuda_graph() -> None:
    """One graph serves every length: the spans are read when it runs, and nothing waits for the host."""
    from syncr1.kernels.api import prefix_decode_attention

    step = make_step([(3, 40), (2, 0)], [5, 0, 36, 7, 1], (4, 2), 64)
    there = step.map(lambda t: t.to(DEVICE))
    prefix_decode_attention(*there.tensors())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = prefix_decode_attention(*there.tensors())
    for shorter in (0, 1):
        shortened = replace(step, spans=step.spans - shorter * (step.spans > 1) * torch.tensor([0, 1, 0, 1]))
        there.spans.copy_(shortened.spans)
        graph.replay()
        assert_close(shortened, output.cpu())
