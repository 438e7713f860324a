"""patch_grpo_trainer over whole runs: every logged value is TRL's, and what is left to TRL's loss is said once.

The learning rate is 1e-9: both runs then see the same policy at every step, so that a value that differs was computed
differently, and not after a step that rounded otherwise.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401

import pytest
import torch

pytest.importorskip("trl", minversion="1.16")

from datasets import Dataset
from test_trl import SCORED, batch, make_trainer, prepared, step
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl_cases import LETTERS, reward_letter_a, tiny_model, tokenizer

from syncr1.kernels.trl import patch_grpo_trainer


def messages(record: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in record if "patch_grpo_trainer" in str(w.message)]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> GRPOTrainer:
    return make_trainer(tmp_path_factory.mktemp("trl"), tiny_model(), gradient_accumulation_steps=2)


FEATURES = {
    "entropy bonus": "entropy_coef",
    "high-entropy tokens": "top_entropy_quantile",
    "high-entropy tokens, KL, bonus": "entropy_coef.*top_entropy_quantile",
    "off-policy mask": "off_policy_mask_threshold",
    "advantage per token": "advantages are given per token",
}


@pytest.mark.parametrize("name", SCORED)
def test_a_feature_left_to_trls_loss_is_named_once(
    trainer: GRPOTrainer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    inputs = prepared(trainer, monkeypatch, SCORED[name])
    with pytest.warns(UserWarning, match=FEATURES[name]) as record, patch_grpo_trainer() as active:
        for _ in range(3):
            step(trainer, inputs)
    assert len(messages(list(record))) == 1 and active.counts == {"linear_logp": 3}


def test_what_is_served_warns_of_nothing(trainer: GRPOTrainer) -> None:
    inputs = batch(trainer)
    with warnings.catch_warnings(record=True) as record, patch_grpo_trainer() as active:
        warnings.simplefilter("always")
        step(trainer, inputs)
    assert not messages(record) and active.counts == {"linear_grpo_loss": 1}


def test_experts_fp16_and_a_loss_of_its_own_are_named(tmp_path: Path) -> None:
    experts = make_trainer(
        tmp_path, tiny_model("mixtral", num_local_experts=2, num_experts_per_tok=1, router_aux_loss_coef=0.1)
    )
    cases: list[tuple[GRPOTrainer, str]] = [(experts, "router_aux_loss_coef")]
    cases.append((make_trainer(tmp_path, tiny_model().half()), "fp16"))
    settings = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "gradient_checkpointing": False,
    }
    gmpo = GMPOTrainer(
        tiny_model(),
        reward_letter_a,
        GMPOConfig(str(tmp_path), **settings),
        train_dataset=Dataset.from_dict({"prompt": ["abc", "fgh"]}),
        processing_class=tokenizer(),
    )
    gmpo.current_gradient_accumulation_steps = 1
    cases.append((gmpo, "GMPOTrainer has a loss of its own"))
    for trainer, reason in cases:
        inputs = batch(trainer)
        with pytest.warns(UserWarning, match=reason) as record, patch_grpo_trainer() as active:
            step(trainer, inputs)
            step(trainer, inputs)
        assert len(messages(list(record))) == 1 and active.counts == {"linear_logp": 2}


def logged(folder: Path, model: PreTrainedModel | str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What a run of three steps logs, without times."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-9,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "max_steps": 3,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "seed": 5,
    }
    data = Dataset.from_dict({"prompt": ["abc", "fgh", "dea", "hhb"] * 8})
    kind = dict(settings)
    rewards = kind.pop("rewards", reward_letter_a)
    if kind.get("eval_strategy"):
        kind["eval_steps"] = 2
    trainer = GRPOTrainer(
        model,
        rewards,
        GRPOConfig(str(folder), **(defaults | kind)),
        data,
        eval_dataset=data.select(range(4)) if kind.get("eval_strategy") else None,
        processing_class=tokenizer(),
    )
    trainer.train()
    return [
        {k: v for k, v in entry.items() if not any(word in k for word in ("time", "runtime", "per_second", "flos"))}
        for entry in trainer.state.log_history
    ]


def reward_length(completion_ids: list[list[int]], **_: object) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def reward_sometimes(completion_ids: list[list[int]], **_: object) -> list[float | None]:
    return [None if LETTERS["b"] in ids else float(ids[0]) for ids in completion_ids]


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    **{
        f"loss {kind}": {"loss_type": kind, "num_iterations": 2}
        for kind in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
    },
    "sequence": {"importance_sampling_level": "sequence", "loss_type": "grpo", "num_iterations": 2},
    "luspo per sequence": {"importance_sampling_level": "sequence", "loss_type": "luspo"},
    "KL": {"beta": 0.1},
    "KL, corrected, reused": {"beta": 0.1, "use_bias_correction_kl": True, "num_iterations": 2},
    "clip higher, delta": {"epsilon": 0.1, "epsilon_high": 0.28, "delta": 1.5, "num_iterations": 2},
    "two rewards": {"rewards": [reward_letter_a, reward_length], "reward_weights": [0.7, 0.3]},
    "two rewards, each normalised": {
        "rewards": [reward_letter_a, reward_length],
        "multi_objective_aggregation": "normalize_then_sum",
    },
    "rewards missing": {"rewards": [reward_letter_a, reward_sometimes]},
    "scaled by batch": {"scale_rewards": "batch"},
    "not scaled": {"scale_rewards": "none", "loss_type": "dr_grpo"},
    "truncated masked": {"mask_truncated_completions": True},
    "accumulated": {"gradient_accumulation_steps": 2, "loss_type": "bnpo"},
    "generated ahead": {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
    "entropy quantile": {"top_entropy_quantile": 0.3},
    "entropy bonus": {"entropy_coef": 0.01},
    "off-policy mask": {"off_policy_mask_threshold": 0.5, "loss_type": "grpo", "num_iterations": 2},
    "temperature": {"temperature": 0.6, "top_k": 5},
    "synchronised reference": {"beta": 0.05, "sync_ref_model": True, "ref_model_sync_steps": 1},
    "evaluation": {"eval_strategy": "steps"},
    "bf16": {"bf16": True},
}
LEFT = {"entropy quantile", "entropy bonus", "off-policy mask"}
TOLERANCE = {"bf16": 3e-2}
"""1e-4 elsewhere: gradients are norms over all parameters, ratios exponentials of differences of rounding."""


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_logged_value_is_trls(tmp_path: Path, name: str) -> None:
    checkpoint = tmp_path / "model"
    tiny_model().save_pretrained(checkpoint)
    expected = logged(tmp_path / "a", str(checkpoint), RUNS[name])
    with warnings.catch_warnings(record=True) as record, patch_grpo_trainer() as active:
        warnings.simplefilter("always")
        found = logged(tmp_path / "b", str(checkpoint), RUNS[name])
    assert active.counts["linear_logp" if name in LEFT else "linear_grpo_loss"] >= 3 and not active.counts["trl"]
    assert len(messages(record)) == (name in LEFT)
    assert len(found) == len(expected) >= 4
    tolerance = TOLERANCE.get(name, 1e-4)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert mine[key] == pytest.approx(value, rel=tolerance, abs=tolerance / 10, nan_ok=True), key
    assert any(abs(entry.get("grad_norm", 0.0)) > 1e-6 for entry in expected)
    assert not torch.isnan(torch.tensor([entry["loss"] for entry in expected if "loss" in entry])).any()
