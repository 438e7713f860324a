"""From a starting model to a trained, saved and scored one, the same for every method.

    learner ► run log ► scores before ► the loop ► save ► scores after ► card

A method says what is trained on what (`Training`).  Ctrl-C ends the loop after its step; what was learnt is then saved,
scored and reported like any other result.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from ..checkpoints.model_card import write_model_card
from ..errors import PictureError, RewardsFailed, RewardSpecError
from ..evaluate.held_out import Evaluation, Evaluator
from ..forward.objective import Objective
from ..learn.credit import CreditRule
from ..learn.from_settings import sampler_of, settings_of
from ..learn.learner import Learner
from ..learn.trainer import Trainer
from ..policies.base import Policy
from ..processes.group import of_all_ranks, place
from ..processes.interrupts import Interrupts
from ..processes.watchdog import Watchdog
from ..records import Prompt, Rollout, StepMetrics
from ..rewards.ensemble import RewardSet
from ..rewards.preview_scorer import build_preview
from ..rewards.trial import try_rewards
from ..settings.train_config import TrainConfig
from ..show.display import Display
from ..show.runlog import NullRunLog, RunLog, open_run_log
from .resume import Checkpoints, ResumablePrompts, ResumePoint
from .starting import quieten, supervised
from .stopping import StopRequests

Config = TypeVar("Config", bound=TrainConfig)
Summaries = dict[str, dict[str, float]]
"""Model -> the means of its scores; empty where nothing was scored."""
EXAMPLE_TASKS = ("rea", "dense_rea", "dense_gen", "pure_gen", "t2i")
"""Tasks whose pictures are shown before and after, where the data has them."""


@dataclass(frozen=True, slots=True)
class Session:
    """What goes with a run from its start to its end: who tells the user, and who watches that nothing hangs."""

    display: Display
    watchdog: Watchdog


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What a method brings to one training."""

    method: str
    """Its name in the model's card."""
    data: str | Path | None
    """What it is trained on, for the card; None: the embedded data."""
    policy: Policy
    """What is trained, on its device, with its adapters."""
    objective: Objective
    prompts: ResumablePrompts
    """This rank's share of each step's prompts."""
    rewards: RewardSet
    reference: Policy | None = None
    """Frozen, for the KL term; see `Learner`."""
    credit: CreditRule | None = None
    """Rewards to what tokens answer for; None: as `config.credit` says."""
    evaluator: Evaluator | None = None
    """None: nothing is scored."""
    before: Evaluation | None = None
    """The starting model's scores, where they are known already."""
    alone: bool = True
    """The run's only training, which announces its stages and shows its table; else its method does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a training leaves."""

    folder: Path
    """Of its log."""
    model: Path
    """The checkpoint, in that folder."""
    finished: bool
    """False when Ctrl-C ended it early."""
    before: Evaluation | None
    after: Evaluation | None

    @property
    def summaries(self) -> Summaries:
        return {name: dict(e.summary) for name, e in (("before", self.before), ("after", self.after)) if e is not None}


def run_method(
    config: Config,
    method: Callable[[Config, Session], Summaries],
    dry_run: Callable[[Config], None],
    num_stages: int = 0,
) -> Summaries:
    """A whole run of `method`, on a rank of the process group; `num_stages`: how many it will announce."""
    quieten()
    if config.dry_run:  # joins no group, so that the plan is made in the environment that a run would find
        if os.environ.get("RANK", "0") == "0":
            dry_run(config)
        return {}
    with supervised(config) as watchdog:
        display = Display(
            max_steps=config.max_steps,
            num_stages=num_stages,
            logging_steps=config.logging_steps,
            quiet=place()[0] != 0,
        )
        return method(config, Session(display, watchdog))


def run_training(
    config: TrainConfig, training: Training, session: Session, resumed: ResumePoint | None = None
) -> Trained:
    """One training, its scores before and after, and everything that is written of it.

    Args:
        config: its settings.
        training: what is trained on what.
        session: of the run.
        resumed: where it goes on; None: a new folder.

    Raises:
        Preempted: SIGTERM or SIGUSR1 came to any rank; a checkpoint is saved.
        NotFinite: update after update was skipped.
        RewardSpecError, RewardsFailed: a reward fails in a trial call, or for everyone while it trains.
    """
    try_out(config, training)
    display, evaluator, before = session.display, training.evaluator, training.before
    announce: Callable[[str], None] = display.stage if training.alone else lambda title: None
    learner = Learner(training.policy, training.objective, settings_of(config), training.reference)
    with open_run_log(config.output_dir, config, resumed) as log:
        announce("scores before training")
        before = before or evaluate(evaluator, learner)
        write_scores(log, before)
        announce("training")
        finished = train(config, training, learner, log, session, resumed)
        model = log.folder / "checkpoints" / "last"
        learner.save(model)
        announce("scores after training")
        after = evaluate(evaluator, learner)
        write_scores(log, before, after)
        write_card(config, training, model, before, after)
        if training.alone and before is not None and after is not None:
            display.before_after(table_of(before), table_of(after))
    if training.alone:
        display.note(f"model {model}")
        display.note(f"report {log.folder / 'report.html'}")
    return Trained(folder=log.folder, model=model, finished=finished, before=before, after=after)


