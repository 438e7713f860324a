"""One stage of training, the same for every method: scores before, the loop, scores after, the model on disk.

Ctrl-C ends the loop after its step; what was learnt is then scored, saved and reported like any other result.
"""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TypeVar

import torch
from torch import Tensor

from syncr1.kernels.api import attention_provider

from ..errors import Preempted
from ..evaluate.held_out import Evaluation
from ..forward.objective import Objective
from ..learn.credit import CreditRule
from ..learn.learner import Learner, init_distributed
from ..learn.optimizer import LearnerSettings
from ..learn.trainer import Trainer
from ..policies.base import Policy
from ..policies.fused import use_liger_kernels
from ..policies.lora import add_lora, base_of
from ..processes.interrupts import Interrupts, preemptible
from ..processes.watchdog import Watchdog
from ..records import Rollout, StepMetrics
from ..rewards.ensemble import RewardSet
from ..rewards.preview_scorer import build_preview
from ..settings.train_config import TrainConfig
from ..show.display import Display
from ..show.runlog import NullRunLog, RunLog
from .resume import Checkpoints, ResumablePrompts, ResumePoint

Made = TypeVar("Made")
Scorer = Callable[[Policy], Evaluation]
"""Scores a policy on held-out items."""

SMALL_MODEL = 5_000_000
"""Parameters below which a second thread costs more than it does (measured on the tiny Janus of 2 million)."""
SAVE = "SAVE"
"""A file of this name in a run's folder asks for a checkpoint and the model after the step under way."""
EXAMPLE_TASKS = ("rea", "dense_rea", "dense_gen", "pure_gen", "t2i")
"""Tasks whose pictures are shown before and after, where the data has them."""


@contextmanager
def supervised(config: TrainConfig) -> Iterator[Watchdog]:
    """Joins the process group; inside nothing hangs unnoticed, and SIGTERM ends the run in order."""
    init_distributed(config.stage_timeout + 60)  # the watchdog, which says more, comes first
    torch.manual_seed(config.seed)
    with (
        Watchdog(config.stage_timeout) as watchdog,
        preemptible("stopped outside of training; what was saved is whole"),
    ):
        yield watchdog


def train(
    config: TrainConfig,
    learner: Learner,
    prompts: ResumablePrompts,
    rewards: RewardSet,
    log: RunLog | NullRunLog,
    display: Display,
    watchdog: Watchdog,
    credit: CreditRule | None = None,
    resumed: ResumePoint | None = None,
) -> bool:
    """The loop, watched: metrics, samples, checkpoints and the terminal's bar, from the start or from where a
    checkpoint left it. False when Ctrl-C ended it early.

    Raises:
        Preempted: SIGTERM or SIGUSR1 came to any rank; a checkpoint is saved.
        NotFinite: update after update was skipped.
    """

    def on_step(metrics: StepMetrics, rollouts: Sequence[Rollout], totals: Tensor) -> None:
        log.metrics(metrics)
        display.step(metrics)
        if config.sample_steps and metrics.step % config.sample_steps == 0:
            log.samples(metrics.step, rollouts, totals)
        if checkpoints.due(trainer.step):
            log.sync()
            checkpoints.save(trainer)

    preview = build_preview(config, rewards)
    trainer = Trainer(config, learner, prompts, rewards, preview, on_step, credit, watchdog.mark)
    checkpoints = Checkpoints(config, log.folder / "checkpoints", learner, prompts)
    if resumed is not None:
        checkpoints.restore(trainer, resumed.checkpoint)
        log.cut(trainer.step)
        display.note(f"going on after {trainer.step} steps, in {resumed.run_folder}")
    with (
        _cheap_collections(config),
        display.training(config.max_steps, trainer.step),
        Interrupts(display.note, watchdog.hurry) as interrupts,
    ):

        def stop() -> bool:
            """Asked between steps: what one rank is asked for all do."""
            save = log.folder / SAVE
            wishes = [interrupts.stop, interrupts.preempt, learner.rank == 0 and save.exists(), checkpoints.failed]
            stopped, preempted, saved, failed = learner.all_reduce(torch.tensor(wishes, dtype=torch.int32)).tolist()
            if failed:
                checkpoints.wait()  # raises, on all ranks at this same place
            if preempted or saved:
                log.sync()
                checkpoints.save(trainer)
                checkpoints.wait()
            if saved:
                folder = log.folder / "checkpoints" / f"model_{trainer.step:06d}"
                learner.save(folder)
                save.unlink(missing_ok=True)
                display.note(f"{SAVE}: a checkpoint and {folder}")
            if preempted:
                raise Preempted(f"stopped after {trainer.step} steps; go on with --resume_from_checkpoint latest")
            return bool(stopped)

        trainer.train(stop)
        stop()  # what the last step was asked for
    watchdog.mark("after training")
    log.sync()
    checkpoints.save(trainer)
    checkpoints.wait()
    if trainer.step < config.max_steps:
        display.note(f"stopped at step {trainer.step}; scoring what there is")
    return trainer.step >= config.max_steps


