"""The image rewards that `reward_funcs` may name, and the checkpoints that they ask; read without torch.

`reward_models` replaces a checkpoint: `geneval=google/owlv2-base-patch16-ensemble`, `clip=FOLDER`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

CLIP_L14 = "openai/clip-vit-large-patch14"
CLIP_H14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

CHECKPOINTS: Mapping[str, Mapping[str, str | None]] = {
    "geneval": {"geneval": "facebook/mask2former-swin-small-coco-instance", "geneval_colours": CLIP_L14},
    "pickscore": {"pickscore": "yuvalkirstain/PickScore_v1"},
    "clip": {"clip": CLIP_L14},
    "hps": {"hps": "adams-story/HPSv2-hf"},
    "aesthetic": {"aesthetic": "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE"},
    "siglip": {"siglip": "google/siglip-so400m-patch14-384"},
    "vqa_score": {"vqa_score": "Salesforce/blip-vqa-base"},
    "ocr": {"ocr": "microsoft/trocr-base-printed"},
    "detector": {"detector": "IDEA-Research/grounding-dino-base"},
    "git": {"git": "microsoft/git-large-vqav2"},
    "orm": {"orm": None},
    "face": {"face": None},
}
"""Reward -> the keys of its checkpoints in `reward_models`, with the published one; None: it has none that transformers
loads as it is, so one must be named."""
NAMED = tuple(CHECKPOINTS)
KEYS = tuple(key for keys in CHECKPOINTS.values() for key in keys)
PREPARED_AS: Mapping[str, str] = {"pickscore": CLIP_H14, "hps": CLIP_H14}
"""Whose tokenizer and image processor a published checkpoint is used with, where its own folder has none."""


WITHOUT_TOKENIZER = ("geneval", "detector", "aesthetic", *PREPARED_AS)
"""Keys of models some of which read no text, or have their tokenizer from elsewhere."""
FILES = ("aesthetic", "face")
"""Keys that may be a safetensors file; face is nothing else."""
OPTIONAL = ("face",)
"""Keys that a reward does without."""


def keys_of(reward_funcs: Sequence[str]) -> dict[str, str | None]:
    """The keys of those rewards' checkpoints, with the published one of each."""
    return {key: known for name in reward_funcs for key, known in CHECKPOINTS.get(name, {}).items()}


PICKLES = (".pt", ".pth", ".bin", ".ckpt")


class Checkpoint(NamedTuple):
    """One model that a run's image rewards ask."""

    key: str
    name: str
    """Folder, or on the hub."""


def named_models(settings: Sequence[str]) -> dict[str, str]:
    """`reward_models` as a mapping; ValueError in words where an entry is of another form."""
    found: dict[str, str] = {}
    for entry in settings:
        key, equals, name = entry.partition("=")
        if not equals or not name or key not in KEYS:
            raise ValueError(f"expected KEY=FOLDER or KEY=HUB_NAME with a key of {', '.join(KEYS)}, got {entry}")
        if key in found:
            raise ValueError(f"expected one checkpoint for {key}, got two; leave one out")
        found[key] = name
    return found


def checkpoints_of(reward_funcs: Sequence[str], settings: Sequence[str]) -> list[Checkpoint]:
    """What the image rewards among `reward_funcs` load, each key once; those without a checkpoint are left out."""
    given = named_models(settings)
    chosen = {key: given.get(key, known) for key, known in keys_of(reward_funcs).items()}
    return [Checkpoint(key, name) for key, name in chosen.items() if name is not None]


def place_problem(one: Checkpoint) -> str:
    """What is wrong with where a checkpoint is to be, in words; "" where it is a folder, a file that fits, or may be a
    name on the hub."""
    path = Path(one.name).expanduser()
    as_file = path.is_file() or one.name.endswith((".safetensors", *PICKLES))
    is_wrong = one.key == "face" if not as_file else one.key not in FILES or one.name.endswith(PICKLES)
    if is_wrong:
        wanted = {"face": "a safetensors file", "aesthetic": "a folder, a name on the hub or a safetensors file"}
        expected = wanted.get(one.key, "a folder or a name on the hub")
        remedy = "save it as safetensors (docs/image_rewards.md)" if as_file else "correct it"
        return f"reward_models: {one.key}: expected {expected}, got {one.name}; {remedy}"
    if as_file and not path.is_file():
        return f"reward_models: {one.key}: expected a file, got {one.name}, which is not there; correct it"
    return ""


def problems_of(reward_funcs: Sequence[str], settings: Sequence[str]) -> list[str]:
    """What is wrong with `reward_models`, in words."""
    try:
        given = named_models(settings)
    except ValueError as error:
        return [f"reward_models: {error}"]
    keys = keys_of(reward_funcs)
    unused = [key for key in given if key not in keys]
    absent = [key for key, known in keys.items() if known is None and key not in (*given, *OPTIONAL)]
    found = [f"reward_models: expected keys of rewards in reward_funcs, got {key}; name its reward" for key in unused]
    found += [problem for one in checkpoints_of(reward_funcs, settings) if (problem := place_problem(one))]
    return found + [
        f"reward_models: expected {key}=FOLDER for reward {key}, which has no published checkpoint that transformers "
        f"loads as it is, got none; convert one, or leave {key} out (docs/image_rewards.md)"
        for key in absent
    ]
