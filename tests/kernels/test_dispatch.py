"""Which backend serves a call, and what is said when none can."""

from __future__ import annotations

import ctypes

import pytest
import torch

from syncr1.kernels import dispatch
from syncr1.kernels.api import BackendError, selective_logp
from syncr1.kernels.native import library

NATIVE = dispatch.available()["native"]
needs_native = pytest.mark.skipif(NATIVE != "ok", reason=NATIVE)
SINGLE, HALF, DOUBLE = (torch.zeros(2, 3, dtype=d) for d in (torch.float32, torch.bfloat16, torch.float64))


@needs_native
def test_the_device_and_dtype_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.choose("selective_logp", None, SINGLE) == "native"
    assert dispatch.choose("selective_logp", None, HALF) == "native"
    assert dispatch.choose("selective_logp", None, SINGLE.clone().requires_grad_()) == "native"
    assert dispatch.choose("selective_logp", None, DOUBLE) == "reference"
    assert dispatch.choose("selective_logp", None, SINGLE, DOUBLE) == "reference"
    monkeypatch.setenv("SYNCR1_BACKEND", "reference")
    assert dispatch.choose("selective_logp", None, SINGLE) == "reference"
    assert dispatch.choose("selective_logp", "native", SINGLE) == "native"
    monkeypatch.setenv("SYNCR1_BACKEND", "native")
    assert dispatch.choose("grpo_loss", None, DOUBLE) == "reference"


@needs_native
def test_a_named_backend_serves_or_says_why_not() -> None:
    with pytest.raises(
        BackendError, match=r"selective_logp: backend='native' cannot serve .*float32 and .*bfloat16 only"
    ):
        selective_logp(DOUBLE, torch.zeros(2, dtype=torch.int64), backend="native")


def test_a_library_that_does_not_fit_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr(library, "ABI_VERSION", 999)
    if NATIVE == "ok":
        reason = library.load.__wrapped__()
        assert isinstance(reason, str) and f"ABI {ctypes.CDLL(str(library.LIBRARY)).syncr1_abi_version()}" in reason
        assert "wants 999; install again" in reason
    monkeypatch.setattr(library, "LIBRARY", library.LIBRARY.with_name("absent.so"))
    assert "was not built" in str(library.load.__wrapped__())


def test_available_names_every_backend() -> None:
    found = dispatch.available()
    assert list(found) == ["reference", "native", "triton"] and found["reference"] == "ok"
