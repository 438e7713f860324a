"""What the C++ loss has beside the contract (test_token_loss.py): threads, and memory that it must not touch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import NATIVE
from loss_contract import TENSORS, assert_same, make_terms
from torch import Tensor

from syncr1.kernels.native.loss import token_loss
from syncr1.kernels.options import RATIOS

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), NATIVE]


def test_the_data_lies_on_both_sides_of_every_bound() -> None:
    terms = make_terms()
    assert terms.old_logp is not None and terms.loss_mask is not None
    advantage_T = torch.repeat_interleave(token_loss(terms).advantages[0], terms.cu_seqlens.diff())[terms.loss_mask]
    ratio_T = (terms.logp - terms.old_logp).exp()[terms.loss_mask]
    for of_sign_T in (advantage_T > 0, advantage_T < 0):
        edges = torch.tensor([0.0, 0.7, 0.8, 0.9, 1.0, 1.15, 1.2, 1.3, 1.4, 1.6, 9.0])
        assert (torch.histogram(ratio_T[of_sign_T], edges).hist > 0).all()


def test_outputs_are_never_inputs() -> None:
    terms = make_terms(dgs="top_k")
    found = token_loss(terms)
    given = {"advantages": found.advantages, "keep": found.keep, "frac_reward_zero_std": found.metrics[0].clone()}
    again = token_loss(replace(terms, rewards=None, **given))
    assert again.keep.data_ptr() != found.keep.data_ptr() and again.advantages.data_ptr() != found.advantages.data_ptr()


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "sapo", "cispo", "vespo"])
def test_same_bits_under_any_number_of_threads_and_repeatedly(loss_type: str, ratio: str) -> None:
    lengths = [14001, 0, 30000, *range(1, 60), 8333]
    terms = make_terms(lengths, loss_type=loss_type, ratio=ratio, beta=0.1, dgs="variance_mass", sampler="token")
    results = []
    for num_threads in (1, 2, 3, 1):
        torch.set_num_threads(num_threads)
        results.append(token_loss(terms))
    for other in results[1:]:
        assert_same(results[0], other)


@contextmanager
def bands_around_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Every tensor that `torch.empty` makes lies between bands of a pattern."""
    buffers: list[Tensor] = []

    def empty(*shape: Any, dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        buffers.append(torch.full((size.numel() + 128,), 1 if dtype == torch.bool else math.nan, dtype=dtype))
        return buffers[-1][64 : 64 + size.numel()].view(size)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield buffers


@pytest.mark.parametrize("lengths", [[1], [15, 1], [511], [512], [513, 0, 2], [4, 4, 4, 4]])
def test_nothing_beside_the_outputs_is_written(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    for ratio in RATIOS:
        terms = make_terms(lengths, [len(lengths)], ratio=ratio, beta=0.1)
        plain = token_loss(terms)
        with bands_around_outputs(monkeypatch) as buffers:
            assert_same(plain, token_loss(terms))
        assert len(buffers) == len(TENSORS)
        for buffer in buffers:
            band = torch.cat([buffer[:64], buffer[-64:]])
            assert band.all() if band.dtype == torch.bool else band.isnan().all()
