"""The backends that the contract of an op is stated for: one test function, tried on each of them.

A test process serves `reference` and `native`. Triton needs a process of its own, since TRITON_INTERPRET must be set
before it is imported: `run_on_triton` starts one, in which the same functions get `backend="triton"` and no others run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from syncr1.kernels import dispatch

TESTS = Path(__file__).resolve().parents[1] / "kernels"
VARIABLE = "SYNCR1_TEST_TRITON"
DEVICE = os.environ.get(VARIABLE, "cpu")
"""Of the tensors that Triton is given: "cpu" where it interprets."""
ON_TRITON = VARIABLE in os.environ
NIGHTLY = os.environ.get("SYNCR1_NIGHTLY") == "1"
"""Whole products of parameters, every seed (`make fuzz`)."""

NATIVE = pytest.mark.skipif(dispatch.available()["native"] != "ok", reason=dispatch.available()["native"])
KERNELS = ["triton"] if ON_TRITON else [pytest.param("native", marks=NATIVE)]
"""What is not plain PyTorch."""
BACKENDS = KERNELS if ON_TRITON else ["reference", *KERNELS]
FEW = hypothesis.settings(max_examples=6 if ON_TRITON else hypothesis.settings().max_examples)
"""An interpreted launch takes milliseconds a program."""


def run_on_triton(device: str, *files: str) -> None:
    """Of these files of tests/kernels every `check_…`, and every test of a backend as one of Triton: on "cpu" in its
    interpreter, on "cuda" compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment[VARIABLE] = device
    if device == "cpu":
        environment |= {"TRITON_INTERPRET": "1"} | _with_the_newest_interpreter()
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "python_functions=check_* test_*"]
    options += ["-k", "check_ or [triton or -triton", "-m", "not gpu"]
    command = [sys.executable, "-m", "pytest", *(str(TESTS / file) for file in files), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def _with_the_newest_interpreter() -> dict[str, str]:
    """Where `make test` has put one: it rounds once in an fma (3.9) and passes a NaN over in a maximum (3.8), as a GPU
    does. An environment of `make test-versions` keeps its own."""
    root = TESTS.parents[1]
    newest = root / "build" / "triton" / "3.9.0"
    own = Path(sys.prefix).is_relative_to(root / "build" / "versions") or not newest.is_dir()
    return {} if own else {"PYTHONPATH": f"{newest}{os.pathsep}{root}"}


def patch_once() -> None:
    """Triton's interpreter puts its own functions in the place of `triton.language`'s at each call of a device function
    anew, which takes half of its time. What the launch around it, or a call before, has replaced is replaced."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_what_is_not(fn: Any) -> Any:
        languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        replaced = not any(tl.core.is_builtin(language.load) for language in languages)
        return interpreter._LangPatchScope() if replaced else patch(fn)

    interpreter._patch_lang = patch_what_is_not


if os.environ.get("TRITON_INTERPRET") == "1":
    patch_once()
