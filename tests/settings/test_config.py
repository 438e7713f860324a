"""sync_r1_config.py and schema.py: what cannot work is refused, with field and remedy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from syncr1.engine.corl.config import CorlConfig
from syncr1.engine.errors import ConfigError
from syncr1.engine.methods.evaluation_config import EvaluateConfig
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.settings.schema import nearest_choice, settings_of
from syncr1.engine.settings.train_config import GpuName
from syncr1.engine.settings.yaml_files import from_yaml, to_yaml

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "sync_r1.yaml"

IMPOSSIBLE: list[tuple[dict[str, Any], str, str]] = [
    ({"num_generations": 1}, "num_generations", "at least 2"),
    ({"num_generations": 8.0}, "num_generations", "an integer"),
    ({"num_generations": True}, "num_generations", "an integer"),
    ({"max_steps": 0}, "max_steps", "at least 1"),
    ({"prompts_per_step": -1}, "prompts_per_step", "at least 1"),
    ({"num_iterations": 0}, "num_iterations", "at least 1"),
    ({"seed": -1}, "seed", "2^32"),
    ({"temperature": 0.0}, "temperature", "more than 0"),
    ({"max_completion_length": 0}, "max_completion_length", "at least 1"),
    ({"top_k": -1}, "top_k", "at least 0"),
    ({"top_k": 2.5}, "top_k", "an integer"),
    ({"top_p": 0.0}, "top_p", "more than 0"),
    ({"top_p": 1.1}, "top_p", "at most 1"),
    ({"min_p": -0.1}, "min_p", "at least 0"),
    ({"min_p": float("nan")}, "min_p", "a finite number"),
    ({"image_top_k": -1}, "image_top_k", "none is as top_k"),
    ({"image_top_p": 0.0}, "image_top_p", "1 keeps all"),
    ({"image_min_p": 2.0}, "image_min_p", "at most 1"),
    ({"cfg_weight": -0.1}, "cfg_weight", "at least 0"),
    ({"learning_rate": float("nan")}, "learning_rate", "a finite number"),
    ({"learning_rate": float("inf")}, "learning_rate", "a finite number"),
    ({"learning_rate": 0.0}, "learning_rate", "more than 0"),
    ({"learning_rate": "fast"}, "learning_rate", "a number"),
    ({"max_grad_norm": -1.0}, "max_grad_norm", "0 switches clipping off"),
    ({"beta": -0.1}, "beta", "at least 0"),
    ({"loss_type": "dpao"}, "loss_type", "did you mean dapo"),
    ({"epsilon": 0.0}, "epsilon", "below 1"),
    ({"epsilon": 1.0}, "epsilon", "below 1"),
    ({"epsilon_high": 0.0}, "epsilon_high", "more than 0"),
    ({"delta": 1.2}, "delta", "1 + epsilon_high = 1.2"),
    ({"delta": 1.25, "epsilon_high": 0.28}, "delta", "1.28"),
    ({"delta": 2.0, "loss_type": "sapo"}, "delta", "no such bound"),
    ({"loss_type": "cispo"}, "epsilon_high", "bounds the ratio itself"),
    ({"loss_type": "cispo", "epsilon_high": 5.0, "image_epsilon_high": 0.5}, "image_epsilon_high", "got 0.5; 5 is"),
    ({"delta": 1.25, "image_epsilon": 0.3}, "delta", "1 + epsilon_high = 1.3"),
    ({"image_epsilon": 1.0}, "image_epsilon", "below 1"),
    ({"image_epsilon_high": 0.0}, "image_epsilon_high", "more than 0"),
    ({"image_beta": -0.1}, "image_beta", "at least 0"),
    ({"image_temperature": 0.0}, "image_temperature", "more than 0"),
    ({"adam_beta1": 1.0}, "adam_beta1", "below 1"),
    ({"adam_beta2": -0.1}, "adam_beta2", "at least 0"),
    ({"adam_epsilon": 0.0}, "adam_epsilon", "more than 0"),
    ({"top_entropy_quantile": 0.0}, "top_entropy_quantile", "at most 1"),
    ({"top_entropy_quantile": 0.5, "loss_type": "vespo"}, "top_entropy_quantile", "expected 1 for loss_type vespo"),
    ({"importance_correction": "clip"}, "importance_correction", "one of none, truncate, mask"),
    ({"importance_cap": 0.5}, "importance_cap", "at least 1"),
    (
        {"importance_correction": "mask", "importance_level": "sequence", "loss_type": "vespo"},
        "importance_level",
        "expected token for loss_type vespo",
    ),
    ({"refill": -1}, "refill", "at least 0"),
    (
        {"loss_type": "cispo", "epsilon_high": 5.0, "importance_sampling_level": "sequence"},
        "importance_sampling_level",
        "expected token for loss_type cispo",
    ),
    ({"loss_type": "sapo", "importance_sampling_level": "sequence"}, "importance_sampling_level", "take token"),
    ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "importance_sampling_level", "take token"),
    ({"text_loss_weight": -1.0}, "text_loss_weight", "at least 0"),
    ({"text_loss_weight": 0.0, "image_loss_weight": 0.0}, "image_loss_weight", "nothing to learn"),
    ({"credit": "image_only", "image_loss_weight": 0.0}, "image_loss_weight", "nothing to learn"),
    ({"judge_weight": -0.1}, "judge_weight", "at least 0"),
    ({"identity_weight": 0, "judge_weight": 0, "text_weight": 0}, "identity_weight", "got 0 for all"),
    ({"reward_timeout": 0.0}, "reward_timeout", "more than 0"),
    ({"dgs_mass": 0.0}, "dgs_mass", "at most 1"),
    ({"dgs_mass": 1.1}, "dgs_mass", "at most 1"),
    ({"dgs": "top_k"}, "dgs_keep", "expected a number"),
    ({"dgs": "max_variance"}, "dgs_keep", "expected a number"),
    ({"dgs": "max_variance", "dgs_keep": 1}, "dgs_keep", "at least 2"),
    ({"dgs": "top_k", "dgs_keep": 9}, "dgs_keep", "at most num_generations = 8"),
    ({"preview_fraction": 1.0}, "preview_fraction", "below 1"),
    ({"preview_threshold": 1.5}, "preview_threshold", "0 to 1"),
    ({"preview_acceptance": 0.0}, "preview_acceptance", "more than 0"),
    ({"preview_max_attempts": 0}, "preview_max_attempts", "at least 1"),
    ({"preview_dead_band": -0.1}, "preview_dead_band", "at least 0"),
    ({"preview_score": "clip"}, "clip", "expected a CLIP for preview_score clip"),
    ({"anchor_fraction": 1.0}, "anchor_fraction", "below 1"),
    ({"anchor_beta": 0.0}, "anchor_fraction", "the KL term alone"),
    ({"zero_stage": 4}, "zero_stage", "one of 0, 1, 2, 3"),
    ({"zero_stage": True}, "zero_stage", "one of 0, 1, 2, 3"),
    ({"bf16": "yes"}, "bf16", "true or false"),
    ({"max_tokens_per_microbatch": 0}, "max_tokens_per_microbatch", "at least 1"),
    ({"logging_steps": 0}, "logging_steps", "at least 1"),
    ({"sample_steps": -1}, "sample_steps", "at least 0"),
    ({"checkpointing_steps": -1}, "checkpointing_steps", "0 saves at the end alone"),
    ({"save_total_limit": 0}, "save_total_limit", "leave it out to keep all"),
    ({"nodes": 0}, "nodes", "at least 1"),
    ({"ranks_per_node": 0}, "ranks_per_node", "at least 1"),
    ({"max_restarts": -1}, "max_restarts", "at least 0"),
    ({"resume_from_checkpoint": "no/such/run"}, "resume_from_checkpoint", "no folder; correct the path"),
    ({"report_to": ("mlflow",)}, "report_to", "tensorboard"),
    ({"report_to": ("none", "tensorboard")}, "report_to", "expected none alone"),
    ({"report_to": ("all", "all", "wandb")}, "report_to", "got all twice"),
    ({"eval_steps": -1}, "eval_steps", "at least 0"),
    ({"eval_steps": 10, "eval_samples": 0}, "eval_samples", "expected items to score"),
    ({"load_best_model_at_end": True}, "eval_steps", "expected some for load_best_model_at_end"),
    ({"metric_for_best_model": "score"}, "eval_steps", "expected some for metric_for_best_model"),
    ({"lr_scheduler_type": "cosine_with_restarts"}, "lr_scheduler_type", "take cosine"),
    ({"loss_type": "GSPO"}, "loss_type", "importance_sampling_level sequence"),
    ({"scale_rewards": True}, "scale_rewards", "TRL's True is group"),
    ({"resume_from_checkpoint": True}, "resume_from_checkpoint", "take latest"),
    ({"hub_model_id": "a/b/c"}, "hub_model_id", "organisation/name"),
    ({"model": ""}, "model", "text"),
    ({"model": "./nowhere"}, "model", "not a folder"),
    ({"model": "a/b/c"}, "model", "not a folder"),
    ({"model": "~/nowhere"}, "model", "not a folder"),
]


@pytest.mark.parametrize(("settings", "field", "words"), IMPOSSIBLE, ids=lambda value: str(value)[:50])
def test_impossible_settings_are_refused(settings: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SyncR1Config(**settings)
    lines = [line for line in str(caught.value).splitlines() if line.startswith(field)]
    assert lines, caught.value
    assert any(words in line for line in lines), lines


def test_all_problems_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        SyncR1Config(num_generations=1, temperature=-1.0, nodes=0)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "num_generations",
        "temperature",
        "nodes",
    ]


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        *[("a100-80gb", "a100"), ("A100", "a100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("a100-sxm-40gb", "a100-40gb")],
        *[("NVIDIA H100 PCIe", "h100-pcie"), ("h100_sxm", "h100"), ("h1000", "h100"), ("RTX-4090", "rtx4090")],
        *[("NVIDIA GeForce RTX 4090", "rtx4090"), ("4090", "rtx4090"), ("b200-192gb", "b200"), ("L40", "l40s")],
        *[("mi300x", None), ("", None), ("-", None), ("tpu v5", None)],
    ],
)
def test_the_gpu_that_is_meant(said: str, meant: str | None) -> None:
    assert nearest_choice(said, get_args(GpuName)) == meant


def test_a_wrong_type_hides_no_range() -> None:
    """Only rules over several settings wait until every type is right."""
    with pytest.raises(ConfigError) as caught:
        SyncR1Config(learning_rate="fast", nodes=0, dgs="top_k")  # type: ignore[arg-type]
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["learning_rate", "nodes"]


def test_every_number_has_a_range() -> None:
    """`delta` is compared with another setting, by a rule."""
    for config in (SyncR1Config, CorlConfig, EvaluateConfig):
        numbers = [s for s in settings_of(config) if s.type in (int, float, int | None, float | None)]
        assert [s.name for s in numbers if s.range is None] in (["delta"], [])
        assert all(s.range.remedy and str(s.range) for s in numbers if s.range is not None)


def test_possible_settings_pass() -> None:
    SyncR1Config()
    SyncR1Config(beta=0.0, anchor_fraction=0.0)
    SyncR1Config(loss_type="cispo", epsilon_high=5.0)
    SyncR1Config(delta=1.21, max_grad_norm=0.0, dgs="random", eval_samples=0, report_to=("tensorboard",))
    assert SyncR1Config(model="org/name-7B").model == "org/name-7B"
    config = SyncR1Config(learning_rate=1, output_dir="runs/x", dgs="top_k", dgs_keep=8)  # type: ignore[arg-type]
    assert isinstance(config.learning_rate, float)
    assert config.output_dir == Path("runs/x")


def test_model_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ConfigError, match="not a folder"):  # a hub name by its looks, but `runs` is a folder here
        SyncR1Config(model="runs/typo")
    (tmp_path / "runs" / "base").mkdir()
    (tmp_path / "runs" / "base" / "config.json").write_text("{}")
    assert SyncR1Config(model="runs/base", data=tmp_path).data == tmp_path
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output_dir"):
        SyncR1Config(output_dir=tmp_path / "file")


def test_missing_tracker_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install trackio"):
        SyncR1Config(report_to=("trackio",))


def test_every_field_is_explained_and_frozen() -> None:
    for setting in settings_of(SyncR1Config):
        assert setting.doc, setting.name
        assert setting.section != "settings", setting.name
    with pytest.raises(dataclasses.FrozenInstanceError):
        SyncR1Config().seed = 1  # type: ignore[misc]


def test_recipe_yaml_is_in_sync_with_the_dataclass() -> None:
    text = RECIPE.read_text(encoding="utf-8")
    assert text.endswith(to_yaml(SyncR1Config())), "run the command at the top of recipes/sync_r1.yaml"
    assert from_yaml(SyncR1Config, RECIPE) == SyncR1Config()


@pytest.mark.parametrize("comments", [True, False])
def test_yaml_round_trip_is_identity(comments: bool) -> None:
    config = SyncR1Config(
        learning_rate=1e-6,
        model="org/name",
        output_dir=Path("runs/a: b #c"),
        report_to=("tensorboard",),
        dgs="top_k",
        dgs_keep=3,
        bf16=True,
        zero_stage=2,
    )
    text = to_yaml(config, comments=comments)
    again = from_yaml(SyncR1Config, text)
    assert again == config
    assert to_yaml(again, comments=comments) == text
    assert isinstance(yaml.safe_load(text)["learning_rate"], float)  # other readers get a number too


@pytest.mark.parametrize(
    ("text", "field", "expected"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("model: None", "model", None),
        ("model: null", "model", None),
        ("scale_rewards: none", "scale_rewards", "none"),
        ("report_to: [tensorboard]", "report_to", ("tensorboard",)),
        ("report_to: tensorboard", "report_to", ("tensorboard",)),  # as transformers takes it
        ("report_to: none", "report_to", ("none",)),
        ("output_dir: runs/x", "output_dir", Path("runs/x")),
        ("", "seed", 0),
        ("# only a comment", "seed", 0),
    ],
)
def test_yaml_values(text: str, field: str, expected: object) -> None:
    assert getattr(from_yaml(SyncR1Config, text), field) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat: 1", "did you mean learning_rate"),
        ("lr: 1e-4", "set learning_rate"),
        ("speed: nan", "unknown setting"),
        ("learning_rate: .nan", "a finite number"),
        ("learning_rate: nan", "a finite number"),
        ("learning_rate: -.inf", "a finite number"),
        ("learning_rate: true", "a number"),
        ("beta: 1\nseed: 2\nbeta: 3", "beta: expected once, got it given twice (line 3)"),
        ("beta: !!python/object/apply:os.system [exit]", "not plain YAML"),
        ("beta: !!python/name:os.system", "not plain YAML"),
        ("beta: [1, 2]", "beta: expected a number"),
        ("seed: '3'", "seed: expected an integer"),
        ("bf16: 1", "bf16: expected true or false"),
        ("zero_stage: true", "zero_stage"),
        ("model_name_or_path: x", "set model"),
        ("- a\n- b", "expected `setting: value`"),
        ("a: b: c", "not plain YAML"),
        ("{[1]: 2}", "not plain YAML"),
        ("RENAMED: 1", "unknown setting"),
    ],
)
def test_yaml_refusals(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_yaml(SyncR1Config, text)
    assert words in str(caught.value)


def test_yaml_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not there"):
        from_yaml(SyncR1Config, tmp_path / "no.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        from_yaml(SyncR1Config, tmp_path / "binary.yaml")
    (tmp_path / "big.yaml").write_text("#" * (1 << 21))
    with pytest.raises(ConfigError, match="no settings file"):
        from_yaml(SyncR1Config, tmp_path / "big.yaml")