@contextmanager
def _cheap_collections(config: TrainConfig) -> Iterator[None]:
    """DeepSpeed collects garbage in every step of ZeRO-3, which looks at half a million imported objects (.6 s)."""
    if config.zero_stage < 3:
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()  # else what this training leaves would never be freed


def write_scores(log: RunLog | NullRunLog, before: Evaluation | None, after: Evaluation | None = None) -> None:
    """Scores before training alone, or before and after with examples of both."""
    if before is None:
        return
    if after is None:
        log.scores(before=table_of(before))
        return
    log.scores(
        before=table_of(before),
        after=table_of(after),
        examples_before=examples_of(before),
        examples_after=examples_of(after),
    )


def evaluate(evaluator: Scorer | None, learner: Learner) -> Evaluation | None:
    """Held-out scores; every rank computes them, because under ZeRO-3 every rank must hold the gathered weights."""
    if evaluator is None:
        return None
    with learner.sampling() as policy:
        return evaluator(policy)


def add_adapters(config: TrainConfig, policy: Policy) -> Policy:
    """LoRA, where the settings ask for it; returns the policy as it was before, frozen, to judge and to be referred to.

    It shares what does not change with `policy`, except under ZeRO-3, which takes parameters apart."""
    whole = policy.frozen_copy() if config.zero_stage == 3 else None
    if config.lora_rank:
        add_lora(policy, config.lora_rank, config.lora_alpha, target_modules=config.lora_target_modules or None,
                 seed=config.seed)  # fmt: skip
    return whole or base_of(policy)


def fuse_kernels(config: TrainConfig, policy: Policy, display: Display) -> None:
    """Liger's kernels in the decoder, where they apply; says which, and on a GPU whose kernels attention has."""
    if config.use_liger_kernel:
        for line in use_liger_kernels(policy.decoder()):
            if not line.startswith("none"):
                display.note(f"liger-kernel: {line}")
    shape = policy.cache_shape()
    if shape.device.type == "cuda":
        dtype = torch.bfloat16 if config.bf16 else shape.dtype
        display.note(f"attention: {attention_provider(shape.device, dtype=dtype, head_size=shape.head_dim)}")


def objective_of(config: TrainConfig, num_image_tokens: int, anchor_beta: float = 0.0) -> Objective:
    """The loss's settings; `anchor_beta` is the KL weight on prompts without a reward."""
    named_alike = {f.name for f in fields(Objective)} - {"anchor_beta", "max_length"}
    return Objective(
        anchor_beta=anchor_beta,
        max_length=config.max_completion_length + num_image_tokens,
        **{name: getattr(config, name) for name in named_alike},
    )


def settings_of(config: TrainConfig) -> LearnerSettings:
    return LearnerSettings(
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        zero_stage=config.zero_stage,
        bf16=config.bf16,
        num_iterations=config.num_iterations,
        max_skipped_updates=config.max_skipped_updates,
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
