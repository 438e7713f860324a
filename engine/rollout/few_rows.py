"""A decoder's modules on a CPU while they decode: tens of rows a step, so that reading weights is what it costs.

- Linear maps take weights laid out [K, N] instead of [N, K]: a step's products then take a fifth less (torch 2.13 with
  MKL, two cores, 16 and 32 rows). The copies are made when a map first meets few rows and dropped at the end.
- In those of layers with LoRA the adapters are added in: a step costs what it does without them. In float32 alone,
  because rounding the sum to bfloat16 would lose much of an adapter, and another network would sample than is trained.
- RMSNorm, SwiGLU and the rotation run as one native call each, where a module's code is that of Llama's.

Nothing is changed for good: outside of the context, and for many rows, modules are what they were.

Dims: R rows, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, cast

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama import modeling_llama as llama

from syncr1.kernels.dispatch import load
from syncr1.kernels.native import trunk

from ..policies.base import Policy
from ..policies.fused import Rotation, is_norm, is_silu, same_code, with_rotation
from ..policies.lora import delta, is_lora

MAX_ROWS = 64
"""Above, a library's product over [N, K] is as fast."""


class FewRows:
    """How a policy's modules decode on a CPU.

    Args:
        policy: on a CPU; its parameters may change between uses.
    """

    def __init__(self, policy: Policy) -> None:
        self._forwards = {module: made for module in policy.modules() if (made := self._forward_of(module)) is not None}
        self._transposed: dict[int, Tensor] = {}
        self._inside = False

    def _forward_of(self, module: nn.Module) -> Callable[..., Any] | None:
        kind = type(module)
        if "forward" in vars(module):  # somebody else's
            return None
        if kind is nn.Linear:
            return MethodType(lambda linear, x: self.linear(x, linear.weight, linear.bias), module)
        if is_lora(module) and type(module.base_layer) is nn.Linear:
            return MethodType(lambda layer, x: self._adapted(layer, x), module)
        if native_is_there():
            if is_norm(module, llama.LlamaRMSNorm, "forward"):
                return MethodType(_norm, module)
            if same_code(kind.forward, llama.LlamaMLP.forward) and is_silu(module):
                return MethodType(_gated, module)
            if (rotated := with_rotation(kind.forward, _rotation)) is not None:
                return MethodType(rotated, module)
        return None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, and without gradients, modules run so."""
        for module, forward in self._forwards.items():
            module.forward = forward
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            for module in self._forwards:
                del module.forward
            self._transposed.clear()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`F.linear`, of few rows over transposed weights: [..., K], [N, K], [N] or None -> [..., N]."""
        # Parameters alone: they outlive the context, so that an id stays its own; outside they may be trained.
        if not isinstance(weight, nn.Parameter) or not self._lays_out(x):
            return F.linear(x, weight, bias)
        return self._product(x, id(weight), lambda: weight, bias)

    def _adapted(self, layer: Any, x: Tensor) -> Tensor:
        """A linear map and its adapters: [..., K] -> [..., N]."""
        base = layer.base_layer
        if base.weight.dtype != torch.float32 or layer.disable_adapters or not self._lays_out(x):
            return cast(Tensor, type(layer).forward(layer, x))
        return self._product(x, id(layer), lambda: base.weight + delta(layer), base.bias)

    def _lays_out(self, x: Tensor) -> bool:
        return self._inside and not torch.is_grad_enabled() and 0 < x.numel() <= MAX_ROWS * x.shape[-1]

    def _product(self, x: Tensor, key: int, weight: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        laid_out = self._transposed.get(key)
        if laid_out is None:
            laid_out = self._transposed[key] = weight().t().contiguous()
        rows = x.reshape(-1, x.shape[-1])
        out = torch.mm(rows, laid_out) if bias is None else torch.addmm(bias, rows, laid_out)
        return out.view(*x.shape[:-1], -1)


def native_is_there() -> bool:
    """The C++ library was built."""
    return load("native")[0] is not None


def _few(x: Tensor) -> bool:
    """Few rows, of a dtype that the native functions serve, and no gradient."""
    rows = x.numel() // max(1, x.shape[-1])
    return 0 < rows <= MAX_ROWS and x.dtype in (torch.float32, torch.bfloat16) and not torch.is_grad_enabled()


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    if not _few(hidden_states) or self.weight.dtype != hidden_states.dtype:
        return cast(Tensor, type(self).forward(self, hidden_states))
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    return trunk.rms_norm(rows, self.weight, self.variance_epsilon).view(hidden_states.shape)


def _gated(self: Any, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    if not _few(gate):
        return cast(Tensor, self.down_proj(self.act_fn(gate) * up))
    width = gate.shape[-1]
    return cast(Tensor, self.down_proj(trunk.silu_mul(gate.view(-1, width), up.view(-1, width)).view(gate.shape)))


def _rotation(plain: Rotation) -> Rotation:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        one_token = q.shape[2] == 1 and cos.shape[:2] == (q.shape[0], 1) and cos.shape[-1] == q.shape[-1]
        if unsqueeze_dim != 1 or not one_token or not _few(q[:, 0, 0]) or cos.dtype != q.dtype:
            return plain(q, k, cos, sin, unsqueeze_dim)
        turned = trunk.rope(q[:, :, 0], k[:, :, 0], cos[:, 0], sin[:, 0])
        return turned[0][:, :, None], turned[1][:, :, None]

    return rotate
