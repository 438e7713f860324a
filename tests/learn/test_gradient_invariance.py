"""An update's gradient and metrics do not depend on how its data are cut into micro-batches or spread over ranks.

Measured as |g - g'| / |g'| over all trained parameters, in float32, where g' is of one rank and one micro-batch. What
is left is rounding: a log-probability near -6 is known to 2.4e-7 in float32, and a token's weight is its exponential.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from gradient_cases import DATA, MICRO_BATCHES, OBJECTIVES, RANKS, Cell, all_cells, measured

from syncr1.kernels.options import LOSS_TYPES

BOUND = 1e-6


def few_cells() -> list[Cell]:
    """Every objective on one rank and on two; four ranks, and a sample's two halves, for some."""

    def few(objective: str, cut: tuple[int, int], data: Any = "mixed", **more: Any) -> Cell:
        return Cell(data=data, objective=objective, num_micro_batches=cut[0], num_ranks=cut[1], pruned=True, **more)

    cells = [few(name, cut) for name in OBJECTIVES for cut in ((1, 1), (8, 1), (4, 2))]
    cells += [few(name, (8, 4)) for name in ("grpo", "dapo", "dr_grpo")]
    cells += [few(name, cut, "pairs") for name in ("grpo", "dapo") for cut in ((1, 1), (4, 2))]
    cells += [few(name, (1, 2), local=True) for name in OBJECTIVES]
    return cells


def assert_invariant(cells: list[Cell], results: Mapping[str, Mapping[str, Any]]) -> None:
    """Every cell was computed, and none is further off than float32's rounding."""
    wanted = {cell.name for cell in cells if not cell.local}
    assert wanted <= set(results)
    off = {name: results[name]["difference"] for name in wanted if not results[name]["difference"] <= BOUND}
    assert off == {}
    assert all(results[name]["norm"] > 0.1 for name in wanted), "there is a gradient"


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return measured(few_cells(), tmp_path_factory.mktemp("few"), timeout=240)


@pytest.mark.slow
def test_micro_batches_and_ranks_change_nothing(few: dict[str, dict[str, Any]]) -> None:
    assert set(LOSS_TYPES) <= set(OBJECTIVES), "every loss type has its cells"
    assert_invariant(few_cells(), few)


@pytest.mark.slow
def test_metrics_are_those_of_one_rank_and_one_micro_batch(few: dict[str, dict[str, Any]]) -> None:
    """Counts to the last one, extremes to the last bit but for rounding, means by what they are over: text tokens are
    few here, and some micro-batches have none. Not of gradients that a faulty learner makes."""
    for cell in (cell for cell in few_cells() if not cell.local):
        found, want = few[cell.name]["metrics"], few[cell.reference]["metrics"]
        assert set(found) == set(want) and found["tokens/text"] == want["tokens/text"] > 0
        assert found["tokens/image"] == want["tokens/image"] > 0
        for name, value in want.items():
            assert found[name] == pytest.approx(value, rel=2e-5, abs=2e-7), (cell.name, name)


@pytest.mark.slow
def test_counts_of_one_rank_alone_are_seen(few: dict[str, dict[str, Any]]) -> None:
    """The same measure tells a learner whose ranks divide by their own tokens and sequences."""
    faulty = {cell.objective: few[cell.name]["difference"] for cell in few_cells() if cell.local}
    assert set(faulty) == set(OBJECTIVES) and min(faulty.values()) > 100 * BOUND


@pytest.mark.slow
def test_objectives_differ(few: dict[str, dict[str, Any]]) -> None:
    """The cells of different objectives measure different gradients."""
    norms = [round(few[f"mixed-{name}-1x1-pruned"]["norm"], 4) for name in OBJECTIVES]
    # bnpo divides by the update's tokens, which is what dapo does within one update.
    assert len(set(norms)) == len(OBJECTIVES) - 1


@pytest.mark.slow
@pytest.mark.skipif("SYNCR1_ALL_CELLS" not in os.environ, reason="three minutes; SYNCR1_ALL_CELLS=1 runs it")
def test_every_cell(tmp_path: Path) -> None:
    """Data × objectives × micro-batches × ranks × pruning on or off."""
    cells = all_cells()
    assert len(cells) == len(DATA) * len(OBJECTIVES) * len(MICRO_BATCHES) * len(RANKS) * 2 == 360
    results = measured(cells, tmp_path, timeout=1200)
    assert len(results) == len(cells)
    assert_invariant(cells, results)
