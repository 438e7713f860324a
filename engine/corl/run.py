"""A whole CoRL run: first stage, three refined runs, merge, and a table of every model on the way.

    base ──► unified ──► t2i                     draws
                    └──► mcq ──┐
                    └──► oe  ──┴──► merged       answers

Each training starts from a saved checkpoint and leaves one, in a folder of its own below the run's; `--stage` runs any
part alone.  Source: CoRL (arXiv 2505.17534), section 3; the strategies of the first stage are its pilot study's.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ..checkpoints.merge import merge_checkpoints
from ..checkpoints.model_card import write_model_card
from ..data.samples import Sample
from ..evaluate.held_out import Evaluation
from ..learn.credit import shared_advantages
from ..learn.learner import Learner, local_device
from ..methods.resume import resume_point
from ..methods.training import (
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
from ..policies.auto import load_policy
from ..policies.base import Policy
from ..processes.watchdog import Watchdog
from ..records import Prompt
from ..rollout.capacity import check_plans
from ..show.display import Display
from ..show.runlog import NullRunLog, RunLog, open_run_log
from .config import REFINED, CorlConfig, Training
from .models_table import models_table
from .parts import Parts
from .progress import Continued, interrupted_run, is_finished, mark_finished
from .training_data import refined_trainings, stream_of, training_samples

TABLE_WIDTH = 110
"""Characters; a log file's lines may be longer than a terminal's 80."""


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint of the run and what it can do."""

    folder: str
    """In transformers' format; a hub name for a base that is there."""
    scores: Evaluation | None


def run(config: CorlConfig) -> dict[str, dict[str, float]]:
    """Runs what `config.stage` asks for; returns each model's summary by name (empty without evaluation)."""
    quieten()
    if config.dry_run:  # needs no other rank
        if os.environ.get("RANK", "0") == "0":
            dry_run(config)
        return {}
    with supervised(config) as watchdog:
        return every_model(config, watchdog)


def every_model(config: CorlConfig, watchdog: Watchdog) -> dict[str, dict[str, float]]:
    """The run itself, on a rank of the process group."""
    display = Display(max_steps=1, logging_steps=config.logging_steps, quiet=torch.distributed.get_rank() != 0)
    interrupted = interrupted_run(config, display.note)
    with open_run_log(config.output_dir, config, interrupted) as log:
        models = CorlRun(config, log, display, watchdog).models()
        scored = {name: model.scores for name, model in models.items() if model.scores is not None}
        if scored:
            table = models_table({name: table_of(scores) for name, scores in scored.items()})
            display.wide(table, TABLE_WIDTH)
            if "base" in scored and len(scored) > 1:
                write_scores(log, scored["base"], best_of_both(scored))
    for name, model in models.items():
        display.note(f"{name}: {model.folder}")
    display.note(f"report {log.folder / 'report.html'}")
    return {name: dict(scores.summary) for name, scores in scored.items()}


