"""What `make gpu` runs on a GPU is what the tests have for one; in the suite: any commit to a test can break it."""

from __future__ import annotations

import re
import sys

from helpers import ROOT

sys.path.insert(0, str(ROOT / "bench"))
try:
    import gpu_parts
    import gpu_tests
finally:
    sys.path.remove(str(ROOT / "bench"))


def test_every_file_with_a_gpu_test_is_among_the_steps() -> None:
    marker = "pytest.mark." + "gpu"
    files = {p.stem.removeprefix("test_") for p in (ROOT / "tests").glob("*/test_*.py") if marker in p.read_text()}
    on_triton = (ROOT / "tests" / "kernels" / "test_triton_interpreted.py").read_text()
    assert set(re.findall(r"\"test_(\w+)\.py\",?", on_triton)) - {"triton_interpreted"} == set(gpu_tests.CHECKS)
    assert files - {"triton_interpreted"} | set(gpu_tests.CHECKS) == set(gpu_parts.TESTS)
