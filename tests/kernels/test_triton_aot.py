"""Every kernel of the hot path compiles without a GPU, on the oldest and the newest Triton that a CUDA build of torch
brings, without spills and with loads of 16 bytes: one launch of each of its forms. `make test-triton` compiles all
launches for every target."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
MODULE = "syncr1.kernels.triton_ops.aot"
FORMS = "|".join(
    (
        "V=102400 bf16 [TC]=",  # rows that are swept,
        "V=16384 bf16 bias [TC]=",  # that a program holds,
        "V=184622 bf16 bias C=",  # that are no multiple of 16
        "V=102400 bf16 support C=",  # of which a set of ids is kept
        "^dapo, pruned",
        "^grpo, sequence ratio",
        "^scale=group",
        "^rule=variance_mass",
        "V=16384 bf16 guided top-k top-p",
        "V=102400 bf16 plain",
        "^16 heads on 16, E=128 bf16",
        "^28 heads on 4, E=128 bf16",
    )
)


def run(*command: str, triton: Path | None = None, cache: Path) -> subprocess.CompletedProcess[str]:
    """In a process without TRITON_INTERPRET, which would replace the kernels."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = os.pathsep.join(str(path) for path in (triton, ROOT) if path is not None)
    command = (sys.executable, "-W", "ignore", *command)
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def compiled(pytestconfig: pytest.Config, tmp_path: Path) -> Path:
    """Where Triton keeps what it has compiled, from one session to the next: by source, options, compiler and target,
    so that what changed is compiled again. `make clean` removes it."""
    kept = getattr(pytestconfig, "cache", None)
    return tmp_path if kept is None else kept.mkdir("triton")


@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_the_hot_path_compiles(version: str, compiled: Path, tmp_path: Path) -> None:
    folder = None if triton.__version__ == version else ROOT / "build" / "triton" / version
    if folder is not None and not folder.is_dir():
        pytest.skip(f"Triton {version} is not in build/triton; `make build/triton/{version}` puts it there")
    page = tmp_path / "records.json"
    flags = ("--hot", "--only", FORMS, "--targets", "90", "--processes", "1", "--json", str(page))
    done = run("-m", MODULE, *flags, triton=folder, cache=compiled)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    records = json.loads(page.read_text())
    hot = {"score_rows", "loss_rows", "gradient_rows", "loss", "finish", "advantage", "keep", "sample", "decode"}
    assert hot <= {record["kernel"].removesuffix("_kernel") for record in records}, done.stdout
    assert {record["triton"] for record in records} == {version}
    found = {form for form in FORMS.split("|") for record in records if re.search(form, record["case"])}
    assert found == set(FORMS.split("|"))  # none has lost its name


PROBE = """
import torch, triton, triton.language as tl
from syncr1.kernels.triton_ops import aot, aot_cases

@triton.jit
def probe_kernel(pointer, stride, SIZE: tl.constexpr):
    values = tl.load(pointer + stride * tl.arange(0, SIZE))
    tl.store(pointer + stride * tl.arange(0, SIZE), values / tl.sum(tl.exp(values)))

def record(size, stride):
    values = aot_cases.empty(8192)
    case = aot_cases.Case("probe", lambda: probe_kernel[(1,)](values, stride, SIZE=size, num_warps=1), 1, "")
    (launch,) = aot.compiled_by(case, 90)
    return aot.describe(launch, case, 90)

print(record(8192, 1).fault, record(512, 1).fault, record(2048, 3).fault, sep=" | ")
"""


def test_spills_and_narrow_loads_are_found(tmp_path: Path, compiled: Path) -> None:
    """The check can fail: one kernel that must spill, one that is right, one whose stride allows no wide load."""
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    done = run(str(script), cache=compiled)
    assert done.returncode == 0, done.stderr[-4000:]
    crowded, right, strided = done.stdout.strip().split(" | ")
    assert crowded.startswith("spills") and right == "None" and "loads of under 16 bytes" in strided
