"""Going on where a run was interrupted: which checkpoint, whether the settings allow it, and what is put back.

A step's random numbers are keyed by (seed, step, prompt, member), and a checkpoint is taken between steps, when every
rollout was used: the resumed run samples, learns and writes what the uninterrupted one would have, to the last bit.
"""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import yaml
from torch import Tensor

from ..checkpoints.optimizer_state import (
    check_optimizer_tensors,
    load_optimizer_tensors,
    optimizer_tensors,
)
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
from ..learn.trainer import Prompts, Trainer
from ..processes.group import place
from ..settings.schema import at_defaults, to_yaml
from ..settings.train_config import TrainConfig

FREE = frozenset(
    {
        *("max_steps", "output_dir", "resume_from_checkpoint", "checkpointing_steps", "save_total_limit", "dry_run"),
        *("eval_samples", "eval_cfg_weight", "report_to", "logging_steps", "replay_check_steps", "sample_steps"),
        *("eval_steps", "metric_for_best_model", "load_best_model_at_end", "log_completions", "run_name"),
        *("push_to_hub", "hub_model_id", "hub_private_repo"),
        *("nodes", "ranks_per_node", "hostfile", "launcher", "max_restarts"),
        *("reward_timeout", "stage_timeout", "shutdown_timeout", "max_skipped_updates", "judge_url", "judge_key_env"),
    }
)
"""Settings that may differ from those of the checkpoint."""
ROUNDING = frozenset(
    {
        *("max_tokens_per_microbatch", "gradient_checkpointing", "use_liger_kernel", "cuda_graphs", "compile_decode"),
    }
)
"""These may differ as well, but other rounding makes the resumed run another one than the uninterrupted."""
OPTIMIZER, RANDOM = "optimizer/", "random/"
Made = TypeVar("Made")


class ResumablePrompts(Prompts, Protocol):
    """A source of prompts that can go on where it was."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


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
        ConfigError: no such checkpoint, another world size, or settings that differ where they must not.
    """
    asked = config.resume_from_checkpoint
    if asked is None:
        return None
    try:
        found = _latest(config.output_dir, note) if asked == "latest" else _named(Path(asked).expanduser(), note)
        checkpoint = None if found is None else found.checkpoint
        if checkpoint is None:
            note(f"no checkpoint below {config.output_dir} yet: a new run")
            return None
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


def numbered(output_dir: Path, is_run: Callable[[Path], bool]) -> list[Path]:
    """The runs that `RunLog` has made for `output_dir`: itself and `-2`, `-3`, … beside it, the last first."""
    runs = {1: output_dir} if is_run(output_dir) else {}
    for folder in output_dir.parent.glob("*") if output_dir.parent.is_dir() else ():
        number = folder.name.removeprefix(f"{output_dir.name}-")
        if number != folder.name and number.isdecimal() and is_run(folder):
            runs[int(number)] = folder
    return [runs[number] for number in sorted(runs, reverse=True)]


def _has_checkpoints(folder: Path) -> bool:
    return bool(folders(folder / "checkpoints"))


