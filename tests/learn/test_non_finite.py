"""NaN and infinity in an update: kernels let them through where asked, and the learner then changes nothing at all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import everything_partitioned, own_process_group, packed, same_bits, sampled, sharp_policy, state_of
from torch import Tensor

from syncr1.engine.errors import NotFinite
from syncr1.engine.forward.objective import Objective
from syncr1.engine.learn.learner import Learner
from syncr1.engine.learn.optimizer import LearnerSettings
from syncr1.engine.records import PackedBatch
from syncr1.kernels.api import NonFiniteError, TokenStream, linear_grpo_loss, non_finite_passes

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    with own_process_group(), everything_partitioned():
        yield


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> list[PackedBatch]:
    policy = sharp_policy()
    return packed(policy, sampled(policy, tmp_path_factory.mktemp("nan"), num_generations=3), 3, 1)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_kernels_let_it_through(backend: str, value: float) -> None:
    """A bad hidden state: an error by default; inside the block, gradients that are not finite."""
    hidden = torch.randn(6, 8)
    hidden[2, 3] = value
    hidden.requires_grad_()
    weight = torch.randn(11, 8, requires_grad=True)
    stream = TokenStream(hidden, weight, torch.arange(6), torch.arange(6))
    groups = torch.tensor([0, 3, 6], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)

    def loss() -> Tensor:
        rewards = torch.tensor([0.0, 1.0])
        return linear_grpo_loss([stream], rewards, *groups, loss_mask=torch.ones(6).bool(), backend=backend).loss

    with pytest.raises(NonFiniteError):
        loss()
    with non_finite_passes():
        loss().backward()
    assert weight.grad is not None and not bool(weight.grad.isfinite().all())
    with pytest.raises(NonFiniteError):
        loss()


def learner_of(stage: int, bf16: bool, **more: Any) -> Learner:
    settings = LearnerSettings(learning_rate=1e-3, zero_stage=stage, bf16=bf16, **more)
    policy = sharp_policy()
    return Learner(policy.to(torch.bfloat16) if bf16 else policy, Objective(), settings)


def poisoned(learner: Learner, batches: list[PackedBatch], value: float = float("nan")) -> dict[str, float]:
    """An update whose hidden states overflow in the second micro-batch."""
    module: Any = learner.engine.module
    trunk, calls = module._trunk, []

    def broken(embeddings: Tensor, layout: Any) -> Tensor:
        calls.append(layout)
        states: Tensor = trunk(embeddings, layout)
        return states * value if len(calls) == 2 else states

    module._trunk = broken
    try:
        return learner.update(batches)
    finally:
        del module._trunk


@pytest.mark.parametrize(("stage", "bf16"), [(0, False), (1, False), (2, False), (3, False), (0, True), (2, True)])
def test_an_update_that_is_not_finite_changes_nothing(stage: int, bf16: bool, batches: list[PackedBatch]) -> None:
    """Weights and optimizer to the last bit; the updates before and after are those of a learner that never saw it."""
    learner, other = learner_of(stage, bf16), learner_of(stage, bf16)
    for each in (learner, other):
        assert each.update(batches)["updates_skipped"] == 0
    before = state_of(learner)
    metrics = poisoned(learner, batches)
    assert metrics["updates_skipped"] == 1 and not metrics["grad_norm"] < float("inf")
    assert same_bits(state_of(learner), before)
    for each in (learner, other):
        assert each.update(batches)["updates_skipped"] == 0
    assert same_bits(state_of(learner), state_of(other)) and not same_bits(state_of(learner), before)


def test_too_many_in_a_row_end_the_run(batches: list[PackedBatch], caplog: pytest.LogCaptureFixture) -> None:
    learner = learner_of(0, False, max_skipped_updates=2)
    before = state_of(learner)
    for _ in range(2):
        poisoned(learner, batches)
    learner.update(batches)  # a good one in between
    for _ in range(2):
        poisoned(learner, batches)
    assert "the loss of rank 0 is NaN or infinite: all ranks skip this update (2 in a row)" in caplog.messages[-1]
    after = state_of(learner)
    with pytest.raises(NotFinite, match="more than max_skipped_updates = 2"):
        poisoned(learner, batches)
    assert same_bits(state_of(learner), after) and not same_bits(after, before)
