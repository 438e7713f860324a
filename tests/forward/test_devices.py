"""What runs on the CPU gives the same on a GPU: the ops, and a rollout replayed by the trainer's forward."""

from __future__ import annotations

from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import packed, sampled, sharp_policy

from syncr1.engine.forward.objective import Objective, PolicyForward
from syncr1.engine.learn.learner import replay_error
from syncr1.kernels.api import TokenStream, cfg_sample, dgs_select, group_advantages, linear_grpo_loss

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
    ),
]


@pytest.mark.parametrize("device", DEVICES)
def test_ops_agree_with_the_cpu_in_float64(device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    rewards = torch.rand(12, generator=generator, dtype=torch.float64)
    offsets = torch.tensor([0, 4, 8, 12], dtype=torch.int32)
    cu_seqlens = torch.arange(0, 61, 5, dtype=torch.int32)
    hidden = torch.randn(60, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(33, 16, generator=generator, dtype=torch.float64)
    targets = torch.randint(33, (60,), generator=generator)

    def run(where: str) -> list[torch.Tensor]:
        h, w = (x.to(where).requires_grad_() for x in (hidden, weight))
        stream = TokenStream(h, w, targets.to(where), torch.arange(60, device=where))
        places = rewards.to(where), cu_seqlens.to(where), offsets.to(where)
        out = linear_grpo_loss([stream], *places, num_items=60)
        gradients = torch.autograd.grad(out.loss, (h, w))
        kept = dgs_select(places[0], places[2])
        sample = cfg_sample(
            (hidden @ weight.T).to(where), (hidden @ weight.T).flip(0).to(where), cfg_weight=2.0, seed=5, offset=7
        )
        outputs = [out.loss, *gradients, kept, group_advantages(places[0], places[2]), sample.token, sample.logp_mixed]
        return [x.detach().cpu().double() for x in outputs]

    for here, there in zip(run("cpu"), run(device), strict=True):
        torch.testing.assert_close(there, here, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
def test_rollout_is_replayed_by_the_trainer(device: str, tmp_path: Path) -> None:
    policy = sharp_policy().to(device)
    rollouts = sampled(policy, tmp_path, num_generations=2)
    (batch,) = packed(policy, rollouts, num_generations=2)
    moved = batch.to(torch.device(device))
    with torch.no_grad():
        logp = PolicyForward(policy, Objective())(moved)["logp"]
    assert int(moved.loss_mask.sum()) > 50
    assert replay_error(moved, logp) <= 1e-4
