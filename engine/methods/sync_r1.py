"""A whole Sync-R1 run: data, policy, scores before, training, scores after, report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from ..checkpoints.model_card import write_model_card
from ..data.mixture import Mixture
from ..data.prompts import by_task, load_anchors, load_benchmark, load_training_prompts
from ..data.samples import load_prompts
from ..data.stream import PromptStream
from ..errors import DataError
from ..learn.learner import Learner, local_device
from ..policies.auto import model_draws
from ..policies.base import Policy
from ..processes.watchdog import Watchdog
from ..records import Prompt
from ..rollout.capacity import check_plans
from ..show.display import Display
from ..show.runlog import open_run_log
from .resume import resume_point
from .sync_r1_config import SyncR1Config
from .sync_r1_parts import Evaluator, build_reward_set, prepare_data, prepare_policy
from .training import (
    add_adapters,
    evaluate,
    fuse_kernels,
    limit_threads,
    objective_of,
    one_at_a_time,
    quieten,
    settings_of,
    supervised,
    table_of,
    train,
    write_scores,
)


def run(config: SyncR1Config) -> dict[str, dict[str, float]]:
    """Runs to the end and returns the summaries `before` and `after` (empty without evaluation)."""
    quieten()
    if config.dry_run:  # joins no group, so that the plan is made in the environment that a run would find
        if os.environ.get("RANK", "0") == "0":
            dry_run(config)
        return {}
    with supervised(config) as watchdog:
        return train_and_score(config, watchdog)


def train_and_score(config: SyncR1Config, watchdog: Watchdog) -> dict[str, dict[str, float]]:
    """The run itself, on a rank of the process group."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    display = Display(max_steps=config.max_steps, num_stages=4, logging_steps=config.logging_steps, quiet=rank != 0)

    resumed = resume_point(config, display.note)
    display.stage("data and starting model")
    policy = starting_policy(config, display)
    root = one_at_a_time(lambda: prepare_data(config))
    prompts, anchors, benchmark = load_data(root, config.model, scored=config.eval_samples > 0)
    check_plans(policy, prompts)
    if not anchors and config.anchor_fraction > 0:
        display.note("no general/train in the data: training without anchors")
    display.note(f"{len(prompts)} training prompts, {len(anchors)} anchors, from {root}")
    if config.eval_samples and not benchmark:
        display.note("no held-out part in the data: nothing is scored")
    stream = stream_of(config, prompts, anchors, rank, world_size)
    frozen = add_adapters(config, policy).to(local_device())
    rewards = build_reward_set(config, frozen, prompts)
    evaluator = None
    if config.eval_samples and benchmark:
        evaluator = one_at_a_time(lambda: Evaluator(config, frozen, benchmark))
    anchor_beta = config.anchor_beta if config.anchor_fraction > 0 else 0.0
    objective = objective_of(config, policy.num_image_tokens, anchor_beta)
    learner = Learner(policy, objective, settings_of(config), frozen)

    with open_run_log(config.output_dir, config, resumed) as log:
        display.stage("scores before training")
        before = evaluate(evaluator, learner)
        write_scores(log, before)
        display.stage("training")
        train(config, learner, stream, rewards, log, display, watchdog, resumed=resumed)
        display.stage("scores after training")
        after = evaluate(evaluator, learner)
        learner.save(log.folder / "checkpoints" / "last")
        write_scores(log, before, after)
        if rank == 0:
            scores = [None if scored is None else table_of(scored) for scored in (before, after)]
            write_model_card(log.folder / "checkpoints" / "last", base_model=config.model, method="Sync-R1",
                             config=config, data=config.data, before=scores[0], after=scores[1])  # fmt: skip
        if before is not None and after is not None:
            display.before_after(table_of(before), table_of(after))
    display.note(f"model {log.folder / 'checkpoints' / 'last'}")
    display.note(f"report {log.folder / 'report.html'}")
    return {name: dict(e.summary) for name, e in (("before", before), ("after", after)) if e is not None}


def load_data(
    root: Path, model: str | None, *, scored: bool
) -> tuple[list[Prompt], list[Prompt], dict[str, list[Prompt]]]:
    """Training prompts, anchors, and (where they are wanted) held-out prompts by task, of a UnifyBench++ folder or of
    a table of prompts, which a model that draws nothing is to answer."""
    if (root / "concept").is_dir():
        return load_training_prompts(root), load_anchors(root), load_benchmark(root) if scored else {}
    held_out: dict[str, list[Prompt]] = {}
    draws = model_draws(model)
    if scored and not root.is_file():  # a file has one split
        with suppress(DataError):  # a table may be all for training
            held_out = by_task(load_prompts(root, "test", model_draws=draws))
    return load_prompts(root, "train", model_draws=draws), [], held_out


def stream_of(
    config: SyncR1Config, prompts: Sequence[Prompt], anchors: Sequence[Prompt], rank: int = 0, world_size: int = 1
) -> PromptStream:
    """The prompts of each step: every task's share, and anchors among them."""
    order = Mixture(
        prompts,
        anchors,
        seed=config.seed,
        prompts_per_step=config.prompts_per_step,
        anchor_fraction=config.anchor_fraction,
    )
    return PromptStream(order, rank, world_size)


def starting_policy(config: SyncR1Config, display: Display) -> Policy:
    """The model that is trained, on its device."""
    policy = one_at_a_time(lambda: prepare_policy(config, report=display.note))
    limit_threads(policy)
    policy.to(local_device())
    fuse_kernels(config, policy, display)
    return policy


def dry_run(config: SyncR1Config) -> None:
    """Prints the resolved settings, the plan, memory and the first prompts, without loading a model."""
    from .dry_run import show

    def prompts_of(world_size: int) -> list[Prompt]:
        root = prepare_data(config)
        prompts, anchors, _ = load_data(root, config.model, scored=False)
        print(f"data: {root}: {len(prompts)} prompts, {len(anchors)} anchors")
        return stream_of(config, prompts, anchors, 0, world_size).next_step()

    show(config, prompts_of)
