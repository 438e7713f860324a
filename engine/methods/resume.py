"""Going on where a run was interrupted: which checkpoint, whether the settings allow it, and what is put back.

A step's random numbers are keyed by (seed, step, prompt, member), and a checkpoint is taken between steps, when every
rollout was used: the resumed run samples, learns and writes what the uninterrupted one would have, to the last bit.

Another number of ranks, or another ZeRO stage, goes on from the same state to the last bit; gradients are then summed
in another order, so what follows is the same within rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from torch import Tensor

from ..checkpoints.frozen_weights import fingerprint_of_format_1, frozen_fingerprint
from ..checkpoints.optimizer_state import optimizer_tensors, spread
from ..checkpoints.random_states import load_random_state, random_state
from ..checkpoints.recut import OPTIMIZER, check_saved, load_saved
from ..checkpoints.saver import Saver
from ..checkpoints.sharded import (
    Checkpoint,
    Warn,
    agreed,
    everywhere,
    folders,
    newest,
    save,
    set_aside,
    shard_name,
    verified,
)
from ..errors import CheckpointError, ConfigError
from ..learn.learner import Learner
from ..learn.schedule import learning_rate
from ..learn.trainer import Trainer
from ..learn.trajectories import ResumablePrompts
from ..processes.beside import Message
from ..processes.group import place
from ..processes.run_folder import numbered
from ..processes.watchdog import gathering
from ..settings.schema import at_defaults
from ..settings.train_config import TrainConfig
from ..settings.yaml_files import to_yaml

FREE = frozenset(
    {
        *("max_steps", "output_dir", "resume_from_checkpoint", "checkpointing_steps", "save_total_limit", "dry_run"),
        *("eval_samples", "eval_cfg_weight", "report_to", "logging_steps", "replay_check_steps", "sample_steps"),
        *("nodes", "ranks_per_node", "hostfile", "launcher", "max_restarts", "zero_stage"),
        *("eval_steps", "metric_for_best_model", "load_best_model_at_end", "log_completions", "run_name"),
        *("push_to_hub", "hub_model_id", "hub_private_repo"),
        *("report_steps", "bad_rows"),
        *("reward_timeout", "stage_timeout", "shutdown_timeout", "max_skipped_updates", "judge_url", "judge_key_env"),
    }
)
"""Settings that may differ from those of the checkpoint; of another `zero_stage`, as of other ranks, a note tells."""
ROUNDING = frozenset(
    {
        *("max_tokens_per_microbatch", "gradient_checkpointing", "use_liger_kernel", "cuda_graphs", "compile_decode"),
    }
)
"""These may differ as well, but other rounding makes the resumed run another one than the uninterrupted."""
FORMERLY = {"picture_fit": "crop"}
"""What runs did from before there was the setting, where its default is another; of the tiny base's pictures, which are
of its size, it makes nothing else."""
RANDOM, AHEAD = "random/", "ahead/"
"""Before the names of generators and of what was drawn ahead."""
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """A whole checkpoint that fits the settings, and the run that it is of; without one the folder is written on from
    the beginning."""

    checkpoint: Checkpoint | None
    run_folder: Path

    @property
    def step(self) -> int:
        return 0 if self.checkpoint is None else self.checkpoint.step


# Which checkpoint -----------------------------------------------------------------------------------------------------


def resume_point(config: TrainConfig, note: Warn) -> ResumePoint | None:
    """What `resume_from_checkpoint` asks for; None: a new run. Collective.

    `latest` is the newest whole checkpoint of the run in `output_dir`, or of the last of the numbered ones beside it;
    where there is none yet, the run is a new one, so that a launcher may pass it at every start.

    Raises:
        ConfigError: no such checkpoint, or settings that differ where they must not.
    """
    asked = config.resume_from_checkpoint
    if asked is None:
        return None
    try:
        found = _latest(config.output_dir, note) if asked == "latest" else _named(Path(asked).expanduser(), note)
        checkpoint = None if found is None else found.checkpoint
        if checkpoint is None:
            where = config.output_dir if found is None else found.run_folder
            note(f"no checkpoint below {where} yet: {'a new run' if found is None else 'from the beginning'}")
            return found
        agreed(lambda: _check_fits(config, checkpoint, note), f"resuming from {checkpoint.folder}")
    except CheckpointError as error:
        raise ConfigError(f"resume_from_checkpoint: {error}") from error
    return found


def _latest(output_dir: Path, note: Warn) -> ResumePoint | None:
    runs = everywhere(lambda: numbered(output_dir, _has_checkpoints), f"looking for runs at {output_dir}")[0]
    if not runs:
        return None
    checkpoint = newest(runs[0] / "checkpoints", note)
    if checkpoint is None:
        raise CheckpointError(f"{runs[0]}: none of its checkpoints is whole; start a new run in another output_dir")
    return ResumePoint(checkpoint, runs[0])


def _has_checkpoints(folder: Path) -> bool:
    return bool(folders(folder / "checkpoints"))


def _named(folder: Path, note: Warn) -> ResumePoint:
    """One checkpoint, which must be whole; or the newest of a run's folder, which begins again where it has none."""
    if (folder / "config.yaml").is_file() and not _has_checkpoints(folder):
        return ResumePoint(None, folder)
    if (folder / "checkpoints").is_dir():
        checkpoint = newest(folder / "checkpoints", note)
        if checkpoint is None:
            raise CheckpointError(f"{folder}: expected a run with a whole checkpoint, got none; start a new run")
        return ResumePoint(checkpoint, folder)
    if not folder.is_dir():
        raise CheckpointError(f"expected `latest`, a checkpoint or a run's folder, got {folder}, which is no folder")
    checkpoint = verified(folder)
    return ResumePoint(checkpoint, folder.resolve().parent.parent)


