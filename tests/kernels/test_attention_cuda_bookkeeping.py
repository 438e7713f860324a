"""The CUDA provider of shared-prefix attention, everything but its kernels: run on the CPU with a loop in their place.

The loop has FlashAttention's interface and its habits: log-sum-exp [H, N], +inf for queries without keys, and nothing
written where a segment has no counterpart.  A GPU runs the same checks with the real kernels.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from shared_prefix_cases import (
    CASES,
    CAUSAL,
    GROUPS,
    RAGGED,
    WHOLES,
    Group,
    make_layout,
    operands,
    whole_of,
    with_gradients,
)
from torch import Tensor

from syncr1.kernels.attention_ops import cpu, cuda, reference, two_calls
from syncr1.kernels.attention_ops.cuda import Flash, FlashAttn, TorchFlash, Where
from syncr1.kernels.attention_ops.varlen import SHORT, Plan, VarlenCall, offsets_of

pytestmark = pytest.mark.usefixtures("poisoned_memory")
Triple = tuple[Tensor, Tensor, Tensor]


class Loop:
    """Segment by segment in plain PyTorch, backward by the formula over whatever out and lse it is given."""

    def segments(self, where: Where) -> list[tuple[slice, slice]]:
        for offsets, longest in ((where.cu_queries, where.max_queries), (where.cu_keys, where.max_keys)):
            assert offsets.dtype == torch.int32 and longest >= int(offsets.diff().max()) and longest > 0
        assert where.max_queries > 1  # at 1 and grouped heads FlashAttention takes every segment to have one query
        pairs = zip(*(itertools.pairwise(x.tolist()) for x in (where.cu_queries, where.cu_keys)), strict=True)
        return [(slice(*rows), slice(*keys)) for rows, keys in pairs]

    def scores(self, q: Tensor, k: Tensor, where: Where) -> Tensor:
        scores = torch.einsum("qhe,khe->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * where.scale
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1) & where.causal
        return scores.masked_fill(hidden, -math.inf)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> tuple[Tensor, Tensor]:
        out, lse = torch.full_like(q, math.nan), q.new_full((q.shape[1], q.shape[0]), math.inf)
        for rows, keys in self.segments(where):
            if rows.start < rows.stop and keys.start < keys.stop:
                scores = self.scores(q[rows], k[keys], where)
                lse[:, rows] = scores.logsumexp(-1)
                values = v[keys].repeat_interleave(q.shape[1] // k.shape[1], 1)
                out[rows] = torch.einsum("hqk,khe->qhe", scores.softmax(-1), values)
        return out, lse

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, where: Where) -> Triple:
        assert lse.shape == (q.shape[1], q.shape[0]) and lse.is_contiguous()
        dq, dk, dv = (torch.full_like(x, math.nan) for x in (q, k, v))
        repeats = q.shape[1] // k.shape[1]
        for rows, keys in self.segments(where):
            if rows.start < rows.stop and keys.start < keys.stop:
                probability = (self.scores(q[rows], k[keys], where) - lse[:, rows, None]).exp()
                dp = torch.einsum("qhe,khe->hqk", grad[rows], v[keys].repeat_interleave(repeats, 1))
                delta = (grad[rows] * out[rows]).sum(-1).t()[:, :, None]
                ds = probability * (dp - delta) * where.scale
                dq[rows] = torch.einsum("hqk,khe->qhe", ds, k[keys].repeat_interleave(repeats, 1))
                for whole, part in ((dk, (ds, q[rows])), (dv, (probability, grad[rows]))):
                    each = torch.einsum("hqk,qhe->khe", *part)
                    whole[keys] = each.unflatten(1, (-1, repeats)).sum(2)
        return dq, dk, dv


def run(provider: two_calls.Provider, plan: Plan, tensors: Sequence[Tensor], scale: float) -> list[Tensor]:
    """Output and the three gradients."""
    q, k, v, probe = (x.detach() for x in tensors)
    out, lse = two_calls.forward(provider, plan, q, k, v, scale)
    return [out, *two_calls.backward(provider, plan, probe, q, k, v, out, lse, scale)]


def over_cache(provider: two_calls.Provider, plan: Plan, tensors: Sequence[Tensor], scale: float) -> Tensor:
    """Output of the responses; the prefixes' keys and values are columns of a larger cache, heads first."""
    q, k, v, _ = (x.detach() for x in tensors)
    end = plan.num_prefix_tokens
    cache = [torch.full((2, x.shape[1], end + 3, x.shape[2]), math.nan).to(x) for x in (k, v)]
    for stored, x in zip(cache, (k, v), strict=True):
        stored[1, :, :end] = x[:end].transpose(0, 1)
    own = (q[end:], k[end:], v[end:])
    return two_calls.over_cache(provider, plan, *own, *(stored[1, :, :end] for stored in cache), scale)


def expected(plan: Plan, tensors: Sequence[Tensor], scale: float) -> list[Tensor]:
    q, k, v, probe = tensors
    return with_gradients(reference.attend(plan, q, k, v, scale), (q, k, v), probe)


def assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("groups", CASES.values(), ids=CASES)
def test_two_calls_are_the_reference(groups: list[Group], kv_heads: int) -> None:
    plan = make_layout(groups).plan
    tensors = operands(plan.num_tokens, 4, kv_heads)
    assert_same(run(Flash(Loop()), plan, tensors, 0.3), expected(plan, tensors, 0.3))


@given(groups=GROUPS)
def test_any_layout(groups: list[Group]) -> None:
    plan = make_layout(groups).plan
    if plan.num_tokens:  # the op itself answers for none
        tensors = operands(plan.num_tokens, 2, 1)
        assert_same(run(Flash(Loop()), plan, tensors, 0.3), expected(plan, tensors, 0.3))


@pytest.mark.parametrize("kind", WHOLES)
@pytest.mark.parametrize("groups", CASES.values(), ids=CASES)
def test_whole_parts_are_the_reference(groups: list[Group], kind: str) -> None:
    """With gradients, and over a cache of the prefixes, which is a strided view."""
    plan = make_layout(groups, whole_of(groups, kind)).plan
    tensors = operands(plan.num_tokens, 4, 2)
    wanted = expected(plan, tensors, 0.3)
    assert_same(run(Flash(Loop()), plan, tensors, 0.3), wanted)
    assert_same([over_cache(Flash(Loop()), plan, tensors, 0.3)], [wanted[0][plan.num_prefix_tokens :]])


def test_offsets_of_whole_parts_by_hand() -> None:
    """Rows that have no part in a call lie in segments without a counterpart, and it begins at the first that has."""
    plan = make_layout([(3, [4, 2]), (2, [5])], ([2, 0], [4, 0, 3])).plan
    parts = [*plan.own.disjoint, *plan.own.further]
    #  rows       0 1 | 2 | 3 4 | 5 … 8 | 9 10 | 11 12 13 | 14 15
    #             whole       prefix 1  whole           whole
    assert [(p.queries, p.keys, p.call.causal) for p in parts] == [
        (slice(2, 16), slice(2, 16), True),
        (slice(0, 14), slice(0, 14), False),
        (slice(2, 16), slice(0, 14), False),
    ]
    assert [tuple(x.tolist() for x in p.call.offsets(torch.device("cpu"))) for p in parts] == [
        ([0, 1, 3, 7, 7, 9, 12, 12, 14], [0, 1, 3, 3, 7, 9, 9, 12, 14]),
        ([0, 2, 5, 5, 9, 11, 11, 14], [0, 2, 2, 5, 9, 9, 11, 14]),
        ([0, 1, 12, 12, 14], [0, 2, 2, 11, 14]),
    ]
    assert [(p.call.blind_queries, p.call.blind_keys) for p in parts] == [
        (((3, 7), (9, 12)), ((3, 7), (9, 12))),
        (((2, 5), (9, 11)), ((2, 5), (9, 11))),
        (((1, 12),), ((2, 11),)),
    ]


