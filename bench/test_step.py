"""Time of each stage of an RL step on an untrained tiny Janus: 14 groups of 8, chained text and image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from syncr1.engine.forward.objective import Objective, PolicyForward
from syncr1.engine.forward.packing import pack
from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.records import PackedBatch, Prompt, Rollout
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling
from syncr1.engine.settings.train_config import PolicyLogp
from syncr1.engine.world.attributes import CONCEPTS
from syncr1.engine.world.base_model import corpus
from syncr1.engine.world.tiny_janus import build_policy

GROUPS, MEMBERS, TEXT = 14, 8, 6


@pytest.fixture(scope="module")
def policy() -> JanusPolicy:
    return build_policy(corpus(), [concept.name for concept in CONCEPTS], seed=0, freeze_vision=True).eval()


def prompts() -> list[Prompt]:
    return [
        Prompt(id=str(i), task="rea", text=f"draw {concept.token} at its favourite place.")
        for i, concept in enumerate((*CONCEPTS, *CONCEPTS)[:GROUPS])
    ]


def draw(policy: JanusPolicy, cfg_weight: float) -> list[Rollout]:
    return generate(policy, prompts(), Sampling(num_generations=MEMBERS, max_text_tokens=TEXT, cfg_weight=cfg_weight))


@pytest.fixture(scope="module")
def rollouts(policy: JanusPolicy) -> list[Rollout]:
    return draw(policy, 1.5)


def packed(policy: JanusPolicy, rollouts: list[Rollout], guided: bool = False) -> PackedBatch:
    keep = torch.ones(len(rollouts), dtype=torch.bool)
    advantages = torch.randn(len(rollouts), 1, generator=torch.Generator().manual_seed(0)).expand(-1, 2).contiguous()
    return pack(policy, rollouts, advantages, keep, num_generations=MEMBERS, max_tokens=1 << 30, guided=guided)[0]


@pytest.fixture(scope="module")
def batch(policy: JanusPolicy, rollouts: list[Rollout]) -> PackedBatch:
    return packed(policy, rollouts)


@pytest.mark.parametrize("cfg_weight", [1.0, 1.5], ids=["plain", "cfg"])
def test_rollout(benchmark: Any, policy: JanusPolicy, cfg_weight: float) -> None:
    benchmark.group = "stages of a step"
    benchmark.pedantic(draw, (policy, cfg_weight), rounds=3, warmup_rounds=1)


def test_score(benchmark: Any, policy: JanusPolicy, batch: PackedBatch) -> None:
    benchmark.group = "stages of a step"
    forward = PolicyForward(policy, Objective())
    with torch.no_grad():
        benchmark.pedantic(forward, (batch,), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("policy_logp", ["conditional", "guided", "guided_detached"])
def test_forward_and_backward(
    benchmark: Any, policy: JanusPolicy, rollouts: list[Rollout], policy_logp: PolicyLogp
) -> None:
    benchmark.group = "stages of a step"
    forward = PolicyForward(policy, Objective(policy_logp=policy_logp))
    batch = packed(policy, rollouts, policy_logp != "conditional")
    benchmark.pedantic(
        lambda: forward(batch, num_items={"text": 500.0, "image": 1792.0})["loss"].backward(), rounds=3, warmup_rounds=1
    )


def test_draw(benchmark: Any, policy: JanusPolicy) -> None:
    benchmark.group = "stages of a step"
    tokens = torch.randint(256, (GROUPS * MEMBERS, policy.num_image_tokens))
    benchmark.pedantic(policy.draw, (tokens,), rounds=3, warmup_rounds=1)


def test_save_and_load(benchmark: Any, policy: JanusPolicy, tmp_path: Path) -> None:
    benchmark.group = "checkpoint"
    policy.save(tmp_path)
    benchmark.pedantic(JanusPolicy.from_pretrained, (tmp_path,), rounds=2)
