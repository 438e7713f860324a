"""What a CoRL run will take, looked at once its data are read and before a model is: samples enough for every training,
and the models of its rewards, in the cache or at the hub."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from ..errors import ConfigError
from ..methods.hub_names import Wanted, gib, look_up, why_unreachable
from ..methods.model_files import folder_problems
from .config import CorlConfig
from .training_data import TrainingData


def check_needs(config: CorlConfig, data: TrainingData) -> None:
    """Says what has to be downloaded.

    Args:
        config: the run's settings.
        data: what is trained on.

    Raises:
        ConfigError: a training has fewer samples than a step takes, or a reward's model cannot be had.
        DataError: data that cannot be read.
    """
    drawn = False
    for training in data.trainings():
        samples = data.samples(training)
        config.for_stage(training, len(samples))
        drawn = drawn or any("image" in prompt.segments for sample in samples for prompt in sample)
    wanted = reward_models(config) if drawn else []
    problems: list[str] = []
    for one in wanted:
        folder = Path(one.name).expanduser()
        problems += folder_problems(one.setting, folder) if folder.is_dir() else []
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one of a machine asks for all
        told, downloads = look_up([one for one in wanted if not Path(one.name).expanduser().is_dir()])
        problems += told
        for download in downloads:
            print(f"syncr1: to download: {download.wanted.setting} {download.wanted.name}, {gib(download.num_bytes)}")
    problems += _torchvision_problems(config) + _wordnet_problems(config) if drawn else []
    if problems:
        raise ConfigError.of(problems)


def reward_models(config: CorlConfig) -> list[Wanted]:
    """The pretrained models that the rewards of drawings ask."""
    asked, found = set(config.reward_funcs), []
    if {"clip_text", "clip_image"} & asked:
        found.append(Wanted("clip", config.clip))
    if "cycle" in asked and config.cycle_text != "none":
        if config.captioner not in ("policy", "world"):
            found.append(Wanted("captioner", config.captioner))
        if config.cycle_text == "bertscore":
            found.append(Wanted("bert", config.bert))
        if config.cycle_text == "spice" and config.spice_parser != "world":
            found.append(Wanted("spice_parser", config.spice_parser))
    return found


TORCHVISION = "download.pytorch.org"
TRUNKS = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}
"""Files that torchvision downloads for LPIPS."""


def _torchvision_problems(config: CorlConfig) -> list[str]:
    if "cycle" not in config.reward_funcs or config.cycle_image != "lpips" or config.lpips_weights == "random":
        return []
    if config.lpips_weights != "torchvision":
        if Path(config.lpips_weights).expanduser().is_file():
            return []
        return [
            f"lpips_weights: expected torchvision, random or a safetensors file, got {config.lpips_weights}, which is "
            "no file; correct it"
        ]
    remedy = "give a safetensors file of those weights"
    if importlib.util.find_spec("torchvision") is None:
        return [f"lpips_weights: expected torchvision to be installed, got none; pip install torchvision, or {remedy}"]
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch"
    file = Path(home).expanduser() / "hub" / "checkpoints" / TRUNKS[config.lpips_net]
    if file.is_file() or os.environ.get("LOCAL_RANK", "0") != "0":
        return []
    if unreachable := why_unreachable(f"https://{TORCHVISION}"):
        return [f"lpips_weights: expected {file}, or a network to fetch it, got neither ({unreachable}); {remedy}"]
    print(f"syncr1: to download: lpips_weights {file.name} from {TORCHVISION}")
    return []


def _wordnet_problems(config: CorlConfig) -> list[str]:
    """The parser's table of synonyms is a package of its own."""
    uses = "cycle" in config.reward_funcs and config.cycle_text == "spice" and config.spice_parser != "world"
    if not uses or config.spice_synonyms == "none" or importlib.util.find_spec("factual_scene_graph") is not None:
        return []
    return [
        "spice_synonyms: expected WordNet's table, got none; run `pip install --no-deps FactualSceneGraph` (its "
        "requirements would replace torch), or set spice_synonyms none"
    ]
