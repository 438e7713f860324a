"""recipes/convert.py both ways; and a run that starts from DeepSeek's layout, whose result goes back into it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import warm
from deepseek_janus import save_small
from made import cache_folder
from mistake import PROMPTS
from small_show_o import publish

from syncr1.engine.checkpoints.deepseek_files import RECORD
from syncr1.engine.checkpoints.weight_source import weights_in

REWARD = "def steps(*, completions, **_):\n    return [float(n) for n in range(len(completions))]\n"


def run(folder: Path, script: str, *flags: str) -> str:
    """What a recipe says, started in `folder`."""
    env = warm.environment(cache_folder()) | {"SYNCR1_CACHE": str(folder / "cache")}
    running = warm.Program(str(warm.ROOT / "recipes" / script), *flags, env=env, cwd=folder, torch=True)
    out, said = running.communicate(timeout=300)
    assert running.poll() == 0, said
    return out


@pytest.mark.slow
def test_a_run_from_deepseeks_layout_and_back(tmp_path: Path) -> None:
    before = save_small(tmp_path / "janus", weights="bin_shards")
    (tmp_path / "rows.jsonl").write_text(PROMPTS)
    (tmp_path / "mine.py").write_text(REWARD)
    flags = ["--model", "janus", "--data", "rows.jsonl", "--reward_funcs", "mine.py:steps", "--prompts_per_step", "1"]
    flags += ["--num_generations", "2", "--max_steps", "1", "--eval_samples", "0", "--max_completion_length", "4"]
    looked = run(tmp_path, "sync_r1.py", *flags, "--output_dir", "run", "--dry_run")
    assert "janus is in DeepSeek's layout: a run converts it once" in looked and not [
        *(tmp_path / "cache").rglob("*.safetensors")
    ]
    said = run(tmp_path, "sync_r1.py", *flags, "--output_dir", "run")
    assert "converting it to transformers', once" in said and "step 1/1" in said
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert "its conversion is kept in" in run(tmp_path, "sync_r1.py", *flags, "--output_dir", "run", "--dry_run")
    assert "model: janus" in (tmp_path / "run" / "config.yaml").read_text(), "not a place in the cache"
    told = run(tmp_path, "convert.py", "--model", "run/checkpoints/last", "--base", "janus", "--output", "back")
    assert f"{len(before)} tensors" in told and "saved back in" in told
    after = weights_in(tmp_path / "back")
    assert set(after.tensors) == set(before)
    moved = [
        name
        for name, tensor in before.items()
        if not torch.equal(after.elements(name, 0, tensor.numel()), tensor.flatten())
    ]
    assert moved and all(name.startswith(("language_model", "gen_")) for name in moved)
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "janus" / "config.json").read_bytes()


@pytest.mark.slow
def test_flags_to_a_folder_and_what_is_said(tmp_path: Path) -> None:
    save_small(tmp_path / "janus")
    there = run(tmp_path, "convert.py", "--model", "janus", "--output", "ours", "--to", "transformers")
    assert "converting janus into transformers' layout" in there
    assert "282 tensors, 0.00 GB in 1 file, bit for bit" in there and "attn_pool (13)" in there
    assert "no counterpart: processor_config.json: mask_prompt and ignore_id" in there
    back = run(tmp_path, "convert.py", "--model", "ours", "--output", "theirs", "--max_shard_gb", "0.001")
    assert "into DeepSeek's layout" in back and "288 tensors" in back and "written as zeros" not in back
    record = json.loads((tmp_path / "theirs" / RECORD).read_text())
    assert record["to"] == "deepseek" and len(record["written"]) > 3 and list(record["read"]) == ["model.safetensors"]


@pytest.mark.slow
def test_show_o_with_named_tokenizers(tmp_path: Path) -> None:
    before = publish(tmp_path / "theirs", more=3)
    for name in ("magvitv2", "phi-1_5"):
        (tmp_path / "theirs" / name).rename(tmp_path / name)
    file = (tmp_path / "magvitv2" / "pytorch_model.bin").rename(tmp_path / "vq.bin")
    flags = ["--model", "theirs", "--vq", file.name, "--tokenizer", "phi-1_5", "--output", "ours"]
    said = run(tmp_path, "convert.py", *flags)
    assert "converting theirs into transformers' layout" in said and f"{len(before)} tensors" in said
    assert "no counterpart: 3 rows of text have no token" in said
    back = run(tmp_path, "convert.py", "--model", "ours", "--output", "back")
    assert "into showlab's layout" in back and "of the image tokenizer, in magvitv2/: " in back
