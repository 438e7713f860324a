"""The Triton sampler against `kernels.reference.sample`, in Triton's interpreter.

test_triton_interpreted.py runs every `check_…` of this file in a process of its own; on a machine with a GPU another
runs them there, compiled.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tied_logits import SEED, exact_size, late_offset, levels, tied_cases, uniform_shares
from torch import Tensor
from triton_child import run_checks

from syncr1.kernels.outputs import CFGSample
from syncr1.kernels.reference.philox import uniform
from syncr1.kernels.reference.sample import sample as reference_sample
from syncr1.kernels.reference.sample import truncate
from syncr1.kernels.terms import SampleInputs

pytest.importorskip("triton")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
MODULE = "syncr1.kernels.triton_ops.sample"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu() -> None:
    run_checks("cuda", __file__)


@pytest.fixture(params=["resident", "swept"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways to hold a row; the swept one in tiles small enough for several of them."""
    module = importlib.import_module(MODULE)
    monkeypatch.setattr(module, "COLUMNS", 32)
    if request.param == "swept":
        monkeypatch.setattr(module, "MAX_RESIDENT", 0)
        monkeypatch.setattr(module, "STREAM_TILE", 256)
    yield request.param


def draw(cond: Tensor, uncond: Tensor | None = None, first: int = 2**40, **changes: Any) -> tuple[CFGSample, CFGSample]:
    """(Triton, reference) with one offset per row; the reference has no token for a row of NaN, and is left out."""
    num_rows = cond.shape[0]
    options: dict[str, Any] = {"cfg_weight": 1.0 if uncond is None else 3.0, "temperature": 0.8, "top_k": 0}
    options |= {"top_p": 1.0, "forbidden": None, "seed": torch.full((num_rows,), -5, device=cond.device)}
    options["offset"] = torch.arange(num_rows, device=cond.device) + first
    options |= changes
    inputs = SampleInputs(cond, uncond, **options, backend="triton")
    got = importlib.import_module(MODULE).sample(inputs)
    return got, got if bool(cond.isnan().any()) else reference_sample(inputs)


def near_a_threshold(cond: Tensor, uncond: Tensor | None, offset: Tensor, **options: Any) -> Tensor:
    """[B] bool: the uniform is within 1e-6 of a running sum, where rounding may choose the neighbour."""
    mixed = cond.double() if uncond is None else uncond.double() + 3 * (cond.double() - uncond.double())
    logp = truncate((mixed / 0.8).log_softmax(-1), options.get("top_k", 0), options.get("top_p", 1.0))
    running = logp.exp().cumsum(-1)
    u = uniform(torch.full_like(offset, -5), offset)[:, None] * running[:, -1:]
    return ((running - u).abs() < 1e-6 * running[:, -1:]).any(-1)


def same(got: CFGSample, want: CFGSample, rows: Tensor) -> None:
    assert got.token.dtype == torch.int64
    assert torch.equal(got.token[rows], want.token[rows])
    for ours, theirs in ((got.logp, want.logp), (got.logp_mixed, want.logp_mixed), (got.entropy, want.entropy)):
        torch.testing.assert_close(ours[rows], theirs[rows], rtol=1e-6, atol=3e-6)


def check_uniform_is_the_references() -> None:
    """Bit for bit, for seeds and offsets that use all 64 bits."""
    import triton
    import triton.language as tl

    from syncr1.kernels.triton_ops.philox import row_uniform

    @triton.jit
    def kernel(seed, offset, out):  # type: ignore[no-untyped-def]
        index = tl.program_id(0)
        tl.store(out + index, row_uniform(tl.load(seed + index), tl.load(offset + index)))

    kernel.fn.__globals__.update(tl=tl, row_uniform=row_uniform)
    seed = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 123456789012345], device=DEVICE)
    offset = torch.tensor([0, 2**32, 2**62 + 5, -1, 2**31, 7], device=DEVICE)
    out = torch.empty(6, dtype=torch.float64, device=DEVICE)
    kernel[(6,)](seed, offset, out)
    assert torch.equal(out, uniform(seed, offset))


CASES: list[dict[str, Any]] = [{}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 40, "top_p": 0.7}]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize(("dtype", "guided"), [(torch.float32, True), (torch.bfloat16, False)])
def check_tokens(form: str, options: dict[str, Any], dtype: torch.dtype, guided: bool) -> None:
    num_rows = 10 if form == "resident" else 3
    cond, uncond = (2 * torch.randn(2, num_rows, 301, device=DEVICE)).to(dtype)
    got, want = draw(cond, uncond if guided else None, **options)
    offset = torch.arange(num_rows, device=DEVICE) + 2**40
    clear = ~near_a_threshold(cond, uncond if guided else None, offset, **options)
    assert int(clear.sum()) >= num_rows // 2
    same(got, want, clear)


