"""How a checkpoint was trained to be asked, as far as the folder of its run says so: asked in another way, it would be
asked for what it has not learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, get_args

import yaml

from ..errors import ConfigError
from ..policies.inputs import Inputs
from ..settings.template_kwargs import arguments_of
from ..settings.train_config import PictureFit, Unconditional, WorldName
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
    def image_steps(self) -> int | None: ...
    @property
    def image_noise(self) -> float | None: ...
    @property
    def picture_fit(self) -> PictureFit | None: ...
    @property
    def chat_template_kwargs(self) -> tuple[str, ...]: ...
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
    found = _said_of(model).get("unconditional")
    return next((known for known in get_args(Unconditional) if known == found), "fixed")


def trained_filling(model: str | Path | None) -> dict[str, Any]:
    """How the run that left a checkpoint filled images in, as fields of `Sampling`; without one its defaults."""
    said, found = _said_of(model), dict[str, Any]()
    steps, noise = said.get("image_steps"), said.get("image_noise")
    if isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1:
        found["image_steps"] = steps
    if isinstance(noise, int | float) and not isinstance(noise, bool) and 0 <= noise < float("inf"):
        found["image_noise"] = float(noise)
    return found


def filling_of(config: Asked, model: str | Path | None) -> dict[str, Any]:
    """How `model` is to fill images in, as fields of `Sampling`."""
    asked = {"image_steps": config.image_steps, "image_noise": config.image_noise}
    return trained_filling(model) | {name: value for name, value in asked.items() if value is not None}


def _said_of(model: str | Path | None) -> dict[str, Any]:
    """The settings of the run of either method that left a checkpoint, unchecked; empty where there is none."""
    try:
        said = {} if model is None else yaml.safe_load(_settings_beside(model).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # none, or another program's
        return {}
    return said if isinstance(said, dict) else {}


def trained_inputs(model: str | Path | None) -> Inputs:
    """How the run that left a checkpoint prepared pictures and prompts; else as its own processor does."""
    said = _said_of(model)
    # Before there was the setting, every run cropped.
    found = said.get("picture_fit", "crop" if "prompts_per_step" in said else "processor")
    fit: PictureFit = next((known for known in get_args(PictureFit) if known == found), "processor")
    try:
        arguments = tuple(map(str, said.get("chat_template_kwargs") or ()))
        arguments_of(arguments)
    except (TypeError, ValueError):
        arguments = ()
    return Inputs(fit, arguments)


def inputs_of(config: Asked, model: str | Path | None) -> Inputs:
    """How pictures and prompts of `model` are prepared."""
    trained = trained_inputs(model)
    return Inputs(
        config.picture_fit or trained.picture_fit, config.chat_template_kwargs or trained.chat_template_kwargs
    )


def world_of_model(model: str | Path | None, given: WorldName | None = None) -> WorldName:
    """The embedded world that `model` is asked about without data: its run's, unless one is given."""
    found = given or _said_of(model).get("world")
    return next((known for known in get_args(WorldName) if known == found), "rendered")


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