def _named(folder: Path, note: Warn) -> ResumePoint:
    """One checkpoint, which must be whole; or the newest of a run's folder."""
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
    """Raises CheckpointError for what an exact continuation cannot be had with."""
    _, world_size = place()
    if checkpoint.world_size != world_size:
        raise CheckpointError(
            f"saved by {checkpoint.world_size} ranks, this run has {world_size}; start {checkpoint.world_size}"
        )
    try:
        before = yaml.safe_load(_entry(checkpoint.state(), "config", str))
    except (yaml.YAMLError, RecursionError) as error:
        raise CheckpointError(f"state.json: its config is no YAML ({type(error).__name__})") from error
    if not isinstance(before, dict) or not all(isinstance(name, str) for name in before):
        raise CheckpointError(f"state.json: expected config to be settings by name, got {type(before).__name__}")
    check_settings(before, config, note)


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
            CheckpointError: the save before failed.
        """
        self.wait()
        if self._at == trainer.step:
            return
        rank, _ = place()
        tensors = {f"{RANDOM}{name}": value for name, value in random_state().items()}
        if rank == 0 or self.learner.settings.zero_stage > 0:  # without ZeRO all ranks have the same
            tensors |= {OPTIMIZER + name: value for name, value in optimizer_tensors(self.learner.optimizer).items()}
        state = {
            "step": trainer.step,
            "prompts": copy.deepcopy(self.prompts.state_dict()),
            "preview": None if trainer.preview is None else copy.deepcopy(trainer.preview.state_dict()),
            **self._constant,
        }
        copies, step, keep, group = self._copied(tensors), trainer.step, self.config.save_total_limit, self._saver.group
        self._saver.start(lambda: save(self.root, step, copies, state, keep, group))
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
            "frozen": frozen_fingerprint(self.learner.policy),
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
        """Puts the state back. Collective.

        Raises:
            CheckpointError: the checkpoint is of another model or of other data.
        """
        self.wait()
        doing = f"resuming from {checkpoint.folder}"
        step, mine, optimizer = agreed(lambda: self._read(trainer, checkpoint), doing)
        load_optimizer_tensors(self.learner.optimizer, optimizer)
        trainer.step = self._at = step
        agreed(lambda: load_random_state(_under(RANDOM, mine)), doing)
        agreed(lambda: set_aside(self.root, step) if place()[0] == 0 else None, doing)

    def _read(self, trainer: Trainer, checkpoint: Checkpoint) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
        """The step, this rank's tensors and its optimizer's, all checked; prompts and preview are put back already."""
        rank, _ = place()
        state, mine = checkpoint.state(), checkpoint.tensors(rank)
        if _entry(state, "step", int) != checkpoint.step:
            raise CheckpointError(f"state.json: expected step {checkpoint.step}, got {state['step']}")
        if rank == 0 and state.get("frozen") != self._constant["frozen"]:
            raise CheckpointError("the starting model's frozen weights are others now; resume with the model as it was")
        owner = mine if rank == 0 or self.learner.settings.zero_stage > 0 else checkpoint.tensors(0)
        optimizer = _under(OPTIMIZER, owner)
        check_optimizer_tensors(self.learner.optimizer, optimizer)
        absent = sorted(random_state().keys() - {"cuda"} - _under(RANDOM, mine).keys())
        if absent:
            raise CheckpointError(f"{shard_name(rank)}: expected the random states {absent}, which are absent")
        try:
            self.prompts.load_state_dict(_entry(state, "prompts", dict))
            if trainer.preview is not None and state.get("preview") is not None:
                trainer.preview.load_state_dict(_entry(state, "preview", dict))
        except (ValueError, KeyError, TypeError) as error:
            told = str(error) if isinstance(error, ValueError) else f"state.json: {type(error).__name__} {error}"
            raise CheckpointError(told) from error
        return checkpoint.step, mine, optimizer


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def frozen_fingerprint(policy: torch.nn.Module) -> str:
    """Of the model's shape and of some of every frozen weight: enough to tell another model, cheap for a large one."""
    digest = hashlib.sha256()
    for name, parameter in policy.named_parameters():
        held = getattr(parameter, "ds_tensor", parameter)  # under ZeRO-3, this rank's share
        digest.update(f"{name} {list(held.shape)} {parameter.requires_grad}\n".encode())
        if not parameter.requires_grad:
            flat = held.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // 64)].cpu().contiguous()
            digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def random_state() -> dict[str, Tensor]:
    """The generators of Python, NumPy, torch and the GPU, as tensors."""
    _, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([int(word) for word in (*legacy[1], legacy[2], legacy[3])], dtype=torch.int64),
        "numpy_gauss": torch.tensor([legacy[4]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def load_random_state(state: Mapping[str, Tensor]) -> None:
    """What `random_state` told; a GPU's is left out where there is none."""
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    *words, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(words, np.uint32), position, has_gauss, float(state["numpy_gauss"])))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
