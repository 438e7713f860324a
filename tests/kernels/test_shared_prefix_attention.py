"""Shared-prefix attention against a dense masked softmax in float64, and against every response with its own prefix."""

from __future__ import annotations

import functools
import gc
import itertools
import weakref
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
    Group,
    assert_all_close,
    dense,
    make_layout,
    operands,
    seen_by,
    with_gradients,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from syncr1.kernels.api import BackendError, SharedPrefixLayout, shared_prefix_attention
from syncr1.kernels.attention import choose_attention
from syncr1.kernels.attention_ops.varlen import _alive, offsets_of, plan_of, shared_plan

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def assert_true(groups: Sequence[Group], heads: int, kv_heads: int, backend: str, scale: float | None = None) -> None:
    layout = make_layout(groups)
    q, k, v, probe = operands(layout.num_tokens, heads, kv_heads)
    out = shared_prefix_attention(q, k, v, layout, scale=scale, backend=backend)
    assert out.shape == q.shape
    truth = dense(q, k, v, seen_by(groups), scale)
    assert_all_close(
        with_gradients(out, (q, k, v), probe), with_gradients(truth, (q, k, v), probe), forward=1e-12, gradient=1e-9
    )


@pytest.mark.parametrize("backend", ["flash", "reference"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("groups", CASES.values(), ids=CASES)
def test_forward_and_gradients_are_the_masked_softmax(groups: list[Group], kv_heads: int, backend: str) -> None:
    assert_true(groups, 4, kv_heads, backend)


@given(groups=GROUPS, heads=st.sampled_from([(4, 4), (4, 2), (2, 1), (1, 1)]))
def test_any_layout(groups: list[Group], heads: tuple[int, int]) -> None:
    """Empty prefixes, empty responses, groups without any, one token, nothing at all."""
    assert_true(groups, *heads, "flash")


@pytest.mark.parametrize("scale", [1e-3, 40.0])
def test_any_scale(scale: float) -> None:
    """Scores of hundreds: what padded places would make of them never reaches a gradient."""
    assert_true(RAGGED, 4, 2, "flash", scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", CASES.values(), ids=CASES)
def test_error_is_at_most_twice_that_of_dense_attention(groups: list[Group], dtype: torch.dtype) -> None:
    """Against float64, forward and every gradient; the peer is torch's dense attention with a mask, same dtype."""
    layout, seen = make_layout(groups), seen_by(groups)
    q, k, v, probe = operands(layout.num_tokens, 4, 2, 16, dtype)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = with_gradients(dense(*wide, seen), wide, probe.double())
    batch = (x.transpose(0, 1)[None] for x in (q, k, v))
    peer_out = F.scaled_dot_product_attention(*batch, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1)
    peer = with_gradients(peer_out, (q, k, v), probe)
    mine = with_gradients(shared_prefix_attention(q, k, v, layout, backend="flash"), (q, k, v), probe)
    for name, found, theirs, exact in zip(("out", "dq", "dk", "dv"), mine, peer, truth, strict=True):
        assert found.dtype == dtype
        error, allowed = ((x.double() - exact).norm() for x in (found, theirs))
        assert error <= 2 * allowed, f"{name}: {error:.2e} > 2 * {allowed:.2e}"


def test_gradients_are_those_of_every_response_with_its_own_copy_of_the_prefix() -> None:
    """The un-shared computation that this op stands for: a prefix's gradient is the sum over its copies."""
    groups = [group for group in RAGGED if group[1]]  # without responses the un-shared prefix would not be there
    layout = make_layout(groups)
    q, k, v, probe = operands(layout.num_tokens, 4, 2)
    end, total, sums = layout.num_prefix_tokens, 0.0, []
    prefix_at, response_at = 0, end
    for prefix, lengths in groups:
        alone = slice(prefix_at, prefix_at + prefix)
        for index, length in enumerate(lengths):
            mine = slice(response_at, response_at + length)
            parts = [torch.cat([x[alone], x[mine]]).transpose(0, 1)[None] for x in (q, k, v)]
            if prefix + length:
                out = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
                total = total + (out[prefix:] * probe[mine]).sum()
                if index == 0:
                    total = total + (out[:prefix] * probe[alone]).sum()
                    sums.append(out[:prefix])
            response_at += length
        prefix_at += prefix
    expected = torch.autograd.grad(total, (q, k, v))
    found = with_gradients(shared_prefix_attention(q, k, v, layout), (q, k, v), probe)
    torch.testing.assert_close(found[0][:end], torch.cat(sums), rtol=0, atol=1e-12)
    assert_all_close(found[1:], expected, forward=1e-9, gradient=1e-9)


@pytest.mark.parametrize("groups", CASES.values(), ids=CASES)
def test_nothing_leaks(groups: list[Group]) -> None:
    """A change in one response moves no other token by a bit; one in a prefix moves its own group alone."""
    layout, seen = make_layout(groups), seen_by(groups)
    q, k, v, _ = (x.detach() for x in operands(layout.num_tokens, dtype=torch.float32))
    before = shared_prefix_attention(q, k, v, layout)
    prefixes = offsets_of([prefix for prefix, _ in groups])
    responses = [layout.num_prefix_tokens + o for o in offsets_of([n for _, lengths in groups for n in lengths])]
    for start, end in [*itertools.pairwise(prefixes), *itertools.pairwise(responses)]:
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[start:end] += 1
        same = (shared_prefix_attention(*changed, layout) == before).all(-1).all(-1)
        assert torch.equal(~same, seen[:, start:end].any(1))


def test_a_token_does_not_see_the_future() -> None:
    layout, seen = make_layout(RAGGED), seen_by(RAGGED)
    q, k, v, _ = (x.detach() for x in operands(layout.num_tokens))
    before = shared_prefix_attention(q, k, v, layout)
    for token in (1, 12, layout.num_prefix_tokens + 2, layout.num_tokens - 5):
        v_changed = v.clone()
        v_changed[token] += 1
        same = (shared_prefix_attention(q, k, v_changed, layout) == before).all(-1).all(-1)
        assert torch.equal(~same, seen[:, token])


def test_two_runs_are_bitwise_equal() -> None:
    layout = make_layout(RAGGED)
    q, k, v, probe = operands(layout.num_tokens, 4, 2, dtype=torch.float32)
    first, second = (with_gradients(shared_prefix_attention(q, k, v, layout), (q, k, v), probe) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["flash", "reference"])
def test_strides_do_not_matter_and_inputs_stay_as_they_were(backend: str) -> None:
    """Heads first as transformers has them, slices of one projection, last dimension strided, expanded gradient."""
    layout = make_layout(RAGGED)
    q, k, v, probe = operands(layout.num_tokens)
    truth = dense(q, k, v, seen_by(RAGGED))
    probes = [torch.ones((), dtype=q.dtype).expand(q.shape), probe.repeat_interleave(2, -1)[..., ::2]]
    truths = [with_gradients(truth, (q, k, v), x.contiguous(), retain_graph=True) for x in probes]
    fused = torch.cat([q, k, v], -1).detach()
    layouts = {
        "heads first": [x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)],
        "one projection": list(fused.split(8, -1)),
        "strided": [x.detach().repeat_interleave(2, -1)[..., ::2] for x in (q, k, v)],
        "transposed": [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)],
    }
    for name, given_inputs in layouts.items():
        inputs = [x.requires_grad_() for x in given_inputs]
        copies = [x.detach().clone() for x in inputs]
        assert name == "heads first" or not inputs[1].is_contiguous()
        out = shared_prefix_attention(*inputs, layout, backend=backend)
        for x, expected in zip(probes, truths, strict=True):
            assert_all_close(with_gradients(out, inputs, x, retain_graph=True), expected, 1e-12, 1e-11)
        assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    layout = make_layout(RAGGED)
    q, k, v, probe = operands(layout.num_tokens, 4, 2)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return shared_prefix_attention(q * 2, k.sin(), v, layout).tanh()

    expected = with_gradients(layer(q, k, v), (q, k, v), probe)
    out = checkpoint(layer, q, k, v, use_reentrant=reentrant)
    out.backward(probe)
    assert_all_close([out.detach(), q.grad, k.grad, v.grad], expected, 0, 0)


def test_opcheck() -> None:
    """Schema, autograd registration, fake kernels and AOT dispatch, static and dynamic."""
    layout = make_layout(RAGGED)
    q, k, v, probe = operands(layout.num_tokens, 4, 2)
    q = q.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()  # as transformers has it
    ops = torch.ops.syncr1
    torch.library.opcheck(ops.shared_prefix_attention.default, (q, k, v, *layout.host_offsets, 0.3))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = ops.shared_prefix_attention(q, k, v, *layout.host_offsets, 0.3)
    torch.library.opcheck(
        ops.shared_prefix_attention_backward.default, (q, k, v, *layout.host_offsets, 0.3, out, lse, probe)
    )


def test_compile_without_graph_breaks() -> None:
    """Also for the next batch, whose layout is another."""

    def layer(q: Tensor, k: Tensor, v: Tensor, layout: SharedPrefixLayout) -> Tensor:
        return shared_prefix_attention(q * 2, k, v, layout).tanh()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for groups in (RAGGED, EQUAL):
        layout = make_layout(groups)
        q, k, v, probe = operands(layout.num_tokens, 4, 2)
        expected = with_gradients(layer(q, k, v, layout), (q, k, v), probe)
        assert_all_close(with_gradients(compiled(q, k, v, layout), (q, k, v), probe), expected, 1e-12, 1e-12)


def test_a_second_derivative_is_refused_and_the_reference_has_it() -> None:
    layout = make_layout([(2, [2, 1])])
    q, k, v, _ = operands(layout.num_tokens)
    with pytest.raises(NotImplementedError, match="shared_prefix_attention: its gradient cannot be differentiated"):
        torch.autograd.grad(shared_prefix_attention(q, k, v, layout).sum(), q, create_graph=True)
    call = functools.partial(shared_prefix_attention, layout=layout, backend="reference")
    assert torch.autograd.gradgradcheck(call, (q, k, v))


def test_frozen_inputs_get_no_gradient() -> None:
    layout = make_layout(EQUAL)
    q, k, v, probe = operands(layout.num_tokens)
    assert not shared_prefix_attention(q.detach(), k.detach(), v.detach(), layout).requires_grad
    (alone,) = torch.autograd.grad(shared_prefix_attention(q.detach(), k, v.detach(), layout), k, probe)
    _, _, together, _ = with_gradients(shared_prefix_attention(q, k, v, layout), (q, k, v), probe)
    assert torch.equal(alone, together)


# The layout -----------------------------------------------------------------------------------------------------------


def test_positions_and_predicting_rows_by_hand() -> None:
    layout = make_layout([(3, [2, 0, 1]), (0, [2]), (2, []), (1, [1, 3])])
    assert (layout.num_tokens, layout.num_prefix_tokens) == (15, 6)
    #          prefixes          | responses
    positions = [0, 1, 2, 0, 1, 0, 3, 4, 3, 0, 1, 1, 1, 2, 3]
    #       of group 0   1   3 (group 2 has none); rows 6… are the responses' own
    rows = [2, 6, 2, -1, 9, 5, 5, 12, 13]
    assert layout.position_ids().tolist() == positions and layout.predicting_rows().tolist() == rows
    assert layout.position_ids().dtype == layout.predicting_rows().dtype == torch.int64


@given(groups=GROUPS)
def test_predicting_rows_are_one_position_before(groups: list[Group]) -> None:
    """The row that predicts a token sees exactly what lies before that token."""
    layout, seen = make_layout(groups), seen_by(groups)
    positions, rows = layout.position_ids(), layout.predicting_rows()
    assert torch.equal(positions + 1, seen.sum(1))
    for token, row in zip(range(layout.num_prefix_tokens, layout.num_tokens), rows.tolist(), strict=True):
        before = seen[token].clone()
        before[token] = False
        assert torch.equal(seen[row] if row >= 0 else torch.zeros_like(before), before)


def test_to_moves_everything() -> None:
    layout = make_layout(RAGGED)
    layout.position_ids()
    moved = layout.to("meta")
    there = (moved.cu_prefixes, moved.cu_seqlens, moved.group_offsets, moved.position_ids(), moved.predicting_rows())
    assert {x.device.type for x in there} == {"meta"} and moved.device.type == "meta"
    assert moved.num_tokens == layout.num_tokens and all(x.device.type == "cpu" for x in moved.host_offsets[:3])
    assert layout.device.type == "cpu" and layout.position_ids().device.type == "cpu"


def test_a_plan_lives_as_long_as_its_layout() -> None:
    """A CUDA graph holds the addresses of its offsets, however many batches were planned since; and then it goes."""
    layout = make_layout([(4, [2, 6, 1])])
    shared_plan.cache_clear()
    assert plan_of(*layout.host_offsets) is layout.plan
    shared_plan.cache_clear()
    gone = weakref.ref(layout.plan)
    del layout
    gc.collect()
    assert gone() is None


def test_the_default_device_does_not_matter() -> None:
    given_offsets = make_layout(RAGGED).host_offsets
    expected = SharedPrefixLayout(*given_offsets)
    q, k, v, probe = operands(expected.num_tokens)
    shared_plan.cache_clear()
    _alive.clear()  # the plan of these offsets is made anew
    with torch.device("meta"):
        layout = SharedPrefixLayout(*given_offsets)
        found = with_gradients(shared_prefix_attention(q, k, v, layout), (q, k, v), probe)
        assert torch.equal(layout.position_ids(), expected.position_ids())
        assert torch.equal(layout.predicting_rows(), expected.predicting_rows())
    assert_all_close(found, with_gradients(dense(q, k, v, seen_by(RAGGED)), (q, k, v), probe), 1e-12, 1e-9)


@pytest.mark.parametrize(
    ("given_offsets", "message"),
    [
        (([0, 2], [0, 1], [0, 1, 1]), r"group_offsets must be \[2\], got \[3\]; every prefix is a group"),
        (([0, 2], [0, 1], [0, 2]), r"group_offsets\[-1\] must be 1, got 2; the last offset"),
        (([0, 2, 1], [0, 1], [0, 1, 1]), "cu_prefixes must be non-decreasing, got a fall after entry 1"),
        (([0, 2], [1, 2], [0, 1]), r"cu_seqlens\[0\] must be 0, got 1; prepend a 0"),
        (([], [0], [0]), r"cu_prefixes must be \[n\+1\], got \[0\]; pass cumulative counts"),
    ],
)
def test_offsets_that_do_not_fit_are_refused(given_offsets: tuple[list[int], ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"SharedPrefixLayout: {message}"):
        SharedPrefixLayout(*(torch.tensor(x, dtype=torch.int32) for x in given_offsets))


def test_operands_that_do_not_fit_are_refused() -> None:
    layout = make_layout([(2, [2, 1])])
    q, k, v, _ = operands(5, 4, 2)
    wrong = {
        r"q must be \[5, H, E\], got \[4, 4, 8\]; the token axis is": (q[:4], k, v),
        r"q must be \[5, H, E\], got \[1, 5, 4, 8\]": (q[None], k, v),
        r"v must be \[5, 2, 8\], got \[5, 1, 8\]": (q, k, v[:, :1]),
        r"k must be \[5, K, 8\], got \[5, 2, 4\]": (q, k[..., :4], v[..., :4]),
        "the number of query heads must be a multiple .* got H 4, K 3": (q, *[torch.zeros(5, 3, 8).double()] * 2),
        "k must be torch.float64 on cpu, got torch.float32 on cpu": (q, k.float(), v),
        "q must be a float tensor, got torch.int64": (q.long(), k, v),
    }
    for message, inputs in wrong.items():
        with pytest.raises(ValueError, match=f"shared_prefix_attention: {message}"):
            shared_prefix_attention(*inputs, layout)
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(
            ValueError, match=r"scale must be a finite number > 0, or None, got .* multiply the queries"
        ):
            shared_prefix_attention(q, k, v, layout, scale=scale)
    other = make_layout([(2, [2])])
    with pytest.raises(ValueError, match="must be 4, got 5; is the layout that of this batch"):
        torch.ops.syncr1.shared_prefix_attention(q, k, v, *other.host_offsets, 1.0)


def test_which_backend_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(5, 4, 8)
    assert choose_attention(None, q) == choose_attention("flash", q) == "flash"
    assert choose_attention(None, q.to("meta")) == "reference"
    with pytest.raises(BackendError, match=r"shared_prefix_attention: backend='triton' .* reference and flash"):
        choose_attention("triton", q)
    with pytest.raises(BackendError, match=r"backend='flash' cannot serve .* not meta; use 'reference'"):
        choose_attention("flash", q.to("meta"))
    monkeypatch.setenv("SYNCR1_BACKEND", "reference")
    assert (choose_attention(None, q), choose_attention("flash", q)) == ("reference", "flash")
    monkeypatch.setenv("SYNCR1_BACKEND", "native")
    assert choose_attention(None, q) == "flash"
    monkeypatch.setenv("SYNCR1_BACKEND", "fastest")
    with pytest.raises(BackendError, match="SYNCR1_BACKEND='fastest'"):
        choose_attention(None, q)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", CASES.values(), ids=CASES)
def test_on_the_gpu(groups: list[Group], dtype: torch.dtype) -> None:
    """Error against float64 at most twice that of the reference in the same dtype, and bitwise equal runs."""
    layout = make_layout(groups).to("cuda")
    made = operands(layout.num_tokens, 4, 2, 64, dtype)
    q, k, v, probe = (x.detach().cuda().requires_grad_() for x in made)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = with_gradients(shared_prefix_attention(*wide, layout, backend="reference"), wide, probe.double())
    plain = with_gradients(shared_prefix_attention(q, k, v, layout, backend="reference"), (q, k, v), probe)
    runs = [
        with_gradients(shared_prefix_attention(q, k, v, layout, backend="flash"), (q, k, v), probe) for _ in range(2)
    ]
    for first, again, theirs, exact in zip(*runs, plain, truth, strict=True):
        assert torch.equal(first, again)
        error, allowed = ((x.double() - exact).norm() for x in (first, theirs))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * exact.norm()
