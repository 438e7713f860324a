"""One update's gradient and metrics, cut into micro-batches and spread over ranks in every way; as a script, the ranks.

`python gradient_cases.py OUT CELLS.json` is the worker of `test_gradient_invariance.py`: it forks one group of
gloo processes for each number of ranks, after the imports and the rollouts, and writes how far each cell's gradient is
from that of one rank and one micro-batch, and what all ranks together measured.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import traceback
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import syncr1.engine.compat  # noqa: F401  # before transformers

import torch
import warm
from helpers import CHAIN, LONG_CHAIN, make_prompt, world_photo
from safetensors.torch import load_file, save_file
from torch import Tensor

from syncr1.engine.forward.objective import Objective
from syncr1.engine.forward.packing import pack
from syncr1.engine.learn.credit import Credit, StepPlan, plan_of, shared_within_samples
from syncr1.engine.learn.learner import Learner
from syncr1.engine.learn.metrics import merged, trl_names
from syncr1.engine.learn.optimizer import LearnerSettings
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.processes.meeting import free_port
from syncr1.engine.records import PackedBatch, Prompt, Rollout
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling
from syncr1.engine.world import tiny_janus
from syncr1.engine.world.attributes import CONCEPTS
from syncr1.engine.world.base_model import corpus

GROUP = 3
MICRO_BATCHES, RANKS = (1, 4, 8), (1, 2, 4)
Data = Literal["mixed", "pairs"]
DATA: tuple[Data, ...] = ("mixed", "pairs")
LENGTH_LIMIT = 64

OBJECTIVES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "bnpo": {},
    "dr_grpo": {},
    "dapo": {},
    "cispo": {"epsilon_high": 5.0},
    "sapo": {},
    "luspo": {},
    "vespo": {},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "dapo_per_segment": {"loss_type": "dapo", "credit": "per_segment"},
    "corrected": {
        "loss_type": "dapo",
        "importance_correction": "truncate",
        "importance_cap": 1.03,
        "top_entropy_quantile": 0.4,
        "image_epsilon": 0.03,
        "image_beta": 0.2,
        "image_temperature": 0.7,
    },
}
"""Every loss type, the sequence's ratio, credit per segment, and what weighs tokens one by one or by their modality;
with a KL term, for anchors a stronger one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One way to compute one gradient."""

    data: Data
    objective: str
    num_micro_batches: int
    """Of each rank, anchors apart."""
    num_ranks: int
    pruned: bool
    local: bool = False
    """A learner with a fault: every rank divides by its own counts."""

    @property
    def name(self) -> str:
        cut = f"{self.num_micro_batches}x{self.num_ranks}"
        return f"{self.data}-{self.objective}-{cut}-{'pruned' if self.pruned else 'all'}{'-local' * self.local}"

    @property
    def reference(self) -> str:
        """Name of the cell that it must equal."""
        return replace(self, num_micro_batches=1, num_ranks=1, local=False).name


def all_cells() -> list[Cell]:
    return [
        Cell(data=d, objective=o, num_micro_batches=m, num_ranks=r, pruned=p)
        for d, o, m, r, p in product(DATA, OBJECTIVES, MICRO_BATCHES, RANKS, (False, True))
    ]


def objective_of(name: str) -> Objective:
    settings = {"loss_type": name, "beta": 0.04, "anchor_beta": 0.4, "max_length": LENGTH_LIMIT}
    # As narrow as the ratios below are spread, so that a part of them is clipped.
    settings |= {"epsilon": 0.06}
    return Objective(**(settings | OBJECTIVES[name]))


# Trajectories ---------------------------------------------------------------------------------------------------------


@cache
def small_policy() -> JanusPolicy:
    """A Janus of one layer: its gradient's rounding is that of float32 and nothing more."""
    with patch.object(tiny_janus, "LAYERS", 1):
        return tiny_janus.build_policy(corpus(), [c.name for c in CONCEPTS], seed=0, freeze_vision=True).eval()


@dataclass(frozen=True)
class Batch:
    """What a rollout and its rewards hand to the packing."""

    rollouts: list[Rollout]
    credit: Tensor
    """[S, 2]"""
    unit: int
    """Adjacent groups that stay on one rank."""


