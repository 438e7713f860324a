"""Whose kernels serve attention on CUDA: flash_attn, or PyTorch's with the reason said once. No GPU is needed."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch

from syncr1.engine.methods.starting import fuse_kernels
from syncr1.engine.settings.train_config import TrainConfig
from syncr1.engine.show.display import Display
from syncr1.engine.show.environment import environment
from syncr1.engine.world.base_model import corpus
from syncr1.engine.world.tiny_janus import build_policy
from syncr1.kernels import attention
from syncr1.kernels.api import BackendError, attention_provider
from syncr1.kernels.attention_ops import cuda
from syncr1.kernels.dispatch import available

UNDEFINED = "flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2ENS_14SourceLocationE"
WORKS = "def _wrapped_flash_attn_varlen_forward(*a, **k): ...\n_wrapped_flash_attn_varlen_backward = None\n"
Install = Callable[[str], None]


class Said(Display):
    """A display that keeps its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def forget() -> None:
    cuda.choose_pair.cache_clear()
    cuda.kernels.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a flash_attn on the path whose interface is the given source, with the metadata of version 2.6.3."""
    if "flash_attn" in sys.modules:
        pytest.skip("the real flash_attn is loaded in this process")

    def put(source: str) -> None:
        package, metadata = tmp_path / "flash_attn", tmp_path / "flash_attn-2.6.3.dist-info"
        package.mkdir()
        metadata.mkdir()
        (package / "__init__.py").write_text("")
        (package / "flash_attn_interface.py").write_text(source)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.6.3\n")
        monkeypatch.syspath_prepend(tmp_path)

    forget()
    yield put
    forget()


BROKEN = {
    "another torch's ABI": (f"raise ImportError({UNDEFINED!r})", f"does not load (ImportError: {UNDEFINED})"),
    "a library that is not there": ("raise OSError('libcudart.so.12: cannot open')", "(OSError: libcudart.so.12"),
    "ops registered twice": ("raise RuntimeError('already registered')", "(RuntimeError: already registered)"),
    "its extension is not built": ("import flash_attn_2_cuda_of_nowhere", "needs a module that is missing"),
    "before 2.7": ("def flash_attn_varlen_func(*a): ...", "2.7 or later is expected"),
    "half of it": (WORKS.splitlines()[0], "_wrapped_flash_attn_varlen_backward"),
}


@pytest.mark.parametrize(("source", "reason"), BROKEN.values(), ids=BROKEN)
def test_one_that_cannot_be_used_is_named_once_with_the_reason(install: Install, source: str, reason: str) -> None:
    install(source)
    with pytest.warns(RuntimeWarning) as caught:
        pair = cuda.kernels()
    assert isinstance(pair, cuda.TorchFlash) and len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith("shared_prefix_attention: flash_attn 2.6.3 cannot be used: ") and reason in message
    assert "pip install flash-attn --no-build-isolation" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cuda.kernels() is pair
        assert reason in cuda.provider() and cuda.provider().startswith("PyTorch's FlashAttention-2 (flash_attn 2.6.3")


def test_one_that_loads_serves_without_a_word(install: Install) -> None:
    install(WORKS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(cuda.kernels(), cuda.FlashAttn)
    assert cuda.provider() == "flash_attn 2.6.3"


def test_its_absence_is_no_fault(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nowhere:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name.partition(".")[0] == "flash_attn":
                raise ModuleNotFoundError(f"No module named {name!r}", name="flash_attn")

    monkeypatch.setattr(sys, "meta_path", [Nowhere(), *sys.meta_path])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(cuda.kernels(), cuda.TorchFlash)
    assert cuda.provider() == "PyTorch's FlashAttention-2 (flash_attn is not installed)"


def test_who_serves_is_public(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(f"raise ImportError({UNDEFINED!r})")
    monkeypatch.delenv("SYNCR1_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    attention._choose_once.cache_clear()
    assert attention_provider("cpu", dtype=torch.float32) == "flash: PyTorch's CPU kernel"
    assert attention_provider("cpu", backend="reference") == "reference: it was asked for"
    assert attention_provider("meta").startswith("reference: it serves cpu and cuda tensors, not meta")
    assert UNDEFINED in attention_provider("cuda")
    assert attention_provider("cuda").startswith("flash: PyTorch's FlashAttention-2 (flash_attn 2.6.3 cannot be used")
    assert attention_provider("cuda", dtype=torch.float32).startswith("reference: on CUDA it serves torch.float16 and")
    assert "multiples of 8" in attention_provider("cuda", head_size=36)
    with pytest.raises(BackendError, match="cannot serve this call"):
        attention_provider("cuda", dtype=torch.float32, backend="flash")
    monkeypatch.setenv("SYNCR1_BACKEND", "reference")
    assert attention_provider("cpu") == "reference: it was asked for"
    attention._choose_once.cache_clear()


def test_a_run_says_it(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among the facts that a run's folder keeps, and on a GPU in the lines of its start."""
    install(f"raise ImportError({UNDEFINED!r})")
    monkeypatch.delenv("SYNCR1_BACKEND", raising=False)
    facts = environment()
    assert facts["backends"] == available() and facts["backends"]["reference"] == "ok"
    if torch.cuda.is_available():
        pytest.skip("the rest pretends that there is a GPU")
    assert facts["attention"] == "flash: PyTorch's CPU kernel"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    attention._choose_once.cache_clear()
    policy, said = build_policy(corpus(), [], seed=0), Said()
    fuse_kernels(TrainConfig(use_liger_kernel=False), policy, said)
    assert said.notes == []
    here = policy.cache_shape()
    monkeypatch.setattr(policy, "cache_shape", lambda: replace(here, device=torch.device("cuda", 0)))
    fuse_kernels(TrainConfig(use_liger_kernel=False, bf16=True), policy, said)
    (line,) = said.notes
    assert line.startswith("attention: flash: PyTorch's FlashAttention-2 (flash_attn 2.6.3") and UNDEFINED in line
    fuse_kernels(TrainConfig(use_liger_kernel=False, bf16=False), policy, said)
    assert said.notes[-1].startswith("attention: reference: on CUDA it serves")
    attention._choose_once.cache_clear()
