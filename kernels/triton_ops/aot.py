"""Ahead-of-time compilation of every launch, on machines without a GPU: registers, spills, shared memory, load widths.

`python -m syncr1.kernels.triton_ops.aot` prints the table for the installed Triton and fails where a kernel of the hot
path spills or reads its rows in less than 16 bytes. `--json` keeps it, `--merge` makes one page of several Tritons'.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .aot_cases import Case, cases
from .launching import interpreting

TARGETS = (80, 90, 100)
H200_BYTES_PER_SECOND = 4.3e12
"""A device-to-device copy, bytes read and written."""
LAUNCH_SECONDS = 3e-6
"""Below it the launch is what a kernel costs."""
NARROW_LOADS = 12
"""Loads of under 16 bytes that a hot kernel may hold beside those of its rows: targets, weights, a row's last piece."""


@dataclass(frozen=True, slots=True)
class Record:
    """What one launch needs on one target."""

    triton: str
    kernel: str
    case: str
    target: int
    grid: int
    """Programs."""
    warps: int
    registers: int
    """Per thread."""
    spilled: int
    """Bytes of stack and local memory per thread."""
    shared: int
    """Bytes per program."""
    wide_loads: int
    """Instructions that read 16 bytes a thread, from memory into registers or shared memory."""
    narrow_loads: int
    """Those that read less."""
    passes: str
    num_bytes: int
    hot: bool
    wide: bool
    more_loads: int
    """Of `Case`."""

    @property
    def floor(self) -> float:
        """Seconds that the bytes alone take on an H200."""
        return self.num_bytes / H200_BYTES_PER_SECOND

    @property
    def fault(self) -> str | None:
        """What a kernel of the hot path may not have."""
        if self.hot and self.spilled:
            return f"spills {self.spilled} bytes"
        if self.hot and self.wide and (not self.wide_loads or self.narrow_loads > NARROW_LOADS + self.more_loads):
            return f"{self.narrow_loads} loads of under 16 bytes beside {self.wide_loads} of 16"
        return None


class Target:
    """Stands in for a GPU's driver: a kernel is compiled for `sm` and never launched."""

    def __init__(self, sm: int) -> None:
        self.sm = sm

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)

    def get_current_device(self) -> int:
        return self.sm  # a kernel keeps what it was compiled to by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


Launch = tuple[str, tuple[int, ...], Any]


def compiled_by(case: Case, sm: int) -> list[Launch]:
    """(kernel, grid, compiled kernel) of each launch of a case."""
    launches: list[Launch] = []
    launch = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = launch(self, *arguments, grid=grid, warmup=True, **options)
        launches.append((self.fn.__name__, grid, compiled))
        return compiled

    driver.set_active(Target(sm))
    JITFunction.run = compile_only
    try:
        case.call()
    finally:
        JITFunction.run = launch
    return launches


def run_tool(tool: str, *arguments: str) -> str:
    """What one of Triton's own binary tools prints."""
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def load_widths(machine_code: str) -> tuple[int, int]:
    """(loads of 16 bytes a thread, narrower ones) in a disassembly."""
    loads = re.findall(r"\b(LDG(?:STS)?\.\S*)", machine_code)
    wide = sum(".128" in load for load in loads)
    return wide, len(loads) - wide


def describe(launch: Launch, case: Case, sm: int) -> Record:
    """Reads the binary."""
    kernel, grid, compiled = launch
    tools = triton.knobs.nvidia
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = run_tool(tools.cuobjdump.path, "-res-usage", file.name)
        wide, narrow = load_widths(run_tool(tools.nvdisasm.path, "-c", file.name))
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Record(
        triton=triton.__version__,
        kernel=kernel,
        case=case.name,
        target=sm,
        grid=grid[0],
        warps=compiled.metadata.num_warps,
        registers=used["REG"],
        spilled=used["STACK"] + used["LOCAL"],
        shared=compiled.metadata.shared,
        wide_loads=wide,
        narrow_loads=narrow,
        passes=case.passes,
        num_bytes=case.num_bytes,
        hot=case.hot,
        wide=case.wide,
        more_loads=case.more_loads,
    )


