"""What the Triton decode step has beside the contract (test_prefix_decode_attention.py): long caches, CUDA graphs.

test_triton_interpreted.py runs every `check_…` of this file in a process of its own.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backends import DEVICE
from decode_cases import assert_close_to_truth, make_step

pytest.importorskip("triton")


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
    assert_close_to_truth(step, output)
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
        assert_close_to_truth(shortened, output.cpu())
