"""Chameleon, Liquid and Show-o through the recipes as commands: adapters, ZeRO, resuming, CoRL, merging, scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import warm
from helpers import ROOT, environment, rows_of
from made import cache_folder, world_folder
from PIL import Image
from safetensors import safe_open
from small_chameleon import sharp_chameleon
from small_liquid import sharp_liquid
from small_show_o import sharp_show_o

from syncr1.engine.policies.auto import load_policy
from syncr1.engine.policies.base import Policy

MAKERS: dict[str, Callable[[], Policy]] = {
    "chameleon": sharp_chameleon,
    "liquid": sharp_liquid,
    "show_o": partial(sharp_show_o, image_size=32),
}
WAYS: dict[str, dict[str, Any]] = {
    "guided": {"policy_logp": "guided", "drawing_turn": "t2i_r1"},
    "lora": {
        "policy_logp": "guided_detached",
        "drawing_turn": "sync_r1",
        "unconditional": "pads",
        "preview_completion": "likely",
        "lora_rank": 4,
        "zero_stage": 2,
        "beta": 0.01,
    },
    "refilled": {"policy_logp": "conditional", "top_p": 0.9, "image_top_k": 8, "refill": 1, "zero_stage": 1},
}
FILLED_IN: dict[str, dict[str, Any]] = {
    "guided": {"image_noise": 1.8},
    "lora": {"unconditional": "fixed", "preview_completion": "repeat", "masked_steps": 2, "zero_stage": 3},
    "refilled": {"image_top_k": 0, "masked_logp": "random_mask", "image_top_p": 1},
}
"""Where images are filled in."""


@pytest.fixture(scope="module", params=MAKERS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / request.param
    MAKERS[request.param]().save(folder)
    return folder


def recipe(name: str, **settings: Any) -> str:
    flags = [word for key, value in settings.items() for word in (f"--{key}", *str(value).split("\n")) if word]
    out, _ = warm.run(str(ROOT / "recipes" / name), *flags, env=environment(cache_folder()))
    return out


def names_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("way", WAYS)
def test_a_chain(model: Path, way: str, tmp_path: Path) -> None:
    """Trained, gone on with, sampled and scored; what draws stays among the weights."""
    settings = {
        "model": model,
        "data": world_folder(),
        "output_dir": tmp_path / "run",
        "prompts_per_step": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "cfg_weight": 3,
        "replay_check_steps": 1,
        "checkpointing_steps": 1,
        "learning_rate": 1e-3,
        "eval_samples": 2,
        **WAYS[way],
        **(FILLED_IN[way] | {"image_steps": 5} if model.name == "show_o" else {}),
    }
    recipe("sync_r1.py", **settings, max_steps=2)
    recipe("sync_r1.py", **settings, max_steps=3, resume_from_checkpoint="latest")
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 3
    for row in rows:
        assert row["rollout/replay_logp_max_abs"] <= 1e-4 and row["reward_failures"] == 0 and row["grad_norm"] > 0
    last = tmp_path / "run" / "checkpoints" / "last"
    assert names_in(last) == names_in(model)
    few = {"model": last, "max_completion_length": 6}
    recipe("sample.py", **few, prompt="draw <bobo>", produce="text\nimage", output_dir=tmp_path / "s")
    with Image.open(tmp_path / "s" / "grid.png") as grid:
        assert grid.width > 100
    scored = {"data": world_folder(), "limit": 2, "images_per_prompt": 1, "output_dir": tmp_path / "e"}
    recipe("evaluate.py", **few, **scored)
    assert json.loads((tmp_path / "e" / "scores.json").read_text())


def test_corl_and_its_merge(model: Path, tmp_path: Path) -> None:
    """Its first stage, and a merge that draws."""
    asked = {"segments": "image", "real_image": "p.png", "qa_solution": "<answer>A</answer>", "qa_type": "MC"}
    rows = [
        asked | {"prompt": f"a {colour} cup", "qa_problem": f"{colour}?\nA. yes\nB. no"} for colour in ("red", "blue")
    ]
    Image.new("RGB", (32, 32), "red").save(tmp_path / "p.png")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": model,
        "data": tmp_path,
        "output_dir": tmp_path / "run",
        "max_steps": 1,
        "stage": "unified",
        "prompts_per_step": 2,
        "num_generations": 2,
        "max_completion_length": 4,
        "reward_funcs": "tim\naccuracy",
        "eval_samples": 0,
        "cfg_weight": 2,
        "replay_check_steps": 1,
    }
    recipe("corl.py", **settings)
    (row,) = rows_of(tmp_path / "run" / "unified")
    assert row["rollout/replay_logp_max_abs"] <= 1e-4 and row["tokens/image"] > 0
    trained = tmp_path / "run" / "unified" / "checkpoints" / "last"
    recipe("merge.py", base=model, models=f"{trained}\n{trained}", output=tmp_path / "merged", method="mean")
    merged = load_policy(tmp_path / "merged")
    assert not merged.cannot_draw and names_in(tmp_path / "merged") == names_in(model)
