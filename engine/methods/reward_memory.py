"""What rewards' own models hold of a GPU, as far as it is known without loading them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..rewards.images.image_rewards import checkpoints_of

PARAMETERS = {
    "Salesforce/blip-image-captioning-base": 247_000_000,
    "lizhuang144/flan-t5-base-VG-factual-sg": 248_000_000,
    "google-bert/bert-base-uncased": 110_000_000,
    "openai/clip-vit-base-patch32": 151_000_000,
    "openai/clip-vit-large-patch14": 428_000_000,
    "facebook/mask2former-swin-small-coco-instance": 69_000_000,
    "yuvalkirstain/PickScore_v1": 986_000_000,
    "adams-story/HPSv2-hf": 986_000_000,
    "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE": 305_000_000,
    "google/siglip-so400m-patch14-384": 878_000_000,
    "google/owlv2-base-patch16-ensemble": 155_000_000,
    "IDEA-Research/grounding-dino-base": 233_000_000,
    "Salesforce/blip-vqa-base": 385_000_000,
    "microsoft/git-large-vqav2": 394_000_000,
    "microsoft/trocr-base-printed": 334_000_000,
    "lpips vgg": 14_700_000,
    "lpips alex": 2_500_000,
    "lpips squeeze": 700_000,
}
"""Of the checkpoints that the settings name, as their pages tell, and of the trunks of LPIPS."""


def reward_models(names: Mapping[str, str | None]) -> dict[str, int]:
    """Bytes by what they are for, in float32; 0 where that is not known before they are there.

    Args:
        names: what a model is for -> its folder or hub name; None: there is none.
    """
    found: dict[str, int] = {}
    for use, name in names.items():
        if name is None:
            continue
        found[use] = 4 * PARAMETERS[name] if name in PARAMETERS else _bytes_of(Path(name).expanduser())
    return found


def image_reward_models(reward_funcs: Sequence[str], settings: Sequence[str]) -> dict[str, int]:
    """The same of image rewards by name."""
    chosen = checkpoints_of(reward_funcs, settings)
    return reward_models({f"{one.key} (reward_models)": one.name for one in chosen})


def _bytes_of(folder: Path) -> int:
    """Of the weights in a folder or a file; 0 where it is none."""
    if folder.is_file():
        return folder.stat().st_size
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