def _check_fits(config: TrainConfig, checkpoint: Checkpoint, note: Warn) -> None:
    """Raises CheckpointError for what a continuation cannot be had with."""
    try:
        before = yaml.safe_load(_entry(checkpoint.state(), "config", str))
    except (yaml.YAMLError, RecursionError) as error:
        raise CheckpointError(f"state.json: its config is no YAML ({type(error).__name__})") from error
    if not isinstance(before, dict) or not all(isinstance(name, str) for name in before):
        raise CheckpointError(f"state.json: expected config to be settings by name, got {type(before).__name__}")
    check_settings(before, config, note)
    _check_cut(before.get("zero_stage"), config.zero_stage, checkpoint, note)
    _tell_schedule(before.get("max_steps"), config, checkpoint.step, note)


def _check_cut(stage_before: Any, stage: int, checkpoint: Checkpoint, note: Warn) -> None:
    """Says that other ranks, or another ZeRO stage, go on; CheckpointError where the checkpoint is too old for it."""
    _, world_size = place()
    before, now = _cut(checkpoint.world_size, stage_before), _cut(world_size, stage)
    if before == now:
        return
    if checkpoint.format == 1:
        raise CheckpointError(
            f"saved by {before} in an older format, which fits those alone, this run has {now}; start {before} for one "
            "more step: what that saves goes on with any"
        )
    note(
        f"saved by {before}, going on with {now}: weights, moments and prompts are as saved to the last bit; sums run "
        "in another order from here, so not the same run to the last bit"
    )


def _cut(world_size: int, stage: Any) -> str:
    return f"{world_size} rank{'s' * (world_size > 1)} (zero_stage {stage})"


def _tell_schedule(steps_before: Any, config: TrainConfig, step: int, note: Warn) -> None:
    """The learning rate falls until `max_steps`: says how far it jumps where that is another one now."""
    if type(steps_before) is not int or steps_before == config.max_steps or step >= config.max_steps:
        return
    before, now = (learning_rate(replace(config, max_steps=steps), step) for steps in (steps_before, config.max_steps))
    if before == now:  # a constant one
        return
    note(
        f"max_steps is {steps_before} in the checkpoint, {config.max_steps} now: the learning rate of step {step} is "
        f"{now:.3g} instead of {before:.3g}; from there on it is as lr_scheduler_type {config.lr_scheduler_type} says "
        "for the new end"
    )


