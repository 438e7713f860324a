"""A GPU that is not there: ops run on fake CUDA tensors as they would on one, launches are kept and not made.

What a GPU would have to do is seen from outside: which kernels are launched, on which device, with which pointers and
strides, and where the host would have to wait for a value. Needs triton without TRITON_INTERPRET.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from syncr1.kernels import dispatch

DEVICE = torch.device("cuda", 1)
"""Not the current one: a launch has to choose it."""
OPS = ("group_advantages", "dgs_select", "grpo_plan", "grpo_loss", "linear_grpo_loss", "linear_logp", "selective_logp")
OPS += ("cfg_sample", "prefix_decode_attention")
WAITS = ("aten._local_scalar_dense", "aten.nonzero.", "aten.is_nonzero", "aten.equal.", "aten.masked_select")
WAITS += ("aten._unique2", "aten.unique_dim", "aten.repeat_interleave.Tensor", "aten.bincount")


@dataclass(frozen=True)
class Launch:
    """One kernel as it would have been launched."""

    kernel: str
    grid: tuple[int, ...]
    device: torch.device | None
    """The one that was current."""
    arguments: dict[str, Any]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every pointer, those inside records too."""
        return self._of(Tensor)

    def numbers(self) -> Iterator[tuple[str, int]]:
        """Every integer."""
        return self._of(int)

    def _of(self, kind: type[Any]) -> Iterator[tuple[str, Any]]:
        for name, value in self.arguments.items():
            parts = value._asdict().items() if hasattr(value, "_asdict") else [("", value)]
            yield from ((f"{name}.{part}".rstrip("."), one) for part, one in parts if isinstance(one, kind))


@dataclass
class AbsentGPU:
    """What was seen."""

    mode: FakeTensorMode
    launches: list[Launch] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    """Ops at which the host waits for the GPU, in order."""
    dispatched: int = 0
    answer: int = 1
    """What every value that is read back is taken to be."""

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32, device: torch.device = DEVICE) -> Tensor:
        """On the absent GPU."""
        return torch.empty(shape, dtype=dtype, device=device)


class _Watch(TorchDispatchMode):
    """Counts ops, and those that make the host wait."""

    def __init__(self, gpu: AbsentGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func)
        self.gpu.dispatched += 1
        waits = name.startswith(WAITS)
        if name.startswith("aten.repeat_interleave.Tensor"):
            waits = (kwargs or {}).get("output_size") is None
        if name.startswith(("aten.index.Tensor", "aten.index_put")):  # a mask's places are counted first
            waits = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name == "aten.addmm.dtype_out":  # whose fake takes the dtype for a factor in torch 2.10 and 2.11
            func, args = torch.ops.aten.mm.dtype_out, args[1:]
        result = func(*args, **(kwargs or {}))
        if name.startswith(("aten._to_copy", "aten.copy_")):
            source = args[1] if name.startswith("aten.copy_") else args[0]
            target = args[0] if name.startswith("aten.copy_") else result
            waits = source.device != target.device
        if waits:
            self.gpu.waits.append(name)
        return result


# Methods whose own form asks the GPU's driver before they dispatch the ops that they stand for.


def contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def copy_(tensor: Tensor, source: Tensor) -> Tensor:
    copied: Tensor = torch.ops.aten.copy_.default(tensor, source)
    return copied


def index(tensor: Tensor, places: Any) -> Tensor:
    dim = 0
    for place in places if isinstance(places, tuple) else (places,):
        if place is None:
            tensor, dim = tensor.unsqueeze(dim), dim + 1
        elif isinstance(place, slice):
            tensor, dim = torch.ops.aten.slice.Tensor(tensor, dim, place.start, place.stop, place.step or 1), dim + 1
        elif isinstance(place, int):
            tensor = tensor.select(dim, place)
        else:
            tensor, dim = torch.ops.aten.index.Tensor(tensor, [None] * dim + [place]), dim + 1
    return tensor


def flat(function: Callable[[Any], Any], record: type[Any]) -> Callable[..., Any]:
    """An op's implementation, which takes its record, called as torch calls it: with the record's fields."""
    from syncr1.kernels.register import gatherer

    return lambda *arguments: function(gatherer(record)(arguments))


OWN: dict[str, Callable[..., Any]] = {
    "__getitem__": index,
    "contiguous": contiguous,
    "copy_": copy_,
    "__invert__": lambda mask: mask.bitwise_not(),
}
"""What fake tensors do differently."""


@contextmanager
def absent_gpu(patch: pytest.MonkeyPatch) -> Iterator[AbsentGPU]:
    """Fake CUDA tensors may be made inside, and public ops called on them."""
    import triton.runtime.jit as jit

    from syncr1.kernels import triton_ops
    from syncr1.kernels.ops import decode_attention, groups, linear_loss, logp, loss, sample
    from syncr1.kernels.terms import DecodeStep, SampleInputs

    gpu = AbsentGPU(FakeTensorMode())
    current: list[torch.device] = []

    class Current:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            current.append(self.device)

        def __exit__(self, *error: object) -> None:
            current.pop()

    def launch(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        named = dict(zip(self.arg_names, arguments, strict=False)) | options
        gpu.launches.append(Launch(self.fn.__name__, grid, current[-1] if current else None, named))

    def read_back(self: Tensor) -> list[int]:
        gpu.waits.append("tolist")
        return [gpu.answer] * self.numel()

    implementations = SimpleNamespace(
        group_advantages=flat(groups.score, groups.AdvantageInputs),
        dgs_select=flat(groups.select, groups.SelectionInputs),
        grpo_plan=flat(groups.make_plan, groups.SelectionInputs),
        grpo_loss=flat(loss.form_loss, loss.TokenLossInputs),
        linear_grpo_loss=flat(linear_loss.form_linear_loss, linear_loss.LinearLossInputs),
        linear_logp=flat(logp.score_head, logp.HiddenInputs),
        selective_logp=flat(logp.score_logits, logp.LogitInputs),
        cfg_sample=flat(sample.draw, SampleInputs),
        prefix_decode_attention=flat(decode_attention.decode, DecodeStep),
    )
    # A fake tensor would take the op's fake, which launches nothing.
    for module in (groups, loss, linear_loss, logp, sample, decode_attention):
        patch.setattr(module, "registered", implementations)
    patch.setattr(jit.JITFunction, "run", launch)
    patch.setattr(torch.cuda, "device", Current)
    patch.setattr(triton_ops, "unavailable_reason", lambda: None)
    patch.setattr(FakeTensor, "tolist", read_back, raising=False)
    patch.setattr(FakeTensor, "data_ptr", lambda self: self.storage_offset() * self.element_size(), raising=False)
    for name, method in OWN.items():
        patch.setattr(FakeTensor, name, method, raising=False)
    dispatch.load.cache_clear()
    dispatch._choose_once.cache_clear()
    try:
        # Autograd's nodes need a real GPU. What they would save and scale is in the ops; their gradients are formed.
        with gpu.mode, _Watch(gpu), torch._C._AutoDispatchBelowAutograd():
            yield gpu
    finally:
        dispatch.load.cache_clear()
        dispatch._choose_once.cache_clear()


def strided(tensor: Callable[..., Tensor], *shape: int, **options: Any) -> Tensor:
    """The same shape, no dimension contiguous."""
    wide = tensor(*(2 * size for size in shape), **options)
    return wide[tuple(slice(None, None, 2) for _ in shape)]
