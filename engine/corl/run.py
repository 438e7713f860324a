"""A whole CoRL run: first stage, three refined runs, merge, and a table of every model on the way.

    base ──► unified ──► t2i                     draws
                    └──► mcq ──┐
                    └──► oe  ──┴──► merged       answers

Each training starts from a saved checkpoint and leaves one, in a folder of its own below the run's; `--stage` runs any
part alone.  Source: CoRL (arXiv 2505.17534), section 3; the strategies of the first stage are its pilot study's.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.merge import merge_checkpoints
from ..checkpoints.model_card import write_model_card
from ..data.samples import Sample
from ..evaluate.held_out import Evaluation
from ..learn.from_settings import check_order, objective_of
from ..methods.ahead_start import AheadOf
from ..methods.bad_rows import BadRows
from ..methods.starting import add_adapters, loaded_from, starting_policy
from ..methods.training import (
    EMBEDDED_BASE,
    Session,
    Summaries,
    Training,
    result_of,
    run_method,
    run_training,
    try_rewards_on,
    write_scores,
)
from ..processes.group import barrier, one_at_a_time, place
from ..rollout.capacity import LOOKED_AT, check_lengths, check_plans, remarks_on
from ..settings.yaml_files import to_yaml
from ..show.runlog import NullRunLog, RunLog, open_run_log
from .account import TITLES, Account, planned_parts
from .config import REFINED, CorlConfig
from .config import Training as TrainingName
from .models_table import models_table
from .parts import Parts, credit_of_training, data_of
from .progress import interrupted_run, interrupted_training, is_finished, mark_finished
from .training_data import stream_of

EMBEDDED_DATA = "the rendered world of syncr1"
MAIN_TASKS: Mapping[TrainingName, frozenset[str]] = {
    "unified": frozenset(),
    "generation": frozenset({"t2i"}),
    "understanding": frozenset({"mcq", "oe"}),
    **{name: frozenset({name}) for name in REFINED},
}
"""Tasks that say which of a training's models is its best."""
DRAWING = ("t2i", "merged_first", "unified", "generation", "merged", "base")
"""Models by how well they draw, the best first."""
ANSWERING = ("merged", "mcq", "oe", "merged_first", "unified", "understanding", "base")
"""Models by how well they answer."""


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint of the run and what it can do."""

    name: str
    """In the run, which is that of its folder there."""
    folder: str
    """In transformers' format; a hub name for a base that is there."""
    scores: Evaluation | None


def run(config: CorlConfig) -> Summaries:
    """Runs what `config.stage` asks for; returns each model's summary by name (empty without evaluation)."""
    return run_method(config, every_model, dry_run)


def every_model(config: CorlConfig, session: Session) -> Summaries:
    """The run itself, on a rank of the process group."""
    display = session.display
    interrupted = interrupted_run(config, display.note)
    rows = BadRows.of(config, None if interrupted is None else interrupted.run_folder)
    with open_run_log(config.output_dir, config, interrupted) as log:
        session.writes_in(log.folder)
        corl = CorlRun(config, log, session, rows)
        models = corl.models()
        scored = {name: model.scores for name, model in models.items() if model.scores is not None}
        if scored:
            table = models_table({name: scores.table for name, scores in scored.items()})
            display.console.print(table)
            if "base" in scored and len(scored) > 1:
                corl.account.compares("base", best_models(scored))
                write_scores(log, scored["base"], best_of_both(scored))
    if not corl.stopped:
        session.models.update(products(models))
    for name, model in models.items():
        display.note(f"{name}: {model.folder}")
    display.note(f"report {log.folder / 'report.html'}")
    return {name: dict(scores.summary) for name, scores in scored.items()}


