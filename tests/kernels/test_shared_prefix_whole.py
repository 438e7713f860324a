"""Prefixes and responses that begin with tokens which see each other whole, against a masked softmax in float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from shared_prefix_cases import (
    CASES,
    EQUAL,
    GROUPS,
    RAGGED,
    WHOLES,
    Group,
    Whole,
    assert_all_close,
    dense,
    drawn_whole,
    make_layout,
    operands,
    seen_by,
    whole_of,
    with_gradients,
)

from syncr1.kernels.api import SharedPrefixLayout, shared_prefix_attention
from syncr1.kernels.attention_ops.varlen import offsets_of

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def assert_true(groups: Sequence[Group], whole: Whole, heads: int, kv_heads: int, backend: str) -> None:
    layout = make_layout(groups, whole)
    q, k, v, probe = operands(layout.num_tokens, heads, kv_heads)
    out = shared_prefix_attention(q, k, v, layout, backend=backend)
    truth = dense(q, k, v, seen_by(groups, whole))
    assert_all_close(
        with_gradients(out, (q, k, v), probe), with_gradients(truth, (q, k, v), probe), forward=1e-12, gradient=1e-9
    )


@pytest.mark.parametrize("backend", ["flash", "reference"])
@pytest.mark.parametrize("kind", WHOLES)
@pytest.mark.parametrize("groups", CASES.values(), ids=CASES)
def test_forward_and_gradients_are_the_masked_softmax(groups: list[Group], kind: str, backend: str) -> None:
    assert_true(groups, whole_of(groups, kind), 4, 2, backend)


@given(groups=GROUPS, heads=st.sampled_from([(4, 4), (4, 2), (2, 1), (1, 1)]), data=st.data())
def test_any_layout(groups: list[Group], heads: tuple[int, int], data: st.DataObject) -> None:
    """Empty prefixes, empty responses, whole parts of no, one, some and all tokens, next to each other."""
    assert_true(groups, drawn_whole(data.draw, groups), *heads, "flash")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", WHOLES)
def test_error_is_at_most_twice_that_of_dense_attention(kind: str, dtype: torch.dtype) -> None:
    """Against float64, forward and every gradient; the peer is torch's dense attention with a mask, same dtype."""
    whole = whole_of(RAGGED, kind)
    layout, seen = make_layout(RAGGED, whole), seen_by(RAGGED, whole)
    q, k, v, probe = operands(layout.num_tokens, 4, 2, 16, dtype)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = with_gradients(dense(*wide, seen), wide, probe.double())
    batch = (x.transpose(0, 1)[None] for x in (q, k, v))
    peer_out = F.scaled_dot_product_attention(*batch, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1)
    peer = with_gradients(peer_out, (q, k, v), probe)
    mine = with_gradients(shared_prefix_attention(q, k, v, layout, backend="flash"), (q, k, v), probe)
    for name, found, theirs, exact in zip(("out", "dq", "dk", "dv"), mine, peer, truth, strict=True):
        error, allowed = ((x.double() - exact).norm() for x in (found, theirs))
        assert error <= 2 * allowed, f"{name}: {error:.2e} > 2 * {allowed:.2e}"


@pytest.mark.parametrize("kind", ["all", "begin", "mixed"])
def test_nothing_leaks(kind: str) -> None:
    """A change in one prefix or response moves, to the last bit, only those rows that see it."""
    whole = whole_of(RAGGED, kind)
    layout, seen = make_layout(RAGGED, whole), seen_by(RAGGED, whole)
    q, k, v, _ = (x.detach() for x in operands(layout.num_tokens, dtype=torch.float32))
    before = shared_prefix_attention(q, k, v, layout)
    prefixes = offsets_of([prefix for prefix, _ in RAGGED])
    responses = [layout.num_prefix_tokens + o for o in offsets_of([n for _, lengths in RAGGED for n in lengths])]
    for start, end in [*itertools.pairwise(prefixes), *itertools.pairwise(responses)]:
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[start:end] += 1
        same = (shared_prefix_attention(*changed, layout) == before).all(-1).all(-1)
        assert torch.equal(~same, seen[:, start:end].any(1))


