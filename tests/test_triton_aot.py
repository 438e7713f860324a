"""Every Triton kernel compiles for each target without a GPU, and none of the hot path spills."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow


@pytest.fixture
def compiled(pytestconfig: pytest.Config, tmp_path: Path) -> Path:
    """Where Triton keeps what it has compiled, from one session to the next: by source, options, compiler and target,
    so that what changed is compiled again. `make clean` removes it."""
    kept = getattr(pytestconfig, "cache", None)
    return tmp_path if kept is None else kept.mkdir("triton")


def test_all_kernels_compile_without_spills(compiled: Path) -> None:
    """In a child process: TRITON_INTERPRET, if set here, would replace the kernels."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(compiled)
    command = [sys.executable, "-W", "ignore", "-m", "syncr1.kernels.triton_ops.aot"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    kernels = set(re.findall(r"^(\w+_kernel) +(\d+)", done.stdout, flags=re.MULTILINE))
    for name in ("loss_kernel", "finish_kernel", "advantage_kernel", "keep_kernel"):
        assert {(name, target) for target in ("80", "90", "100")} <= kernels, done.stdout
    modules = {"rows": "loss_rows_kernel", "sample": "sample_kernel", "decode_attention": "decode_kernel"}
    assert {name for name, _ in kernels} >= set(modules.values()), done.stdout


def test_spills_are_found(tmp_path: Path) -> None:
    """The check can fail: a kernel that must spill is reported as such."""
    source = """
import triton, triton.language as tl
from syncr1.kernels.triton_ops import aot, groups

@triton.jit
def crowded_kernel(pointer, SIZE: tl.constexpr):
    values = tl.load(pointer + tl.arange(0, SIZE))
    tl.store(pointer + tl.arange(0, SIZE), values / tl.sum(tl.exp(values)))

groups.AOT = [(crowded_kernel, {"pointer": "*fp32", "SIZE": "constexpr"}, {"SIZE": 8192}, 1, 3, True)]
(record,) = aot.compile_all(targets=(90,), modules=("groups",))
assert record.spilled > 0, record
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = tmp_path / "crowded.py"
    script.write_text(source)
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
