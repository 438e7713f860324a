"""Refused inputs: each error names the op, what was expected, what came and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from syncr1.kernels import dispatch
from syncr1.kernels.api import (
    BackendError,
    TokenStream,
    cfg_sample,
    dgs_select,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logp,
    selective_logp,
)
from syncr1.kernels.checks import check_layout
from syncr1.kernels.layout import PackedLayout, segment_ids

ROWS = torch.arange(3)
LOGITS = torch.zeros(3, 5)


def loss(**changes: Any) -> object:
    arguments: dict[str, Any] = {
        "logp": torch.zeros(5),
        "old_logp": None,
        "rewards": torch.tensor([0.0, 1.0]),
        "cu_seqlens": torch.tensor([0, 2, 5]),
        "group_offsets": torch.tensor([0, 2]),
    }
    return grpo_loss(**(arguments | changes))


def linear(stream: dict[str, Any], **changes: Any) -> object:
    fields: dict[str, Any] = {"hidden": torch.zeros(3, 2), "weight": torch.zeros(5, 2), "targets": ROWS, "rows": ROWS}
    streams = [TokenStream(**(fields | stream))]
    arguments = {"rewards": torch.tensor([0.0, 1.0]), "cu_seqlens": torch.tensor([0, 2, 5])}
    return linear_grpo_loss(streams, group_offsets=torch.tensor([0, 2]), **(arguments | changes))


def advantages(offsets: Any, rewards: Any = (0.0, 1.0), **settings: Any) -> object:
    return group_advantages(torch.tensor(rewards), torch.tensor(offsets), **settings)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "offsets from 1": (lambda: advantages([1, 2]), r"group_offsets\[0\] must be 0, got 1"),
    "lengths, not offsets": (lambda: advantages([0, 3, 2]), "non-decreasing"),
    "offsets too short": (lambda: advantages([0, 1]), r"group_offsets\[-1\] must be 2, got 1"),
    "float offsets": (lambda: advantages([0.0, 2.0]), "int32 or int64"),
    "offsets without entries": (lambda: advantages([[0, 2]]), r"must be \[n\+1\]"),
    "integer rewards": (lambda: advantages([0, 2], (0, 1)), "float tensor"),
    "infinite reward": (lambda: advantages([0, 2], (0.0, torch.inf)), "infinite"),
    "weights for [S]": (lambda: advantages([0, 2], weights=torch.ones(2)), "None for rewards"),
    "unknown scale": (lambda: advantages([0, 2], scale="std"), "one of group, batch, none, loo"),
    "unknown rule": (lambda: dgs_select(torch.ones(2), torch.tensor([0, 2]), rule="best"), "rule must be one of"),  # type: ignore[arg-type]
    "mass 0": (lambda: dgs_select(torch.ones(2), torch.tensor([0, 2]), mass=0.0), r"mass must be a number in \(0, 1\]"),
    "short old_logp": (lambda: loss(old_logp=torch.zeros(4)), r"old_logp must be \[5\], got \[4\]; did packing"),
    "float mask": (lambda: loss(loss_mask=torch.ones(5)), "loss_mask must be torch.bool"),
    "modality 2": (lambda: loss(modality=torch.full((5,), 2)), r"0 \(text\) or 1 \(image\)"),
    "beta without ref": (lambda: loss(beta=0.1), "ref_logp must be given where beta is not 0"),
    "dr_grpo without length": (lambda: loss(loss_type="dr_grpo"), "max_length must be an int > 0"),
    "half a dict": (lambda: loss(clip_low={"text": 0.1}), r"keys \['text', 'image'\]"),
    "is_ratio": (lambda: loss(is_ratio=torch.ones(3)), r"is_ratio must be \[5\], \[2\] or \[2, 1\]"),
    "NaN is_ratio per token": (lambda: loss(is_ratio=torch.tensor([1, 1, torch.nan, 1, 1])), "is_ratio must be finite"),
    "infinite is_ratio": (
        lambda: loss(is_ratio=torch.tensor([1, torch.inf])),
        "is_ratio must be finite .* at token 2",
    ),
    "NaN row to draw from": (
        lambda: cfg_sample(LOGITS.index_fill(0, ROWS[1:2], torch.nan), seed=0, offset=0),
        "at row 1",
    ),
    "nothing to draw": (lambda: cfg_sample(LOGITS - torch.inf, seed=0, offset=0), "logits must be finite or -inf"),
    "quantile without entropy": (lambda: loss(top_entropy_quantile=0.5), "entropy must be given"),
    "rewards of another length": (lambda: loss(rewards=torch.ones(3)), r"group_offsets\[-1\] must be 3"),
    "rewards and advantages": (lambda: loss(advantages=torch.ones(2)), "one of the two, got both"),
    "neither": (lambda: loss(rewards=None), "one of the two, got neither"),
    "infinite advantage": (lambda: loss(rewards=None, advantages=torch.tensor([0.0, torch.inf])), "must be finite"),
    "infinite logp": (lambda: loss(logp=torch.tensor([0, 0, -torch.inf, 0, 0])), "logp must be finite .* at token 2"),
    "NaN old_logp": (lambda: loss(old_logp=torch.full((5,), torch.nan)), "old_logp must be finite at every loss token"),
    "padded logp": (lambda: loss(logp=torch.zeros(5, 1)), r"logp must be \[T\], got \[5, 1\]; pack"),
    "integer logp": (lambda: loss(logp=torch.zeros(5, dtype=torch.int64)), "logp must be a float tensor"),
    "num_items of three": (lambda: loss(num_items=torch.ones(3)), "num_items must be a number, or one per modality"),
    "NaN hidden": (lambda: linear({"hidden": torch.full((3, 2), torch.nan)}), "logp must be finite .* at token 0"),
    "half of rewards": (lambda: loss(rewards={"text": torch.ones(2)}), "rewards must be"),
    "position twice": (lambda: linear({"rows": torch.tensor([0, 0, 1])}), "free of duplicates"),
    "row outside": (lambda: linear({"rows": torch.tensor([0, 1, 5])}), r"within \[0, 5\), got \[0, 5\]"),
    "mask for rows": (lambda: linear({"rows": torch.ones(3, dtype=torch.bool)}), "pass positions, not a mask"),
    "wrong head": (lambda: linear({"targets": torch.tensor([0, 1, 9])}), "the other modality's vocabulary"),
    "wrong width": (lambda: linear({"weight": torch.zeros(5, 3)}), r"weight must be \[V, 2\]"),
    "wrong dtype": (lambda: linear({"weight": torch.zeros(5, 2, dtype=torch.bfloat16)}), "weight.dtype"),
    "modality": (lambda: linear({"modality": "audio"}), "text or image"),
    "forbidden target": (lambda: linear({"forbidden": torch.tensor([2])}), "outside `forbidden`"),
    "disagreeing modality": (lambda: linear({}, modality=torch.ones(5, dtype=torch.uint8)), "that of the streams"),
    "no streams": (lambda: linear_grpo_loss([], torch.ones(1), torch.tensor([0, 1]), torch.tensor([0, 1])), "at least"),
    "temperature 0": (lambda: linear_logp(torch.zeros(3, 2), torch.zeros(5, 2), ROWS, temperature=0.0), "> 0"),
    "3-D logits": (lambda: selective_logp(torch.zeros(1, 3, 5), ROWS), r"logits must be \[N, V\]"),
    "everything forbidden": (lambda: selective_logp(LOGITS, ROWS, forbidden=torch.arange(5)), "fewer than all 5"),
    "a mask as forbidden": (lambda: selective_logp(LOGITS, ROWS, forbidden=torch.ones(5)), "ids, not a mask"),
    "guidance alone": (lambda: cfg_sample(LOGITS, cfg_weight=2.0, seed=0, offset=0), "1 without uncond"),
    "negative temperature": (lambda: cfg_sample(LOGITS, temperature=-1.0, seed=0, offset=0), "0 is greedy"),
    "one offset short": (lambda: cfg_sample(LOGITS, seed=0, offset=ROWS[:2]), r"offset must be \[3\]"),
    "top_p 0": (lambda: cfg_sample(LOGITS, top_p=0.0, seed=0, offset=0), "top_p must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_unknown_option_lists_the_known_ones() -> None:
    for error in (ValueError, TypeError):
        with pytest.raises(error, match=r"options must be among loss_type, .*clip_low.*, got cliplow; check"):
            loss(cliplow=0.1)


def test_absent_backend_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    if dispatch.available()["triton"] != "ok":
        with pytest.raises(BackendError, match=r"backend='triton' cannot serve this call: (there is no CUDA|triton)"):
            loss(backend="triton")
        monkeypatch.setenv("SYNCR1_BACKEND", "triton")
        with pytest.raises(BackendError, match="SYNCR1_BACKEND='triton'"):
            loss()
    with pytest.raises(BackendError, match="no such backend; known: reference, native, triton"):
        loss(backend="cuda")
    loss(backend="reference")


def test_layout_record() -> None:
    layout = PackedLayout(torch.tensor([0, 2, 2, 5]), torch.tensor([0, 1, 3]))
    check_layout("test", layout)
    assert (layout.num_sequences, layout.num_tokens) == (3, 5)
    assert layout.sequence_of_token.tolist() == [0, 0, 2, 2, 2]
    assert segment_ids(layout.group_offsets, 3).tolist() == [0, 1, 1]
