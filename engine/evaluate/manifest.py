"""What a folder of generated items was made with, so that an interrupted run goes on only with the very same settings.

    manifest.json   model (name, fingerprint of its weights), data (fingerprint, items per task), sampling, versions

The fingerprints are of contents: moving the model or the data elsewhere changes nothing.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import EvaluationError
from ..pictures import ImageRef
from ..policies.base import Policy
from ..records import Prompt
from ..settings.train_config import PictureFit, Unconditional
from ..whole_files import write_atomically

MANIFEST = "manifest.json"
FORMAT = 1
PACKAGES = ("syncr1", "torch", "transformers")
"""Whose versions may change what is generated, bit by bit."""
LATER: tuple[tuple[str, object], ...] = (
    ("drawing_turn", "none"),
    ("unconditional", "fixed"),
    ("picture_fit", "crop"),
    ("chat_template_kwargs", []),
    ("image_steps", 16),
    ("image_noise", 1.0),
)
"""Settings that are not written down at these values: folders begun before there were such settings go on."""
SAMPLED_VALUES = 4096
"""Of each weight tensor, this many values, evenly spread, go into the fingerprint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything about the sampling that changes what comes out."""

    seed: int = 3407
    temperature: float = 1.0
    """Of the sampled trajectories (texts and images)."""
    max_text_tokens: int = 32
    cfg_weight: float = 1.5
    unconditional: Unconditional = "fixed"
    drawing_turn: str = "none"
    image_steps: int = 16
    image_noise: float = 1.0
    picture_fit: PictureFit = "processor"
    chat_template_kwargs: tuple[str, ...] = ()
    images_per_prompt: int = 1
    """Trajectories of each prompt that draws."""
    greedy_texts: bool = True
    """Answer every question greedily as well."""
    sampled_texts: bool = True
    """Answer prompts without an image by sampling as well."""
    batch_size: int = 32
    """Prompts per batch; batches are fixed, since a batch's shape may change the last bit of a logit."""


def describe(
    policy: Policy, model_name: str, items: Mapping[str, Sequence[Prompt]], source: str, settings: Settings
) -> dict[str, Any]:
    """The manifest of a run that generates `items` with `policy`."""
    parameter = next(policy.parameters())
    return {
        "format": FORMAT,
        "model": {"name": model_name, "fingerprint": weights_fingerprint(policy.state_dict())},
        "data": {
            "source": source,
            "fingerprint": prompts_fingerprint([prompt for task in items for prompt in items[task]]),
            "items": {task: len(prompts) for task, prompts in items.items()},
        },
        "sampling": {k: v for k, v in _as_json(asdict(settings)).items() if (k, v) not in LATER},
        "versions": {
            **{name: _version(name) for name in PACKAGES},
            "device": parameter.device.type,
            "dtype": str(parameter.dtype).removeprefix("torch."),
        },
    }


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as a manifest that is read again has them: a tuple is a list there, and would differ from itself."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return "not installed"


def claim(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Writes the manifest into a new folder; True when the folder already has the same one, so that it goes on.

    Raises:
        EvaluationError: the folder was made with something else; the message lists what differs.
    """
    path = folder / MANIFEST
    if not path.exists():
        if (folder / "items.jsonl").exists():
            raise EvaluationError(f"{folder}: has items.jsonl but no {MANIFEST}; choose another output_dir")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        return False
    before = read_manifest(folder)
    try:
        found = list(differences(before, manifest))
    except RecursionError as error:
        raise EvaluationError(f"{path}: is nested too deeply to be a manifest; choose another output_dir") from error
    if found:
        lines = "\n  ".join(found)
        raise EvaluationError(
            f"{folder}: was begun with other settings, so it cannot go on with these:\n  {lines}\n"
            "choose another output_dir, or take the settings back"
        )
    return True


def read_manifest(folder: Path) -> dict[str, Any]:
    """The folder's manifest; EvaluationError when there is none or it cannot be read."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EvaluationError(f"{path}: missing; run --stage generate first, or name its output_dir") from None
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{path}: not readable as JSON ({error}); generate into another output_dir") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise EvaluationError(f"{path}: is not of format {FORMAT}; generate into another output_dir")
    return manifest


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs, one line each: `sampling.seed: 3407 then, 1 now`.  Names and paths do not count, contents do."""
    told = {"model.fingerprint": "model.name", "data.fingerprint": "data.source"}
    unsaid = {f"sampling.{name}": value for name, value in LATER}
    old, new = (unsaid | dict(_flat(side)) for side in (before, now))
    for name in dict.fromkeys([*old, *new]):
        if name in told.values() or old.get(name) == new.get(name):
            continue
        label = told.get(name)
        shown = [(f"{side.get(label)} ({side.get(name)})" if label else str(side.get(name))) for side in (old, new)]
        yield f"{name}: {shown[0]} then, {shown[1]} now"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def weights_fingerprint(state: Mapping[str, Tensor]) -> str:
    """Of names, shapes and an even sample of the values of every tensor; blind to a change of few values in a large
    tensor."""
    digest = hashlib.blake2b(digest_size=12)
    for name in sorted(state):
        tensor = state[name].detach()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        step = max(1, tensor.numel() // SAMPLED_VALUES)
        values = tensor.reshape(-1)[::step].contiguous().cpu()
        digest.update(values.view(torch.uint8).numpy().tobytes() if values.numel() else b"")
    return digest.hexdigest()


def prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    """Of everything that the prompts say, and of the names and sizes of their pictures."""
    digest = hashlib.blake2b(digest_size=12)
    for prompt in prompts:
        told = {field.name: _stable(getattr(prompt, field.name)) for field in fields(Prompt)}
        if len(prompt.images) < 2:  # as it was while there could be no more
            told["images"] = next(iter(told["images"]), None)
        # What older prompts did not have, and most have not: folders that they were begun with go on.
        values = [value for name, value in told.items() if value or name not in ("request", "info", "right_answers")]
        digest.update(json.dumps(values, sort_keys=True, ensure_ascii=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _stable(value: Any) -> Any:
    if isinstance(value, Path):
        return [value.name, value.stat().st_size if value.is_file() else None]
    if isinstance(value, tuple):
        return [_stable(part) for part in value]
    if isinstance(value, Mapping):
        return {str(name): _stable(part) for name, part in value.items()}
    return picture_name(value) if hasattr(value, "read") and hasattr(value, "name") else value


def picture_names(refs: Sequence[ImageRef]) -> str | None:
    """Pictures' short names; None for none."""
    return ", ".join(str(ref.name) for ref in refs) or None


def picture_name(ref: ImageRef | None) -> str | None:
    """A picture's short name; None for none."""
    return None if ref is None else str(ref.name)
