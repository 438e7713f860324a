"""How a checkpoint was trained to be asked, as far as the folder of its run says so: asked in another way, it would be
asked for what it has not learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, get_args

import yaml

from ..errors import ConfigError
from ..settings.train_config import Unconditional
from ..settings.turn_templates import NONE
from ..settings.yaml_files import from_yaml
from .sync_r1_config import SyncR1Config


class Asked(Protocol):
    """Settings of recipes that ask a model; None: as it was trained."""

    @property
    def drawing_turn(self) -> str | None: ...
    @property
    def unconditional(self) -> Unconditional | None: ...
    @property
    def concept_info(self) -> bool | None: ...
    @property
    def data(self) -> str | None: ...


def run_of(model: str | Path | None) -> SyncR1Config | None:
    """The settings of the Sync-R1 run that left a checkpoint, `RUN/checkpoints/NAME`; None where there is none."""
    if model is None:
        return None
    settings = _settings_beside(model)
    try:
        return from_yaml(SyncR1Config, settings) if settings.is_file() else None
    except (ConfigError, OSError):  # another program's folder, or another method's
        return None


def _settings_beside(model: str | Path) -> Path:
    """Where a run that left `model` has its settings."""
    return Path(model).expanduser().absolute().parent.parent / "config.yaml"


def trained_unconditional(model: str | Path | None) -> Unconditional:
    """The prompt without words that the run of either method guided by which left a checkpoint, else `fixed`."""
    try:
        said = {} if model is None else yaml.safe_load(_settings_beside(model).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # none, or another program's
        return "fixed"
    found = said.get("unconditional") if isinstance(said, dict) else None
    return next((known for known in get_args(Unconditional) if known == found), "fixed")


def unconditional_of(config: Asked, model: str | Path | None) -> Unconditional:
    """The prompt without words that `model` is guided by."""
    return trained_unconditional(model) if config.unconditional is None else config.unconditional


def drawing_turn_of(config: Asked, model: str | Path | None) -> str:
    """The drawing turn that `model` is asked with."""
    if config.drawing_turn is not None:
        return config.drawing_turn
    run = run_of(model)
    return NONE if run is None else run.drawing_turn


def tells_concepts(config: Asked, model: str | Path | None) -> bool:
    """Whether `model` is told what info.json has of a concept: without its run's word, on data of the user's own."""
    if config.concept_info is not None:
        return config.concept_info
    run = run_of(model)
    return (model is not None and config.data is not None) if run is None else run.tells_concepts
