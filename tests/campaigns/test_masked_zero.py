"""Images that are filled in, under ZeRO: of two ranks one has no image, and both learn what one rank does of all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
import warm
from guided_ranks import far_apart
from helpers import ROOT, own_process_group
from masked_ranks import CASES, STAGES, after_two_updates

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    with own_process_group():
        yield


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    warm.run(str(ROOT / "tests" / "support" / "masked_ranks.py"), str(folder), ranks=2)
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_a_rank_without_images_keeps_in_step(name: str, two_ranks: dict[str, Any]) -> None:
    plain, told = after_two_updates(CASES[name], 0)
    assert told[0]["rollout/replay_logp_max_abs"] <= 1e-4
    for stage in STAGES:
        weights, norm = two_ranks[f"{name}-{stage}"]
        assert norm == pytest.approx(told[0]["grad_norm"], rel=1e-4), stage
        assert far_apart(weights, plain) <= 1e-2, stage
