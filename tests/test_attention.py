"""The two layouts against plain transformers: packing leaks nothing, the cache is the full forward step by step."""

from __future__ import annotations

import copy
import itertools

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from syncr1.engine.attention import ATTENTION_NAME, KVCache, PackedLayout

LENGTHS = (5, 0, 1, 17, 16, 1, 0, 40, 3, 33)
"""With empty sequences, single tokens, and lengths at and around the buckets' edges."""
WIDTH, LAYERS = 32, 2


def make_models(kv_heads: int, dtype: torch.dtype) -> tuple[LlamaModel, LlamaModel]:
    """The same decoder under our attention and under transformers' own."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(1)
    plain = LlamaModel(config).to(dtype).eval()
    plain.set_attn_implementation("sdpa")
    ours = copy.deepcopy(plain)
    ours.set_attn_implementation(ATTENTION_NAME)
    return ours, plain


def offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def run_packed(model: LlamaModel, embeddings: Tensor, lengths: tuple[int, ...]) -> Tensor:
    positions = torch.cat([torch.arange(n) for n in lengths])
    return model(
        inputs_embeds=embeddings[None],
        position_ids=positions[None],
        layout=PackedLayout(offsets(lengths)),
        use_cache=False,
    ).last_hidden_state[0]


def run_alone(model: LlamaModel, embeddings: Tensor, lengths: tuple[int, ...]) -> Tensor:
    parts = [part for part in embeddings.split(lengths) if len(part)]
    return torch.cat([model(inputs_embeds=part[None], use_cache=False).last_hidden_state[0] for part in parts])


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_packed_equals_one_by_one_with_gradients(kv_heads: int, dtype: torch.dtype) -> None:
    """Protects training: hidden states, input gradients and weight gradients are those of each sequence alone."""
    ours, plain = make_models(kv_heads, dtype)
    embeddings = torch.randn(sum(LENGTHS), WIDTH, dtype=dtype, requires_grad=True)
    probe = torch.randn(sum(LENGTHS), WIDTH, dtype=dtype)
    results = []
    for model, forward in ((ours, run_packed), (plain, run_alone)):
        hidden = forward(model, embeddings, LENGTHS)
        gradients = torch.autograd.grad((hidden * probe).sum(), [embeddings, *model.parameters()], allow_unused=True)
        results.append((hidden, [g for g in gradients if g is not None]))
    (hidden, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(hidden, expected, rtol=0, atol=TOLERANCE[dtype])
    assert len(gradients) == len(expected_gradients) > 10
    for got, want in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=10 * TOLERANCE[dtype] * float(want.abs().max().clamp(min=1)))


def test_no_sequence_sees_another() -> None:
    """Protects credit: a change in one sequence moves no other sequence's hidden states by a single bit."""
    ours, _ = make_models(2, torch.float32)
    embeddings = torch.randn(sum(LENGTHS), WIDTH)
    before = run_packed(ours, embeddings, LENGTHS)
    bounds = offsets(LENGTHS).tolist()
    for start, end in itertools.pairwise(bounds):
        if start == end:
            continue
        changed = embeddings.clone()
        changed[start:end] += 1
        after = run_packed(ours, changed, LENGTHS)
        same = (after == before).all(1)
        assert not same[start:end].any() and same[:start].all() and same[end:].all()


def test_a_token_does_not_see_the_future() -> None:
    ours, _ = make_models(4, torch.float32)
    embeddings = torch.randn(30, WIDTH)
    changed = embeddings.clone()
    changed[12] += 1
    same = (run_packed(ours, embeddings, (30,)) == run_packed(ours, changed, (30,))).all(1)
    assert same[:12].all() and not same[12:].any()


def test_one_long_packed_axis_would_leak() -> None:
    """The control: with the boundaries left out the result is far off, so the tests above can fail."""
    ours, plain = make_models(4, torch.float32)
    embeddings = torch.randn(20, WIDTH)
    positions = torch.cat([torch.arange(10), torch.arange(10)])[None]
    layout = PackedLayout(torch.tensor([0, 20], dtype=torch.int32))
    leaky = ours(
        inputs_embeds=embeddings[None], position_ids=positions, layout=layout, use_cache=False
    ).last_hidden_state[0]
    assert (leaky - run_alone(plain, embeddings, (10, 10))).abs().max() > 0.1


def test_a_forward_without_a_layout_is_refused() -> None:
    ours, _ = make_models(4, torch.float32)
    with pytest.raises(ValueError, match="expected layout="):
        ours(inputs_embeds=torch.randn(1, 3, WIDTH), use_cache=False)