@pytest.mark.parametrize("guided", [True, False])
def check_greedy_forbidden_and_one_id(form: str, guided: bool) -> None:
    cond, uncond = torch.randn(2, 3, 290, device=DEVICE)
    forbidden = torch.cat([cond.argmax(-1), torch.tensor([289], device=DEVICE)])
    everything = torch.arange(3, device=DEVICE)
    other = uncond if guided else None
    for options in ({"temperature": 0.0}, {}, {"top_k": 2}):
        got, want = draw(cond, other, forbidden=forbidden, **options)
        same(got, want, everything)
        assert not bool(torch.isin(got.token, forbidden).any())
    cond[:, 50] = cond[:, 20] = 9.0
    got, _ = draw(cond, temperature=0.0)
    assert got.token.tolist() == [20] * 3
    for options in ({"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 1}):
        got, want = draw(cond[:, :1], other if other is None else other[:, :1], **options)
        same(got, want, everything)
        assert got.token.tolist() == [0] * 3
    empty, _ = draw(cond[:0])
    assert empty.token.shape == (0,)


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.29}, {"top_k": 5, "top_p": 0.41}], ids=str)
def check_ties_go_to_the_lower_ids(form: str, options: dict[str, Any]) -> None:
    """Equal logits: three of ten, 2.9 of ten, and 2.05 of the five that top_k leaves, rounded up."""
    cond = torch.full((12 if form == "resident" else 5, 300), -torch.inf, device=DEVICE)
    ids = torch.tensor([3, 30, 40, 90, 130, 140, 200, 201, 290, 299], device=DEVICE)
    cond[:, ids] = 1.5
    got, want = draw(cond, temperature=1.0, **options)
    assert set(got.token.tolist()) <= {3, 30, 40} and len(set(got.token.tolist())) > 1
    assert torch.equal(got.token, want.token)


def check_top_p_of_ties_is_exact(form: str) -> None:
    """The smallest set that holds the share, as the C++ and the PyTorch sampler take it."""
    where = {"seed": torch.tensor([SEED], device=DEVICE), "offset": torch.tensor([late_offset()], device=DEVICE)}
    plain = {"uncond": None, "cfg_weight": 1.0, "temperature": 1.0, "forbidden": None, "backend": "triton", **where}
    sample = importlib.import_module(MODULE).sample
    for counts, weights, share, top_k in tied_cases(5, 12 if form == "resident" else 6, 600):
        if share < 1 and 1 - float(share) < 1e-5:
            continue
        cond = levels(counts, weights).to(DEVICE)
        drawn = sample(SampleInputs(cond, top_k=top_k, top_p=float(share), **plain))
        assert int(drawn.token) == exact_size(counts, weights, share, top_k) - 1, (counts, weights, share, top_k)
    for vocabulary in (8, 10, 41):
        for top_p, kept in list(uniform_shares(vocabulary))[:: 3 if form == "resident" else 9]:
            cond = torch.full((1, vocabulary), -1.3, device=DEVICE)
            drawn = sample(SampleInputs(cond, top_k=0, top_p=top_p, **plain))
            assert int(drawn.token) == kept - 1, (vocabulary, top_p)


def check_a_row_does_not_depend_on_its_batch(form: str) -> None:
    cond = torch.randn(1, 270, device=DEVICE).expand(4, 270)
    whole, _ = draw(cond, top_p=0.9)
    again, _ = draw(cond, top_p=0.9)
    broken = cond.clone()
    broken[2, 5] = torch.nan
    beside, _ = draw(broken, top_p=0.9)
    order = torch.tensor([3, 1], device=DEVICE)
    part, _ = draw(cond[order], top_p=0.9, offset=order + 2**40)
    others = torch.tensor([0, 1, 3], device=DEVICE)
    for name in ("token", "logp", "logp_mixed", "entropy"):
        complete = getattr(whole, name)
        assert torch.equal(complete, getattr(again, name))
        assert torch.equal(complete[order], getattr(part, name))
        assert torch.equal(complete[others], getattr(beside, name)[others])
    assert bool(beside.logp[2].isnan()) and 0 <= int(beside.token[2]) < 270


def check_minus_infinity_in_both_is_minus_infinity(form: str) -> None:
    cond, uncond = torch.randn(2, 2, 290, device=DEVICE)
    banned = torch.arange(50, device=DEVICE)
    want, _ = draw(cond, uncond, forbidden=banned)
    cond[:, :50] = uncond[:, :50] = -torch.inf
    got, _ = draw(cond, uncond)
    assert all(torch.equal(getattr(got, name), getattr(want, name)) for name in ("token", "logp", "logp_mixed"))


@pytest.mark.parametrize("vocabulary", [1, 7, 8, 9, 297, 303])
def check_what_lies_beside_a_row_is_not_drawn(form: str, vocabulary: int) -> None:
    """Rows inside a band of NaN; away from the condition, where -inf at a forbidden id would become +inf."""
    bands = torch.full((2, 3, 352), torch.nan, device=DEVICE)
    cond, uncond = bands[:, :, 16 : 16 + vocabulary].copy_(torch.randn(2, 3, vocabulary))
    forbidden = torch.tensor([vocabulary // 2], device=DEVICE) if vocabulary > 1 else None
    for weight in (3.0, -0.5):
        for options in ({}, {"top_k": 5, "top_p": 0.9}, {"temperature": 0.0}):
            got, want = draw(cond, uncond, cfg_weight=weight, forbidden=forbidden, **options)
            same(got, want, torch.arange(3, device=DEVICE))
