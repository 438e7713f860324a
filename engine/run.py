"""A whole Sync-R1 run: data, policy, scores before, training, scores after, report.

Ctrl-C ends the training loop; what was learnt is then scored, saved and reported like any other result.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from syncr1.engine.assemble import Evaluator, build_preview, build_reward_set, prepare_data, prepare_policy
from syncr1.engine.config import SyncR1Config
from syncr1.engine.display import Display
from syncr1.engine.evaluate.run import Evaluation
from syncr1.engine.learner import Learner, LearnerSettings, init_distributed, local_device
from syncr1.engine.objective import Objective
from syncr1.engine.policies.base import Policy
from syncr1.engine.policies.fused import use_liger_kernels
from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.prompt_stream import PromptStream
from syncr1.engine.prompts import load_anchors, load_training_prompts
from syncr1.engine.records import Rollout, StepMetrics
from syncr1.engine.runlog import open_run_log
from syncr1.engine.trainer import Trainer

Made = TypeVar("Made")

SMALL_MODEL = 5_000_000
"""Parameters below which a second thread costs more than it does (measured on the tiny Janus of 2 million)."""
EXAMPLE_TASKS = ("rea", "dense_rea", "dense_gen", "pure_gen")
"""Tasks whose pictures are shown before and after, where the data has them."""


def run(config: SyncR1Config) -> dict[str, dict[str, float]]:
    """Runs to the end and returns the summaries `before` and `after` (empty without evaluation)."""
    quieten()
    init_distributed()
    if torch.distributed.get_rank() == 0 and config.dry_run:
        dry_run(config)
    if config.dry_run:
        return {}
    torch.manual_seed(config.seed)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    display = Display(max_steps=config.max_steps, num_stages=4, logging_steps=config.logging_steps, quiet=rank != 0)

    display.stage("data and starting model")
    policy = starting_policy(config, display)
    root = one_at_a_time(lambda: prepare_data(config))
    prompts, anchors = load_training_prompts(root), load_anchors(root)
    if not anchors and config.anchor_fraction > 0:
        display.note("no general/train in the data: training without anchors")
    display.note(f"{len(prompts)} training prompts, {len(anchors)} anchors, from {root}")
    stream = PromptStream(
        prompts, anchors, config.seed, config.prompts_per_step, config.anchor_fraction, rank, world_size
    )
    frozen = policy.frozen_copy().to(local_device())
    rewards = build_reward_set(config, frozen, prompts)
    evaluator = one_at_a_time(lambda: Evaluator(config, frozen, root)) if config.eval_samples else None
    learner = Learner(policy, objective_of(config, policy.num_image_tokens), settings_of(config), frozen)

    with open_run_log(config.output_dir, config) as log:
        display.stage("scores before training")
        before = evaluate(evaluator, learner)
        if before is not None:
            log.scores(before=table_of(before))
        display.stage("training")

        def on_step(metrics: StepMetrics, rollouts: Sequence[Rollout], totals: Tensor) -> None:
            log.metrics(metrics)
            display.step(metrics)
            if config.sample_steps and metrics.step % config.sample_steps == 0:
                log.samples(metrics.step, rollouts, totals)

        trainer = Trainer(config, learner, stream, rewards, build_preview(config, rewards), on_step)
        with display.training():
            try:
                trainer.train()
            except KeyboardInterrupt:
                display.note(f"stopped at step {trainer.step}; scoring what there is")
        display.stage("scores after training")
        after = evaluate(evaluator, learner)
        learner.save(log.folder / "checkpoints" / "last")
        if before is not None and after is not None:
            log.scores(
                before=table_of(before),
                after=table_of(after),
                examples_before=examples_of(before),
                examples_after=examples_of(after),
            )
            display.before_after(table_of(before), table_of(after))
    display.note(f"model {log.folder / 'checkpoints' / 'last'}")
    display.note(f"report {log.folder / 'report.html'}")
    return {name: dict(e.summary) for name, e in (("before", before), ("after", after)) if e is not None}


def starting_policy(config: SyncR1Config, display: Display) -> JanusPolicy:
    """The model that is trained, on its device."""
    policy = one_at_a_time(lambda: prepare_policy(config, report=display.note))
    limit_threads(policy)
    policy.to(local_device())
    if config.use_liger_kernel:
        for line in use_liger_kernels(policy.decoder()):
            if not line.startswith("none"):
                display.note(f"liger-kernel: {line}")
    return policy


def evaluate(evaluator: Evaluator | None, learner: Learner) -> Evaluation | None:
    """Held-out scores; every rank computes them, because under ZeRO-3 every rank must hold the gathered weights."""
    if evaluator is None:
        return None
    with learner.sampling() as policy:
        return evaluator(policy)


def objective_of(config: SyncR1Config, num_image_tokens: int) -> Objective:
    return Objective(
        loss_type=config.loss_type,
        ratio=config.importance_sampling_level,
        clip_low=config.epsilon,
        clip_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
        delta=config.delta,
        beta=config.beta,
        anchor_beta=config.anchor_beta if config.anchor_fraction > 0 else 0.0,
        scale=config.scale_rewards,
        temperature=config.temperature,
        credit=config.credit,
        text_weight=config.text_loss_weight,
        image_weight=config.image_loss_weight,
        max_length=config.max_completion_length + num_image_tokens,
    )


def settings_of(config: SyncR1Config) -> LearnerSettings:
    return LearnerSettings(
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        zero_stage=config.zero_stage,
        bf16=config.bf16,
        num_iterations=config.num_iterations,
        gradient_checkpointing=config.gradient_checkpointing,
        cuda_graphs=config.cuda_graphs,
        compile_decode=config.compile_decode,
    )


def table_of(evaluation: Evaluation) -> Mapping[str, Mapping[str, float]]:
    """Scores by task with the summary as one more task: what the table and scores.json hold."""
    return {**evaluation.scores, "summary": evaluation.summary}


def examples_of(evaluation: Evaluation) -> list[Rollout]:
    return [rollout for task in EXAMPLE_TASKS for rollout in evaluation.examples.get(task, ())]


def one_at_a_time(make: Callable[[], Made]) -> Made:
    """Rank 0 makes (and caches) first, the others find it made."""
    rank = torch.distributed.get_rank()
    made = make() if rank == 0 else None
    if torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()
    return make() if made is None else made


def limit_threads(policy: Policy) -> None:
    """One thread for a model too small to share out, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ and sum(p.numel() for p in policy.parameters()) < SMALL_MODEL:
        torch.set_num_threads(1)


def quieten() -> None:
    """Libraries report progress bars and notices of their own; a run has one display."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("DeepSpeed", "deepspeed", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def dry_run(config: SyncR1Config) -> None:
    """Prints the resolved settings and the first prompts, without loading a model."""
    from syncr1.engine.settings import to_yaml

    print(to_yaml(config, comments=False))
    root = prepare_data(config)
    prompts, anchors = load_training_prompts(root), load_anchors(root)
    stream = PromptStream(prompts, anchors, config.seed, config.prompts_per_step, config.anchor_fraction)
    print(f"data: {root}: {len(prompts)} prompts, {len(anchors)} anchors; the first step:")
    for prompt in stream.next_step():
        shown = f" [{prompt.image.name}]" if prompt.image else ""
        print(f"  {prompt.task:14}{shown} {prompt.text!r} -> {prompt.answer or prompt.target!r}")
