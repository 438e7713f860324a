"""The contracts, and every `check_…`, on Triton: few processes, since each loads torch anew."""

from __future__ import annotations

import pytest
import torch
from backends import TESTS, run_on_triton

pytest.importorskip("triton")
BATCHES = [
    ("test_sample.py", "test_triton_sample.py", "test_rows.py", "test_triton_rows.py"),
    (
        "test_token_loss.py",
        "test_group_advantages.py",
        "test_dgs_select.py",
        "test_triton_decode_attention.py",
        "test_triton_ops.py",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("files", BATCHES, ids=" ".join)
def test_interpreted(files: tuple[str, ...]) -> None:
    run_on_triton("cpu", *files)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("files", BATCHES, ids=" ".join)
def test_on_the_gpu(files: tuple[str, ...]) -> None:
    run_on_triton("cuda", *files)


def test_no_file_is_left_out() -> None:
    on_triton = ("\ndef check_", "ON_TRITON", "import BACKENDS, DEVICE")
    found = {p.name for p in TESTS.glob("test_*.py") if any(mark in p.read_text() for mark in on_triton)}
    assert found - {"test_triton_interpreted.py"} == {file for files in BATCHES for file in files}