def _entry(state: Mapping[str, Any], name: str, kind: type[Made]) -> Made:
    """An entry of the plain state; CheckpointError where it is absent or of another kind."""
    value = state.get(name)
    if type(value) is not kind:
        raise CheckpointError(f"state.json: expected {name}, of type {kind.__name__}, got {type(value).__name__}")
    return value


def check_settings(before: Mapping[str, Any], config: TrainConfig, note: Warn, free: frozenset[str] = FREE) -> None:
    """Raises CheckpointError for settings that are not those of `before`, where they must be."""
    now, problems = yaml.safe_load(to_yaml(config, comments=False)), []
    younger = at_defaults(config) - before.keys()  # than the checkpoint: at their defaults they change nothing
    for name in sorted((before.keys() | now.keys()) - younger):
        if name in free or before.get(name) == now.get(name):
            continue
        change = f"{name} is {before.get(name)!r} in the checkpoint, {now.get(name)!r} now"
        if name in ROUNDING:
            note(f"{change}: other rounding, so not the same run to the last bit")
        else:
            problems.append(change)
    for name, formerly in FORMERLY.items():
        if name not in before and config.model is not None and now[name] != formerly:
            note(
                f"{name} is {now[name]!r}, and this run began with {formerly!r}, before there was a choice: pass "
                f"--{name} {formerly} to go on as it began"
            )
    if problems:
        remedy = "pass the run's own config.yaml with --config, or start a new run from its saved model with --model"
        raise CheckpointError(f"{'; '.join(problems)}; {remedy}")


# A training's state ---------------------------------------------------------------------------------------------------


