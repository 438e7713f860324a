"""What every op would do on a GPU, seen without one: launches, devices, pointers, and where the host would wait.

The values are tested elsewhere; here a GPU is only pretended, so that grids, guards, strides and read-backs are real.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from absent_gpu import DEVICE, AbsentGPU, Launch, absent_gpu, strided
from absent_gpu import OPS as REGISTERED
from torch import Tensor

from syncr1.kernels import api
from syncr1.kernels.ops import late_gradients as late
from syncr1.kernels.ops import logp as ops
from syncr1.kernels.streams import TokenStream
from syncr1.kernels.terms import Head

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces launches")

TOKENS, SEQUENCES, GROUPS, WIDTH, VOCABULARY, ROWS = 65536, 64, 8, 64, 102400, 64
STRIDED = {
    "products",
    "out",
    "cond",
    "uncond",
    "query",
    "key",
    "value",
    "prefix_keys",
    "prefix_values",
    "own_keys",
    "own_values",
}
"""Pointers that come with their strides."""
Maker = Callable[..., Tensor]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[AbsentGPU]:
    with absent_gpu(monkeypatch) as made:
        yield made


def offsets(make: Maker, num: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return make(num + 1, dtype=dtype)


def grpo_loss(make: Maker, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "logp": make(TOKENS),
        "old_logp": make(TOKENS),
        "rewards": make(SEQUENCES),
        "cu_seqlens": offsets(make, SEQUENCES),
        "group_offsets": offsets(make, GROUPS),
        "loss_mask": make(TOKENS, dtype=torch.bool),
        "modality": make(TOKENS, dtype=torch.uint8),
        "entropy": make(TOKENS),
    }
    return api.grpo_loss(**arguments | changes)


def stream(make: Maker, rows: int, vocabulary: int, modality: Any, dtype: torch.dtype = torch.bfloat16) -> TokenStream:
    return TokenStream(
        make(rows, WIDTH, dtype=dtype).requires_grad_(),
        make(vocabulary, WIDTH, dtype=dtype).requires_grad_(),
        make(rows, dtype=torch.int64),
        make(rows, dtype=torch.int64),
        make(vocabulary, dtype=dtype).requires_grad_(),
        modality=modality,
    )


def linear_grpo_loss(make: Maker, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    streams = [stream(make, 5000, VOCABULARY, "text", dtype), stream(make, 5000, 16384, "image", dtype)]
    arguments: dict[str, Any] = {
        "rewards": make(SEQUENCES),
        "cu_seqlens": offsets(make, SEQUENCES),
        "group_offsets": offsets(make, GROUPS),
        "old_logp": make(TOKENS),
    }
    return api.linear_grpo_loss(streams, **arguments | changes)


def late_gradients(make: Maker) -> None:
    streams = [stream(make, 5000, VOCABULARY, "text", torch.float16), stream(make, 5000, 1001, "image", torch.float16)]
    with torch.no_grad():
        lists = late.StreamLists.of(streams)
    scored = (make(TOKENS), make(TOKENS, dtype=torch.float64), make(TOKENS))
    late.form_gradients(late.LateGradientInputs(lists, *scored, [True] * 6, "triton"))


def linear_logp(make: Maker) -> None:
    s = stream(make, 5000, 1001, "text")
    operands = (s.hidden.detach(), s.weight.detach(), s.bias.detach(), s.targets)  # type: ignore[union-attr]
    inputs = ops.HiddenInputs(*operands, 1.0, None, make(5000, 32, dtype=torch.int32), "triton")
    logp, entropy, lse = ops.score_head(inputs)
    rows = ops.RowGradients(lse, entropy, logp, entropy)
    ops.head_gradient(ops.HiddenGradientInputs(inputs, rows, [True] * 3))


def selective_logp(make: Maker) -> None:
    of_logits(make(300, 1001, dtype=torch.bfloat16), make(300, dtype=torch.int64))


def of_logits(logits: Tensor, targets: Tensor) -> None:
    inputs = ops.LogitInputs(logits, targets, 1.0, None, None, "triton")
    logp, entropy, lse = ops.score_logits(inputs)
    ops.logits_gradient(ops.LogitGradientInputs(inputs, ops.RowGradients(lse, entropy, logp, entropy)))


def cfg_sample(make: Maker, vocabulary: int = 16384, **changes: Any) -> Any:
    arguments: dict[str, Any] = {"cfg_weight": 5.0, "top_k": 100, "top_p": 0.9, "seed": 3, "offset": 4}
    cond, uncond = (make(ROWS, vocabulary, dtype=torch.bfloat16) for _ in range(2))
    return api.cfg_sample(cond, uncond, **arguments | changes)


def decode(make: Maker) -> None:
    new = (make(ROWS, 8, 128, dtype=torch.bfloat16) for _ in range(3))
    caches = [torch.empty(8, 400, 128, dtype=torch.bfloat16, device=DEVICE) for _ in range(4)]
    api.prefix_decode_attention(*new, *caches, make(ROWS, 4, dtype=torch.int64))


OPS: dict[str, Callable[[Maker], Any]] = {
    "group_advantages": lambda make: api.group_advantages(make(SEQUENCES), offsets(make, GROUPS)),
    "group_advantages of the batch": lambda make: api.group_advantages(
        make(SEQUENCES, 3), offsets(make, GROUPS), weights=make(3), scale="batch"
    ),
    "dgs_select": lambda make: api.dgs_select(make(SEQUENCES), offsets(make, GROUPS)),
    "grpo_plan": lambda make: api.grpo_plan(make(SEQUENCES), offsets(make, GROUPS), dgs="variance_mass"),
    "grpo_loss": grpo_loss,
    "grpo_loss, sequence ratios": lambda make: grpo_loss(
        make, ratio="sequence", loss_type="grpo", beta=0.1, ref_logp=make(TOKENS), is_ratio=make(TOKENS)
    ),
    "grpo_loss, two rewards": lambda make: grpo_loss(
        make, rewards={"text": make(SEQUENCES, 2), "image": make(SEQUENCES)}, num_items=make(1), dgs="top_k"
    ),
    "linear_grpo_loss": linear_grpo_loss,
    "linear_grpo_loss, two sweeps": lambda make: linear_grpo_loss(make, ratio="sequence"),
    "linear_grpo_loss, items per modality": lambda make: linear_grpo_loss(make, num_items={"text": 3.0, "image": 9.0}),
    "linear_grpo_loss, float16": lambda make: linear_grpo_loss(make, torch.float16),
    "linear_grpo_loss, float16, backward": late_gradients,
    "linear_logp": linear_logp,
    "selective_logp": selective_logp,
    "cfg_sample": cfg_sample,
    "cfg_sample, no multiple of 16": lambda make: cfg_sample(make, 1001, seed=make(ROWS, dtype=torch.int64)),
    "prefix_decode_attention": decode,
}
READ_BACKS = {"linear_grpo_loss": 1, "linear_grpo_loss, two sweeps": 2, "linear_grpo_loss, items per modality": 1}
READ_BACKS |= {"linear_grpo_loss, float16": 1, "linear_grpo_loss, float16, backward": 1}
"""Of every other op: none."""


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("name", OPS)
def test_a_launch_is_one_that_a_gpu_can_make(gpu: AbsentGPU, name: str, contiguous: bool) -> None:
    """On the tensors' device; a grid of one dimension, whose limit is 2³¹ − 1; no pointer to strided memory whose
    strides the kernel does not know."""
    make = gpu.tensor if contiguous else lambda *shape, **options: strided(gpu.tensor, *shape, **options)
    OPS[name](make)
    assert gpu.launches
    for launch in gpu.launches:
        assert launch.device == DEVICE, launch.kernel
        assert len(launch.grid) == 1 and 0 < launch.grid[0] < 2**31, (launch.kernel, launch.grid)
        for argument, tensor in launch.tensors():
            where = f"{launch.kernel}: {argument}"
            assert tensor.device == DEVICE, where
            assert tensor.is_contiguous() or argument in STRIDED, f"{where} {tensor.stride()}"
            assert tensor.stride(-1) == 1 if tensor.dim() and tensor.shape[-1] > 1 else True, where
        assert all(abs(number) < 2**63 for _, number in launch.numbers())


@pytest.mark.parametrize("name", OPS)
def test_the_host_waits_for_one_value_at_most(gpu: AbsentGPU, name: str) -> None:
    """Counted in the ops that torch dispatches, backward included."""
    gpu.answer = 2000
    OPS[name](gpu.tensor)
    assert len(gpu.waits) == READ_BACKS.get(name, 0), gpu.waits


def test_a_row_begins_where_loads_of_16_bytes_can(gpu: AbsentGPU) -> None:
    """The workspace and what the sampler reads, for a vocabulary that is no multiple of 16; and 2³¹ elements apart."""
    linear_logp(gpu.tensor)
    cfg_sample(gpu.tensor, 1001)
    rows = {"score_rows_kernel": "stride", "gradient_rows_kernel": "stride", "sample_kernel": "cond_stride"}
    seen = {launch.kernel: launch.arguments[rows[launch.kernel]] for launch in gpu.launches}
    assert seen == dict.fromkeys(rows, 1008)
    big = torch.empty(2**15, 2**17, dtype=torch.bfloat16, device=DEVICE)
    api.selective_logp(big, torch.empty(2**15, dtype=torch.int64, device=DEVICE))
    launch = gpu.launches[-1]
    assert launch.grid == (2**15,) and launch.arguments["stride"] == 2**17  # row · stride is formed in 64 bits


def ragged(launch: Launch) -> bool:
    """Its rows are read in 16 bytes up to their end."""
    form = launch.arguments.get("FORM")
    return bool(launch.arguments.get("RAGGED") or getattr(form, "RAGGED", False))


@pytest.mark.parametrize("shift", [0, 1, 8])
@pytest.mark.parametrize("stride", [1001, 1008, 1016])
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_are_read_in_16_bytes_only_where_they_lie_so(gpu: AbsentGPU, rows: int, stride: int, shift: int) -> None:
    """Wherever the caller's begin: whole 16 bytes of rows that begin elsewhere may end on a page that is not there."""

    def placed(count: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        flat = gpu.tensor(shift + count * stride, dtype=dtype)
        return flat[shift:].view(count, stride)[:, :1001]

    logits, targets = placed(rows), gpu.tensor(rows, dtype=torch.int64)
    of_logits(logits, targets)
    api.cfg_sample(logits, placed(rows), cfg_weight=2.0, seed=1, offset=2)
    from syncr1.kernels.triton_ops import score_rows

    head = Head(placed(1)[0])
    score_rows(gpu.tensor(rows, 1008, dtype=torch.bfloat16)[:, :1001], targets, head)
    assert {launch.kernel for launch in gpu.launches} == {"score_rows_kernel", "gradient_rows_kernel", "sample_kernel"}
    assert ragged(gpu.launches[-1]) and ragged(gpu.launches[-2])
    for launch in filter(ragged, gpu.launches):
        for name, tensor in launch.tensors():
            if name in ("products", "out", "cond", "uncond", "shift", "forbidden"):
                assert tensor.data_ptr() % 16 == 0, (launch.kernel, name)
                assert tensor.dim() == 1 or tensor.shape[0] == 1 or tensor.stride(0) % 16 == 0, (launch.kernel, name)


def test_ops_that_read_back_stay_out_of_cuda_graphs() -> None:
    names = (*REGISTERED, "linear_grpo_loss_backward")
    tags = {name: getattr(torch.ops.syncr1, name).default.tags for name in names}
    tagged = {name for name, own in tags.items() if torch.Tag.cudagraph_unsafe in own}
    assert tagged == {"linear_grpo_loss", "linear_grpo_loss_backward", "dgs_select", "grpo_plan"}
