"""Every `check_…` of the Triton kernels' files, in Triton's interpreter: few processes, since each loads torch anew."""

from __future__ import annotations

import pytest
from triton_child import TESTS, run_checks

pytest.importorskip("triton")
BATCHES = [
    ("test_triton_sample.py", "test_triton_rows.py"),
    ("test_triton_loss.py", "test_triton_decode_attention.py", "test_triton_ops.py"),
]


@pytest.mark.slow
@pytest.mark.parametrize("files", BATCHES, ids=" ".join)
def test_interpreted(files: tuple[str, ...]) -> None:
    run_checks("cpu", *files)


def test_no_file_is_left_out() -> None:
    with_checks = {path.name for path in TESTS.glob("test_triton_*.py") if "\ndef check_" in path.read_text()}
    assert with_checks == {file for files in BATCHES for file in files}