class CorlRun:
    """The trainings of a run, which share data, judges and the table of scores."""

    def __init__(self, config: CorlConfig, log: RunLog | NullRunLog, session: Session, rows: BadRows) -> None:
        self.config, self.log, self.session, self.display = config, log, session, session.display
        self.loaded: dict[str, str] = {}
        """Name of a model -> the folder that it was loaded from."""
        self.display.stage("data, starting model and rewards")
        self.data = one_at_a_time(lambda: data_of(config, rows))
        if config.data is not None and config.stage != "merge":
            self.data.check(self.display.note)
        self.parts = one_at_a_time(lambda: Parts(config, self.display.note, self.data))
        if config.stage != "merge":
            log.data(self.data.found())
        self.refined, note = self.data.refined()
        if note:
            self.display.note(note)
        self.account = Account(log, planned_parts(config, self.refined))
        self.stopped = False

    def models(self) -> dict[str, Model]:
        """Every model of the run by name, in order of making; Ctrl-C makes the current one the last."""
        config = self.config
        self._try_rewards()
        models = {"base": self._scored("base", self.parts.base)}
        start = dict.fromkeys(("drawing", "answering"), models["base"])
        if config.stage in ("all", "unified"):
            models |= self._first_stage(models["base"])
            for skill, name in (("drawing", "generation"), ("answering", "understanding")):
                start[skill] = next(models[n] for n in ("merged_first", "unified", name, "base") if n in models)
        for training in self.refined:
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

    def _try_rewards(self) -> None:
        """A trial call of the user's own rewards before the first model is scored; each training makes one, too."""
        config, parts = self.config, self.parts
        if set(config.reward_funcs) <= {*config.REWARDS} - {"judge"} or config.stage == "merge":
            return
        for name in self.data.trainings():
            samples = self.data.samples(name)
            prompts = [prompt for sample in samples for prompt in sample]
            try_rewards_on(config, parts.rewards(name, parts.frozen, samples), prompts, parts.frozen)

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

    def _train(self, name: TrainingName, start: Model) -> Model:
        """One training from a saved model to a saved model."""
        samples = self.data.samples(name)
        config = self.config.for_stage(
            name,
            len(samples),
            model=start.folder,
            output_dir=self.log.folder / name,
            run_name=f"{self.config.run_name or self.log.folder.name}-{name}",
            resume_from_checkpoint=self.config.resume_from_checkpoint and "latest",
            stage=name if name in REFINED else "unified",
        )
        self.account.begins(name, [start.name])
        if config.resume_from_checkpoint and is_finished(config.output_dir):
            self.display.note(f"training {name}: finished already")
            return self._scored(name, str(result_of(config, config.output_dir)))
        torch.manual_seed(config.seed)  # a training does not depend on those before it that are finished already
        self.display.stage(f"training {name}, {TITLES[name]}: {config.max_steps} steps, {len(samples)} samples")
        resumed = interrupted_training(config, self.display.note)
        trained = run_training(config, self._put_together(config, name, samples, start), self.session, resumed)
        self.stopped = not trained.finished
        if not self.stopped:
            mark_finished(trained.folder, config.max_steps)
        gc.collect()  # the learner, before the next one is made
        self.account.made(name, trained.after, finished=trained.finished)
        return Model(name, str(trained.model), trained.after)

    def _put_together(self, config: CorlConfig, name: TrainingName, samples: list[Sample], start: Model) -> Training:
        policy = starting_policy(config, start.folder, self.display)
        self.loaded[start.folder] = loaded_from(policy, start.folder)
        objective = objective_of(config, policy.num_image_tokens)
        reference = add_adapters(config, policy) if config.lora_rank or objective.needs_reference else None
        prompts = [prompt for sample in samples for prompt in sample]
        check_order(config, policy)
        check_plans(policy, prompts)
        for line in remarks_on(policy, prompts):
            self.display.note(line)
        most = None if config.data is not None else LOOKED_AT  # the rendered world's are short
        check_lengths(policy, prompts, config.drawing_turn, config.max_completion_length, most=most)
        rewards = self.parts.rewards(name, policy, samples)
        return Training(
            method=f"CoRL, {name}",
            data=self.config.data or EMBEDDED_DATA,
            embedded=self._embedded(start.folder),
            policy=policy,
            reference=reference,
            objective=objective,
            prompts=stream_of(config, name, samples, *place()),
            rewards=rewards,
            credit=credit_of_training(config, name, rewards),
            ahead=AheadOf("syncr1.engine.corl.corl_ahead", self._told(config, name, start.folder)),
            evaluator=self.parts.evaluator,
            main_tasks=MAIN_TASKS[name],
            before=start.scores,
            alone=False,
        )

    def _told(self, config: CorlConfig, name: str, folder: str) -> dict[str, Any]:
        """What another process makes a training's parts from."""
        base = self.config.model
        whole = self.config if base is None else replace(self.config, model=self.loaded.get(base, base))
        run, training = (to_yaml(settings, comments=False) for settings in (whole, config))
        model = self.loaded.get(folder, folder)
        return {"run": run, "training": training, "name": name, "model": model, "skipped": self.data.skipped}

    def _merge(self, name: str, base: str, sources: list[str]) -> Model:
        """Two models into one; rank 0 writes, all wait and score."""
        config, folder = self.config, self.log.folder / name
        self.display.stage(f"merging {len(sources)} models ({config.merge_method})")
        self.account.begins(name, [model_name(source, self.log.folder) for source in sources])
        if place()[0] == 0 and not (config.resume_from_checkpoint and folder.is_dir()):
            merge_checkpoints(base, sources, folder, config.merge_method, say=self.display.note)
        barrier()
        model = self._scored(name, str(folder))
        if place()[0] == 0:
            write_model_card(
                folder,
                base_model=None if self._embedded(base) else base,
                base_words=EMBEDDED_BASE,
                method=f"{config.merge_method} merge",
                config=config,
                data=config.data or EMBEDDED_DATA,
                after=None if model.scores is None else model.scores.table,
                merged_from=sources,
            )
        return model

    def _embedded(self, folder: str) -> bool:
        """Whether this is the embedded base, whose folder is a name in a cache."""
        return self.config.model is None and folder == self.parts.base

    def _scored(self, name: str, folder: str) -> Model:
        """A saved model with its scores."""
        scores: Evaluation | None = None
        if self.parts.evaluator is not None:
            self.display.stage(f"scores of {name}, the {TITLES[name]}" if name == "base" else f"scores of {name}")
            policy = starting_policy(self.config, folder, self.display)
            self.loaded[folder] = loaded_from(policy, folder)
            scores = self.parts.evaluator(policy.eval())
        self.account.made(name, scores)
        return Model(name, folder, scores)


