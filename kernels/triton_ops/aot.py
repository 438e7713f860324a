"""Ahead-of-time compilation of every kernel, on machines without a GPU: registers, spills and shared memory.

`python -m syncr1.kernels.triton_ops.aot` prints the table and fails where a kernel of the hot path spills. A module
with kernels lists representative variants in `AOT`: (kernel, signature, constexprs, num_warps, num_stages, hot), the
signature as `triton.compiler.ASTSource` takes it; a "constexpr" that `constexprs` does not name is an absent pointer.
A seventh item holds further options. What is not on the hot path is compiled for one target only.
"""

from __future__ import annotations

import importlib
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from syncr1.kernels.triton_ops.launch import interpreting

MODULES = ("groups", "loss", "rows", "sample", "decode_attention")
TARGETS = (80, 90, 100)
MAIN_TARGET = 90


@dataclass(frozen=True, slots=True)
class Record:
    """What one kernel needs on one target."""

    kernel: str
    variant: str
    target: int
    registers: int
    """Per thread."""
    spilled: int
    """Bytes of stack and local memory per thread."""
    shared: int
    """Bytes per program."""
    hot: bool


ALIGNED_NUMBERS = ("V", "stride", "out_stride", "cond_stride", "uncond_stride")


def entries(module: str) -> list[Any]:
    """The variants that a module lists."""
    return list(importlib.import_module(f"syncr1.kernels.triton_ops.{module}").AOT)


def leaves(signature: dict[str, Any]) -> Iterator[tuple[tuple[int, ...], str, str]]:
    """(path, name, type) of every argument, those inside tuples too."""
    for index, (name, kind) in enumerate(signature.items()):
        if isinstance(kind, tuple):
            names = getattr(kind, "_fields", range(len(kind)))
            yield from (((index, i), f"{name}.{names[i]}", part) for i, part in enumerate(kind))
        else:
            yield (index,), name, kind


def describe(signature: dict[str, Any], constexprs: dict[str, Any]) -> str:
    """What sets a variant apart: its switches, and the pointers it goes without."""
    parts = []
    for name, value in constexprs.items():
        fields = value._asdict().items() if hasattr(value, "_asdict") else [(name, value)]
        parts += [f"{key}={int(v)}" for key, v in fields if v]
    absent = [name for _, name, kind in leaves(signature) if kind == "constexpr" and name not in constexprs]
    types = sorted({kind[1:] for _, _, kind in leaves(signature) if kind.startswith("*")})
    return " ".join([*parts, *(f"-{name.split('.')[-1]}" for name in absent), f"({' '.join(types)})"])


def compile_one(module: str, index: int, target: int) -> Record:
    """One variant for one target."""
    kernel, signature, constexprs, num_warps, num_stages, hot, *more = entries(module)[index]
    values = {path: None for path, _, kind in leaves(signature) if kind == "constexpr"}
    places = {name: path for path, name, _ in leaves(signature)}
    values |= {places[name]: value for name, value in constexprs.items()}
    # What the launcher finds for tensors that begin where their memory does and have rows of such a length.
    aligned = {
        path: [["tt.divisibility", 16]]
        for path, name, kind in leaves(signature)
        if kind.startswith("*") or name in ALIGNED_NUMBERS or name.startswith("strides.")
    }
    source = ASTSource(kernel, signature, values, aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages, **(more[0] if more else {})}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Record(
        kernel=kernel.fn.__name__,
        variant=describe(signature, constexprs),
        target=target,
        registers=used["REG"],
        spilled=used["STACK"] + used["LOCAL"],
        shared=compiled.metadata.shared,
        hot=hot,
    )


def compile_all(targets: Sequence[int] = TARGETS, modules: Sequence[str] = MODULES, processes: int = 1) -> list[Record]:
    """Every listed variant of the hot path for every target, the others for MAIN_TARGET."""
    if interpreting():
        raise RuntimeError("compile_all: TRITON_INTERPRET must be unset, got 1; start a new process without it")
    jobs = [
        (module, index, target)
        for module in modules
        for index, entry in enumerate(entries(module))
        for target in targets
        if entry[5] or target == MAIN_TARGET
    ]
    if processes == 1:
        return [compile_one(*job) for job in jobs]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(compile_one, *zip(*jobs, strict=True)))


def table(records: Sequence[Record]) -> str:
    """One line per variant and target."""
    head = f"{'kernel':22} {'sm':>4} {'registers':>9} {'spilled B':>9} {'shared B':>9} {'hot':4} variant"
    lines = [
        f"{r.kernel:22} {r.target:4} {r.registers:9} {r.spilled:9} {r.shared:9} {'yes' if r.hot else '':4} {r.variant}"
        for r in records
    ]
    return "\n".join([head, *lines])


if __name__ == "__main__":
    found = compile_all(processes=2)
    print(table(found))
    sys.exit(any(record.hot and record.spilled for record in found))
