"""Where a row of Triton's ends: what the contract (test_rows.py) does not try at every multiple of 16 bytes.

test_triton_interpreted.py runs every `check_…` of this file in a process of its own.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backends import DEVICE
from native_library import Guarded
from rows_contract import PLAIN, Chunk, scores

from syncr1.kernels.support import pack
from syncr1.kernels.terms import Head, RowTerms, padded

pytest.importorskip("triton")
# The interpreter truncates float32 to bfloat16: one unit in the last place of an output.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7}
ENDS = [(torch.float32, n) for n in (1, 3, 7, 8, 519, 520)]
ENDS += [(torch.bfloat16, n) for n in (1, 7, 8, 9, 15, 16, 17, 527, 528, 529)]


@pytest.mark.parametrize("form", ["resident", "swept"])
@pytest.mark.parametrize(("dtype", "vocabulary"), ENDS)
def check_every_end_of_a_row(form: str, vocabulary: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Around multiples of 16 bytes, with a bias of another dtype inside a band of NaN, which no call writes to."""
    from syncr1.kernels.triton_ops import gradient_rows, loss_rows, rows, score_rows

    if form == "swept":
        small = {"SCORE_RESIDENT_IDS": 0, "LOSS_RESIDENT_BYTES": 0, "STREAM_TILE": 512, "STREAM_BYTES": 1024}
        for name, value in (small | dict.fromkeys(("SCORE_WARPS", "LOSS_WARPS", "GRADIENT_WARPS"), 1)).items():
            monkeypatch.setattr(rows, name, value)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    band = torch.full((padded(vocabulary) + 32,), torch.nan, dtype=other, device=DEVICE)
    bias = band[16 : 16 + vocabulary].copy_(torch.randn(vocabulary))
    before = band.clone()
    kept = torch.rand(2, vocabulary) < 0.5
    kept[:, 0] = kept[:, -1] = True
    support = pack(kept).to(DEVICE) if vocabulary % 2 else None
    head = Head(bias, 0.7, torch.tensor([vocabulary // 2], device=DEVICE) if vocabulary > 1 else None, support)
    gap, values = padded(vocabulary) - vocabulary + 32, 3 * torch.randn(2, vocabulary)
    products, out = (Guarded(v.to(DEVICE, dtype), gap, 16) for v in (values, values * torch.nan))
    targets, ones = torch.tensor([0, vocabulary - 1], device=DEVICE), torch.tensor([0.0, 1.0], device=DEVICE)
    leaf = products.matrix.double().requires_grad_()
    logp, entropy = scores(Chunk(leaf, targets, replace(head, bias=bias.double())), leaf)
    (want,) = torch.autograd.grad(logp[1], leaf)
    got = score_rows(products.matrix, targets, head)
    torch.testing.assert_close(got[0].double(), logp.detach(), rtol=1e-6, atol=6e-5)
    torch.testing.assert_close(got[1].double(), entropy.detach(), rtol=1e-6, atol=6e-5)
    gradient_rows(products.matrix, targets, head, got[2], got[1], ones, None, out.matrix)
    loss_rows(products.matrix, targets, head, RowTerms(-ones, ones), PLAIN)
    for gradient in (out, products):
        torch.testing.assert_close(gradient.matrix.double(), want, rtol=ROUNDING[dtype] + 1e-4, atol=2e-6)
        gradient.assert_untouched_around()
    assert torch.equal(band.nan_to_num(7.0), before.nan_to_num(7.0))