def prompts_of(data: Data, folder: Path) -> list[Prompt]:
    """38 groups of every kind of trajectory, five of them anchors; or 20 of CoRL's samples, a drawing and an answer."""
    photos = [world_photo(folder, index) for index in range(3)]
    if data == "pairs":
        pairs = []
        for i in range(20):
            words = " ".join(["a red creature", "at the beach", "with a crown"][: 1 + i % 3])
            pairs.append(make_prompt(f"draw {words} {i}", ("image",), sample=f"s{i}"))
            pairs.append(make_prompt(f"what is it? {words} {i}", ("text",), photos[i % 3], sample=f"s{i}"))
        return pairs
    kinds: list[Callable[[int], Prompt]] = [
        lambda i: make_prompt(f"what is the colour of the creature {i}?", ("text",), photos[i % 3]),
        lambda i: make_prompt(f"draw the creature, round, red, plain, with a crown, at the beach {i}.", CHAIN),
        lambda i: make_prompt(f"draw it {i}.", ("image",)),
        lambda i: make_prompt(f"draw {i}.", LONG_CHAIN, follow_up="what is its colour?"),
        lambda i: make_prompt(f"sound {i}?", ("text",)),
        lambda i: make_prompt(f"who is this {i}?", CHAIN, photos[i % 3]),
    ]
    made = [kinds[i % len(kinds)](i) for i in range(38)]
    return [replace(prompt, rewarded=i % 7 != 5) for i, prompt in enumerate(made)]


@cache
def batch_of(data: Data, folder: Path) -> Batch:
    """Trajectories of ragged lengths; a group without variance, rewards that failed; old log-probabilities at which
    ratios leave the clip range."""
    policy = small_policy()
    sampling = Sampling(num_generations=GROUP, cfg_weight=2.0, max_text_tokens=12, seed=7)
    rollouts = generate(policy, prompts_of(data, folder), sampling)
    generator = torch.Generator().manual_seed(1)

    rollouts = [stale(rollout, generator) for rollout in rollouts]
    # Low ids earn more: what trajectories teach adds up, so that float32's rounding is small beside the gradient.
    values = torch.tensor([[-s.tokens.double().mean() for s in (r.segments[0], r.segments[-1])] for r in rollouts])
    values[0:3] = 0.5
    values[7] = float("nan")
    values[[not rollout.prompt.rewarded for rollout in rollouts]] = float("nan")
    if data == "pairs":
        answers = torch.tensor([rollout.prompt.segments == ("text",) for rollout in rollouts])
        values[:, 0].masked_fill_(~answers, float("nan"))
        values[:, 1].masked_fill_(answers, float("nan"))
        total = shared_within_samples(values, rollouts).sum(1)
        return Batch(rollouts, total[:, None].expand(-1, 2).float().contiguous(), 2)
    return Batch(rollouts, values.float(), 1)


def stale(rollout: Rollout, generator: torch.Generator) -> Rollout:
    """Its texts cut to any length, its log-probabilities off by what a few updates make."""
    parts = []
    for segment in rollout.segments:
        length = len(segment.tokens)
        if segment.kind == "text":
            length = int(torch.randint(1, length + 1, (), generator=generator))
        logp = segment.logp[:length] + 0.06 * torch.randn(length, generator=generator)
        parts.append(replace(segment, tokens=segment.tokens[:length], logp=logp))
    return replace(rollout, segments=tuple(parts))


def planned(batch: Batch, credit: Any, pruned: bool) -> StepPlan:
    """As the trainer plans it; where nothing is pruned, trajectories whose rewards failed stay, too."""
    config = SyncR1Config(num_generations=GROUP, credit=credit, dgs="variance_mass" if pruned else "none", dgs_mass=0.7)
    return plan_of(
        Credit(total_S=batch.credit[:, 0], tokens_S2=batch.credit),
        batch.rollouts,
        config,
        step=0,
        holds_anchors=True,
        sum_over_ranks=lambda values: values,
    )


