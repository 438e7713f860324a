"""The machine: versions, backends, and its two ceilings: bytes that a copy moves and operations of a bf16 product."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
from collections.abc import Callable
from typing import Any

import machine
import torch
from gpu_report import Report

from syncr1.kernels import attention, dispatch
from syncr1.kernels.attention_ops import cuda

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "deepspeed",
    "liger_kernel",
    "trl",
    "flash_attn",
    "cut_cross_entropy",
    "quack_kernels",
    "numpy",
    "pytest",
)
COPIED, SIDE = 4 << 30, 8192
"""Bytes of one operand of the copy; rows, columns and depth of the product."""


def seconds_of(run: Callable[[], Any], device: str, repeats: int = 10) -> float:
    """Median of single runs, by events on a GPU."""
    from interleaved import clock_for

    clock = clock_for("hot", device)
    for _ in range(2):
        run()
    return statistics.median(clock(run, 1) for _ in range(repeats))


def ceilings(device: str, copied: int, side: int) -> dict[str, float]:
    """Bytes a second, read and written both counted, and floating-point operations a second."""
    bandwidth = _copied_bytes_per_second(device, copied)
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    rate = 2 * side**3 / seconds_of(lambda: torch.mm(left, right, out=out), device)
    return {"copy_bytes_per_second": bandwidth, "bf16_flops": rate}


def _copied_bytes_per_second(device: str, copied: int) -> float:
    source = torch.randint(-100, 100, (copied // 8,), dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)


def versions() -> dict[str, str]:
    """Of what matters, or `absent`."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def properties() -> dict[str, Any]:
    """Of the GPU."""
    if not torch.cuda.is_available():
        return {}
    known = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    names = ("name", "major", "minor", "multi_processor_count", "L2_cache_size", "shared_memory_per_block_optin")
    return {name: getattr(known, name, None) for name in names} | {"free_bytes": free, "total_bytes": total}


def run(report: Report, pretend: bool, _: str) -> None:
    """Written in this order: what costs nothing first."""
    device = "cpu" if pretend else "cuda"
    report.write(versions=versions(), backends=dispatch.available())
    report.write(environment=machine.environment(device), properties=properties())
    served = {str(dtype).removeprefix("torch."): _attention(device, dtype) for dtype in (torch.bfloat16, torch.float32)}
    report.write(attention=served)
    report.write(ceilings=ceilings(device, *((1 << 24, 256) if pretend else (COPIED, SIDE))))


def _attention(device: str, dtype: torch.dtype) -> str:
    """What serves shared prefixes of this dtype, and whose kernels."""
    served = attention.choose_attention(None, torch.zeros(1, 1, 64, device=device, dtype=dtype))
    return f"{served}, {type(cuda.kernels()).__name__}" if served == "flash" and device == "cuda" else served
