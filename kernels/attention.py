"""Groups whose responses share one prefix: the layout of their tokens, and who computes attention over it.

The token axis is [all prefixes | all responses].  A response's tokens see their whole prefix and their own response up
to their own place; a prefix's tokens see the prefix up to their own place; nothing sees anything else.  Prefixes and
responses may begin with tokens that see each other whole, ahead of their own place too: an image that is filled in by
masked steps.

Dims: `T` tokens, `Tp` prefix tokens, `Tr` response tokens, `P` prefixes (groups), `S` responses, `H` query heads, `K`
key-value heads, `E` head size.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from functools import cache, cached_property

import torch
from torch import Tensor

from .attention_ops import cuda
from .attention_ops.varlen import Plan, plan_of
from .checks import INTEGER_DTYPES, check_offsets, check_vector, checks_values, refuse
from .dispatch import ENVIRONMENT_VARIABLE, MODULES, BackendError, refuse_transforms
from .layout import segment_ids
from .register import constant_when_traced

OP = "shared_prefix_attention"
BACKENDS = ("reference", "flash")
HostOffsets = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class SharedPrefixLayout:
    """Which tokens are which prefix's and which response's; made once per batch, outside `torch.compile`.

    Prefix p is tokens `cu_prefixes[p]:cu_prefixes[p+1]`; response s is the tokens from `Tp + cu_seqlens[s]` to
    `Tp + cu_seqlens[s+1]`; responses `group_offsets[p]:group_offsets[p+1]` continue prefix p.  Any of them may be
    empty, and P and S may be 0.

    Raises:
        ValueError: offsets do not fit together, or a whole part is longer than what it is a part of.
    """

    cu_prefixes: Tensor
    """[P+1] int32."""
    cu_seqlens: Tensor
    """[S+1] int32."""
    group_offsets: Tensor
    """[P+1] int32."""
    whole_prefixes: Tensor | None = None
    """[P] int32: how many leading tokens of each prefix see each other whole, ahead of their place too; what is behind
    them is causal and sees them all. None = 0, everything is causal."""
    whole_responses: Tensor | None = None
    """[S] int32: the same of each response."""

    host_offsets: HostOffsets = field(init=False, repr=False)
    """The five fields above, on the host."""
    plan: Plan = field(init=False, repr=False)
    """How attention is computed; made of the fields above."""

    def __post_init__(self) -> None:
        # Offsets given on a GPU are read back here, once; no attention layer reads them there.
        with torch.inference_mode(False):  # a training step saves them for its backward
            cu_prefixes, cu_seqlens, group_offsets = map(
                _on_host, (self.cu_prefixes, self.cu_seqlens, self.group_offsets)
            )
            whole = [None if x is None else _on_host(x) for x in (self.whole_prefixes, self.whole_responses)]
        check_offsets("SharedPrefixLayout", "cu_prefixes", cu_prefixes)
        check_offsets("SharedPrefixLayout", "cu_seqlens", cu_seqlens)
        check_offsets("SharedPrefixLayout", "group_offsets", group_offsets, cu_seqlens.numel() - 1)
        if group_offsets.numel() != cu_prefixes.numel():
            remedy = "every prefix is a group; give one without responses an empty range"
            refuse("SharedPrefixLayout", "group_offsets", list(cu_prefixes.shape), list(group_offsets.shape), remedy)
        _check_whole("whole_prefixes", whole[0], "cu_prefixes", cu_prefixes)
        _check_whole("whole_responses", whole[1], "cu_seqlens", cu_seqlens)
        host = (cu_prefixes, cu_seqlens, group_offsets, whole[0], whole[1])
        object.__setattr__(self, "host_offsets", host)
        object.__setattr__(self, "plan", plan_of(*host))

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.plan.num_tokens

    @property
    def num_prefix_tokens(self) -> int:
        """Tp."""
        return self.plan.num_prefix_tokens

    @property
    def device(self) -> torch.device:
        return self.cu_prefixes.device

    def to(self, device: torch.device | str) -> SharedPrefixLayout:
        """The same layout with its tensors on `device`, ready for attention there."""
        moved = copy.copy(self)
        with torch.inference_mode(False):
            for name, value in vars(self).items():
                if isinstance(value, Tensor):
                    object.__setattr__(moved, name, value.to(device))
        self.plan.prepare(moved.device)
        return moved

    def position_ids(self) -> Tensor:
        """[T] int64; a prefix counts from 0, a response from its prefix's length."""
        return self._position_ids

    def predicting_rows(self) -> Tensor:
        """[Tr] int64; the row of the token axis whose hidden state predicts each response token.

        It is the row before; for the first token of a response the last row of its prefix, or -1 if that is empty.
        """
        return self._predicting_rows

    @cached_property
    @torch.inference_mode(False)  # what is kept serves training, too
    def _position_ids(self) -> Tensor:
        cu_prefixes, cu_seqlens, group_offsets = (x.long() for x in self.host_offsets[:3])
        num_response_tokens = self.num_tokens - self.num_prefix_tokens
        in_prefix = torch.arange(self.num_prefix_tokens, device="cpu")
        in_prefix -= cu_prefixes[segment_ids(cu_prefixes, self.num_prefix_tokens)]
        response = segment_ids(cu_seqlens, num_response_tokens)
        group = segment_ids(group_offsets, cu_seqlens.numel() - 1)
        first = cu_prefixes.diff()[group] - cu_seqlens[:-1]
        in_response = torch.arange(num_response_tokens, device="cpu") + first[response]
        return torch.cat([in_prefix, in_response]).to(self.device)

    @cached_property
    @torch.inference_mode(False)
    def _predicting_rows(self) -> Tensor:
        cu_prefixes, cu_seqlens, group_offsets = (x.long() for x in self.host_offsets[:3])
        rows = torch.arange(self.num_prefix_tokens, self.num_tokens, device="cpu") - 1
        last = torch.where(cu_prefixes.diff() > 0, cu_prefixes[1:] - 1, -1)
        group = segment_ids(group_offsets, cu_seqlens.numel() - 1)
        filled = cu_seqlens.diff() > 0
        rows[cu_seqlens[:-1][filled]] = last[group[filled]]
        return rows.to(self.device)