def model_name(folder: str, run_folder: Path) -> str:
    """A model's name in its run, which is that of its folder there; the folder itself where it lies elsewhere."""
    inside = Path(folder).is_relative_to(run_folder)
    return Path(folder).relative_to(run_folder).parts[0] if inside else folder


def best_models(scored: Mapping[str, Evaluation]) -> dict[str, str]:
    """What ULM-R1 reports: drawings by the refined drawing model, answers by the merged one; before that stage, and for
    a single stage, by the last model that was trained on them."""
    kinds = {"drawings": DRAWING, "answers": ANSWERING}
    return {kind: next(name for name in names if name in scored) for kind, names in kinds.items()}


def products(models: Mapping[str, Model]) -> dict[str, Path]:
    """What a run is for: its last model that draws and its last one that answers, or the one that does both."""
    chosen = {next((name for name in names if name in models), "base") for names in (DRAWING, ANSWERING)} - {"base"}
    return {name if len(chosen) > 1 else "": Path(models[name].folder) for name in sorted(chosen)}


def best_of_both(scored: Mapping[str, Evaluation]) -> Evaluation:
    """The scores of `best_models`, as those of one."""
    best = best_models(scored)
    drawing, answering = scored[best["drawings"]], scored[best["answers"]]
    kept = {task: (drawing if task == "t2i" else answering) for task in answering.tasks}
    return replace(
        answering,
        tasks={task: source.tasks[task] for task, source in kept.items()},
        examples={task: source.examples[task] for task, source in kept.items()},
        readings={task: source.readings.get(task, ()) for task, source in kept.items()},
    )


def dry_run(config: CorlConfig) -> None:
    """Prints what all of it takes, then each training's settings, plan, cost and first prompts; loads no weights."""
    from .dry_runs import plan_all

    if config.stage == "merge":
        print(to_yaml(config, comments=False))
        return
    plan_all(config)
