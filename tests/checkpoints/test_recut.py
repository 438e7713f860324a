"""A state saved on some ranks under some ZeRO stage is the same state on any others, to the last bit."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
import warm
from helpers import ROOT, same_bits
from recut_cases import KINDS, saved, whole
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
KINDS_HERE = ("0_fp32", "1_fp32", "2_fp32", "3_fp32", "0_bf16", "3_bf16")
FP32 = [kind for kind in KINDS_HERE if kind.endswith("fp32")]
PAIRS = {
    1: [*(f"2_{one}:{other}" for one, other in product(FP32, FP32)), "2_0_bf16:3_bf16", "2_3_bf16:0_bf16"],
    2: [f"1_{one}:{other}" for one, other in zip(FP32, FP32[1:] + FP32[:1], strict=True)],
    4: [*(f"2_{kind}:{kind}" for kind in FP32), "2_0_fp32:3_fp32", "2_3_fp32:2_fp32", "2_3_bf16:3_bf16"],
}
"""Ranks -> what they load: 2 to 1 from every stage to every other, 1 to 2, and 2 to 4."""


def cut(folder: Path, ranks: int, *flags: str) -> None:
    warm.run(str(ROOT / "tests" / "support" / "recut_cases.py"), str(folder), *flags, ranks=ranks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recut")
    cut(folder, 2, "--make", *KINDS_HERE)
    cut(folder, 1, "--make", *FP32, "--load", *PAIRS[1])
    for ranks in (2, 4):
        cut(folder, ranks, "--load", *PAIRS[ranks])
    return folder


def test_what_is_cut_again_is_the_same_state(folder: Path) -> None:
    """Masters, moments and counts of steps of every parameter: saved, loaded elsewhere, and saved there."""
    found = sorted((folder / "again").iterdir())
    assert len(found) == sum(map(len, PAIRS.values()))
    for path in found:
        source, (ranks, stage, _) = path.name.split("-")[0], path.name.split("-")[1].split("_")
        before, after = saved(folder / "made" / source), saved(path)
        assert after.world_size == int(ranks)
        assert same_bits(whole(before), whole(after)), path.name
        assert len(whole(after)) == 4 * len({"one", "scale", "wide", "tall", "three"})
        held = [len(after.tensors(rank, "optimizer/")) for rank in range(after.world_size)]
        assert all(held) if stage != "0" and ranks == "2" else held[0] > 0, f"{path.name}: {held}"


def test_the_next_step_is_the_same_within_rounding(folder: Path) -> None:
    """From one state, whatever ranks and stage take it: so the moments are where they belong, and steps counted."""
    for source in {path.name.split("-")[0] for path in (folder / "stepped").iterdir()}:
        stepped = [load_file(path) for path in sorted((folder / "stepped").glob(f"{source}-*"))]
        before = whole(saved(folder / "made" / source))
        loose = 2e-2 if source.endswith("bf16") else 1e-5
        for weights in stepped:
            for name, value in weights.items():
                torch.testing.assert_close(value, stepped[0][name], rtol=loose, atol=loose)
        moved = (stepped[0]["wide"].float() - before["master/wide"].view(7, 11)).abs()
        assert float(moved.max()) > 5e-3, "a step of the learning rate, 1e-2"


def test_every_kind_is_tried() -> None:
    assert set(KINDS_HERE) <= set(KINDS)
    assert {load.split(":")[1] for loads in PAIRS.values() for load in loads} == set(KINDS_HERE)
