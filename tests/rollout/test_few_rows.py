"""Decoding on a CPU with weights laid out for few rows: the same numbers, and nothing stays changed."""

from __future__ import annotations

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
import torch.nn.functional as F
from helpers import CHAIN, make_prompt, sharp_policy
from torch import nn

from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.policies.lora import add_lora
from syncr1.engine.rollout.few_rows import MAX_ROWS, FewRows
from syncr1.engine.rollout.sampler import RolloutEngine, generate
from syncr1.engine.rollout.sampling import Sampling


@pytest.fixture
def policy() -> JanusPolicy:
    return sharp_policy()


def changed(policy: JanusPolicy) -> list[str]:
    return [name for name, module in policy.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("rows", [1, 7, MAX_ROWS, MAX_ROWS + 1])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_linear_of_any_number_of_rows(policy: JanusPolicy, rows: int, bias: bool) -> None:
    few = FewRows(policy)
    x, weight = torch.randn(rows, 3, 40)[:, 1:2], nn.Parameter(torch.randn(24, 40))
    shift = torch.randn(24) if bias else None
    with few():
        torch.testing.assert_close(few.linear(x, weight, shift), F.linear(x, weight, shift), rtol=1e-5, atol=1e-5)
        assert bool(few._transposed) is (rows <= MAX_ROWS)
        assert few.linear(torch.zeros(0, 40), weight, shift).shape == (0, 24)
    few.linear(x, weight, shift)
    assert not few._transposed, "nothing is kept outside, where weights may be trained"


@torch.no_grad()
def test_a_decoders_hidden_states_stay_the_same(policy: JanusPolicy) -> None:
    """Through the modules that a step runs: projections, norms, gated products, the image head."""
    few, decoder = FewRows(policy), policy.decoder()
    layer, hidden = decoder.layers[1], torch.randn(5, 1, decoder.config.hidden_size)
    parts = [layer.self_attn.q_proj, layer.input_layernorm, layer.mlp, policy.model.model.generation_head]
    expected = [part(hidden) for part in parts]
    with few():
        assert changed(policy)
        for part, want in zip(parts, expected, strict=True):
            torch.testing.assert_close(part(hidden), want, rtol=1e-5, atol=1e-5)


def test_nothing_stays_changed(policy: JanusPolicy) -> None:
    """Not after an error either; copies of weights are dropped, so that the next rollout sees trained ones."""
    engine = RolloutEngine(policy)
    prompt, sampling = make_prompt("draw it.", CHAIN), Sampling(num_generations=2, cfg_weight=2.0, temperature=0)
    first = engine.generate([prompt], sampling)
    assert changed(policy) == []
    with torch.no_grad():
        for module in policy.modules():
            if isinstance(module, nn.Linear):
                module.weight.add_(0.2 * torch.randn_like(module.weight))
    again, fresh = engine.generate([prompt], sampling), generate(policy, [prompt], sampling)
    tokens = [[s.tokens.tolist() for s in rollouts[0].segments] for rollouts in (first, again, fresh)]
    assert tokens[0] != tokens[1] == tokens[2]
    with pytest.raises(RuntimeError, match="broke"), FewRows(policy)():
        raise RuntimeError("it broke")
    assert changed(policy) == []


def test_gradients_take_the_usual_way(policy: JanusPolicy) -> None:
    hidden = torch.randn(3, policy.decoder().config.hidden_size, requires_grad=True)
    mlp = policy.decoder().layers[0].mlp
    (want,) = torch.autograd.grad(mlp(hidden).sum(), hidden)
    with FewRows(policy)():
        (got,) = torch.autograd.grad(mlp(hidden).sum(), hidden)
    assert torch.equal(got, want)


def test_forwards_of_others_are_left_alone(policy: JanusPolicy) -> None:
    """Liger's, say: what another has replaced is neither replaced again nor removed."""
    mine = policy.decoder().layers[0].mlp.up_proj
    mine.forward = lambda x: x
    with FewRows(policy)():
        assert mine(torch.ones(1)).item() == 1
    assert changed(policy) and mine(torch.ones(1)).item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_adapters_take_part(policy: JanusPolicy, dtype: torch.dtype) -> None:
    """In float32 they are part of the weights that are laid out; in bfloat16 they stay apart, as in training."""
    add_lora(policy, 3, 6.0)
    policy.to(dtype)
    few, layer = FewRows(policy), policy.decoder().layers[1].self_attn.o_proj
    layer.lora_B["default"].weight.normal_(0.0, 0.1)
    for rows in (1, MAX_ROWS, MAX_ROWS + 1):
        x = torch.randn(rows, layer.in_features, dtype=dtype)
        want = layer(x)
        bare = layer.base_layer(x)
        with few():
            got = layer(x)
            assert (id(layer) in few._transposed) is (dtype == torch.float32 and rows <= MAX_ROWS)
            layer.enable_adapters(False)
            torch.testing.assert_close(layer(x), bare, rtol=1e-5, atol=1e-5)
            layer.enable_adapters(True)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert float((want - bare).abs().max()) > 0.01
    assert changed(policy) == []
