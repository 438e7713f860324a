"""Show-o through the recipes: trained, gone on with, sampled; with adapters, over ranks, and with CoRL."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import own_process_group, rows_of
from PIL import Image
from safetensors.torch import load_file
from small_show_o import sharp_show_o

from syncr1.engine.api import Model
from syncr1.engine.errors import ConfigError
from syncr1.engine.methods.dry_run import show
from syncr1.engine.methods.sync_r1 import run
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.policies.auto import load_policy
from syncr1.engine.policies.show_o import ShowOPolicy
from syncr1.engine.records import Prompt

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    with own_process_group():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("show-o")
    sharp_show_o().save(folder)
    return str(folder)


def config_of(model: str, folder: Path, **more: Any) -> SyncR1Config:
    """A question about a photo that is answered and drawn, and a drawing at once."""
    Image.new("RGB", (16, 16), "red").save(folder / "p.png")
    rows = [
        {"prompt": "what is it?", "image": "p.png", "segments": "text+image", "answer": "a hat", "target": "a red hat"},
        {"prompt": "draw the cup", "segments": "image", "target": "a red cup"},
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": model,
        "data": folder / "data.jsonl",
        "output_dir": folder / "run",
        "max_steps": 1,
        "prompts_per_step": 2,
        "num_generations": 3,
        "max_completion_length": 5,
        "replay_check_steps": 1,
        "cfg_weight": 3.0,
        "policy_logp": "guided",
        "image_steps": 5,
        "image_noise": 1.8,
        "drawing_turn": "sync_r1",
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "eval_samples": 0,
    }
    return SyncR1Config(**settings | more)


def test_a_run_is_gone_on_with_to_the_bit(model: str, tmp_path: Path) -> None:
    """Steps of the images drawn for each, previews, guided loss; then the checkpoint is asked as it was trained."""
    config = config_of(model, tmp_path, masked_steps=2, checkpointing_steps=1)
    run(replace(config, output_dir=tmp_path / "whole", max_steps=2))
    run(config)
    run(replace(config, max_steps=2, resume_from_checkpoint="latest"))
    rows = {name: rows_of(tmp_path / name) for name in ("whole", "run")}
    same = ("loss", "grad_norm", "reward", "tokens/image", "rollout/replay_logp_max_abs")
    assert [{key: row[key] for key in same} for row in rows["run"]] == [
        {key: row[key] for key in same} for row in rows["whole"]
    ]
    for row in rows["run"]:
        assert row["rollout/replay_logp_max_abs"] <= 1e-4 and row["reward_failures"] == 0 and row["grad_norm"] > 0
        assert row["tokens/text"] > 0 and row["tokens/image"] > 0 and row["dgs/tokens_saved_fraction"] >= 0
    last = {name: tmp_path / name / "checkpoints" / "last" for name in rows}
    before, after, whole = (load_file(Path(f) / "model.safetensors") for f in (model, last["run"], last["whole"]))
    assert all(torch.equal(after[key], whole[key]) for key in whole) and before.keys() == after.keys()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert any("showo.model.layers.0" in key for key in moved) and not any("vqmodel" in key for key in moved)
    assert isinstance(load_policy(last["run"]), ShowOPolicy)
    assert "it answers and draws" in (last["run"] / "README.md").read_text()
    asked = Model.load(last["run"])
    text, picture = asked.reason_and_draw("draw <bobo>", max_text_tokens=4)
    assert isinstance(text, str) and picture.size == (16, 16)
    (drawn,) = asked.sample([Prompt(id="a", task="gen", text="draw it", segments=("image",))], cfg_weight=2.0)
    assert drawn.segments[0].order is not None and int(drawn.segments[0].order.max()) == 4
    assert asked.draw("draw it", image_steps=1).size == (16, 16)


WAYS: dict[str, dict[str, Any]] = {
    "adapters, corrected": {
        "lora_rank": 4,
        "gradient_checkpointing": True,
        "policy_logp": "guided_detached",
        "zero_stage": 2,
        "masked_logp": "step",
        "loss_type": "grpo",
        "importance_correction": "truncate",
        "image_top_k": 9,
        "share_prefix": False,
    },
    "all places": {"masked_logp": "all", "beta": 0.1, "cfg_weight": 1.0},
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_of_training(way: str, model: str, tmp_path: Path) -> None:
    run(config_of(model, tmp_path, **WAYS[way]))
    (row,) = rows_of(tmp_path / "run")
    assert row["grad_norm"] > 0 and row["reward_failures"] == 0
    assert row["rollout/replay_logp_max_abs"] <= 1e-4
    last = tmp_path / "run" / "checkpoints" / "last"
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (model, last))
    assert before.keys() == after.keys()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    if "lora_rank" in WAYS[way]:
        assert (last / "adapter" / "adapter_model.safetensors").is_file()
        assert all("showo.model.layers" in key for key in moved)
    else:
        assert any("lm_head" in key for key in moved) and not any("vqmodel" in key for key in moved)


def test_a_dry_run_tells_what_it_takes_and_what_it_cannot_use(model: str, tmp_path: Path) -> None:
    """More states are more work and memory; settings of another decoding order are refused without a weight."""
    prompts = [Prompt(id="a", task="gen", text="draw it", segments=("image",))]

    def said(**more: Any) -> Any:
        return show(config_of(model, tmp_path, **more), lambda ranks: prompts, lambda line: None)

    few, many = said(masked_steps=1), said()
    assert few.work.update.tokens < many.work.update.tokens / 3 and few.work.image == many.work.image
    assert few.memory.peak() < many.memory.peak() and "a step of drawing" in few.memory.rollout
    tight = replace(many, gpu=replace(many.gpu, memory=0)).lines()
    assert "--masked_steps" in tight[1], "an image's states are one pass, whatever the budget of tokens"
    with pytest.raises(ConfigError, match=r"unconditional: expected fixed for ShowOPolicy"):
        said(unconditional="pads")
    with pytest.raises(ConfigError, match=r"image_steps: expected 16 for JanusPolicy, which draws one token after"):
        show(SyncR1Config(image_steps=5, output_dir=tmp_path / "run"), lambda ranks: prompts, lambda line: None)
