"""Ways of drawing and scoring that tests of their own hold one by one, in pairs: the trainer scores what was sampled.

ROWS are an array of strength two: each value of a column meets each value of every other column; a digit each.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import CHAIN, LONG_CHAIN, Gate, make_prompt, packed, sharp_policy, world_photo
from small_emu3 import sharp_emu3

from syncr1.engine.forward.objective import Objective, PolicyForward
from syncr1.engine.records import Prompt
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling

pytestmark = pytest.mark.slow
G = 3
COLUMNS: dict[str, tuple[Any, ...]] = {
    "model": (cache(sharp_policy), cache(sharp_emu3)),
    "scored": ("conditional", "guided", "guided_detached"),
    "kept": ({}, {"top_k": 5}, {"image_top_p": 0.6}, {"min_p": 0.05, "image_min_p": 0.0}),
    "turn": ("none", "sync_r1", "t2i_r1"),
    "unconditional": ("fixed", "pads"),
    "preview": (None, "repeat", "likely"),
    "temperatures": ((1.0, None), (0.7, 1.3)),
    "packing": ("whole", "cut", "pruned"),
}
ROWS = (
    "02111202 10210110 00300001 12021111 11201212 11020000 00321210 10121012 "
    "01110211 02210001 01310102 10100100 02000200 00011102 12320112 12220011"
)


def prompts_in(folder: Path) -> list[Prompt]:
    about: dict[str, Any] = {"concept": "bobo", "info": "<bobo> is red."}
    return [
        make_prompt("who is it?", CHAIN, world_photo(folder, 3), request="a photo of <bobo>", **about),
        make_prompt("draw the blue one", LONG_CHAIN, follow_up="what is its colour?"),
        make_prompt("draw it.", ("image",), **about),
    ]


def test_every_pair_is_there() -> None:
    sizes = [len(values) for values in COLUMNS.values()]
    pairs = {(i, int(row[i]), j, int(row[j])) for row in ROWS.split() for j in range(len(sizes)) for i in range(j)}
    assert len(pairs) == sum(sizes[i] * sizes[j] for j in range(len(sizes)) for i in range(j))


@pytest.mark.parametrize("row", ROWS.split())
def test_what_is_combined_replays(row: str, tmp_path: Path) -> None:
    """And the first update's ratio is exactly 1, with a finite gradient, in each micro-batch."""
    way = {column: values[int(digit)] for (column, values), digit in zip(COLUMNS.items(), row, strict=True)}
    policy, (text, image) = way["model"](), way["temperatures"]
    sampling = Sampling(
        num_generations=G,
        cfg_weight=5.0,
        temperature=text,
        image_temperature=image,
        max_text_tokens=5,
        drawing_turn=way["turn"],
        unconditional=way["unconditional"],
        **way["kept"],
    )
    gate = None
    if way["preview"] is not None:
        gate = Gate(threshold=2.0, max_attempts=2, min_keep=2)
        gate.completion = way["preview"]
    rollouts = generate(policy, prompts_in(tmp_path), sampling, gate)
    assert any(rollout.dropped for rollout in rollouts) is (gate is not None)
    keep = torch.tensor([True, way["packing"] != "pruned", True] * 3)
    cut = way["packing"] == "cut"
    batches = packed(
        policy,
        rollouts,
        G,
        1 if cut else 1 << 30,
        keep=keep,
        share_prefix=not cut,
        guided=way["scored"] != "conditional",
    )
    assert len(batches) == (3 if cut else 1)
    forward = PolicyForward(
        policy, Objective(policy_logp=way["scored"], temperature=text, image_temperature=image, loss_type="grpo")
    )
    for batch in batches:
        with torch.no_grad():
            logp = forward(batch)["logp"]
        assert float((batch.sampled_logp - logp)[batch.loss_mask].abs().max()) <= 1e-4, way
        out = forward(replace(batch, old_logp=logp), {"text": 10.0, "image": 10.0})
        ends = [float(out[f"metric/ratio_{end}/{kind}"]) for end in ("min", "max") for kind in ("text", "image")]
        assert all(ratio == 1.0 for ratio in ends if ratio == ratio), way
        out["loss"].backward()
        gradients = [p.grad for p in policy.parameters() if p.grad is not None]
        assert gradients and all(bool(gradient.isfinite().all()) for gradient in gradients)
        policy.zero_grad(set_to_none=True)
