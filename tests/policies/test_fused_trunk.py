"""Liger's kernels and torch.compile in the trunk: the numbers of the plain one.

As a script with TRITON_INTERPRET=1 (`python test_fused_trunk.py OUT`) it runs Liger's kernels on the CPU.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import ROOT, environment, sharp_policy
from text_models import model, policy
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers.models.llama import modeling_llama

from syncr1.engine.policies.attention_interface import ATTENTION_NAME, PackedLayout
from syncr1.engine.policies.base import Policy
from syncr1.engine.policies.cache import Decode, Prefill, Store
from syncr1.engine.policies.fused import same_code, use_liger_kernels, with_rotation
from syncr1.engine.rollout.compiled import CompiledTrunk
from syncr1.kernels.api import SharedPrefixLayout

REPLACED = {
    "llama": ["rotary embedding: 2 of LlamaAttention", "SwiGLU: 2 of LlamaMLP", "RMSNorm: 5 of LlamaRMSNorm"],
    "qwen2": ["rotary embedding: 2 of Qwen2Attention", "SwiGLU: 2 of Qwen2MLP", "RMSNorm: 5 of Qwen2RMSNorm"],
    "qwen3": ["rotary embedding: 2 of Qwen3Attention", "RMSNorm: 9 of Qwen3RMSNorm", "SwiGLU: 2 of Qwen3MLP"],
    "gemma": ["rotary embedding: 2 of GemmaAttention", "RMSNorm: 5 of GemmaRMSNorm"],  # a GELU
    "cohere": ["SwiGLU: 2 of CohereMLP"],  # LayerNorm; it rotates interleaved pairs
}
INTERPRETED = ("llama", "qwen3", "gemma")


def decoder_of(family: str, **more: Any) -> Any:
    decoder = model(family, **more).get_decoder()
    decoder.set_attn_implementation(ATTENTION_NAME)
    return decoder


def forward_backward(decoder: Any, device: str = "cpu") -> dict[str, Tensor]:
    """Output, and gradients of input and parameters, of a packed forward over sequences of 5 and 4 tokens."""
    ends, nobody = torch.tensor([0, 5, 9], dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    layout = SharedPrefixLayout(ends, nobody[:1], nobody).to(torch.device(device))
    made = torch.Generator().manual_seed(1)
    x = torch.randn(1, 9, 32, generator=made).to(device).requires_grad_()
    out = decoder(
        inputs_embeds=x, position_ids=layout.position_ids()[None], layout=PackedLayout(layout), use_cache=False
    )
    out.last_hidden_state.backward(torch.randn(1, 9, 32, generator=made).to(device))
    gradients = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
    return {"output": out.last_hidden_state.detach(), "input": x.grad, **gradients}


def assert_agree(plain: dict[str, Tensor], fused: dict[str, Tensor]) -> None:
    assert plain.keys() == fused.keys() and len(plain) > 10
    for name, expected in plain.items():
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(fused[name] / scale, expected / scale, rtol=1e-5, atol=1e-5, msg=name)


def test_without_a_gpu_nothing_changes() -> None:
    decoder = decoder_of("llama")
    assert use_liger_kernels(decoder) == ["none: the decoder is on cpu, Liger's kernels need a GPU"]
    assert not any("forward" in vars(module) for module in decoder.modules())


def test_without_liger_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("syncr1.engine.policies.fused.find_spec", lambda name: None)
    decoder = decoder_of("llama")
    assert use_liger_kernels(decoder, any_device=True) == [
        "none: liger-kernel is not installed (pip install liger-kernel)"
    ]
    assert not any("forward" in vars(module) for module in decoder.modules())


@pytest.mark.parametrize("family", REPLACED)
def test_only_this_decoder_is_changed_and_its_parameters_are_not(family: str) -> None:
    decoder, other = decoder_of(family), decoder_of(family)
    before = [(name, p, p.data_ptr()) for name, p in decoder.named_parameters()]
    kept = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm.forward, modeling_llama.LlamaMLP.forward
    buffers, code = list(decoder.state_dict()), inspect.getsource(type(decoder.layers[0].self_attn).forward)
    assert sorted(use_liger_kernels(decoder, any_device=True)) == sorted(REPLACED[family])
    assert sorted(use_liger_kernels(decoder, any_device=True)) == sorted(REPLACED[family])
    after = [(name, p, p.data_ptr()) for name, p in decoder.named_parameters()]
    assert all(a[0] == b[0] and a[1] is b[1] and a[2] == b[2] for a, b in zip(before, after, strict=True))
    assert list(decoder.state_dict()) == buffers
    assert kept == (
        modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm.forward, modeling_llama.LlamaMLP.forward
    )  # fmt: skip
    assert inspect.getsource(type(other.layers[0].self_attn).forward) == code
    assert not any("forward" in vars(module) for module in other.modules())


def test_a_class_that_computes_otherwise_is_left_alone() -> None:
    """Looking like Llama's norm is not enough: one more operation, or another constant, and it stays."""

    class Centred(modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))

    class Named(modeling_llama.LlamaRMSNorm):
        pass

    class Squared(modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            input_dtype = hidden_states.dtype
            hidden_states = hidden_states.to(torch.float32)
            variance = hidden_states.pow(4).mean(-1, keepdim=True)
            hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
            return self.weight * hidden_states.to(input_dtype)

    parts = nn.ModuleList([Centred(8), Named(8), Squared(8), nn.LayerNorm(8)])
    assert use_liger_kernels(parts, any_device=True) == ["RMSNorm: 1 of Named"]
    assert use_liger_kernels(nn.ModuleList([nn.LayerNorm(8)]), any_device=True) == [
        "none: no module of ModuleList computes what Liger's kernels do"
    ]


def test_a_decorator_does_not_hide_what_it_wraps() -> None:
    """transformers 5.24 wraps every attention's forward in one: the rotation inside is found and replaced, and the
    decorator goes on working; a decorated norm is compared by what is inside, not by the decorator's code."""

    def renaming(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def renamed(*args: Any, **kwargs: Any) -> Any:
            if "old" in kwargs:
                kwargs["positions"] = kwargs.pop("old")
            return function(*args, **kwargs)

        return renamed

    def scaled(function: Callable[..., Any], by: float) -> Callable[..., Any]:
        return functools.wraps(function)(lambda *args: by * function(*args))

    names = dict(vars(modeling_llama))  # a module like those that transformers copies from Llama's
    exec("def forward(self, q, *, positions=None): return apply_rotary_pos_emb(q, q, *positions)", names)
    twice = renaming(renaming(names["forward"]))
    marked = with_rotation(twice, lambda plain: lambda q, k, cos, sin: (cos, sin))
    assert marked is not None
    assert marked(None, torch.ones(1), old=("cos", "sin")) == ("cos", "sin")
    assert torch.is_tensor(twice(None, torch.ones(1, 1, 1, 2), old=(torch.ones(1, 1, 2),) * 2)[0])

    def hiding(self: Any, q: Tensor) -> Any:
        return held[0](self, q)

    held = [names["forward"]]
    hiding.__wrapped__ = names["forward"]
    assert with_rotation(hiding, lambda plain: plain) is None

    norm = modeling_llama.LlamaRMSNorm.forward
    assert same_code(renaming(norm), renaming(norm))
    assert not same_code(renaming(norm), norm)
    assert not same_code(renaming(norm), renaming(modeling_llama.LlamaMLP.forward))
    assert same_code(scaled(norm, 2.0), scaled(norm, 2.0)) and not same_code(scaled(norm, 2.0), scaled(norm, 3.0))


def fused_in_the_interpreter(folder: Path) -> None:
    """The worker: every family, plain and fused; also a deep copy, and with activations computed again in backward."""
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    # Two things that a compiler has and the interpreter lacks: float arguments as tensors, and libdevice.
    convert = interpreter._implicit_cvt

    def with_floats(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
        return convert(argument)

    interpreter._implicit_cvt = with_floats
    rms_norm.rsqrt = lambda x: tl.rsqrt(x)
    torch.set_num_threads(1)
    results = {}
    for family in INTERPRETED:
        plain = decoder_of(family, num_hidden_layers=1)
        fused = copy.deepcopy(plain)
        use_liger_kernels(fused, any_device=True)
        copied = copy.deepcopy(fused)
        results[family] = forward_backward(plain), forward_backward(fused)
        if family == "llama":
            name = "activation" if hasattr(copied, "activation_checkpointing_enable") else "gradient"
            getattr(copied.train(), f"{name}_checkpointing_enable")({"use_reentrant": False})
            with torch.no_grad():
                for parameter in fused.parameters():
                    parameter.zero_()  # A copy that still used the original's weights would notice.
            results["llama, copied and checkpointed"] = results[family][0], forward_backward(copied)
    torch.save(results, folder / "fused.pt")


@pytest.mark.slow
def test_kernels_agree_with_the_plain_decoder(tmp_path: Path) -> None:
    """Outputs and every gradient, float32, in Triton's interpreter; the control knows that Liger's kernels ran."""
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=240,
        env=environment() | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    results = torch.load(tmp_path / "fused.pt")
    assert len(results) == len(INTERPRETED) + 1
    for family, (plain, fused) in results.items():
        assert_agree(plain, fused)
        assert any(not torch.equal(plain[name], fused[name]) for name in plain), f"{family}: bitwise, so not fused"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", REPLACED)
def test_kernels_agree_on_a_gpu(family: str) -> None:
    plain = decoder_of(family).cuda()
    fused = copy.deepcopy(plain)
    assert sorted(use_liger_kernels(fused)) == sorted(REPLACED[family])
    assert_agree(forward_backward(plain, "cuda"), forward_backward(fused, "cuda"))


# A compiled trunk


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


class Decoding:
    """Rows behind prompts of `prompt` tokens, one token a step, from random caches that a seed fixes."""

    def __init__(self, made: Policy, *, rows: int, prompt: int = 6) -> None:
        noise, shape = torch.Generator().manual_seed(0), made.cache_shape()
        self.prompts, self.own = Store(shape, [prompt, prompt]), Store(shape, [4] * 8)
        for tensor in (self.prompts.keys, self.prompts.values):
            tensor.normal_(generator=noise)
        for tensor in (self.own.keys, self.own.values):
            tensor.zero_()
        starts = [(self.prompts.starts[row % 2], prompt, self.own.starts[row], 0) for row in range(rows)]
        self.spans = torch.tensor(starts)
        self.position_ids = torch.full((rows, 1), prompt)
        self.noise, self.width = noise, made.head(torch.zeros(1, 1), "text").weight.shape[1]

    @torch.no_grad()
    def step(self, trunk: Any) -> Tensor:
        embeddings = torch.randn(len(self.spans), 1, self.width, generator=self.noise)
        hidden = trunk(embeddings, self.position_ids, Decode(self.prompts, self.own, self.spans))
        self.position_ids = self.position_ids + 1
        self.spans = self.spans + torch.tensor([0, 0, 0, 1])
        return hidden


def assert_same_steps(made: Policy, compiled: CompiledTrunk, num_steps: int = 3, **sizes: int) -> None:
    """Hidden states, and the caches that the steps wrote, of every layer."""
    ours, theirs = Decoding(made, **sizes), Decoding(made, **sizes)
    for _ in range(num_steps):
        torch.testing.assert_close(ours.step(compiled), theirs.step(made.trunk), rtol=1e-5, atol=1e-5)
    for a, b in ((ours.own.keys, theirs.own.keys), (ours.own.values, theirs.own.values)):
        assert b.abs().amax((1, 2, 3)).min() > 0, "every layer wrote"
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "janus", "liger"])
def test_one_graph_serves_every_step_and_number_of_rows(kind: str, fresh_dynamo: None) -> None:
    """fullgraph: nothing breaks it; a shrinking batch compiles nothing again, except for a single row."""
    made: Policy = policy("qwen3", num_hidden_layers=1)
    plain = copy.deepcopy(made)
    if kind == "janus":
        made = plain = sharp_policy()
        made.decoder().config.num_hidden_layers = 2
    elif kind == "liger":
        assert "rotary embedding: 1 of Qwen3Attention" in use_liger_kernels(made.decoder(), any_device=True)
    compiled = CompiledTrunk(made, backend="aot_eager")
    for rows in (6, 3, 8, 2):
        assert_same_steps(plain, compiled, rows=rows)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    if kind == "text":
        assert_same_steps(plain, compiled, rows=1)
        assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@pytest.mark.slow
def test_sizes_of_caches_beyond_the_allowed_run_plainly(fresh_dynamo: None, caplog: pytest.LogCaptureFixture) -> None:
    """Dynamo's own limit, which would raise, does not count; a warning names the sizes, and the numbers stay right."""
    made = policy("llama", num_hidden_layers=1)
    compiled = CompiledTrunk(made, backend="eager", max_shapes=2)
    with caplog.at_level(logging.WARNING), torch._dynamo.config.patch(recompile_limit=1):
        for prompt in (4, 5, 6, 7, 6, 4):
            assert_same_steps(made, compiled, rows=2, prompt=prompt)
    assert counters["stats"]["unique_graphs"] == 2
    warnings = [record.getMessage() for record in caplog.records if "compiled trunk" in record.getMessage()]
    assert len(warnings) == 2 and all("max_shapes" in message for message in warnings)


def test_other_layouts_and_training_go_to_the_plain_trunk(fresh_dynamo: None) -> None:
    made = policy("llama")
    compiled = CompiledTrunk(made, backend="aot_eager")
    prompts = Store(made.cache_shape(), [4, 3])
    prefill, x = Prefill(prompts), torch.randn(1, 7, 32)
    with torch.no_grad():
        assert torch.equal(
            compiled(x, prefill.position_ids[None], prefill), made.trunk(x, prefill.position_ids[None], prefill)
        )
    assert compiled(x, prefill.position_ids[None], prefill).requires_grad
    assert not counters["stats"]


def test_training_between_calls_is_seen(fresh_dynamo: None) -> None:
    """Weights are inputs: changed in place or given new storage, nothing is compiled again."""
    made = policy("llama", num_hidden_layers=1)
    compiled = CompiledTrunk(made, backend="aot_eager")
    assert_same_steps(made, compiled, rows=2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.1)
    assert_same_steps(made, compiled, rows=2)
    for parameter in made.parameters():
        parameter.data = parameter.data * 1.1
    assert_same_steps(made, compiled, rows=2)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_inductor_writes_every_layers_cache(fresh_dynamo: None) -> None:
    """With symbolic cache columns, torch 2.13's Inductor writes all layers' keys into the first layer's."""
    made = policy("llama")
    compiled = CompiledTrunk(made)
    for rows in (4, 2):
        assert_same_steps(made, compiled, rows=rows)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    fused_in_the_interpreter(Path(sys.argv[1]))
