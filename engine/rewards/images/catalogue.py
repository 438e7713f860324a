"""Image rewards by their names: made with their checkpoints when they are first needed, off the training path."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import ConfigError
from ..reward import RewardFunction, RewardValues
from .image_rewards import CHECKPOINTS, NAMED, PREPARED_AS, keys_of, named_models, problems_of

Models = Mapping[str, str]
"""Key of `reward_models` -> folder or name on the hub."""


class NamedReward:
    """One of NAMED. Its models are loaded by `load`, or by the first call.

    Args:
        name: of NAMED.
        settings: the run's `reward_models`.
        device: of the models.
    """

    kind = "image"

    def __init__(self, name: str, settings: Sequence[str] = (), device: torch.device | str = "cpu") -> None:
        known = {key: found for key, found in CHECKPOINTS[name].items() if found is not None}
        self.models = known | {key: found for key, found in named_models(settings).items() if key in CHECKPOINTS[name]}
        self.device = device
        self.__name__ = name
        self._made: RewardFunction | None = None
        self._lock = threading.Lock()

    def load(self) -> RewardFunction:
        """The reward itself, loaded once; ConfigError where a checkpoint cannot be had."""
        with self._lock:
            if self._made is None:
                self._made = _MAKERS[self.__name__](self.models, self.device)
            return self._made

    def __call__(self, **columns: Any) -> RewardValues:
        return self.load()(**columns)  # type: ignore[return-value]  # none of them is async


def named_rewards(reward_funcs: Sequence[str], settings: Sequence[str]) -> dict[str, RewardFunction]:
    """Those of `reward_funcs` that are in NAMED, unloaded; ConfigError where one of them lacks its checkpoint."""
    asked = [name for name in reward_funcs if name in NAMED]
    absent = problems_of(asked, [entry for entry in settings if entry.partition("=")[0] in keys_of(asked)])
    if absent:
        raise ConfigError.of(absent)
    return {name: NamedReward(name, settings) for name in asked}


def load_models(functions: Iterable[RewardFunction], device: torch.device | str) -> None:
    """Loads those that are image rewards by name, before they are timed; ConfigError where a checkpoint is missing."""
    for function in functions:
        if isinstance(function, NamedReward):
            function.device = device
            function.load()


# One maker each; what it needs is imported there, so that a run loads no class that it does not use -------------------


def _clip(key: str, models: Models, device: torch.device | str) -> Any:
    """A CLIP of two towers; a published one without a tokenizer of its own takes that of its base."""
    from ..builtin.clip import ClipScorer

    name, folder = models[key], Path(models[key]).expanduser()
    whole = (folder / "preprocessor_config.json").is_file() or key not in PREPARED_AS
    whole = whole or (folder / "processor_config.json").is_file()
    return ClipScorer.from_pretrained(name, prepared_as=None if whole else PREPARED_AS[key], device=device)


def _geneval(models: Models, device: torch.device | str) -> RewardFunction:
    from .geneval import GenEval, GenEvalReward

    return GenEvalReward(GenEval.from_pretrained(models["geneval"], models["geneval_colours"], device=device))


def _pickscore(models: Models, device: torch.device | str) -> RewardFunction:
    from .preference import pickscore

    return pickscore(_clip("pickscore", models, device))


def _cosine(name: str) -> Callable[[Models, torch.device | str], RewardFunction]:
    def make(models: Models, device: torch.device | str) -> RewardFunction:
        from .preference import PreferenceReward

        return PreferenceReward(_clip(name, models, device), name)

    return make


def _siglip(models: Models, device: torch.device | str) -> RewardFunction:
    from .preference import PreferenceReward, SiglipScorer

    return PreferenceReward(SiglipScorer.from_pretrained(models["siglip"], device=device), "siglip")


def _aesthetic(models: Models, device: torch.device | str) -> RewardFunction:
    from .aesthetic import AestheticReward, AestheticScorer

    return AestheticReward(AestheticScorer.from_pretrained(models["aesthetic"], device=device))


def _vqa_score(models: Models, device: torch.device | str) -> RewardFunction:
    from .vqa import QuestionReward
    from .yes_no import load_yes_no

    return QuestionReward(load_yes_no("vqa_score", models["vqa_score"], device=device))


def _git(models: Models, device: torch.device | str) -> RewardFunction:
    from .vqa import NounsReward
    from .yes_no import load_yes_no

    return NounsReward(load_yes_no("git", models["git"], device=device))


def _orm(models: Models, device: torch.device | str) -> RewardFunction:
    from .vqa import ORM, QuestionReward
    from .yes_no import load_yes_no

    return QuestionReward(load_yes_no("orm", models["orm"], device=device), "orm", ORM)


def _detector(models: Models, device: torch.device | str) -> RewardFunction:
    from .detectors import load_detector
    from .objects import DetectorReward

    return DetectorReward(load_detector("detector", models["detector"], device=device))


def _ocr(models: Models, device: torch.device | str) -> RewardFunction:
    from .ocr import OcrReward, TrOcrReader

    return OcrReward(TrOcrReader.from_pretrained(models["ocr"], device=device))


def _face(models: Models, device: torch.device | str) -> RewardFunction:
    from .face import FaceReward, load_faces

    return FaceReward(load_faces(models.get("face"), device=device))


_MAKERS: Mapping[str, Callable[[Models, torch.device | str], RewardFunction]] = {
    "geneval": _geneval,
    "pickscore": _pickscore,
    "clip": _cosine("clip"),
    "hps": _cosine("hps"),
    "aesthetic": _aesthetic,
    "siglip": _siglip,
    "vqa_score": _vqa_score,
    "ocr": _ocr,
    "detector": _detector,
    "git": _git,
    "orm": _orm,
    "face": _face,
}