def share_of(batch: Batch, rank: int, num_ranks: int) -> list[int]:
    """Trajectories of a rank: its groups, dealt out in turn."""
    size = batch.unit * GROUP
    return [i for i in range(len(batch.rollouts)) if i // size % num_ranks == rank]


@cache
def micro_batches(
    folder: Path, data: Data, credit: str, pruned: bool, count: int, num_ranks: int, rank: int
) -> list[PackedBatch]:
    """The rank's share in exactly `count` micro-batches, by the budget of tokens."""
    batch = batch_of(data, folder)
    plan = planned(batch, credit, pruned)
    mine = share_of(batch, rank, num_ranks)
    for _ in range(0, len(mine), GROUP):
        mine = mine[GROUP:] + mine[:GROUP]  # a budget may leave a number out; from another group on it does not
        rollouts = [batch.rollouts[i] for i in mine]

        def packed(
            budget: int, given: Any = (rollouts, plan.advantages_S2[mine], plan.keep_S[mine])
        ) -> list[PackedBatch]:
            return pack(small_policy(), *given, num_generations=GROUP, max_tokens=budget)

        def few_enough(budget: int, packed: Callable[[int], list[PackedBatch]] = packed) -> bool:
            return sum(not one.anchor for one in packed(budget)) <= count

        batches = packed(1 << 30 if count == 1 else bisect_left(range(1 << 12), True, key=few_enough))
        if sum(not one.anchor for one in batches) == count:
            return batches
    raise AssertionError(f"{data}: no budget gives {count} micro-batches on rank {rank}")


def with_history(batch: PackedBatch) -> PackedBatch:
    """Old and reference log-probabilities that belong to trajectories, however they are cut."""
    old = batch.sampled_logp.nan_to_num(nan=0.0)
    return replace(batch, old_logp=old, ref_logp=old + 0.2 * (7 * old).sin())


# Ranks ----------------------------------------------------------------------------------------------------------------


class Gradients:
    """A learner of this rank that tells an update's gradient, in `metrics` what was measured, and changes nothing."""

    def __init__(self) -> None:
        settings = LearnerSettings(learning_rate=0.0, max_grad_norm=0.0)
        self.learner = Learner(copy.deepcopy(small_policy()), objective_of("dapo"), settings, reference=small_policy())
        self._found, self.metrics = torch.zeros(0), dict[str, float]()
        self.learner.optimizer.register_step_pre_hook(self._record)

    def _record(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        self._found = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])

    def __call__(self, cell: Cell, folder: Path) -> Tensor:
        """[number of parameters] float32, after the mean over ranks."""
        learner, objective = self.learner, objective_of(cell.objective)
        learner.objective = learner.engine.module.objective = objective
        # The reference is not asked: what it would say stands in the batches.
        learner._reference = None
        mine = micro_batches(
            folder, cell.data, objective.credit, cell.pruned, cell.num_micro_batches, cell.num_ranks, learner.rank
        )
        batches = [with_history(one) for one in learner.score(mine)]
        if cell.local:
            whole, learner.all_reduce = learner.all_reduce, lambda values, op=None: values * learner.world_size
        told = trl_names(learner._step(batches))
        if cell.local:
            learner.all_reduce = whole
        self.metrics = merged(learner.gathered(told))
        return self._found.clone()


def rank_main(rank: int, num_ranks: int, port_file: Path, folder: Path, cells: Sequence[Cell]) -> None:
    """Computes the cells of this number of ranks; rank 0 of one rank keeps the references, other rank 0s compare."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port_file.read_text()}
    torch.set_num_threads(1)
    gradients = Gradients()
    references = folder / "references.safetensors"
    known = load_file(references) if references.exists() else {}
    results: dict[str, dict[str, Any]] = {}
    for cell in cells:
        found = gradients(cell, folder).double()
        if cell.name == cell.reference:
            known[cell.name] = found.float()
        want = known[cell.reference].double()
        difference = float((found - want).norm() / want.norm())
        results[cell.name] = {"difference": difference, "norm": float(want.norm()), "metrics": gradients.metrics}
    if rank == 0:
        if num_ranks == 1:
            save_file(known, references)
        (folder / f"results-{num_ranks}.json").write_text(json.dumps(results))


def fork(num_ranks: int, folder: Path, cells: Sequence[Cell]) -> None:
    """Runs the ranks as copies of this process, which has imported everything and joined no group."""
    port_file = folder / f"port-{num_ranks}"
    port_file.write_text(str(free_port()))
    children = []
    for rank in range(num_ranks):
        child = os.fork()
        if child == 0:
            try:
                rank_main(rank, num_ranks, port_file, folder, cells)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    if failed:
        raise SystemExit(f"{len(failed)} of {num_ranks} ranks failed")


def measured(cells: Sequence[Cell], folder: Path, timeout: float) -> dict[str, dict[str, Any]]:
    """The worker's results by the cells' names."""
    (folder / "cells.json").write_text(json.dumps([asdict(cell) for cell in cells]))
    warm.run(__file__, str(folder), str(folder / "cells.json"), timeout=timeout)
    results: dict[str, dict[str, Any]] = {}
    for path in folder.glob("results-*.json"):
        results |= json.loads(path.read_text())
    return results


def main(folder: Path, wanted: Path) -> None:
    torch.set_num_threads(1)
    cells = [Cell(**values) for values in json.loads(wanted.read_text())]
    for data in {cell.data for cell in cells}:
        batch_of(data, folder)  # before the fork, so that every rank has the very same trajectories
    for num_ranks in sorted({cell.num_ranks for cell in cells}):
        fork(num_ranks, folder, [cell for cell in cells if cell.num_ranks == num_ranks])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
