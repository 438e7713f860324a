"""The packed layout against plain transformers: nothing leaks, and a shared prompt is as good as copies of it."""

from __future__ import annotations

import copy
import itertools

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from syncr1.engine.policies.attention_interface import ATTENTION_NAME, PackedLayout
from syncr1.kernels.api import SharedPrefixLayout

LENGTHS = (5, 0, 1, 17, 16, 1, 0, 40, 3, 33)
"""With empty sequences, single tokens, and lengths at and around the buckets' edges."""
WIDTH, LAYERS = 32, 2


def make_models(kv_heads: int, dtype: torch.dtype) -> tuple[LlamaModel, LlamaModel]:
    """The same decoder under our attention and under transformers' own."""
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    torch.manual_seed(1)
    plain = LlamaModel(config).to(dtype).eval()
    plain.set_attn_implementation("sdpa")
    ours = copy.deepcopy(plain)
    ours.set_attn_implementation(ATTENTION_NAME)
    return ours, plain


def offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def unshared(lengths: tuple[int, ...]) -> PackedLayout:
    """Sequences of their own, behind empty prefixes."""
    nothing = torch.zeros(2, dtype=torch.int32)
    return PackedLayout(SharedPrefixLayout(nothing, offsets(lengths), torch.tensor([0, len(lengths)]).int()))


def run_packed(model: LlamaModel, embeddings: Tensor, lengths: tuple[int, ...]) -> Tensor:
    positions = torch.cat([torch.arange(n) for n in lengths])
    return model(
        inputs_embeds=embeddings[None],
        position_ids=positions[None],
        layout=unshared(lengths),
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
    layout = unshared((20,))
    leaky = ours(
        inputs_embeds=embeddings[None], position_ids=positions, layout=layout, use_cache=False
    ).last_hidden_state[0]
    assert (leaky - run_alone(plain, embeddings, (10, 10))).abs().max() > 0.1


def test_a_forward_without_a_layout_is_refused() -> None:
    ours, _ = make_models(4, torch.float32)
    with pytest.raises(ValueError, match="expected layout="):
        ours(inputs_embeds=torch.randn(1, 3, WIDTH), use_cache=False)


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_a_shared_prefix_equals_copies_of_it(kv_heads: int) -> None:
    """Any decoder of transformers trains so: hidden states, and gradients that sum over the copies."""
    prefixes, responses, groups = (7, 0, 20), (5, 1, 3, 9, 4, 4), (0, 2, 3, 6)
    ours, plain = make_models(kv_heads, torch.float64)
    num_prefix, total = sum(prefixes), sum(prefixes) + sum(responses)
    embeddings = torch.randn(total, WIDTH, dtype=torch.float64, requires_grad=True)
    layout = SharedPrefixLayout(offsets(prefixes), offsets(responses), torch.tensor(groups, dtype=torch.int32))
    together = ours(
        inputs_embeds=embeddings[None],
        position_ids=layout.position_ids()[None],
        layout=PackedLayout(layout),
        use_cache=False,
    ).last_hidden_state[0]
    parts = embeddings[:num_prefix].split(prefixes), embeddings[num_prefix:].split(responses)
    expected = []
    for group, (first, last) in enumerate(itertools.pairwise(groups)):
        for response in range(first, last):
            whole = torch.cat([parts[0][group], parts[1][response]])
            hidden = plain(inputs_embeds=whole[None], use_cache=False).last_hidden_state[0]
            expected.append(hidden[prefixes[group] :])
    torch.testing.assert_close(together[num_prefix:], torch.cat(expected), rtol=0, atol=1e-5)
    probe = torch.randn(sum(responses), WIDTH, dtype=torch.float64)
    got, want = (
        torch.autograd.grad((hidden * probe).sum(), [embeddings, *model.layers.parameters()])
        for hidden, model in ((together[num_prefix:], ours), (torch.cat(expected), plain))
    )
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max().clamp(min=1)))
