"""Whole CoRL runs: every stage from a user's own checkpoints and photographs, and the strategies of the pilot study."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
import warm
from helpers import ROOT, environment, rows_of
from made import cache_folder, short_base
from PIL import Image
from recipe_cases import recipe_here
from safetensors.torch import load_file
from skimage import data
from small_emu3 import sharp_emu3
from small_models import saved, small_bert, small_blip, small_clip, small_janus

from syncr1.engine.corl.config import CorlConfig
from syncr1.engine.corl.run import Model, products, run
from syncr1.engine.errors import ConfigError
from syncr1.engine.learn.trainer import Trainer
from syncr1.engine.policies.auto import load_policy

RECIPE = str(ROOT / "recipes" / "corl.py")
PHOTOS = {
    "astronaut": ("a woman in a space suit", "woman"),
    "coffee": ("a cup of coffee", "cup"),
    "cat": ("a cat", "cat"),
}
BREVITY = ROOT / "tests" / "support" / "brevity.py"
"""A user's own reward, which any policy's texts differ in."""
OPTIONS = "A. woman\nB. cup\nC. cat"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: photographs and x2x_rft_22k's columns, a training and a test split."""
    root = tmp_path_factory.mktemp("photographs")
    rows = []
    for index, (name, (caption, what)) in enumerate(PHOTOS.items()):
        Image.fromarray(getattr(data, name)()).save(root / f"{name}.jpg")
        common = {"prompt": caption, "real_image": f"{name}.jpg"}
        for problem, solution, kind in ((f"What is it?\n{OPTIONS}", "ABC"[index], "MC"), ("What is it?", what, "OE")):
            asked = {"qa_problem": problem, "qa_solution": f"<answer>{solution}</answer>", "qa_type": kind}
            rows.append(common | asked)
    for split in ("train", "test"):
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def changed(one: str | Path, other: str | Path) -> set[str]:
    a, b = tensors(one), tensors(other)
    return {name for name in a if not torch.equal(a[name], b[name])}


@pytest.mark.slow
def test_the_whole_recipe_from_a_users_checkpoints_and_photographs(
    photographs: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    janus, blip, bert, clip = (
        saved(make, tmp_path_factory) for make in (small_janus, small_blip, small_bert, small_clip)
    )
    flags = [
        "--model", janus, "--data", photographs, "--output_dir", tmp_path / "run", "--captioner", blip,
        "--cycle_text", "bertscore", "--bert", bert, "--clip", clip, "--lpips_net", "squeeze",
        "--lpips_weights", "random", "--lpips_size", "32",
        "--reward_funcs", "cycle", "tim", "accuracy", "format", "clip_text",
        "--max_steps", "1", "--refined_max_steps", "1", "--prompts_per_step", "2", "--num_generations", "2",
        "--refined_num_generations", "2", "--refined_t2i_prompts_per_step", "2", "--refined_text_prompts_per_step", "2",
        "--max_completion_length", "6", "--learning_rate", "1e-3", "--refined_learning_rate", "1e-3",
        "--eval_samples", "2", "--gradient_checkpointing", "--eval_steps", "1", "--load_best_model_at_end", "True",
        "--run_name", "photographs",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, RECIPE, *map(str, flags)],
        cwd=tmp_path,
        env=environment(tmp_path / "cache"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    folder = tmp_path / "run"
    for name in ("unified", "t2i", "mcq", "oe"):
        saved_model = folder / name / "checkpoints" / "last"
        assert load_policy(saved_model).num_image_tokens == 16
        card = (saved_model / "README.md").read_text()
        assert "library_name: transformers" in card and str(tmp_path) not in card
        (row,) = rows_of(folder / name)
        expected = {"cycle", "tim", "accuracy", "format", "clip_text"}
        expected &= {"t2i": {"cycle", "tim", "clip_text"}, "unified": expected}.get(name, {"accuracy", "format"})
        assert {key.split("/")[1] for key in row if key.startswith("rewards/")} == expected
        assert row["reward_failures"] == 0 and row["rollout/replay_logp_max_abs"] <= 1e-4
        assert (row["kl"] is not None) and row["loss"] is not None
        best = json.loads((folder / name / "checkpoints" / "best" / "best.json").read_text())
        assert best["step"] == 1 and best["value"] == row["eval/score"]
        assert f"# photographs-{name}\n" in card
    assert (folder / "report.html").is_file() and "Every model of the run" in done.stdout
    record = json.loads((folder / "merged" / "merge.json").read_text())
    assert {Path(model["name"]).name for model in record["models"]} == {"best"}
    assert not (folder / "merged" / "best.json").exists()
    assert record["method"] == "gaussian" and load_policy(folder / "merged").image_size == 32
    frozen = ("vision_model", "vqmodel", "model.aligner")
    moved = changed(janus, folder / "merged")
    assert moved and not {name for name in moved if any(part in name for part in frozen)}
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["before"]["mcq/score/greedy"] is not None and scores["after"]["t2i/reward/cycle"] is not None


def small_config(photographs: Path, base: Path, tmp_path: Path, **changes: Any) -> CorlConfig:
    small: dict[str, Any] = {
        "model": str(base), "data": str(photographs), "output_dir": tmp_path / "run", "max_steps": 1,
        "refined_max_steps": 1, "prompts_per_step": 2, "num_generations": 2, "refined_num_generations": 2,
        "refined_t2i_prompts_per_step": 2, "refined_text_prompts_per_step": 2, "max_completion_length": 4,
        "reward_funcs": ("tim", f"{BREVITY}:brevity"), "learning_rate": 1e-3, "refined_learning_rate": 1e-3,
        "eval_samples": 0, "think_instruction": False,
    }  # fmt: skip
    return CorlConfig(**(small | changes))


@pytest.fixture(scope="module")
def base() -> Path:
    return short_base()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "stage", "folders"),
    [
        ("alternating", "unified", ["unified"]),
        ("separate", "unified", ["generation", "understanding"]),
        ("separate_merged", "unified", ["generation", "merged_first", "understanding"]),
    ],
)
def test_strategies_of_the_pilot_study(
    strategy: str, stage: str, folders: list[str], photographs: Path, base: Path, tmp_path: Path
) -> None:
    config = small_config(photographs, base, tmp_path, strategy=strategy, stage=stage, max_steps=2)
    assert run(config) == {}  # nothing was scored
    made = {path.parent.parent.name for path in (tmp_path / "run").glob("*/checkpoints/last")}
    made |= {path.parent.name for path in (tmp_path / "run").glob("*/merge.json")}
    assert sorted(made) == folders
    rows = {
        path.parent.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / "run").glob("*/metrics.jsonl")
    }
    judged = {name: [{key for key in row if key.startswith("rewards/")} for row in some] for name, some in rows.items()}
    drawing, answering = ({f"rewards/{name}/{what}" for what in ("mean", "std")} for name in ("tim", "brevity"))
    if strategy == "alternating":
        assert judged["unified"] == [drawing, answering]
    else:
        assert judged["generation"] == [drawing] * 2 and judged["understanding"] == [answering] * 2