def test_both_providers_agree_on_rows_without_a_counterpart() -> None:
    """Queries without keys: output 0, log-sum-exp -inf, gradient 0; keys without queries: gradient 0."""
    call = VarlenCall([0, 3, 3, 7, 9], [0, 0, 4, 6, 8], causal=False)
    assert (call.blind_queries, call.blind_keys) == (((0, 3),), ((0, 4),))
    q, _, _, grad = (x.detach() for x in operands(9))
    _, k, v, _ = (x.detach() for x in operands(8))
    results = []
    for provider in (Flash(Loop()), cpu):
        out, lse = provider.forward(q, k, v, call, 0.3)
        assert torch.equal(out[:3], torch.zeros_like(out[:3])) and bool((lse[:3] == -math.inf).all())
        grads = provider.backward(grad, q, k, v, out, lse, call, 0.3)
        assert not grads[0][:3].any() and not grads[1][:4].any() and not grads[2][:4].any()
        results.append([out, lse, *grads])
    assert_same(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merging_is_attention_over_all_keys(dtype: torch.dtype) -> None:
    """Also where one side has all the weight, or no key at all."""
    q, k, v, _ = (x.detach().to(dtype) for x in operands(12))
    q[3:6] *= 100
    scores = torch.einsum("qhe,khe->qhk", q, k)
    pieces = [(scores[..., keys], v[keys]) for keys in (slice(0, 5), slice(5, 12))]
    outs = [torch.einsum("qhk,khe->qhe", s.softmax(-1), part) for s, part in pieces]
    lses = [s.logsumexp(-1) for s, _ in pieces]
    outs[1][0], lses[1][0] = 0, -math.inf
    wanted = torch.einsum("qhk,khe->qhe", scores.softmax(-1), v)
    wanted[0] = outs[0][0]
    alone = lses[0][0].clone()
    two_calls.merge_(outs[0], lses[0], outs[1], lses[1])
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(outs[0], wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lses[0][1:], scores.logsumexp(-1)[1:], rtol=tolerance, atol=0)
    assert torch.equal(lses[0][0], alone)


def test_offsets_are_copied_once() -> None:
    call = make_layout(RAGGED).plan.own.disjoint[0].call
    meta = torch.device("meta")
    assert call.offsets(meta) is call.offsets(meta) and call.offsets(meta)[0].dtype == torch.int32


def test_equal_neighbours_are_views_and_other_short_segments_are_copied_together() -> None:
    """Protects the CPU's speed: what becomes a batch, and that every row is in exactly one."""
    lengths = [20] * 5 + [9, 12, 16, 3, SHORT + 9, SHORT + 9, 40, 0]
    offsets = offsets_of(lengths)
    call = VarlenCall(offsets, offsets, causal=True)
    assert [(run.num_segments, run.query_length) for run in call.runs] == [(5, 20), (2, SHORT + 9), (1, 40)]
    (bucket,) = call.buckets
    assert (bucket.num_segments, bucket.length, bucket.targets.tolist()) == (4, 16, list(range(100, 140)))
    cross = VarlenCall([0, 8, 16, 20], [0, 5, 10, 15], causal=False)
    assert [(run.num_segments, run.query_length, run.key_length) for run in cross.runs] == [(2, 8, 5), (1, 4, 5)]
    assert not cross.buckets


def test_torch_kernels_are_called_as_they_are_declared() -> None:
    """Names and order of their arguments, and the shapes that come back; without a GPU, on meta tensors."""
    q, k, v, grad = (x.detach().to("meta", torch.bfloat16) for x in operands(12, 4, 2))
    where = Where(*(torch.empty(3, dtype=torch.int32, device="meta") for _ in range(2)), 7, 7, True, 0.3)
    settings = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    out, lse = TorchFlash().forward(q, k, v, where)
    assert out.shape == q.shape and lse.shape == (4, 12) and lse.dtype == torch.float32
    grads = TorchFlash().backward(grad, q, k, v, out, lse, where)
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]
    assert torch.utils.deterministic.fill_uninitialized_memory
    now = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    assert now == settings == (True, True)


def test_torch_kernels_take_whole_parts_and_a_strided_cache() -> None:
    """Every call of forward, backward and cache, on meta tensors; the kernels read keys by their strides."""
    plan = make_layout(RAGGED, whole_of(RAGGED, "mixed")).plan
    tensors = [x.detach().to("meta", torch.bfloat16) for x in operands(plan.num_tokens, 4, 2)]
    found = run(Flash(TorchFlash()), plan, tensors, 0.3)
    assert [x.shape for x in found] == [x.shape for x in (tensors[0], *tensors[:3])]
    assert over_cache(Flash(TorchFlash()), plan, tensors, 0.3).shape == tensors[0][plan.num_prefix_tokens :].shape


def test_what_the_kernels_do_not_take() -> None:
    def reason(dtype: torch.dtype, head_size: int, capability: tuple[int, int] = (9, 0)) -> str:
        return str(cuda.unsupported_reason(dtype, cuda.serves_head_size(head_size), capability))

    assert reason(torch.bfloat16, 64) == "None"
    assert "float16 and torch.bfloat16 only" in reason(torch.float32, 64)
    assert "multiples of 8 up to 256" in reason(torch.float16, 36)
    assert "multiples of 8 up to 256" in reason(torch.float16, 264)
    assert "capability 8.0, this GPU has 7.5" in reason(torch.float16, 64, (7, 5))


PAIRS = [
    pytest.param(TorchFlash, id="torch"),
    pytest.param(
        FlashAttn,
        marks=pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash_attn"),
        id="flash_attn",
    ),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("kind", ["causal", "responses", "mixed"])
@pytest.mark.parametrize("groups", CASES.values(), ids=CASES)
def test_on_the_gpu(
    groups: list[Group], kind: str, kv_heads: int, dtype: torch.dtype, pair: type[TorchFlash] | type[FlashAttn]
) -> None:
    """Error against float64 at most twice the reference's in the same dtype, plus a rounding; bitwise equal runs."""
    plan = make_layout(groups, CAUSAL if kind == "causal" else whole_of(groups, kind)).plan
    end = plan.num_prefix_tokens
    tensors = [x.detach().cuda().requires_grad_() for x in operands(plan.num_tokens, 4, kv_heads, 64, dtype)]
    truth = expected(plan, [x.detach().double().requires_grad_() for x in tensors], 0.125)
    plain = expected(plan, tensors, 0.125)
    first, again = (
        [*run(Flash(pair()), plan, tensors, 0.125), over_cache(Flash(pair()), plan, tensors, 0.125)] for _ in range(2)
    )
    for wanted in (truth, plain):
        wanted.append(wanted[0][end:])
    for mine, repeated, theirs, exact in zip(first, again, plain, truth, strict=True):
        assert torch.equal(mine, repeated)
        error, allowed = ((x.double() - exact).norm() for x in (mine, theirs))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * exact.norm()
