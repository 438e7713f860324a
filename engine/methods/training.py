"""From a starting model to a trained, saved and scored one, the same for every method.

    learner ► run log ► scores before ► the loop, with scores on the way ► save ► scores after ► card ► hub

A method says what is trained on what (`Training`).  After Ctrl-C what was learnt is saved, scored and reported, too.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from ..checkpoints.hub import push, repository_of
from ..checkpoints.model_card import write_model_card
from ..errors import PictureError, RewardsFailed, RewardSpecError
from ..evaluate.held_out import Evaluation, Evaluator
from ..forward.objective import Objective
from ..learn.credit import CreditRule
from ..learn.from_settings import sampler_of, settings_of
from ..learn.learner import Learner
from ..learn.trainer import Trainer
from ..learn.trajectories import ResumablePrompts
from ..policies.base import Policy
from ..processes.group import of_all_ranks, place
from ..processes.heaps import bound_heaps
from ..processes.interrupts import Interrupts
from ..processes.meeting import Meeting
from ..processes.watchdog import Watchdog
from ..records import Prompt, Rollout, StepMetrics
from ..rewards.ensemble import RewardSet
from ..rewards.hooks import state_of
from ..rewards.preview_scorer import build_preview
from ..rewards.told import told_rewards
from ..rewards.trial import try_rewards
from ..settings.train_config import TrainConfig
from ..show.data_found import DataFound
from ..show.display import Display
from ..show.in_words import reward_lines
from ..show.names import EXAMPLE_TASKS
from ..show.runlog import NullRunLog, RunLog, open_run_log
from .ahead_start import AheadOf, Started, started_ahead
from .best import BEST, HeldOut
from .dry_run import nothing_trained
from .resume import Checkpoints, ResumePoint
from .starting import RUN_FOLDER, going_on, quieten, starting_policy, supervised
from .stopping import StopRequests

Config = TypeVar("Config", bound=TrainConfig)
Summaries = dict[str, dict[str, float]]
"""Model -> the means of its scores; empty where nothing was scored."""
EMBEDDED_BASE = "the tiny base, a small model that syncr1 trains on its own world before any RL"
LAST = "last"
"""Folder of the last step's model, below `checkpoints/`."""