@pytest.mark.slow
@pytest.mark.parametrize("unify", ["reward", "advantage", "none"])
def test_what_halves_share(unify: str, photographs: Path, base: Path, tmp_path: Path) -> None:
    config = small_config(photographs, base, tmp_path, unify=unify, stage="unified", sample_steps=1, num_generations=3)
    run(config)
    rows = [json.loads(line) for line in (tmp_path / "run/unified/samples/step_000001.jsonl").read_text().splitlines()]
    by_half: dict[str, dict[int, float]] = {"t2i": {}, "mm2t": {}}
    first = rows[0]["id"].rpartition("/")[0]
    for row in rows:
        name, _, half = row["id"].rpartition("/")
        if name == first:
            by_half[half][row["member"]] = row["rewards"]["reward"]
    assert len(by_half["t2i"]) == len(by_half["mm2t"]) == 3
    assert (by_half["t2i"] == by_half["mm2t"]) == (unify != "none")


@pytest.mark.slow
def test_bf16_goes_through_every_stage(photographs: Path, base: Path, tmp_path: Path) -> None:
    run(small_config(photographs, base, tmp_path, bf16=True, zero_stage=2, eval_samples=2))
    merged = tensors(tmp_path / "run" / "merged")
    assert all(value.dtype == torch.bfloat16 for name, value in merged.items() if value.is_floating_point())
    (row,) = rows_of(tmp_path / "run/unified")
    assert row["reward_failures"] == 0 and row["rollout/replay_logp_max_abs"] <= 0.5


