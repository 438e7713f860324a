"""The guided loss under every ZeRO stage, with adapters and recomputed activations; two ranks, one without an image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
import warm
from guided_ranks import GUIDED, MODELS, STAGES, after_two_updates, batches_of, far_apart
from helpers import ROOT, own_process_group

from syncr1.engine.settings.train_config import PolicyLogp

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    with own_process_group():
        yield


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("how", GUIDED)
@pytest.mark.parametrize("model", MODELS)
def test_every_stage_learns_the_same(model: str, how: PolicyLogp, lora: bool, tmp_path: Path) -> None:
    batches = batches_of(tmp_path, model)
    plain, (first, _) = after_two_updates(how, 0, batches, model=model, lora=lora)
    assert first["rollout/replay_logp_max_abs"] <= 1e-4 and first["ratio_max/image"] == first["ratio_min/image"] == 1.0
    assert first["kl/image"] <= 1e-7  # with adapters the reference is the policy without, its free branch too
    for stage in STAGES:
        for checkpointed in (False, True):
            weights, told = after_two_updates(how, stage, batches, model=model, lora=lora, checkpointed=checkpointed)
            assert far_apart(weights, plain) <= 1e-3, (stage, checkpointed)
            assert told[0]["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5), (stage, checkpointed)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    warm.run(str(ROOT / "tests" / "support" / "guided_ranks.py"), str(folder), ranks=2)
    return folder, torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", GUIDED)
@pytest.mark.parametrize("model", MODELS)
def test_a_rank_without_images_keeps_in_step(
    model: str, how: PolicyLogp, stage: int, two_ranks: tuple[Path, Any]
) -> None:
    """Four micro-batches with images on one rank, two of texts on the other: what one rank learns from all six."""
    folder, found = two_ranks
    weights, norm = found[f"{model}-{how}-{stage}"]
    plain, told = after_two_updates(how, 0, batches_of(folder, model), model=model)
    assert norm == pytest.approx(told[0]["grad_norm"], rel=1e-4) and far_apart(weights, plain) <= 1e-2
