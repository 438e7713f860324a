"""The contracts, and every `check_…`, on Triton: few processes, since each loads torch anew."""

from __future__ import annotations

import re

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
        "test_grpo_plan.py",
        "test_prefix_decode_attention.py",
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
    """None that has a check, or puts tensors on the device of Triton."""
    mark = re.compile(r"^(def check_|from backends import .*DEVICE)", re.MULTILINE)
    assert {path.name for path in TESTS.glob("test_*.py") if mark.search(path.read_text())} == set(sum(BATCHES, ()))