class CorlRun:
    """The trainings of a run, which share data, judges and the table of scores."""

    def __init__(self, config: CorlConfig, log: RunLog | NullRunLog, display: Display, watchdog: Watchdog) -> None:
        self.config, self.log, self.display, self.watchdog = config, log, display, watchdog
        display.stage("data, starting model and rewards")
        self.parts = one_at_a_time(lambda: Parts(config, display.note))
        self.stopped = False

    def models(self) -> dict[str, Model]:
        """Every model of the run by name, in order of making; Ctrl-C makes the current one the last."""
        config = self.config
        models = {"base": self._scored("base", self.parts.base)}
        start = dict.fromkeys(("drawing", "answering"), models["base"])
        if config.stage in ("all", "unified"):
            models |= self._first_stage(models["base"])
            for skill, name in (("drawing", "generation"), ("answering", "understanding")):
                start[skill] = next(models[n] for n in ("merged_first", "unified", name, "base") if n in models)
        refined, note = refined_trainings(config, self.parts.data, self.parts.instruction)
        if note:
            self.display.note(note)
        for training in refined:
            if self.stopped:
                return models
            models[training] = self._train(training, start["drawing" if training == "t2i" else "answering"])
        if config.stage == "merge":
            sources, base = list(config.merge_models), config.merge_base
            models["merged"] = self._merge("merged", str(base), sources)
        elif "mcq" in models and "oe" in models and not self.stopped:
            base = config.merge_base or start["answering"].folder
            models["merged"] = self._merge("merged", base, [models["mcq"].folder, models["oe"].folder])
        return models

    def _first_stage(self, base: Model) -> dict[str, Model]:
        if self.config.strategy in ("unified", "alternating"):
            return {"unified": self._train("unified", base)}
        models = {"generation": self._train("generation", base)}
        if not self.stopped:
            models["understanding"] = self._train("understanding", base)
        if self.config.strategy == "separate_merged" and not self.stopped:
            folders = [model.folder for model in models.values()]
            models["merged_first"] = self._merge("merged_first", self.config.merge_base or base.folder, folders)
        return models

    def _train(self, training: Training, start: Model) -> Model:
        """One training from a saved model to a saved model."""
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        samples = training_samples(self.config, training, self.parts.data, self.parts.instruction)
        config = self.config.for_stage(
            training,
            len(samples),
            model=start.folder,
            output_dir=self.log.folder / training,
            resume_from_checkpoint=self.config.resume_from_checkpoint and "latest",
            stage=training if training in REFINED else "unified",
        )
        if config.resume_from_checkpoint and is_finished(config.output_dir):
            self.display.note(f"training {training}: finished already")
            return self._scored(training, str(config.output_dir / "checkpoints" / "last"))
        torch.manual_seed(config.seed)  # a training does not depend on those before it that are finished already
        self.display.stage(f"training {training}: {config.max_steps} steps, {len(samples)} samples")
        policy = self._load(start.folder)
        reference = add_adapters(config, policy) if config.lora_rank or config.beta else None
        objective, credit = objective_of(config, policy.num_image_tokens), None
        check_plans(policy, [prompt for sample in samples for prompt in sample])
        rewards = self.parts.rewards(training, policy, samples)
        if config.unify == "advantage" and training == "unified":
            objective = replace(objective, scale_rewards="none")
            credit = partial(shared_advantages, rewards=rewards, scale=config.scale_rewards,
                             text_weight=config.understanding_weight)  # fmt: skip
        learner = Learner(policy, objective, settings_of(config), reference)
        stream = stream_of(config, training, samples, rank, world_size)
        resumed = resume_point(config, self.display.note)
        # A training that was killed before its first checkpoint begins anew in the folder that it has made.
        begun = bool(config.resume_from_checkpoint) and (config.output_dir / "config.yaml").is_file()
        goes_on = resumed or (Continued(config.output_dir) if begun else None)
        with open_run_log(config.output_dir, config, goes_on) as log:
            log.cut(0 if resumed is None else resumed.step)
            write_scores(log, start.scores)
            self.stopped = not train(
                config, learner, stream, rewards, log, self.display, self.watchdog, credit, resumed
            )
            folder = log.folder / "checkpoints" / "last"
            learner.save(folder)
            scores = evaluate(self.parts.evaluator, learner)
            write_scores(log, start.scores, scores)
        self._card(folder, f"CoRL, {training}", config, start, scores)
        if not self.stopped:
            mark_finished(log.folder, config.max_steps)
        del learner, policy, rewards
        gc.collect()
        return Model(str(folder), scores)

    def _merge(self, name: str, base: str, sources: list[str]) -> Model:
        """Two models into one; rank 0 writes, all wait and score."""
        config, folder = self.config, self.log.folder / name
        self.display.stage(f"merging {len(sources)} models ({config.merge_method})")
        if torch.distributed.get_rank() == 0 and not (self.config.resume_from_checkpoint and folder.is_dir()):
            merge_checkpoints(base, sources, folder, config.merge_method)
        if torch.distributed.get_world_size() > 1:
            torch.distributed.barrier()
        model = self._scored(name, str(folder))
        if torch.distributed.get_rank() == 0:
            after = None if model.scores is None else table_of(model.scores)
            write_model_card(folder, base_model=base, method=f"{config.merge_method} merge", config=config,
                             data=config.data, after=after, merged_from=sources)  # fmt: skip
        return model

    def _scored(self, name: str, folder: str) -> Model:
        """A saved model with its scores."""
        if self.parts.evaluator is None:
            return Model(folder, None)
        self.display.stage(f"scores of {name}")
        policy = self._load(folder).eval()
        return Model(folder, self.parts.evaluator(policy))

    def _load(self, folder: str) -> Policy:
        dtype = torch.bfloat16 if self.config.bf16 else torch.float32
        policy = one_at_a_time(lambda: load_policy(folder, dtype=dtype))
        limit_threads(policy)
        policy.to(local_device())
        fuse_kernels(self.config, policy, self.display)
        return policy

    def _card(self, folder: Path, method: str, config: CorlConfig, start: Model, scores: Evaluation | None) -> None:
        if torch.distributed.get_rank() == 0:
            before, after = (None if s is None else table_of(s) for s in (start.scores, scores))
            write_model_card(folder, base_model=start.folder, method=method, config=config, data=config.data,
                             before=before, after=after)  # fmt: skip


def best_of_both(scored: Mapping[str, Evaluation]) -> Evaluation:
    """What ULM-R1 reports: drawings by the refined drawing model, answers by the merged one; before that stage, and for
    a single stage, by the last model that was trained on them."""
    drawing = next(scored[n] for n in ("t2i", "merged_first", "unified", "generation", "merged", "base") if n in scored)
    names = ("merged", "mcq", "oe", "merged_first", "unified", "understanding", "base")
    answering = next(scored[n] for n in names if n in scored)
    kept = {task: (drawing if task == "t2i" else answering) for task in answering.scores}
    return type(answering)(
        scores={task: source.scores[task] for task, source in kept.items()},
        examples={task: source.examples[task] for task, source in kept.items()},
    )


def dry_run(config: CorlConfig) -> None:
    """Prints each training's settings, plan, memory and first prompts, without loading a model's weights."""
    from ..methods.dry_run import show
    from ..settings.schema import to_yaml
    from .parts import data_of

    if config.stage == "merge":
        print(to_yaml(config, comments=False))
        return
    root, instruction = data_of(config)
    first: tuple[Training, ...] = ("unified",) if config.stage in ("all", "unified") else ()
    refined, _ = refined_trainings(config, root, instruction)
    for training in (*first, *refined):
        samples = training_samples(config, training, root, instruction)
        settings = config.for_stage(training, len(samples))
        print(f"\n# {training}: {len(samples)} samples of {root}, {settings.max_steps} steps\n")
        show(settings, partial(_first_prompts, settings, training, samples))


def _first_prompts(settings: CorlConfig, training: Training, samples: list[Sample], ranks: int) -> list[Prompt]:
    return stream_of(settings, training, samples, 0, ranks).next_step()
