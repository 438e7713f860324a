"""Going on with an interrupted CoRL run: what is finished stays, the training that was interrupted goes on.

Each training keeps its own checkpoints, in its own folder below the run's; `finished.json` there says that its model is
saved.  A merge appears whole or not at all, so its folder is record enough.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import yaml

from ..checkpoints.sharded import Warn, agreed, everywhere
from ..errors import CheckpointError, ConfigError
from ..methods.resume import FREE, ResumePoint, check_settings, resume_point
from ..processes.group import place
from ..processes.run_folder import numbered
from ..whole_files import write_atomically
from .config import REFINED, CorlConfig, Training

FINISHED = "finished.json"
FIRST_STAGE = sorted({*get_args(Training)} - {*REFINED})
"""Trainings that `max_steps` is for."""


def interrupted_run(config: CorlConfig, note: Warn) -> ResumePoint | None:
    """The run that `resume_from_checkpoint` means: `latest` of `output_dir`, or a run's folder. Collective.

    Raises:
        ConfigError: no such run, or settings that differ where they must not.
    """
    asked = config.resume_from_checkpoint
    if asked is None:
        return None

    def look() -> Path | None:
        if asked != "latest" and not (Path(asked).expanduser() / "config.yaml").is_file():
            raise CheckpointError(f"expected latest or a CoRL run's folder, got {asked}, which has no config.yaml")
        found = numbered(config.output_dir, is_run) if asked == "latest" else [Path(asked).expanduser()]
        if found:
            before = yaml.safe_load((found[0] / "config.yaml").read_text(encoding="utf-8"))
            # Later trainings begin where earlier ones ended.
            first_ended = any((found[0] / name / FINISHED).is_file() for name in FIRST_STAGE)
            check_settings(before, config, note, FREE - {"max_steps"} if first_ended else FREE)
        return found[0] if found else None

    try:
        folder = everywhere(lambda: look() if place()[0] == 0 else None, "resuming")[0]
    except CheckpointError as error:
        raise ConfigError(f"resume_from_checkpoint: {error}") from error
    if folder is None:
        note(f"no interrupted run at {config.output_dir} yet: a new one")
    return None if folder is None else ResumePoint(None, folder)


def interrupted_training(config: CorlConfig, note: Warn) -> ResumePoint | None:
    """Where the training of `config` goes on; one cut off before its first checkpoint starts again in the folder
    that it has made. Collective."""
    begun = bool(config.resume_from_checkpoint) and (config.output_dir / "config.yaml").is_file()
    return resume_point(config, note) or (ResumePoint(None, config.output_dir) if begun else None)


def is_run(folder: Path) -> bool:
    """Whether something was trained here."""
    return (folder / "config.yaml").is_file() and any(folder.glob("*/metrics.jsonl"))


def mark_finished(folder: Path, steps: int) -> None:
    """Says that a training came to its end and its model is saved. Collective."""

    def write() -> None:
        if place()[0] == 0:
            write_atomically(folder / FINISHED, json.dumps({"steps": steps}) + "\n")

    agreed(write, f"finishing {folder}")


def is_finished(folder: Path) -> bool:
    """Whether a training came to its end; the same answer on every rank. Collective."""
    return everywhere(lambda: (folder / FINISHED).is_file(), f"reading {folder}")[0]