def test_two_runs_are_bitwise_equal() -> None:
    layout = make_layout(RAGGED, whole_of(RAGGED, "mixed"))
    q, k, v, probe = operands(layout.num_tokens, 4, 2, dtype=torch.float32)
    first, second = (with_gradients(shared_prefix_attention(q, k, v, layout), (q, k, v), probe) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_opcheck() -> None:
    """Schema, autograd registration, fake kernels and AOT dispatch, static and dynamic."""
    layout = make_layout(RAGGED, whole_of(RAGGED, "mixed"))
    q, k, v, probe = operands(layout.num_tokens, 4, 2)
    ops = torch.ops.syncr1
    torch.library.opcheck(ops.shared_prefix_attention.default, (q, k, v, *layout.host_offsets, 0.3))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = ops.shared_prefix_attention(q, k, v, *layout.host_offsets, 0.3)
    given_tensors = (q, k, v, *layout.host_offsets, 0.3, out, lse, probe)
    torch.library.opcheck(ops.shared_prefix_attention_backward.default, given_tensors)


def test_compile_without_graph_breaks() -> None:
    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SharedPrefixLayout) -> torch.Tensor:
        return shared_prefix_attention(q * 2, k, v, layout).tanh()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    layout = make_layout(EQUAL, whole_of(EQUAL, "mixed"))
    q, k, v, probe = operands(layout.num_tokens, 4, 2)
    expected = with_gradients(layer(q, k, v, layout), (q, k, v), probe)
    assert_all_close(with_gradients(compiled(q, k, v, layout), (q, k, v), probe), expected, 1e-12, 1e-12)


# The layout -----------------------------------------------------------------------------------------------------------


def test_what_is_causal_is_one_plan() -> None:
    """None, zeros and ones (a token sees itself either way) are today's calls."""
    plan = make_layout(RAGGED).plan
    sizes = [len(RAGGED), sum(len(lengths) for _, lengths in RAGGED)]
    assert make_layout(RAGGED, ([0] * sizes[0], [0] * sizes[1])).plan is plan
    assert make_layout(RAGGED, (None, [0] * sizes[1])).plan is plan
    assert make_layout(EQUAL, ([1] * 3, [1] * 12)).plan is make_layout(EQUAL).plan
    assert len(plan.own.disjoint) == 1 and not plan.own.further
    whole = make_layout(EQUAL, (None, [5] * 12)).plan
    assert whole is make_layout(EQUAL, ([0] * 3, [5] * 12)).plan and whole is not make_layout(EQUAL).plan


def test_equal_whole_responses_are_one_view() -> None:
    """Protects the CPU's speed in the case that masked images are: causal prompts, many responses of one length."""
    plan = make_layout([(9, [18] * 8), (7, [18] * 8)], (None, [18] * 16)).plan
    causal, whole = plan.own.disjoint
    assert not plan.own.further
    assert (causal.queries, causal.keys, whole.queries, whole.keys) == (*[slice(0, 16)] * 2, *[slice(16, 304)] * 2)
    assert [(run.num_segments, run.query_length) for run in whole.call.runs] == [(16, 18)] and not whole.call.buckets
    assert [(run.num_segments, run.query_length) for run in plan.responses.disjoint[0].call.runs] == [(16, 18)]


def test_positions_and_predicting_rows_are_those_of_causal_segments() -> None:
    causal, whole = make_layout(RAGGED), make_layout(RAGGED, whole_of(RAGGED, "mixed"))
    assert torch.equal(whole.position_ids(), causal.position_ids())
    assert torch.equal(whole.predicting_rows(), causal.predicting_rows())


def test_to_moves_everything() -> None:
    layout = make_layout(EQUAL, (None, [5] * 12))
    moved = layout.to("meta")
    assert moved.whole_prefixes is None and moved.whole_responses is not None
    assert moved.whole_responses.device.type == "meta" and moved.plan is layout.plan
    assert moved.host_offsets[4] is not None and moved.host_offsets[4].tolist() == [5] * 12
    q, k, v, _ = (x.detach() for x in operands(layout.num_tokens))
    assert torch.equal(shared_prefix_attention(q, k, v, moved), shared_prefix_attention(q, k, v, layout))


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        (
            ([4], None),
            r"whole_prefixes\[0\] must be within \[0, 3\], got 4; it counts leading tokens of a segment of cu",
        ),
        (([-1], None), r"whole_prefixes\[0\] must be within \[0, 3\], got -1"),
        ((None, [2, 2]), r"whole_responses\[1\] must be within \[0, 1\], got 2; .* of cu_seqlens"),
        ((None, [2]), r"whole_responses must be \[2\], got \[1\]; one count for each of the segments of cu_seqlens"),
        (([[1]], None), r"whole_prefixes must be \[1\], got \[1, 1\]"),
    ],
)
def test_whole_parts_that_do_not_fit_are_refused(whole: Whole, message: str) -> None:
    with pytest.raises(ValueError, match=f"SharedPrefixLayout: {message}"):
        make_layout([(3, [2, 1])], whole)


def test_whole_parts_are_counts() -> None:
    nobody = torch.tensor([0, 3]).int()
    with pytest.raises(ValueError, match=r"whole_responses must be int32 or int64, got torch\.bool; it counts tokens"):
        SharedPrefixLayout(nobody, nobody, torch.tensor([0, 1]).int(), None, torch.tensor([True]))
