"""Variable-length attention on CUDA: flash_attn where it is installed, else PyTorch's own copy of FlashAttention-2.

Both take offsets on the device and give log-sum-exps as [H, N]; the rest of this file is what the two calls of shared
prefixes need beside them: rows without a counterpart are set here and not left to the kernels (which give +inf).
Gradients are deterministic: the split of dq is summed in a fixed order, not with atomics.

Dims: `N` queries, `M` keys, `H` query heads, `K` key-value heads, `E` head size.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .varlen import VarlenCall

DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_SIZE = 256
INSTALL = "pip install flash-attn --no-build-isolation (its build imports the torch that is installed)"
ABSENT = "flash_attn is not installed"


class Where(NamedTuple):
    """Segments as FlashAttention's kernels take them."""

    cu_queries: Tensor
    """[n+1] int32 on the device."""
    cu_keys: Tensor
    """[n+1] int32 on the device."""
    max_queries: int
    max_keys: int
    causal: bool
    scale: float


class Kernels(Protocol):
    """A library's pair of kernels."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> tuple[Tensor, Tensor]:
        """q [N, H, E], k and v [M, K, E] → output [N, H, E], log-sum-exp [H, N] float32."""
        ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, where: Where
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k, v; `lse` is [H, N] float32, contiguous."""
        ...


class FlashAttn:
    """The flash_attn package, 2.7 or later."""

    def __init__(self) -> None:
        interface = importlib.import_module("flash_attn.flash_attn_interface")
        self._forward: Any = interface._wrapped_flash_attn_varlen_forward
        self._backward: Any = interface._wrapped_flash_attn_varlen_backward

    def forward(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self._forward(
            q,
            k,
            v,
            where.cu_queries,
            where.cu_keys,
            where.max_queries,
            where.max_keys,
            0.0,
            where.scale,
            causal=where.causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            return_softmax=False,
        )
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, where: Where
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        self._backward(
            grad,
            q,
            k,
            v,
            out,
            lse,
            dq,
            dk,
            dv,
            where.cu_queries,
            where.cu_keys,
            where.max_queries,
            where.max_keys,
            0.0,
            where.scale,
            where.causal,
            -1,
            -1,
            0.0,
            None,
            True,
            None,
        )
        return dq, dk, dv


class TorchFlash:
    """The kernels behind `torch.nn.attention.varlen`; called below its op, whose signature changes between releases."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            where.cu_queries,
            where.cu_keys,
            where.max_queries,
            where.max_keys,
            0.0,
            where.causal,
            False,
            scale=where.scale,
        )
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, where: Where
    ) -> tuple[Tensor, Tensor, Tensor]:
        rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        unused = torch.empty(0, device=q.device)
        with _deterministic():
            dq, dk, dv = torch.ops.aten._flash_attention_backward(
                grad,
                q,
                k,
                v,
                out,
                lse,
                where.cu_queries,
                where.cu_keys,
                where.max_queries,
                where.max_keys,
                0.0,
                where.causal,
                rng_state,
                unused,
                scale=where.scale,
            )
        return dq, dk, dv


@contextmanager
def _deterministic() -> Iterator[None]:
    """PyTorch's flash backward takes its order of summation from this global setting alone."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = fill and before[0]
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill


@cache
def kernels() -> Kernels:
    """The pair that serves this installation; warns, once, where flash_attn is installed and cannot be used."""
    pair, problem = choose_pair()
    if problem is not None and problem != ABSENT:
        warnings.warn(
            f"shared_prefix_attention: {problem}; PyTorch's FlashAttention-2 serves instead. Remedy: uninstall it, or "
            f"{INSTALL}",
            RuntimeWarning,
            stacklevel=2,
        )
    return pair


@cache  # a failed import is not tried again: it may have registered half of its ops
def choose_pair() -> tuple[Kernels, str | None]:
    """The pair, and why it is not flash_attn's."""
    try:
        return FlashAttn(), None
    except ModuleNotFoundError as error:
        if error.name == "flash_attn":
            return TorchFlash(), ABSENT
        reason = f"it needs a module that is missing ({error})"
    except AttributeError as error:  # its internals came with 2.7
        reason = f"2.7 or later is expected ({error})"
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch, CUDA or C++ library
        reason = f"it does not load ({type(error).__name__}: {error}); was it built for torch {torch.__version__}?"
    return TorchFlash(), f"flash_attn {installed_version()} cannot be used: {reason}"


def installed_version() -> str:
    """flash_attn's, as its metadata has it, without importing it."""
    try:
        return importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return "(of unknown version)"


def provider() -> str:
    """Whose kernels serve this installation, in words, with the reason where they are not flash_attn's."""
    _, problem = choose_pair()
    return f"flash_attn {installed_version()}" if problem is None else f"PyTorch's FlashAttention-2 ({problem})"


def serves_head_size(head_size: int) -> bool:
    """FlashAttention's kernels take heads of this size; a plain bool for a traced size, too."""
    if head_size % 8 or head_size > MAX_HEAD_SIZE:  # noqa: SIM103
        return False
    return True


def unsupported_reason(dtype: torch.dtype, fits: bool, capability: tuple[int, int]) -> str | None:
    """Why FlashAttention does not take these tensors, or None; `fits` is what `serves_head_size` said."""
    if dtype not in DTYPES:
        return f"on CUDA it serves {' and '.join(str(d) for d in DTYPES)} only"
    if not fits:
        return f"on CUDA it serves head sizes that are multiples of 8 up to {MAX_HEAD_SIZE} only"
    if capability < (8, 0):
        return f"it needs compute capability 8.0, this GPU has {'.'.join(map(str, capability))}"
    return None


def _where(call: VarlenCall, scale: float, device: torch.device) -> Where:
    # At a maximum of one query the kernels take another path under grouped heads, which wants exactly one everywhere.
    return Where(*call.offsets(device), max(2, call.max_queries), call.max_keys, call.causal, scale)


def _fill(x: Tensor, slices: tuple[tuple[int, int], ...], value: float) -> None:
    for start, end in slices:
        x[start:end] = value


class Flash:
    """The provider over either pair of kernels; `syncr1.kernels.attention_ops.two_calls.Provider`."""

    def __init__(self, pair: Kernels) -> None:
        self.pair = pair

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, scale: float) -> tuple[Tensor, Tensor]:
        """q [N, H, E], k and v [M, K, E] → output [N, H, E], log-sum-exp [N, H] float32, strides (1, N)."""
        out, lse = self.pair.forward(q, k, v, _where(call, scale, q.device))
        out = out.contiguous()  # some releases give it the strides of q, which tracing does not expect
        _fill(out, call.blind_queries, 0.0)
        _fill(lse.t(), call.blind_queries, -math.inf)
        return out, lse.t()

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: VarlenCall, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q [N, H, E], k and v [M, K, E]."""
        grads = self.pair.backward(grad, q, k, v, out, lse.t().contiguous(), _where(call, scale, q.device))
        dq, dk, dv = (x.contiguous() for x in grads)
        _fill(dq, call.blind_queries, 0.0)
        _fill(dk, call.blind_keys, 0.0)
        _fill(dv, call.blind_keys, 0.0)
        return dq, dk, dv
