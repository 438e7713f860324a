"""Liger's Triton kernels in the trunk of one decoder: RMSNorm, SwiGLU and rotary embedding, forward and backward.

Only this instance changes; transformers' classes stay as they are, and so do parameters, their names and the files
that `save_pretrained` writes.  A module is replaced only where its code is that of Llama's (transformers copies it from
model to model), so a class that looks alike and computes otherwise is left alone.

Counted, not measured, per token in bf16, hidden D, MLP width F: RMSNorm's forward moves 4 D bytes instead of 36 D in
six passes; SwiGLU keeps 3 F values for backward instead of 4 F; the rotation works in place.

The kernels overwrite in backward what forward saved: a graph is good for one backward (no `retain_graph`).

Source: Liger-Kernel (arXiv 2410.10989), `liger_kernel.transformers.monkey_patch`, 0.8.5.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from inspect import unwrap
from types import CellType, FunctionType, MethodType
from typing import Any, cast

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
from torch import Tensor, nn
from transformers.models.gemma import modeling_gemma as gemma
from transformers.models.llama import modeling_llama as llama

Rotation = Callable[..., tuple[Tensor, Tensor]]


def use_liger_kernels(decoder: nn.Module, *, any_device: bool = False) -> list[str]:
    """Runs a decoder's norms, gated MLPs and rotations through Liger's kernels.

    Args:
        decoder: of transformers, on its device; changed in place. Calling it again changes nothing.
        any_device: also where Triton needs its interpreter (TRITON_INTERPRET=1), for tests.

    Returns:
        One line per kind of module: `RMSNorm: 9 of LlamaRMSNorm`; or one line `none: <reason>`.
    """
    if find_spec("liger_kernel") is None:
        return ["none: liger-kernel is not installed (pip install liger-kernel)"]
    kinds = {parameter.device.type for parameter in decoder.parameters()}
    if kinds != {"cuda"} and not any_device:
        return [f"none: the decoder is on {', '.join(sorted(kinds))}, Liger's kernels need a GPU"]
    done: Counter[str] = Counter()
    for module in decoder.modules():
        name, kind = type(module).__name__, None
        if is_norm(module, llama.LlamaRMSNorm, "forward"):
            kind, module.forward = "RMSNorm", MethodType(_llama_norm, module)
        elif is_norm(module, gemma.GemmaRMSNorm, "forward", "_norm"):
            kind, module.forward = "RMSNorm", MethodType(_gemma_norm, module)
        elif same_code(type(module).forward, llama.LlamaMLP.forward) and is_silu(module):
            kind, module.forward = "SwiGLU", MethodType(_swiglu, module)
        elif (attention := with_rotation(type(module).forward, _liger_rotation)) is not None:
            kind, module.forward = "rotary embedding", MethodType(attention, module)
        if kind is not None:
            done[f"{kind}: {{}} of {name}"] += 1
    return [line.format(count) for line, count in done.items()] or [
        f"none: no module of {type(decoder).__name__} computes what Liger's kernels do"
    ]


def _llama_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """w · (x / rms(x)) with the product in the weights' dtype."""
    if torch.compiler.is_compiling():  # Inductor fuses the plain code, and knows more of what surrounds it.
        return type(self).forward(self, hidden_states)
    from liger_kernel.ops import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", False, None)


def _gemma_norm(self: Any, x: Tensor) -> Tensor:
    """(1 + w) · x / rms(x), all of it in float32."""
    if torch.compiler.is_compiling():
        return type(self).forward(self, x)
    from liger_kernel.ops import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, self.weight, self.eps, 1.0, "gemma", False, None)


def _swiglu(self: Any, x: Tensor) -> Tensor:
    """down(silu(gate(x)) · up(x)); the product is recomputed in backward."""
    if torch.compiler.is_compiling():
        return type(self).forward(self, x)
    from liger_kernel.ops import LigerSiLUMulFunction

    return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x), 1.0, 1.0))


def with_rotation(forward: Callable[..., Any], make: Callable[[Rotation], Rotation]) -> Callable[..., Any] | None:
    """An attention's forward that finds another rotation where its module's globals hold Llama's; None if they do not.

    The rotation is a function of the module, not a method: the same code with other globals is the only way to change
    it for one instance. `make` gets the plain one, for what the other does not serve.
    """
    written = unwrap(forward)
    if not isinstance(written, FunctionType) or "apply_rotary_pos_emb" not in written.__code__.co_names:
        return None
    plain, half = (written.__globals__.get(name) for name in ("apply_rotary_pos_emb", "rotate_half"))
    if not (same_code(plain, llama.apply_rotary_pos_emb) and same_code(half, llama.rotate_half)):
        return None
    made = with_globals(forward, {"apply_rotary_pos_emb": make(cast(Rotation, plain))})
    if made is None:
        return None

    @wraps(forward)
    def attention(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Dynamo looks a function's globals up in its module, where the plain rotation is.
        return (forward if torch.compiler.is_compiling() else made)(self, *args, **kwargs)

    return attention


def with_globals(function: Callable[..., Any], names: dict[str, Any]) -> Callable[..., Any] | None:
    """A copy of `function` that finds `names` among its globals; None where a decorator hides what it calls.

    Decorators are kept (transformers 5.24 renames old keywords in one): a copy of each calls the copy of what it wraps.
    """
    if not isinstance(function, FunctionType):
        return None
    closure, inner = function.__closure__, getattr(function, "__wrapped__", None)
    if inner is not None:
        cells = closure or ()
        copied = with_globals(inner, names)
        if copied is None or not any(cell.cell_contents is inner for cell in cells):
            return None
        closure = tuple(CellType(copied) if cell.cell_contents is inner else cell for cell in cells)
    found = function.__globals__ if inner is not None else function.__globals__ | names
    made = FunctionType(function.__code__, found, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _liger_rotation(plain: Rotation) -> Rotation:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if unsqueeze_dim != 1:
            return plain(q, k, cos, sin, unsqueeze_dim)
        from liger_kernel.ops import LigerRopeFunction

        return LigerRopeFunction.apply(q, k, cos, sin)

    return rotate


def is_norm(module: nn.Module, known: type[nn.Module], *methods: str) -> bool:
    return all(same_code(getattr(type(module), name, None), getattr(known, name)) for name in methods)


def is_silu(module: Any) -> bool:
    return isinstance(module.act_fn, nn.SiLU) or type(module.act_fn).__name__ == "SiLUActivation"


def same_code(function: Any, known: Any) -> bool:
    """Whether two functions compute the same: byte code, names, constants, docstrings aside, and what they wrap."""
    if not isinstance(function, FunctionType) or not isinstance(known, FunctionType):
        return False
    facts = [
        (code.co_code, code.co_names, code.co_freevars, tuple(c for c in code.co_consts if c != f.__doc__))
        for f in (function, known)
        for code in (f.__code__,)
    ]
    if facts[0] != facts[1]:
        return False
    # A decorator's functions have one code, whatever they wrap and whatever it was given.
    inner = [getattr(f, "__wrapped__", None) for f in (function, known)]
    held = [[cell.cell_contents for cell in f.__closure__ or ()] for f in (function, known)]
    for one, other in zip(*held, strict=True):
        wrapped = one is inner[0] and other is inner[1]
        if not (wrapped or one is other or (isinstance(one, str | int | float | tuple) and one == other)):
            return False
    return inner == [None, None] or same_code(*inner)