def _on_host(x: Tensor) -> Tensor:
    return (x.clone() if x.is_inference() else x).detach().cpu()


def _check_whole(name: str, whole: Tensor | None, name_of_offsets: str, offsets: Tensor) -> None:
    """`whole` is [n] int, each within the length of its segment."""
    if whole is None:
        return
    owner = "SharedPrefixLayout"
    remedy = f"one count for each of the segments of {name_of_offsets}, or None where all is causal"
    check_vector(owner, name, whole, offsets.numel() - 1, remedy)
    if whole.dtype not in INTEGER_DTYPES:
        refuse(owner, name, "int32 or int64", whole.dtype, "it counts tokens; convert it with .int()")
    if not checks_values(whole):
        return
    lengths = offsets.diff()
    wrong = ((whole < 0) | (whole > lengths)).nonzero()
    if wrong.numel():
        at = int(wrong[0])
        remedy = f"it counts leading tokens of a segment of {name_of_offsets}"
        refuse(owner, f"{name}[{at}]", f"within [0, {int(lengths[at])}]", int(whole[at]), remedy)


def attention_provider(
    device: torch.device | str = "cuda",
    *,
    dtype: torch.dtype = torch.bfloat16,
    head_size: int = 128,
    backend: str | None = None,
) -> str:
    """Who serves `shared_prefix_attention` for such tensors, in words, and the reason where it is not the first choice.

    Args:
        device: of the tensors; one that is there.
        dtype: of the tensors.
        head_size: E.
        backend: as in `shared_prefix_attention`.

    Returns:
        For example "flash: flash_attn 2.8.3", "flash: PyTorch's FlashAttention-2 (flash_attn is not installed)",
        "flash: PyTorch's CPU kernel", "reference: on CUDA it serves torch.float16 and torch.bfloat16 only".

    Raises:
        BackendError: as `shared_prefix_attention`.
    """
    device = torch.device(device)
    fits = device.type != "cuda" or cuda.serves_head_size(head_size)
    if _choose(OP, backend, device, dtype, fits) == "flash":
        whose = cuda.provider() if device.type == "cuda" else "PyTorch's CPU kernel"
        return f"flash: {whose}"
    return f"reference: {_unsupported_reason(device, dtype, fits) or 'it was asked for'}"


def choose_attention(backend: str | None, q: Tensor, op: str = OP) -> str:
    """Which backend serves: flash or reference, by the rule of `syncr1.kernels.dispatch`."""
    # The head size is a symbol where torch.compile traces with dynamic shapes: what is constant then may not see it.
    fits = q.device.type != "cuda" or cuda.serves_head_size(q.shape[-1])
    chosen = _choose(op, backend, q.device, q.dtype, fits)
    refuse_transforms(op, chosen)
    return chosen


@constant_when_traced
def _choose(op: str, backend: str | None, device: torch.device, dtype: torch.dtype, fits: bool) -> str:
    return _choose_once(op, backend, os.environ.get(ENVIRONMENT_VARIABLE), device, dtype, fits)


@cache
def _choose_once(
    op: str, backend: str | None, preferred: str | None, device: torch.device, dtype: torch.dtype, fits: bool
) -> str:
    wanted = backend or preferred
    # `native` and `triton` in the environment are preferences for other ops; attention has neither.
    known = BACKENDS if backend else {*BACKENDS, *MODULES}
    source = "backend=" if backend else f"{ENVIRONMENT_VARIABLE}="
    if wanted is not None and wanted not in known:
        raise BackendError(
            f"{op}: {source}{wanted!r} cannot serve this call: it has {' and '.join(BACKENDS)}; or leave it unset"
        )
    if wanted == "reference":
        return wanted
    reason = _unsupported_reason(device, dtype, fits)
    if reason is None:
        return "flash"
    if backend:
        raise BackendError(f"{op}: {source}{backend!r} cannot serve this call: {reason}; use 'reference'")
    return "reference"


def _unsupported_reason(device: torch.device, dtype: torch.dtype, fits: bool) -> str | None:
    if device.type == "cuda":
        return cuda.unsupported_reason(dtype, fits, torch.cuda.get_device_capability(device))
    if device.type != "cpu":
        return f"it serves cpu and cuda tensors, not {device.type}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"it does not serve {dtype}"
    return None