@dataclass(frozen=True, slots=True)
class Session:
    """What goes with a run from its start to its end: who tells the user, who watches that nothing hangs, its ranks,
    and what is left of it."""

    display: Display
    watchdog: Watchdog
    meeting: Meeting
    models: dict[str, Path] = field(default_factory=dict)
    """Those that the run was for, by what sets their names apart, for `push_to_hub`; none of one that Ctrl-C ended."""

    def writes_in(self, folder: Path) -> None:
        """The run's folder, where a later start of the same launcher goes on; the first one that is told counts."""
        self.meeting.keep(RUN_FOLDER, str(folder.resolve()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What a method brings to one training."""

    method: str
    """Its name in the model's card."""
    data: str | Path
    """What it is trained on, for the card."""
    found: DataFound | None = None
    """What that holds; None: the run of which this is a training says it."""
    embedded: bool = False
    """It starts from the embedded base, whose folder is a name in a cache; always so without a `model`."""
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
    main_tasks: frozenset[str] = frozenset()
    """Tasks whose held-out scores say which model is the best; none: all that are trained."""
    before: Evaluation | None = None
    """The starting model's scores, where they are known already."""
    ahead: AheadOf | None = None
    """What gathers in another process with `rollout_staleness` 1; None: the method has none."""
    alone: bool = True
    """The run's only training, which announces its stages and shows its table; else its method does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a training leaves."""

    folder: Path
    """Of its log."""
    model: Path
    """The checkpoint, in that folder: the last step's, or the best one where the settings ask for it."""
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
    bound_heaps()
    if config.dry_run:  # joins no group, so that the plan is made in the environment that a run would find
        if os.environ.get("RANK", "0") == "0":
            dry_run(config)
            nothing_trained()
        return {}
    with supervised(config) as (watchdog, meeting):
        config = going_on(config, meeting)
        display = Display(
            max_steps=config.max_steps,
            num_stages=num_stages,
            logging_steps=config.logging_steps,
            quiet=place()[0] != 0,
        )
        session = Session(display, watchdog, meeting)
        with display:
            summaries = method(config, session)
    if config.push_to_hub and place()[0] == 0:  # watched by nobody: a large model takes as long as it takes
        push(session.models, repository_of(config), config.hub_private_repo, display.note)
    return summaries


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
    first = try_out(config, training)
    display, evaluator, before = session.display, training.evaluator, training.before
    announce: Callable[[str], None] = display.stage if training.alone else lambda title: None
    learner = Learner(training.policy, training.objective, settings_of(config), training.reference)
    with (
        started_ahead(config, training.policy, training.ahead) as started,
        open_run_log(config.output_dir, config, resumed) as log,
    ):
        session.writes_in(log.folder)
        log.data(training.found)
        announce("scores before training")
        before = before or evaluate(evaluator, learner)
        write_scores(log, before)
        announce("training")
        paid = told_rewards(training.rewards, first)
        log.rewards(paid)
        for line in reward_lines(paid):
            display.note(line)

        def card(folder: Path, scores: Evaluation | None) -> None:
            write_card(config, training, folder, before, scores)

        root = log.folder / "checkpoints"
        held_out = HeldOut(config, learner, evaluator, before, training.main_tasks, root, card, display.note)
        num_steps = train(config, training, learner, log, session, held_out, resumed, started)
        display.gradients(config.max_grad_norm)
        learner.save(root / LAST)
        announce("scores after training")
        after = held_out.at_the_end(num_steps)
        card(root / LAST, after)
        model, after = held_out.result(root / LAST, after, partial(score_saved, config, evaluator, display))
        write_scores(log, before, after)
        if training.alone and before is not None and after is not None:
            display.before_after(before.table, after.table)
    finished = num_steps >= config.max_steps
    if training.alone:
        session.models.update({"": model} if finished else {})
        display.note(f"model {model}")
        display.note(f"report {log.folder / 'report.html'}")
    return Trained(folder=log.folder, model=model, finished=finished, before=before, after=after)


def try_out(config: TrainConfig, training: Training) -> Sequence[Prompt]:
    """A trial call of the user's own rewards on the first step's prompts, which are returned; raises as below."""
    prompts = training.prompts
    begin = prompts.state_dict()
    first = prompts.next_step()
    prompts.load_state_dict(begin)
    try_rewards_on(config, training.rewards, first, training.policy)
    return first


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
        state=state_of(config, 0),
    )
    if told := [line for words in of_all_ranks("\n".join(problems)) for line in words.splitlines()]:
        raise RewardSpecError("\n".join(dict.fromkeys(told)))


def train(
    config: TrainConfig,
    training: Training,
    learner: Learner,
    log: RunLog | NullRunLog,
    session: Session,
    held_out: HeldOut,
    resumed: ResumePoint | None,
    started: Started,
) -> int:
    """The loop, from the start or a checkpoint, watched. Returns how many steps are done: fewer than asked for after
    Ctrl-C. Raises as `run_training`."""
    display, watchdog = session.display, session.watchdog

    def on_step(metrics: StepMetrics, rollouts: Sequence[Rollout], totals: Tensor) -> None:
        if held_out.due(trainer.step):
            watchdog.mark("evaluation", metrics.step)
            metrics = held_out.with_scores(metrics, trainer.step)
        log.metrics(metrics)
        display.step(metrics)
        ends = metrics.step == config.max_steps - 1 or interrupts.stop
        if config.sample_steps and (metrics.step % config.sample_steps == 0 or ends):
            log.samples(metrics.step, rollouts, totals, metrics.extras)
        if checkpoints.due(trainer.step):
            log.sync()
            checkpoints.save(trainer)

    prompts, rewards = training.prompts, training.rewards
    sampler, preview = sampler_of(config, learner.policy), build_preview(config, rewards)
    ahead = started.of(prompts, preview, watchdog.mark)
    trainer = Trainer(
        config, learner, sampler, prompts, rewards, preview, on_step, training.credit, watchdog.mark, ahead
    )
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
        requests = StopRequests(trainer, checkpoints, interrupts, log, display.note)

        def stop() -> bool:
            watchdog.mark("between steps", trainer.step)
            return requests()

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
    started.close()  # its memory and its core are for the scores now
    if trainer.step < config.max_steps:
        display.note(f"stopped at step {trainer.step}; scoring what there is")
    return trainer.step


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


def score_saved(config: TrainConfig, evaluator: Evaluator | None, display: Display, folder: Path) -> Evaluation:
    """Scores of a saved model. Collective."""
    assert evaluator is not None
    return evaluator(starting_policy(config, folder, display).eval())


def result_of(config: TrainConfig, folder: Path) -> Path:
    """The model that a finished training left in its run's `folder`."""
    best = folder / "checkpoints" / BEST
    return best if config.load_best_model_at_end and best.is_dir() else folder / "checkpoints" / LAST


def write_scores(log: RunLog | NullRunLog, before: Evaluation | None, after: Evaluation | None = None) -> None:
    """Scores before training alone, or before and after with examples of both."""
    if before is None:
        return
    if after is None:
        log.scores(before=before.table)
        return
    log.scores(
        before=before.table,
        after=after.table,
        examples_before=examples_of(before),
        examples_after=examples_of(after),
        read_before=readings_of(before),
        read_after=readings_of(after),
    )


def write_card(
    config: TrainConfig, training: Training, folder: Path, before: Evaluation | None, after: Evaluation | None
) -> None:
    """The README.md beside the saved model, by rank 0."""
    if place()[0] == 0:
        write_model_card(
            folder,
            base_model=None if training.embedded else config.model,
            base_words=EMBEDDED_BASE,
            method=training.method,
            config=config,
            data=training.data,
            title=config.run_name,
            before=None if before is None else before.table,
            after=None if after is None else after.table,
        )


def examples_of(evaluation: Evaluation) -> list[Rollout]:
    return [rollout for task in EXAMPLE_TASKS for rollout in evaluation.examples.get(task, ())]


def readings_of(evaluation: Evaluation) -> list[Mapping[str, str]]:
    """What the examples' images show, in the order of `examples_of`."""
    return [
        reading
        for task in EXAMPLE_TASKS
        for reading in evaluation.readings.get(task) or [{} for _ in evaluation.examples.get(task, ())]
    ]