class Checkpoints:
    """Takes and puts back the state of one training; every rank makes one and calls it at the same steps.

    Saving goes on beside the training: `save` copies the state, which takes as long as reading it once, and a thread
    hashes and writes the copy, about as long again as the file system needs.  The copy stays on the CPU (page-locked
    beside a GPU) for the next save: as many bytes as this rank's share of a checkpoint, 12 per trained weight.

    Args:
        config: settings of the run, which go with the state.
        root: folder of checkpoints.
        learner, prompts: what changes as the training goes.
    """

    def __init__(self, config: TrainConfig, root: Path, learner: Learner, prompts: ResumablePrompts) -> None:
        self.config, self.root, self.learner, self.prompts = config, root, learner, prompts
        self._at: int | None = None
        self._frozen = frozen_fingerprint(learner.policy)
        self._saver = Saver(timeout=config.stage_timeout + 60)
        self._copies: dict[str, Tensor] = {}

    def due(self, num_steps: int) -> bool:
        """Whether `checkpointing_steps` asks for a checkpoint after so many steps."""
        every = self.config.checkpointing_steps
        return every > 0 and num_steps % every == 0

    def save(self, trainer: Trainer) -> None:
        """Begins to save the state between two steps, unless it is the one that was saved or restored last. Collective.

        It is saved when `wait` returns, and may be changed as soon as this does.  First waits for the save before.

        Raises:
            CheckpointError: the save before failed, on any rank, or this rank alone had begun it.
        """
        self.wait()
        if self._at == trainer.step:
            return
        rank, _ = place()
        tensors = {f"{RANDOM}{name}": value for name, value in random_state().items()}
        if rank == 0 or self.learner.settings.zero_stage > 0:  # without ZeRO all ranks have the same
            mine = optimizer_tensors(self.learner.optimizer, self.learner.policy)
            tensors |= {OPTIMIZER + name: value for name, value in mine.items()}
        ahead = None if trainer.ahead is None else trainer.ahead.settled()
        if ahead is not None:
            tensors |= {f"{AHEAD}{name}": value for name, value in ahead.tensors.items()}
        state = {
            "step": trainer.step,
            "prompts": copy.deepcopy(self.prompts.state_dict()),
            "preview": None if trainer.preview is None else copy.deepcopy(trainer.preview.state_dict()),
            **({} if ahead is None else {"ahead": dict(ahead.about)}),
            **self._constant,
        }
        copies, step, keep, group = self._copied(tensors), trainer.step, self.config.save_total_limit, self._saver.group
        all_here = gathering("saving a checkpoint")

        def job() -> None:
            all_here()  # else this step's shard would meet the others' of a later one
            save(self.root, step, copies, state, keep, group)

        self._saver.start(job)
        self._at = step

    @property
    def failed(self) -> bool:
        """Whether the save under way has failed on this rank so far. A loop that asks all ranks between its steps, and
        calls `wait` on all when one says so, ends at once rather than at the next save."""
        return self._saver.failed

    def wait(self) -> None:
        """Returns when no save is under way. All ranks must call it at the same place.

        Raises:
            CheckpointError: the same on every rank: any of them could not write; older checkpoints are as they were.
        """
        try:
            self._saver.wait()
        except Exception:
            self._at = None
            raise

    @cached_property
    def _constant(self) -> dict[str, str]:
        """What no step changes."""
        return {
            "config": to_yaml(self.config, comments=False),
            "frozen": self._frozen,
        }

    @torch.no_grad()
    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the CPU.  Their memory is kept: the first touch of fresh pages takes longer than the copying."""
        before, self._copies = self._copies, {}
        for name, value in tensors.items():
            kept = before.get(name)
            if kept is None or (kept.shape, kept.dtype) != (value.shape, value.dtype):
                kept = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._copies[name] = kept.copy_(value, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return dict(self._copies)

    def restore(self, trainer: Trainer, checkpoint: Checkpoint) -> None:
        """Puts the state back, cut for this run's ranks and ZeRO stage. Collective.

        Raises:
            CheckpointError: the checkpoint is of another model or of other data, or cannot be read.
        """
        self.wait()
        doing, optimizer = f"resuming from {checkpoint.folder}", self.learner.optimizer
        rank, _ = place()
        generators = agreed(lambda: self._read(trainer, checkpoint), doing)
        agreed(lambda: load_saved(optimizer, self.learner.policy, checkpoint), doing)
        spread(optimizer)
        trainer.step = self._at = checkpoint.step
        agreed(lambda: load_random_state(generators), doing)
        agreed(lambda: set_aside(self.root, checkpoint.step) if rank == 0 else None, doing)

    def _read(self, trainer: Trainer, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """This rank's random states; all else is checked, and prompts and preview are put back."""
        rank, _ = place()
        state, policy = checkpoint.state(), self.learner.policy
        if _entry(state, "step", int) != checkpoint.step:
            raise CheckpointError(f"state.json: expected step {checkpoint.step}, got {state['step']}")
        frozen = fingerprint_of_format_1(policy) if checkpoint.format == 1 else self._frozen
        if rank == 0 and state.get("frozen") != frozen:
            raise CheckpointError("the starting model's frozen weights are others now; resume with the model as it was")
        check_saved(self.learner.optimizer, policy, checkpoint)
        saved_by = rank % checkpoint.world_size  # a rank that was not there begins as one that was
        generators = checkpoint.tensors(saved_by, RANDOM)
        absent = sorted(random_state().keys() - {"cuda"} - generators.keys())
        if absent:
            raise CheckpointError(f"{shard_name(saved_by)}: expected the random states {absent}, which are absent")
        try:
            self.prompts.load_state_dict(_entry(state, "prompts", dict))
            if trainer.preview is not None and state.get("preview") is not None:
                trainer.preview.load_state_dict(_entry(state, "preview", dict))
            if trainer.ahead is not None and "ahead" in state:
                drawn = checkpoint.tensors(rank, AHEAD)
                trainer.ahead.restore(Message(_entry(state, "ahead", dict), drawn))
        except (ValueError, KeyError, TypeError) as error:
            told = str(error) if isinstance(error, ValueError) else f"state.json: {type(error).__name__} {error}"
            raise CheckpointError(told) from error
        return generators
