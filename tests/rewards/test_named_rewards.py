"""Image rewards by name in a run: settings, refusals before anything is loaded, loading at first use."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from made import cache_folder
from small_detectors import (
    small_aesthetic,
    small_blip_vqa,
    small_git,
    small_grounding_dino,
    small_llava,
    small_owlv2,
    small_siglip,
    small_trocr,
)
from small_models import saved, small_clip

from syncr1.engine.corl.config import CorlConfig
from syncr1.engine.errors import ConfigError
from syncr1.engine.methods.preflight import models_of
from syncr1.engine.methods.reward_memory import image_reward_models
from syncr1.engine.methods.reward_names import reward_problems
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.methods.sync_r1_parts import own_rewards
from syncr1.engine.records import Prompt
from syncr1.engine.rewards.images.catalogue import _MAKERS, NamedReward, load_models, named_rewards
from syncr1.engine.rewards.images.image_rewards import CHECKPOINTS, NAMED, OPTIONAL, checkpoints_of, problems_of
from syncr1.engine.rewards.scorable import NEEDS, check_scorable
from syncr1.engine.show.names import REWARDS


def test_every_name_has_a_maker_needs_and_words() -> None:
    assert set(NAMED) == set(_MAKERS) and set(NAMED) <= set(NEEDS) and set(NAMED) <= set(REWARDS)
    assert not set(NAMED) & {*SyncR1Config.REWARDS, *CorlConfig.REWARDS}


@pytest.mark.parametrize(
    ("rewards", "settings", "said"),
    [
        (["clip"], [], None),
        (["clip"], ["clip=some/model"], None),
        (["face"], [], None),
        (["orm"], ["orm=a/b"], None),
        (["clip"], ["clip"], "expected KEY=FOLDER or KEY=HUB_NAME with a key of geneval, .*, got clip"),
        (["clip"], ["klip=x"], "got klip=x"),
        (["clip"], ["clip="], "got clip="),
        (["clip"], ["clip=a", "clip=b"], "expected one checkpoint for clip, got two"),
        (["clip"], ["hps=a"], "expected keys of rewards in reward_funcs, got hps"),
        (["orm"], [], "expected orm=FOLDER for reward orm"),
        ([], ["clip=a"], "got clip; name its reward"),
        (["face"], ["face=org/name"], "face: expected a safetensors file, got org/name; correct it"),
        (["face"], ["face=gone.safetensors"], "face: expected a file, got gone.safetensors, which is not there"),
        (
            ["aesthetic"],
            ["aesthetic=a.pth"],
            "expected a folder, a name on the hub or a safetensors file, got a.pth; save",
        ),
        (["hps"], ["hps=HPS_v2.1_compressed.pt"], "hps: expected a folder or a name on the hub, got HPS"),
    ],
)
def test_reward_models_that_do_not_fit_are_told(rewards: list[str], settings: list[str], said: str | None) -> None:
    problems = problems_of(rewards, settings)
    assert (problems == []) if said is None else re.search(said, problems[0])


def test_a_setting_takes_the_place_of_a_published_checkpoint() -> None:
    chosen = dict(checkpoints_of(["geneval", "clip", "cycle"], ["geneval_colours=here"]))
    assert chosen == {
        "geneval": CHECKPOINTS["geneval"]["geneval"],
        "geneval_colours": "here",
        "clip": CHECKPOINTS["clip"]["clip"],
    }
    assert checkpoints_of(["face"], []) == [] and set(OPTIONAL) == {"face"}


@pytest.mark.parametrize("config", [SyncR1Config, CorlConfig])
def test_recipes_ask_for_folders_and_names_before_torch(config: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = saved(small_clip, tmp_path_factory)
    settings = config(reward_funcs=("clip", "pickscore"), reward_models=(f"clip={folder}",))
    folders, names = models_of(settings)
    assert folders == {"reward_models clip": folder}
    assert [(one.setting, one.name) for one in names] == [("reward_models pickscore", "yuvalkirstain/PickScore_v1")]
    assert reward_problems("reward_funcs", ["geneval", "genevla"], (*config.REWARDS, *NAMED)) != []
    assert models_of(config()) == ({}, [])
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert image_reward_models(settings.reward_funcs, settings.reward_models)["clip (reward_models)"] == size


def test_models_are_loaded_once_and_where_they_are_asked_for(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = saved(small_clip, tmp_path_factory)
    settings = SyncR1Config(reward_funcs=("identity", "clip"), reward_models=(f"clip={folder}",))
    own = own_rewards(settings)
    assert list(own) == ["clip"]
    reward = own["clip"]
    assert isinstance(reward, NamedReward) and reward.kind == "image" and reward._made is None
    load_models([reward, lambda **_: [1.0]], "cpu")
    assert reward.load() is reward.load()
    assert reward(images=[None, torch.rand(3, 8, 8)], prompts=["a", "b"])[0] is None
    with pytest.raises(ConfigError, match="expected orm=FOLDER"):
        named_rewards(["orm"], [])
    with pytest.raises(ConfigError, match="reward model ClipScorer: "):
        load_models([NamedReward("clip", [f"clip={cache_folder()}"])], "cpu")


SMALL: dict[str, dict[str, Callable[[Path], Path]]] = {
    "geneval": {"geneval": small_owlv2, "geneval_colours": small_clip},
    **{name: {name: small_clip} for name in ("pickscore", "clip", "hps")},
    "aesthetic": {"aesthetic": small_aesthetic},
    "siglip": {"siglip": small_siglip},
    "vqa_score": {"vqa_score": small_blip_vqa},
    "ocr": {"ocr": small_trocr},
    "detector": {"detector": small_grounding_dino},
    "git": {"git": small_git},
    "orm": {"orm": small_llava},
}


@pytest.mark.parametrize("name", [*SMALL])
def test_each_name_scores_a_batch_of_any_shape_and_text(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Made by its name on a checkpoint of its class; a row without a drawing is None, what is no picture is refused."""
    folders = [f"{key}={saved(build, tmp_path_factory)}" for key, build in SMALL[name].items()]
    reward = NamedReward(name, folders)
    images = [torch.rand(3, *size) for size in ((40, 56), (7, 9), (96, 96), (33, 31))]
    columns: dict[str, Any] = {
        "prompts": ['a "red" dog', "营业 「中」 \N{DOG FACE}", 'x "y" ' * 400, '{} <image>\n"c\nd"', '"never drawn"'],
        "include": [[{"class": "dog", "count": 1, "color": "red"}]] * 5,
        "nouns": [["dog", "red bus"]] * 5,
    }
    values = reward(images=[*images, None], **columns)
    assert values[4] is None and all(isinstance(value, float) and math.isfinite(value) for value in values[:4])
    for wrong in (torch.full((3, 8, 8), math.nan), torch.rand(1, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"expected .*images"):
            reward(images=[wrong], **{key: column[:1] for key, column in columns.items()})


def test_no_name_goes_untried() -> None:
    assert {*SMALL, "face"} == set(NAMED)


@pytest.mark.parametrize(
    ("name", "extra", "told"),
    [
        ("geneval", {"include": [{"class": "dog", "count": 1}]}, False),
        ("geneval", {"metadata": {"include": [{"class": "dog", "count": 1}]}}, False),
        ("geneval", {"nouns": ["dog"]}, True),
        ("detector", {"nouns": ["dog"]}, False),
        ("detector", {"nouns": []}, True),
        ("git", {"attr_nouns": ["red dog"]}, False),
        ("ocr", {"ocr_text": "Open"}, False),
        ("ocr", {}, True),
        ("pickscore", {}, False),
        ("face", {}, True),
    ],
)
def test_data_that_a_reward_says_nothing_of_are_refused(name: str, extra: dict[str, Any], told: bool) -> None:
    prompt = Prompt(id="a", task="t", text="a dog", segments=("image",), extra=extra)
    if told:
        with pytest.raises(ConfigError, match=f"none of {name} can score any"):
            check_scorable([name], [prompt], "data")
    else:
        assert check_scorable([name], [prompt], "data") == []
    with pytest.raises(ConfigError, match="needs a drawing"):
        check_scorable([name], [Prompt(id="a", task="t", text="a dog", segments=("text",), extra=extra)], "data")