@pytest.mark.slow
def test_ctrl_c_makes_the_current_training_the_last(
    photographs: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trainer.train_step

    def interrupted(self: Trainer) -> Any:
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return trained(self)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    summaries = run(small_config(photographs, base, tmp_path, max_steps=5, eval_samples=2))
    assert list(summaries) == ["base", "unified"]
    rows = (tmp_path / "run" / "unified" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 2, "the step under way is finished, and no other begun"
    assert changed(base, tmp_path / "run" / "unified" / "checkpoints" / "last"), "what was learnt is kept"
    assert (tmp_path / "run" / "report.html").is_file() and not (tmp_path / "run" / "t2i").exists()


@pytest.mark.slow
def test_adapters_in_place_of_weights(photographs: Path, base: Path, tmp_path: Path) -> None:
    run(small_config(photographs, base, tmp_path, stage="oe", lora_rank=2, gradient_checkpointing=True,
                     refined_num_generations=6, max_completion_length=8, refined_max_steps=2))  # fmt: skip
    saved_model = tmp_path / "run" / "oe" / "checkpoints" / "last"
    adapter = load_file(saved_model / "adapter" / "adapter_model.safetensors")
    assert adapter and all("lora_" in name for name in adapter)
    moved = changed(base, saved_model)  # what was saved is the merged model
    assert moved and all("language_model" in name and "_proj" in name for name in moved)


@pytest.mark.slow
def test_emu3_goes_through_the_same_recipe(photographs: Path, tmp_path: Path) -> None:
    emu3 = tmp_path / "emu3"
    sharp_emu3().save(emu3)
    run(small_config(photographs, emu3, tmp_path, eval_samples=2))
    (row,) = rows_of(tmp_path / "run/unified")
    assert row["rollout/replay_logp_max_abs"] <= 1e-4 and row["reward_failures"] == 0
    merged = load_policy(tmp_path / "run" / "merged")
    assert type(merged).__name__ == "Emu3Policy" and changed(emu3, tmp_path / "run" / "merged")


@pytest.mark.slow
def test_one_refined_stage_and_a_merge_stand_alone(photographs: Path, base: Path, tmp_path: Path) -> None:
    run(small_config(photographs, base, tmp_path, stage="mcq"))
    run(small_config(photographs, base, tmp_path, stage="oe"))
    models = tuple(str(path) for path in sorted(tmp_path.glob("run*/*/checkpoints/last")))
    assert len(models) == 2
    run(small_config(photographs, base, tmp_path, stage="merge", merge_models=models, merge_base=str(base),
                     output_dir=tmp_path / "merge", merge_method="mean"))  # fmt: skip
    a, b, merged = (tensors(folder) for folder in (*models, tmp_path / "merge" / "merged"))
    for name, value in merged.items():
        torch.testing.assert_close(value, (a[name] + b[name]) / 2, rtol=1e-6, atol=1e-7)


def test_a_dry_run_shows_settings_and_prompts_and_trains_nothing(
    photographs: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """In this process; test_security.py starts the recipe's in another."""
    monkeypatch.setenv("SYNCR1_CACHE", str(cache_folder()))
    out, _ = recipe_here(
        capsys, "corl.py", "--dry_run", "--model", base, "--data", photographs, "--output_dir", tmp_path / "run",
        "--prompts_per_step", 2, "--refined_t2i_prompts_per_step", 2, "--refined_text_prompts_per_step", 2,
        "--max_completion_length", 16, "--captioner", "world", "--spice_parser", "world", "--lpips_weights", "random",
    )  # fmt: skip
    assert "a cup of coffee" in out and "captioner: world" in out
    assert out.index("all 4 trainings take about") < out.index("# unified") < out.index("it will take about")
    assert not (tmp_path / "run").exists()


def test_a_step_larger_than_the_data_is_refused_by_name(photographs: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="refined_text_prompts_per_step: training mcq has 3 samples"):
        run(small_config(photographs, base, tmp_path, stage="mcq", refined_text_prompts_per_step=32))


@pytest.mark.slow
def test_two_ranks_share_samples_and_write_one_run(photographs: Path, base: Path, tmp_path: Path) -> None:
    flags = [
        "--model", base, "--data", photographs, "--output_dir", tmp_path / "run", "--reward_funcs", "tim",
        f"{BREVITY}:brevity", "--tim_policy", "frozen", "--max_steps", "1", "--refined_max_steps", "1",
        "--prompts_per_step", "2", "--num_generations", "2", "--refined_num_generations", "6",
        "--refined_t2i_prompts_per_step", "2", "--refined_text_prompts_per_step", "2", "--max_completion_length", "8",
        "--learning_rate", "1e-3", "--eval_samples", "0", "--no_think_instruction", "--zero_stage", "3",
    ]  # fmt: skip
    warm.run(RECIPE, *map(str, flags), env=environment(tmp_path / "cache"), ranks=2)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["run"]
    for name in ("unified", "t2i", "mcq", "oe"):
        assert changed(base, tmp_path / "run" / name / "checkpoints" / "last"), name
    assert changed(base, tmp_path / "run" / "merged")


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ("base unified t2i mcq oe merged", ["merged", "t2i"]),
        ("base t2i mcq oe merged", ["merged", "t2i"]),
        ("base unified", [""]),
        ("base generation understanding", ["generation", "understanding"]),
        ("base generation understanding merged_first", [""]),
        ("base mcq", [""]),
        ("base merged", [""]),
        ("base", []),
    ],
)
def test_what_a_run_is_for(made: str, expected: list[str]) -> None:
    """These are uploaded; one alone under the repository's own name."""
    found = products({name: Model(name, name, None) for name in made.split()})
    assert list(found) == expected
    assert all(str(folder) == name for name, folder in found.items() if name)
