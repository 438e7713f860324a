"""Two updates on the guided loss under any ZeRO stage; as a script, the ranks of `test_guided_zero.py`.

`python guided_ranks.py OUT` runs as one of several ranks: the first has the images, the last one text alone, so that
a pass that only one of them makes would wait for ever.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import torch
import torch.distributed as dist
from helpers import all_kinds_of_prompts, everything_partitioned, packed, sharp_policy, weights_of
from small_show_o import sharp_show_o
from torch import Tensor

from syncr1.engine.forward.objective import Objective
from syncr1.engine.learn.learner import Learner
from syncr1.engine.learn.optimizer import LearnerSettings
from syncr1.engine.policies.base import Policy
from syncr1.engine.policies.lora import add_lora
from syncr1.engine.records import PackedBatch
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling
from syncr1.engine.settings.train_config import PolicyLogp, Unconditional

GUIDED: tuple[PolicyLogp, ...] = ("guided", "guided_detached")
STAGES = (0, 1, 2, 3)


MODELS: dict[str, Callable[[], Policy]] = {"janus": sharp_policy, "show_o": sharp_show_o}


def batches_of(folder: Path, model: str = "janus") -> list[PackedBatch]:
    """A micro-batch for each of six groups; the first and the fifth are texts."""
    policy, prompts = MODELS[model](), all_kinds_of_prompts(folder)[:6]
    pads: Unconditional = "pads"
    if policy.decoding_order == "masked":
        prompts[5], pads = replace(prompts[5], image=None), "fixed"
    sampling = Sampling(num_generations=3, cfg_weight=3.0, max_text_tokens=6, unconditional=pads, image_steps=4)
    return packed(policy, generate(policy, prompts, sampling), 3, 1, guided=True)


def after_two_updates(
    how: PolicyLogp,
    stage: int,
    batches: Sequence[PackedBatch],
    *,
    model: str = "janus",
    lora: bool = False,
    checkpointed: bool = False,
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The trained weights, and what the updates told."""
    policy = MODELS[model]()
    if lora:
        add_lora(policy, 4, 8.0)
    # Guidance multiplies gradients: at a usual rate of this policy the second update would be far from the first.
    settings = LearnerSettings(learning_rate=1e-5, zero_stage=stage, gradient_checkpointing=checkpointed)
    with everything_partitioned():
        learner = Learner(policy, Objective(policy_logp=how, beta=0.1), settings)
    told = [learner.update(learner.score(batches)) for _ in range(2)]
    return weights_of(learner), told


def far_apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of what two updates moved by at most 2e-5 each way, over that."""
    assert one.keys() == other.keys()
    total = sum(float((one[name] - value).abs().sum()) for name, value in other.items())
    return total / sum(value.numel() for value in other.values()) / 2e-5


def main(folder: Path) -> None:
    from syncr1.engine.processes.group import init_distributed

    torch.set_num_threads(1)
    init_distributed()
    found: dict[str, Any] = {}
    for model in MODELS:
        batches = batches_of(folder, model)
        mine = batches[1:4] + batches[5:] if dist.get_rank() == 0 else [batches[0], batches[4]]
        for how in GUIDED:
            for stage in STAGES:
                weights, told = after_two_updates(how, stage, mine, model=model)
                found[f"{model}-{how}-{stage}"] = (weights, told[0]["grad_norm"])
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
