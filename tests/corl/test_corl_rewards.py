"""reward_parts.py: which rewards a training gets, with which weights, and what their settings make of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import ROOT, sharp_policy
from PIL import Image
from small_models import saved, small_bert, small_blip, small_clip, small_t5

from syncr1.engine.corl.config import IMAGE_REWARDS, TEXT_REWARDS, CorlConfig, Training
from syncr1.engine.corl.reward_parts import RewardParts
from syncr1.engine.errors import ConfigError
from syncr1.engine.records import Prompt, Rollout
from syncr1.engine.rewards.scoring import score

CPU = torch.device("cpu")
OFFLINE: dict[str, Any] = {"lpips_weights": "random", "lpips_net": "squeeze", "lpips_size": 32, "cycle_text": "none"}


def parts_of(**settings: Any) -> RewardParts:
    return RewardParts(CorlConfig(**(OFFLINE | settings)), sharp_policy(), CPU)


@pytest.mark.parametrize(
    ("training", "names", "weights"),
    [
        ("unified", ("cycle", "tim", "accuracy", "format"), (1.0, 1.0, 0.8, 0.8)),
        ("generation", ("cycle", "tim"), (1.0, 1.0)),
        ("understanding", ("accuracy", "format"), (0.8, 0.8)),
        ("t2i", ("cycle", "tim"), (1.0, 1.0)),
        ("mcq", ("accuracy", "format"), (1.0, 1.0)),  # lambda is the first stage's
        ("oe", ("accuracy", "format"), (1.0, 1.0)),
    ],
)
def test_each_training_has_the_papers_rewards(
    training: Training, names: tuple[str, ...], weights: tuple[float, ...]
) -> None:
    rewards = parts_of().of(training, sharp_policy())
    assert rewards.names == names and rewards.weights == weights


def test_every_name_in_the_settings_has_its_maker() -> None:
    assert tuple(sorted(parts_of().makers())) == tuple(sorted(IMAGE_REWARDS + TEXT_REWARDS))


def test_given_weights_hold_in_every_training() -> None:
    parts = parts_of(reward_weights=(4.0, 0.3, 0.8, 0.7))
    assert parts.of("t2i", sharp_policy()).weights == (4.0, 0.3)
    assert parts.of("mcq", sharp_policy()).weights == (0.8, 0.7)


def test_answers_load_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RewardParts, "_cycle", lambda self: pytest.fail("a captioner for answers"))
    assert RewardParts(CorlConfig(), sharp_policy(), CPU).of("mcq", sharp_policy()).names == ("accuracy", "format")


def test_tim_is_of_the_policy_in_training_or_of_the_frozen_one() -> None:
    live = sharp_policy(1)
    parts = parts_of(reward_funcs=("tim",))
    assert parts.of("t2i", live).functions["tim"]._forward.policy is live  # type: ignore[attr-defined]
    frozen = parts_of(reward_funcs=("tim",), tim_policy="frozen")
    assert frozen.of("t2i", live).functions["tim"]._forward.policy is frozen.frozen  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "settings",
    [
        {"cycle_text": "bertscore"},
        {"cycle_text": "soft_jaccard", "cycle_image": "rmse"},
        {"cycle_text": "spice", "spice_synonyms": "none"},
        {"cycle_text": "soft_jaccard", "captioner": "policy", "cycle_normalise": False},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_every_cycle_scores(settings: dict[str, Any], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    photo = tmp_path / "photo.png"
    Image.new("RGB", (40, 32), "red").save(photo)
    folders = {"captioner": small_blip, "bert": small_bert, "clip": small_clip, "spice_parser": small_t5}
    found = {name: str(saved(make, tmp_path_factory)) for name, make in folders.items()}
    parts = parts_of(**(found | settings), reward_funcs=("cycle", "clip_text", "clip_image"))
    prompt = Prompt(id="a", task="t2i", text="a red dog", target="a red dog", segments=("image",), real_image=photo)
    bare = Prompt(id="b", task="t2i", text="a cat", target="a cat", segments=("image",))
    rollouts = [
        Rollout(
            prompt=p,
            member=0,
            prompt_tokens=torch.zeros(0),
            prompt_image=None,
            segments=(),
            image=torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)),
        )
        for p in (prompt, bare)
    ]
    functions = parts.of("t2i", sharp_policy()).functions
    assert functions["clip_text"].scorer is functions["clip_image"].scorer, "one CLIP is enough"  # type: ignore[attr-defined]
    table = score(rollouts, functions)
    assert not any(table.failures.values())
    assert table.values[0].isfinite().all()
    assert table.values[1, 2].isnan() and table.values[1, :2].isfinite().all(), "no real picture, no CLIP-I"


def test_own_rewards_say_what_they_judge() -> None:
    brevity = f"{ROOT / 'tests' / 'support' / 'brevity.py'}:brevity"
    parts = parts_of(reward_funcs=(brevity, "format"), reward_weights=(2.0, 1.0))
    rewards = parts.of("mcq", sharp_policy())
    assert rewards.names == ("brevity", "format") and rewards.weights == (2.0, 1.0)
    with pytest.raises(ValueError, match=r"none of .* judges what training t2i produces"):
        parts.of("t2i", sharp_policy())


def test_own_rewards_judge_texts_or_images(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def odd(**_): return []\nodd.kind = 'video'\n")
    with pytest.raises(ConfigError, match=r"expected 'text' or 'image' as the kind of .*odd, got 'video'; set"):
        parts_of(reward_funcs=("format", f"{tmp_path}/mine.py:odd")).of("mcq", sharp_policy())


@pytest.mark.skipif(importlib.util.find_spec("factual_scene_graph") is not None, reason="the table is installed")
def test_missing_synonyms_are_said_with_the_remedy(tmp_path_factory: pytest.TempPathFactory) -> None:
    parser, blip = (str(saved(make, tmp_path_factory)) for make in (small_t5, small_blip))
    parts = parts_of(cycle_text="spice", spice_parser=parser, captioner=blip)
    with pytest.raises(ConfigError, match="pip install --no-deps FactualSceneGraph"):
        parts.of("t2i", sharp_policy())
