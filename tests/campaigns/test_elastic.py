"""Runs that go on with other ranks or another ZeRO stage: the same tokens, and weights the same but for rounding."""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path

import pytest
import warm
from elastic_cases import SAVED, STEPS
from helpers import ROOT
from made import world_folder
from resume_cases import differences

LARGEST = 2e-6
"""Difference of a float32 weight after four steps of AdamW at 1e-3; measured: 4.5e-7."""


def ranks(number: int, folder: Path, *flags: str) -> None:
    script = str(ROOT / "tests" / "support" / "elastic_cases.py")
    warm.run(script, str(folder), *flags, ranks=number, timeout=3000)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    shutil.copytree(world_folder(), folder / "world")
    for number in (1, 2):
        ranks(number, folder, "--make")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2), (2, 4), (1, 1), (2, 2)])
def test_every_stage_to_every_other(before: int, now: int, made: Path) -> None:
    """Each against the run that nothing happened to."""
    ranks(now, made, "--load", str(before))
    for one, other in product(range(4), range(4)):
        found = differences(made / f"{before}_{one}", made / f"{before}_{one}_on_{now}_{other}")
        moved = differences(made / f"{before}_{one}", made / f"{before}_{one}_saved")["weight"]
        print(f"{before} ranks, ZeRO {one} -> {now} ranks, ZeRO {other}: {found}, moved {moved:.1e}")
        assert found["trajectories"] >= (STEPS - SAVED) * 8 and found["others"] == 0
        assert found["reward"] < 1e-6 and found["weight"] < LARGEST and moved > 1e-3
        if (before, one) == (now, other):
            assert found["weight"] == found["reward"] == 0