def compile_case(index: int, sm: int) -> list[Record]:
    """One case for one target."""
    case = cases()[index]
    return [describe(launch, case, sm) for launch in compiled_by(case, sm)]


def compile_all(
    targets: Sequence[int] = TARGETS, *, hot_only: bool = False, only: str = "", processes: int = 2
) -> list[Record]:
    """Every launch for every target; `only` is a regular expression that the names of cases must match somewhere."""
    if interpreting():
        raise RuntimeError("compile_all: TRITON_INTERPRET must be unset, got 1; start a new process without it")
    chosen = [i for i, case in enumerate(cases()) if (case.hot or not hot_only) and re.search(only, case.name)]
    jobs = [(i, sm) for sm in targets for i in chosen]
    if processes == 1:
        return [record for job in jobs for record in compile_case(*job)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return [record for records in pool.map(compile_case, *zip(*jobs, strict=True)) for record in records]


def line(record: Record, versions: Iterable[str] = ()) -> str:
    """A row of the table; figures of several Tritons stand beside each other."""
    floor = record.floor
    time = f"{floor * 1e6:.1f} µs" if floor > LAUNCH_SECONDS else "launch"
    cells = [
        *versions,
        record.kernel.removesuffix("_kernel"),
        record.case,
        f"sm_{record.target}",
        record.grid,
        record.warps,
        record.registers,
        record.spilled,
        record.shared,
        f"{record.wide_loads} + {record.narrow_loads}",
        record.passes,
        time,
        "hot" if record.hot else "",
    ]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


HEAD = (
    "| kernel | case | target | programs | warps | registers | spilled B | shared B | loads 16 B + narrower | passes"
    " | bytes alone | |"
)


def table(records: Sequence[Record]) -> str:
    """One line per launch and target."""
    rule = "|" + "---|" * (HEAD.count("|") - 1)
    return "\n".join([HEAD, rule, *(line(record) for record in records)])


def merged(records: Sequence[Record]) -> list[Record]:
    """One record per launch, target and outcome: Tritons that agree share a line."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for record in records:
        values = asdict(record)
        alike.setdefault(tuple(values[name] for name in values if name != "triton"), []).append(record.triton)
    return [Record(", ".join(sorted(set(versions))), *values) for values, versions in alike.items()]


def page(records: Sequence[Record]) -> str:
    """All Tritons on one page."""
    order = {key: place for place, key in enumerate(dict.fromkeys((r.kernel, r.case, r.target) for r in records))}
    lines = sorted(merged(records), key=lambda r: (order[r.kernel, r.case, r.target], r.triton))
    versions = sorted({record.triton for record in records})
    faults = [record for record in records if record.fault]
    rule = "|" + "---|" * HEAD.count("|")
    return "\n".join(
        [
            "# Every launch, compiled ahead of time\n",
            f"Triton {', '.join(versions)}; made by `make test-triton`. Registers are per thread, spilled and shared",
            "bytes per thread and per program; `bytes alone` is what has to move at 4.3 TB/s, an H200's copy, and",
            "`launch` where that is below 3 µs. Loads are instructions of the machine code.\n",
            f"Launches × targets × Tritons: {len(records)}. Faults (spills or narrow loads in a hot kernel): "
            f"{len(faults)}.\n",
            f"| Triton {HEAD}",
            rule,
            *(line(record, [record.triton]) for record in lines),
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 1 where a hot kernel has a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS)
    parser.add_argument("--hot", action="store_true", help="only what every training step and token needs")
    parser.add_argument("--only", default="", metavar="REGEX", help="of those the cases whose names match")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the records")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="JSON", help="compile nothing: one page of these")
    given = parser.parse_args(arguments)
    if given.merge:
        read = [Record(**values) for path in given.merge for values in json.loads(path.read_text())]
        print(page(read))
        return int(any(record.fault for record in read))
    records = compile_all(given.targets, hot_only=given.hot, only=given.only, processes=given.processes)
    print(table(records))
    if given.json:
        given.json.write_text(json.dumps([asdict(record) for record in records], indent=0))
    faults = [record for record in records if record.fault]
    for record in faults:
        print(f"{record.kernel} {record.case} sm_{record.target}: {record.fault}", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
