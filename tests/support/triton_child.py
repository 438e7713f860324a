"""Runs `check_…` functions in a process of their own: TRITON_INTERPRET must be set before triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "kernels"


def run_checks(device: str, *files: str) -> None:
    """Of the named files of tests/kernels: on "cpu" in Triton's interpreter, on "cuda" compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "python_functions=check_*"]
    command = [sys.executable, "-m", "pytest", *(str(TESTS / Path(file).name) for file in files), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
