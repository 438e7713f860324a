"""Attention of responses over cached prefixes: the rows of `shared_prefix_attention`, from keys kept elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from shared_prefix_cases import (
    CASES,
    CAUSAL,
    EQUAL,
    GROUPS,
    RAGGED,
    WHOLES,
    Group,
    Whole,
    dense,
    drawn_whole,
    make_layout,
    operands,
    seen_by,
    whole_of,
)
from torch import Tensor

from syncr1.kernels.api import BackendError, SharedPrefixLayout, cached_prefix_attention, shared_prefix_attention
from syncr1.kernels.attention_ops import cpu
from syncr1.kernels.attention_ops.varlen import VarlenCall

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def split(q: Tensor, k: Tensor, v: Tensor, end: int) -> tuple[Tensor, ...]:
    """The op's tensors, of those on the common token axis; the cache is a layer of a larger one, NaN where unused."""
    cache = [torch.full((3, x.shape[1], end + 5, x.shape[2]), torch.nan).to(x) for x in (k, v)]
    for stored, x in zip(cache, (k, v), strict=True):
        stored[1, :, :end] = x[:end].transpose(0, 1)
    return q[end:], k[end:], v[end:], cache[0][1], cache[1][1]


def made(layout: SharedPrefixLayout, *sizes: Any, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q, k, v on the common token axis."""
    return tuple(x.detach() for x in operands(layout.num_tokens, *sizes, dtype=dtype)[:3])


def assert_true(groups: Sequence[Group], whole: Whole, heads: int, kv_heads: int, backend: str) -> None:
    layout = make_layout(groups, whole)
    q, k, v = made(layout, heads, kv_heads)
    end = layout.num_prefix_tokens
    found = cached_prefix_attention(*split(q, k, v, end), layout, scale=0.4, backend=backend)
    assert found.shape == q[end:].shape and found.is_contiguous()
    torch.testing.assert_close(found, dense(q, k, v, seen_by(groups, whole), 0.4)[end:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["flash", "reference"])
@pytest.mark.parametrize("kind", ["causal", *WHOLES])
@pytest.mark.parametrize("groups", CASES.values(), ids=CASES)
def test_it_is_the_masked_softmax(groups: list[Group], kind: str, backend: str) -> None:
    assert_true(groups, CAUSAL if kind == "causal" else whole_of(groups, kind), 4, 2, backend)


@given(groups=GROUPS, heads=st.sampled_from([(4, 4), (4, 2), (2, 1), (1, 1)]), data=st.data())
def test_any_layout(groups: list[Group], heads: tuple[int, int], data: st.DataObject) -> None:
    assert_true(groups, drawn_whole(data.draw, groups), *heads, "flash")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["responses", "mixed"])
def test_it_is_what_training_sees(kind: str, dtype: torch.dtype) -> None:
    """Sampling and training of the same tokens differ by roundings alone, in every dtype."""
    layout = make_layout(RAGGED, whole_of(RAGGED, kind))
    q, k, v = made(layout, 4, 2, 16, dtype=dtype)
    end = layout.num_prefix_tokens
    found = cached_prefix_attention(*split(q, k, v, end), layout)
    expected = shared_prefix_attention(q, k, v, layout)[end:]
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", ["flash", "reference"])
def test_strides_do_not_matter_and_inputs_stay_as_they_were(backend: str) -> None:
    """Heads first as transformers has them, slices of one projection, caches with columns first, E strided."""
    layout = make_layout(RAGGED, whole_of(RAGGED, "mixed"))
    end = layout.num_prefix_tokens
    q, k, v, keys, values = split(*made(layout), end)
    expected = cached_prefix_attention(q, k, v, keys, values, layout, backend="reference")
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    columns_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (keys, values)]
    strided = [x.repeat_interleave(2, -1)[..., ::2] for x in (keys, values)]
    exact = [x[:, :end].contiguous() for x in (keys, values)]
    for own in ((q, k, v), heads_first, torch.cat([q, k, v], -1).split(8, -1)):
        for cache in ((keys, values), columns_first, strided, exact):
            copies = [x.clone() for x in (*own, *cache)]
            found = cached_prefix_attention(*own, *cache, layout, backend=backend)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
            assert all(torch.equal(a, b) or b.isnan().any() for a, b in zip((*own, *cache), copies, strict=True))


def test_a_cache_is_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of every layer reads it: a copy would cost more than the attention."""
    layout = make_layout(EQUAL, whole_of(EQUAL, "responses"))
    tensors = split(*made(layout, 4, 2), layout.num_prefix_tokens)
    read: list[int] = []
    forward = cpu.forward

    def recorded(q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, scale: float) -> tuple[Tensor, Tensor]:
        read.extend(x.untyped_storage().data_ptr() for x in (k, v))
        return forward(q, k, v, call, scale)

    monkeypatch.setattr(cpu, "forward", recorded)
    cached_prefix_attention(*tensors, layout, backend="flash")
    assert read == [x.untyped_storage().data_ptr() for x in tensors[1:]]


def test_opcheck() -> None:
    """Schema, fake kernel and AOT dispatch, static and dynamic."""
    for groups, whole in ((RAGGED, whole_of(RAGGED, "mixed")), ([(3, [])], CAUSAL)):
        layout = make_layout(groups, whole)
        given_tensors = [x.nan_to_num(0) for x in split(*made(layout, 4, 2), layout.num_prefix_tokens)]
        arguments = (*given_tensors, *layout.host_offsets, 0.3)
        torch.library.opcheck(torch.ops.syncr1.cached_prefix_attention.default, arguments)


def test_what_does_not_fit_is_refused() -> None:
    layout = make_layout([(2, [2, 1])])
    q, k, v = made(layout, 4, 2)
    own, keys = (q[2:], k[2:], v[2:]), k[:2].transpose(0, 1)
    wrong = {
        r"q must be \[3, H, E\], got \[5, 4, 8\]; pass the tokens of this layout's responses": (q, k, v, keys, keys),
        r"prefix_keys must be \[2, ≥ 2, 8\], got \[2, 1, 8\]": (*own, keys[:, :1], keys[:, :1]),
        r"prefix_keys must be \[2, ≥ 2, 8\], got \[1, 2, 8\]": (*own, keys[:1], keys[:1]),
        r"prefix_keys must be \[2, ≥ 2, 8\], got \[2, 2, 4\]": (*own, keys[..., :4], keys[..., :4]),
        r"prefix_values must be \[2, 2, 8\], got \[2, 1, 8\]": (*own, keys, keys[:, :1]),
        r"prefix_values must be torch.float64 on cpu, got torch.float32 on cpu": (*own, keys, keys.float()),
        r"v must be \[3, 2, 8\], got \[3, 1, 8\]": (*own[:2], own[2][:, :1], keys, keys),
    }
    for message, tensors in wrong.items():
        with pytest.raises(ValueError, match=f"cached_prefix_attention: {message}"):
            cached_prefix_attention(*tensors, layout)
    with pytest.raises(ValueError, match="must be 2, got 3; is the layout that of this batch"):
        other = make_layout([(2, [2])]).host_offsets
        torch.ops.syncr1.cached_prefix_attention(*own, keys, keys, *other, 1.0)
    with pytest.raises(BackendError, match="cached_prefix_attention: backend='triton' cannot serve"):
        cached_prefix_attention(*own, keys, keys, layout, backend="triton")


@pytest.mark.parametrize("backend", ["flash", "reference"])
@pytest.mark.parametrize("place", range(5))
def test_a_gradient_is_refused_and_parameters_serve_without_one(place: int, backend: str) -> None:
    layout = make_layout([(2, [2, 1])])
    tensors = list(split(*made(layout, 4, 2), 2))
    tensors[place] = tensors[place].requires_grad_()
    with pytest.raises(RuntimeError, match=r"no argument may require a gradient.* score the tokens with shared_prefix"):
        cached_prefix_attention(*tensors, layout, backend=backend)
    for quiet in (torch.no_grad(), torch.inference_mode()):
        with quiet:
            assert not cached_prefix_attention(*tensors, layout, backend=backend).requires_grad