def try_out(config: TrainConfig, training: Training) -> None:
    """A trial call of the user's own rewards, on prompts of the first step; raises as `try_rewards_on`."""
    prompts = training.prompts
    begin = prompts.state_dict()
    first = prompts.next_step()
    prompts.load_state_dict(begin)
    try_rewards_on(config, training.rewards, first, training.policy)


def try_rewards_on(config: TrainConfig, rewards: RewardSet, prompts: Sequence[Prompt], policy: Policy) -> None:
    """Calls the user's own rewards once, before anything is trained. Collective.

    Raises:
        RewardSpecError: any of them fails, on any rank; a line for each.
    """
    problems = try_rewards(
        rewards.functions,
        prompts,
        image_size=policy.image_size,
        encode=lambda text: policy.encode(text).tolist(),
        timeout=config.reward_timeout,
    )
    told = [line for words in of_all_ranks("\n".join(problems)) for line in words.splitlines()]
    if told:
        raise RewardSpecError("\n".join(dict.fromkeys(told)))


def train(
    config: TrainConfig,
    training: Training,
    learner: Learner,
    log: RunLog | NullRunLog,
    session: Session,
    resumed: ResumePoint | None,
) -> bool:
    """The loop, watched: metrics, samples, checkpoints and the terminal's bar, from the start or from where a
    checkpoint left it. False when Ctrl-C ended it early. Raises as `run_training`."""
    display, watchdog = session.display, session.watchdog

    def on_step(metrics: StepMetrics, rollouts: Sequence[Rollout], totals: Tensor) -> None:
        log.metrics(metrics)
        display.step(metrics)
        if config.sample_steps and metrics.step % config.sample_steps == 0:
            log.samples(metrics.step, rollouts, totals)
        if checkpoints.due(trainer.step):
            log.sync()
            checkpoints.save(trainer)

    prompts, rewards = training.prompts, training.rewards
    sampler, preview = sampler_of(config, learner.policy), build_preview(config, rewards)
    trainer = Trainer(config, learner, sampler, prompts, rewards, preview, on_step, training.credit, watchdog.mark)
    checkpoints = Checkpoints(config, log.folder / "checkpoints", learner, prompts)
    if resumed is not None and resumed.checkpoint is not None:
        checkpoints.restore(trainer, resumed.checkpoint)
        display.note(f"going on after {trainer.step} steps, in {resumed.run_folder}")
    log.cut(trainer.step)
    with (
        _cheap_collections(config),
        display.training(config.max_steps, trainer.step),
        Interrupts(display.note, watchdog.hurry) as interrupts,
    ):
        stop = StopRequests(trainer, checkpoints, interrupts, log, display.note)
        began = trainer.step
        try:
            trainer.train(stop)
        except (RewardsFailed, PictureError) as error:
            together = isinstance(error, RewardsFailed)  # a picture that went bad ends one rank in the middle of a step
            if trainer.step > began + together and (together or place()[1] == 1):
                log.sync()
                checkpoints.save(trainer)
                checkpoints.wait()
                display.note(
                    f"saved what {trainer.step} steps learnt; --resume_from_checkpoint latest goes on from there"
                )
            raise
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


def evaluate(evaluator: Evaluator | None, learner: Learner) -> Evaluation | None:
    """Held-out scores; every rank computes them, because under ZeRO-3 every rank must hold the gathered weights."""
    if evaluator is None:
        return None
    with learner.sampling() as policy:
        return evaluator(policy)


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


def write_card(
    config: TrainConfig, training: Training, folder: Path, before: Evaluation | None, after: Evaluation | None
) -> None:
    """The README.md beside the saved model, by rank 0."""
    if place()[0] == 0:
        write_model_card(
            folder,
            base_model=config.model,
            method=training.method,
            config=config,
            data=training.data,
            before=None if before is None else table_of(before),
            after=None if after is None else table_of(after),
        )


def table_of(evaluation: Evaluation) -> Mapping[str, Mapping[str, float]]:
    """Scores by task with the summary as one more task: what the table and scores.json hold."""
    return {**evaluation.scores, "summary": evaluation.summary}


def examples_of(evaluation: Evaluation) -> list[Rollout]:
    return [rollout for task in EXAMPLE_TASKS for rollout in evaluation.examples.get(task, ())]
