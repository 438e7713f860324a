"""Chameleon, Liquid and half an Emu3 through the recipes: trained on a folder, sampled, and what is said of them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import own_process_group, rows_of
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from small_chameleon import sharp_chameleon
from small_emu3 import sharp_emu3
from small_liquid import sharp_liquid

from syncr1.engine.api import Model
from syncr1.engine.errors import DataError
from syncr1.engine.methods.dry_run import show
from syncr1.engine.methods.sample import run_sample
from syncr1.engine.methods.sample_config import SampleConfig
from syncr1.engine.methods.sync_r1 import run
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.policies.auto import load_policy, policy_class
from syncr1.engine.policies.liquid import LiquidPolicy
from syncr1.engine.records import Prompt


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    with own_process_group():
        yield


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_chain(tmp_path: Path) -> None:
    """Guided in the loss as in the drawing, each image in a turn of its own, previews.

    With Liquid, of which everything is to be found out; tests/campaigns has both models, every recipe, and the folder
    of a benchmark."""
    sharp_liquid().save(tmp_path / "model")
    asked = {"segments": "text+image", "answer": "red"}
    rows = [
        asked | {"prompt": f"describe and draw the {thing}", "target": f"a red {thing}"} for thing in ("cup", "hat")
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SyncR1Config(
        model=str(tmp_path / "model"),
        data=tmp_path / "data.jsonl",
        output_dir=tmp_path / "run",
        max_steps=1,
        prompts_per_step=2,
        num_generations=3,
        max_completion_length=5,
        replay_check_steps=1,
        cfg_weight=3.0,
        policy_logp="guided",
        drawing_turn="t2i_r1",
        learning_rate=1e-2,
        warmup_steps=0,
        eval_samples=0,
    )
    run(config)
    (row,) = rows_of(tmp_path / "run")
    assert row["rollout/replay_logp_max_abs"] <= 1e-4 and row["reward_failures"] == 0 and row["grad_norm"] > 0
    assert row["tokens/text"] > 0 and row["tokens/image"] > 0
    last = tmp_path / "run" / "checkpoints" / "last"
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", last))
    assert before.keys() == after.keys()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert any("layers.0" in key for key in moved) and not any("vqmodel" in key for key in moved)
    assert policy_class(last) is policy_class(tmp_path / "model") is LiquidPolicy
    assert "it answers and draws" in (last / "README.md").read_text()
    text, picture = Model.load(last).reason_and_draw("draw <bobo>", max_text_tokens=4)
    assert isinstance(picture, Image.Image) and picture.size == (32, 32) and isinstance(text, str)


def test_what_cannot_be_drawn_is_told_by_a_dry_run(tmp_path: Path) -> None:
    """With the file that is missing, before a weight is loaded."""
    made = sharp_chameleon()
    del made.vqmodel.decoder
    made.save(tmp_path / "chameleon-7b")
    asked = [Prompt(id="a", task="gen", text="draw <bobo>", segments=("image",))]
    config = SyncR1Config(model=str(tmp_path / "chameleon-7b"), output_dir=tmp_path / "run", max_completion_length=4)
    with pytest.raises(DataError, match=r"prompt a asks for an image, but .*vqgan\.ckpt"):
        show(config, lambda ranks: asked, lambda line: None)


def test_half_a_model_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    """The dry run and the samples say which half a checkpoint was trained for, and warn of a chain."""
    sharp_emu3().save(tmp_path / "Emu3-Gen-hf")
    name, lines = str(tmp_path / "Emu3-Gen-hf"), list[str]()
    chain = [Prompt(id="a", task="rea", text="draw it")]
    config = SyncR1Config(model=name, output_dir=tmp_path / "run", max_completion_length=4)
    show(config, lambda ranks: chain, lines.append)
    told = "\n".join(lines)
    assert "Emu3: this checkpoint was trained to draw" in told and "warning: prompts ask for chains of both" in told
    written = io.StringIO()
    run_sample(
        SampleConfig(model=name, prompt=("draw it",), num_generations=1, output_dir=tmp_path / "s"),
        Console(file=written, width=400),
    )
    assert "trained to draw" in written.getvalue() and "warning: prompts" not in written.getvalue()
    kept = load_policy(name)
    kept.save(tmp_path / "last")
    assert json.loads((tmp_path / "last" / "config.json").read_text())["trained_for"] == "image"