# The cache ------------------------------------------------------------------------------------------------------------


def make_cache(rows: int, capacity: int, kv_heads: int = 2, dtype: torch.dtype = torch.float64) -> KVCache:
    return KVCache(num_layers=LAYERS, num_rows=rows, num_heads=kv_heads, head_dim=WIDTH // 4, capacity=capacity,
                   dtype=dtype, device=torch.device("cpu"))  # fmt: skip


def feed(model: LlamaModel, cache: KVCache, embeddings: Tensor, valid: Tensor, seen: Tensor) -> Tensor:
    """[B, N, D] through the cache; `seen` [B] counts the valid tokens before and is advanced."""
    positions = (seen[:, None] + valid.cumsum(1) - 1).clamp(min=0)
    seen += valid.sum(1)
    return model(
        inputs_embeds=embeddings, position_ids=positions, layout=cache.extend(valid), use_cache=False
    ).last_hidden_state


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_cache_with_padding_and_gaps_equals_the_full_forward(kv_heads: int) -> None:
    """Protects the rollout: left padding and the steps after a row's end are as if they were not there."""
    ours, plain = make_models(kv_heads, torch.float64)
    rows, prefill, steps = 3, 6, 9
    valid = torch.ones(rows, prefill + steps, dtype=torch.bool)
    valid[0, :4] = False  # left padding
    valid[1, 8:12] = False  # a text that ended early
    valid[2, :2] = False
    valid[2, [7, 9, 13]] = False
    embeddings = torch.randn(rows, prefill + steps, WIDTH, dtype=torch.float64)
    cache, seen = make_cache(rows, prefill + steps, kv_heads), torch.zeros(rows, dtype=torch.long)
    hidden = [feed(ours, cache, embeddings[:, :prefill], valid[:, :prefill], seen)]
    hidden += [
        feed(ours, cache, embeddings[:, i : i + 1], valid[:, i : i + 1], seen) for i in range(prefill, prefill + steps)
    ]
    together = torch.cat(hidden, 1)
    assert together.isfinite().all()
    for row in range(rows):
        alone = run_alone(plain, embeddings[row, valid[row]], (int(valid[row].sum()),))
        torch.testing.assert_close(together[row, valid[row]], alone, rtol=0, atol=1e-12)


def test_rows_crop_and_write_rows() -> None:
    """Protects preview restarts: copies are independent, cropped columns are forgotten, written rows go on."""
    ours, plain = make_models(2, torch.float64)
    start = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    everyone = torch.ones(2, 1, dtype=torch.bool)
    cache, seen = make_cache(2, 4), torch.zeros(2, dtype=torch.long)
    feed(ours, cache, start, everyone.expand(2, 4), seen)

    group = cache.rows(torch.tensor([1, 0, 1]), capacity=10)
    assert (group.num_rows, group.capacity, group.length) == (3, 10, 4)
    first, second = torch.randn(2, 3, 2, WIDTH, dtype=torch.float64)
    seen = torch.full((3,), 4)
    feed(ours, group, first, everyone[:1].expand(3, 2), seen)
    tried = cache.rows(torch.tensor([0, 1]), capacity=10)
    feed(ours, tried, second[:2], everyone.expand(2, 2), torch.full((2,), 4))
    group.write_rows(torch.tensor([0]), tried.rows(torch.tensor([1])))
    last = torch.randn(3, 1, WIDTH, dtype=torch.float64)
    hidden = feed(ours, group, last, everyone[:1].expand(3, 1), seen)
    histories = [
        torch.cat([start[1], second[1], last[0]]),  # row 0 took the try's second row
        torch.cat([start[0], first[1], last[1]]),
        torch.cat([start[1], first[2], last[2]]),
    ]
    for row, history in enumerate(histories):
        torch.testing.assert_close(hidden[row, 0], run_alone(plain, history, (7,))[-1], rtol=0, atol=1e-12)

    group.crop(4)
    assert group.length == 4 and not group.valid[:, 4:].any()
    again = feed(ours, group, first, everyone[:1].expand(3, 2), torch.full((3,), 4))
    torch.testing.assert_close(
        again[1, 1], run_alone(plain, torch.cat([start[0], first[1]]), (6,))[-1], rtol=0, atol=1e-12
    )


def test_a_full_cache_says_so() -> None:
    cache = make_cache(1, 2)
    cache.extend(torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(AssertionError, match="cache of 2 columns is full"):
        cache.extend(torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(AssertionError):
        cache.rows(torch.tensor([0])).write_rows(torch.tensor([0]), make_cache(1, 2))
