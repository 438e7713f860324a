"""Two updates of a small Show-o under a ZeRO stage; as a script, the ranks of `test_masked_zero.py`.

`python masked_ranks.py OUT` runs as one of two ranks: the first has the images, the second texts alone, so that a pass
that only one of them makes would wait for ever.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import torch
import torch.distributed as dist
from helpers import everything_partitioned, make_prompt, weights_of
from small_show_o import pictures, sharp_show_o
from torch import Tensor

from syncr1.engine.forward.masked_states import MaskedPlan
from syncr1.engine.forward.objective import Objective
from syncr1.engine.forward.packing import pack
from syncr1.engine.learn.learner import Learner
from syncr1.engine.learn.optimizer import LearnerSettings
from syncr1.engine.policies.lora import add_lora
from syncr1.engine.policies.show_o import ShowOPolicy
from syncr1.engine.records import PackedBatch
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling

MEMBERS = 3


@dataclass(frozen=True)
class Case:
    """What is trained."""

    plan: MaskedPlan
    objective: Objective
    num_iterations: int = 1
    lora: bool = False


CASES = {
    "chosen": Case(MaskedPlan("committed", 2, salt=3), Objective(policy_logp="guided", beta=0.1)),
    "all": Case(
        MaskedPlan("all"),
        Objective(policy_logp="guided_detached", beta=0.1, importance_correction="truncate"),
        num_iterations=2,
        lora=True,
    ),
    "step": Case(MaskedPlan("step"), Objective(loss_type="grpo", masked_logp="step"), num_iterations=2),
    "surprising": Case(
        MaskedPlan(), Objective(policy_logp="guided", top_entropy_quantile=0.5, beta=0.1, image_beta=0.2)
    ),
}
STAGES = (0, 3)
WITH_IMAGES, OF_TEXT = (1, 2, 4), (0, 3)
"""Which micro-batches have images, and which have not."""


def batches_of(policy: ShowOPolicy, case: Case) -> list[PackedBatch]:
    """A micro-batch for each of five groups, a pruned member among them."""
    shown = (pictures(2, policy.image_size) + 1) / 2
    policy.load_images = lambda paths: torch.stack([shown[int(str(path))] for path in paths])  # type: ignore[method-assign]
    prompts = [
        make_prompt("who?", ("text",)),
        make_prompt("a red cat"),
        make_prompt("a dog", ("image",)),
        make_prompt("is it?", ("text",), image="1"),
        make_prompt("what?", image="0"),
    ]
    sampling = Sampling(
        num_generations=MEMBERS, max_text_tokens=4, cfg_weight=2.0, image_steps=4, keep_proposals=True, seed=5
    )
    rollouts = generate(policy, prompts, sampling)
    S = len(rollouts)
    advantages = torch.randn(S, 2, generator=torch.Generator().manual_seed(1))
    return pack(
        policy,
        rollouts,
        advantages,
        torch.arange(S) != 4,
        num_generations=MEMBERS,
        max_tokens=1,
        guided=case.objective.policy_logp != "conditional",
        masked=case.plan,
    )


def after_two_updates(
    case: Case, stage: int, which: tuple[int, ...] = (0, 1, 2, 3, 4)
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The weights, and what the updates told, on micro-batches `which`."""
    policy = sharp_show_o()
    batches = batches_of(policy, case)
    if case.lora:
        add_lora(policy, 4, 8.0)
    settings = LearnerSettings(learning_rate=1e-5, zero_stage=stage, num_iterations=case.num_iterations)
    with everything_partitioned():
        learner = Learner(policy, case.objective, settings)
    told = [learner.update(learner.score([batches[i] for i in which])) for _ in range(2)]
    return weights_of(learner), told


def main(folder: Path) -> None:
    from syncr1.engine.processes.group import init_distributed

    torch.set_num_threads(1)
    init_distributed()
    mine = WITH_IMAGES if dist.get_rank() == 0 else OF_TEXT
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        for stage in STAGES:
            weights, told = after_two_updates(case, stage, mine)
            found[f"{name}-{stage}"] = (weights, told[0]["grad_norm"])
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
