"""Going on where a run was interrupted: which checkpoint, whether the settings allow it, and what is put back.

A step's random numbers are keyed by (seed, step, prompt, member), and a checkpoint is taken between steps, when every
rollout was used: the resumed run samples, learns and writes what the uninterrupted one would have, to the last bit.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from torch import Tensor

from syncr1.engine.checkpoint import (
    Checkpoint,
    Warn,
    agreed,
    everywhere,
    folders,
    newest,
    place,
    save,
    set_aside,
    verified,
)
from syncr1.engine.learner import Learner
from syncr1.engine.optimizer_state import (
    check_optimizer_tensors,
    load_optimizer_tensors,
    optimizer_tensors,
)
from syncr1.engine.safetensors_stream import CheckpointError
from syncr1.engine.settings import ConfigError, to_yaml
from syncr1.engine.train_config import TrainConfig
from syncr1.engine.trainer import Prompts, Trainer

FREE = frozenset({
    *("max_steps", "output_dir", "resume_from_checkpoint", "checkpointing_steps", "save_total_limit", "dry_run"),
    *("eval_samples", "eval_cfg_weight", "report_to", "logging_steps", "replay_check_steps", "sample_steps"),
    *("nodes", "ranks_per_node", "hostfile", "launcher", "max_restarts"),
    *("reward_timeout", "judge_url", "judge_key_env"),
})  # fmt: skip
"""Settings that may differ from those of the checkpoint."""
ROUNDING = frozenset({
    *("max_tokens_per_microbatch", "gradient_checkpointing", "use_liger_kernel", "cuda_graphs", "compile_decode"),
})  # fmt: skip
"""These may differ as well, but other rounding makes the resumed run another one than the uninterrupted."""
OPTIMIZER, RANDOM = "optimizer/", "random/"


class ResumablePrompts(Prompts, Protocol):
    """A source of prompts that can go on where it was."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """A whole checkpoint that fits the settings, and the run that it is of."""

    checkpoint: Checkpoint
    run_folder: Path

    @property
    def step(self) -> int:
        return self.checkpoint.step


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
        if found is None:
            note(f"no checkpoint below {config.output_dir} yet: a new run")
            return None
        agreed(lambda: _check_fits(config, found.checkpoint, note), f"resuming from {found.checkpoint.folder}")
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
    check_settings(yaml.safe_load(checkpoint.state()["config"]), config, note)


def check_settings(before: Mapping[str, Any], config: TrainConfig, note: Warn, free: frozenset[str] = FREE) -> None:
    """Raises CheckpointError for settings that are not those of `before`, where they must be."""
    now, problems = yaml.safe_load(to_yaml(config, comments=False)), []
    for name in sorted(before.keys() | now.keys()):
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
    """Takes and puts back the state of one training; every rank has one and calls it at the same steps.

    Args:
        config: settings of the run, which go with the state.
        root: folder of checkpoints.
        learner, prompts: what changes as the training goes.
    """

    def __init__(self, config: TrainConfig, root: Path, learner: Learner, prompts: ResumablePrompts) -> None:
        self.config, self.root, self.learner, self.prompts = config, root, learner, prompts
        self._at: int | None = None

    def due(self, num_steps: int) -> bool:
        """Whether `checkpointing_steps` asks for a checkpoint after so many steps."""
        every = self.config.checkpointing_steps
        return every > 0 and num_steps % every == 0

    def save(self, trainer: Trainer) -> None:
        """Saves the state between two steps, unless it is the one that was saved or restored last. Collective."""
        if self._at == trainer.step:
            return
        rank, _ = place()
        tensors = {f"{RANDOM}{name}": value for name, value in random_state().items()}
        if rank == 0 or self.learner.settings.zero_stage > 0:  # without ZeRO all ranks have the same
            tensors |= {OPTIMIZER + name: value for name, value in optimizer_tensors(self.learner.optimizer).items()}
        state = {
            "step": trainer.step,
            "prompts": self.prompts.state_dict(),
            "preview": None if trainer.preview is None else trainer.preview.state_dict(),
            "config": to_yaml(self.config, comments=False),
            "frozen": frozen_fingerprint(self.learner.policy),
        }
        save(self.root, trainer.step, tensors, state, self.config.save_total_limit)
        self._at = trainer.step

    def restore(self, trainer: Trainer, checkpoint: Checkpoint) -> None:
        """Puts the state back. Collective.

        Raises:
            CheckpointError: the checkpoint is of another model or of other data.
        """
        state, mine, optimizer = agreed(lambda: self._read(checkpoint), f"resuming from {checkpoint.folder}")
        load_optimizer_tensors(self.learner.optimizer, optimizer)
        if trainer.preview is not None and state["preview"] is not None:
            trainer.preview.load_state_dict(state["preview"])
        trainer.step = self._at = int(state["step"])
        load_random_state(_under(RANDOM, mine))
        if place()[0] == 0:
            set_aside(self.root, trainer.step)

    def _read(self, checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
        """The plain state, this rank's tensors and its optimizer's, all checked; the prompts are put back already."""
        rank, _ = place()
        state, mine = checkpoint.state(), checkpoint.tensors(rank)
        if rank == 0 and state["frozen"] != frozen_fingerprint(self.learner.policy):
            raise CheckpointError("the starting model's frozen weights are others now; resume with the model as it was")
        owner = mine if rank == 0 or self.learner.settings.zero_stage > 0 else checkpoint.tensors(0)
        optimizer = _under(OPTIMIZER, owner)
        check_optimizer_tensors(self.learner.optimizer, optimizer)
        try:
            self.prompts.load_state_dict(state["prompts"])
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        return state, mine, optimizer


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
