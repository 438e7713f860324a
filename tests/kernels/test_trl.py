"""patch_grpo_trainer: the same losses, gradients, metrics and training runs as TRL's own code."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", minversion="1.16")

from datasets import Dataset
from helpers import environment
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import utils
from trl_cases import LETTERS, reward_letter_a, tiny_model, tokenizer

from syncr1.kernels import dispatch
from syncr1.kernels.trl import Patch, patch_grpo_trainer

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "grpo_trl.py"
LENGTHS = [6, 4, 0, 1]
"""Completion tokens: full, ended early, truncated and masked out, one token."""
PROMPT_LENGTH = 3


def make_trainer(folder: Path, model: PreTrainedModel | str, **settings: Any) -> GRPOTrainer:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "learning_rate": 1e-2,
        "logging_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "gradient_checkpointing": False,
    }  # fmt: skip
    config = GRPOConfig(str(folder), **(defaults | settings))
    dataset = Dataset.from_dict({"prompt": ["abc", "fgh", "dea", "hhb"] * 8})
    trainer = GRPOTrainer(model, reward_letter_a, config, dataset, processing_class=tokenizer())
    trainer.current_gradient_accumulation_steps = config.gradient_accumulation_steps
    return trainer


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> GRPOTrainer:
    """Constructed before the patch: trainers that exist already are served as well."""
    folder = tmp_path_factory.mktemp("trl")
    return make_trainer(folder, tiny_model(), gradient_accumulation_steps=2, steps_per_generation=3)


def batch(trainer: GRPOTrainer, seed: int = 0) -> dict[str, Any]:
    """Random completions with log-ratios on both sides of every clip bound."""
    random = torch.Generator().manual_seed(seed)
    num_sequences, width = len(LENGTHS), max(LENGTHS)
    prompt_ids = torch.randint(2, len(LETTERS), (num_sequences, PROMPT_LENGTH), generator=random)
    completion_ids = torch.randint(2, len(LETTERS), (num_sequences, width), generator=random)
    prompt_mask = torch.ones_like(prompt_ids)
    prompt_mask[1, 0] = 0
    completion_mask = (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).long()
    ids, mask = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, completion_mask], 1)
    with torch.no_grad():
        logp, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)
    noise = torch.randn(2, num_sequences, width, generator=random)
    return {
        "prompt_ids": prompt_ids, "prompt_mask": prompt_mask,
        "completion_ids": completion_ids, "completion_mask": completion_mask,
        "advantages": torch.tensor([1.2, -0.7, 0.4, 0.0]), "num_items_in_batch": torch.tensor(29),
        "old_per_token_logps": logp + 0.4 * noise[0], "ref_per_token_logps": logp + 0.3 * noise[1],
    }  # fmt: skip


def step(trainer: GRPOTrainer, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], dict[str, list[float]]]:
    """Loss, gradients and metrics of one micro-batch."""
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model_wrapped, dict(inputs))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, {name: list(values) for name, values in trainer._metrics["train"].items()}


def assert_same_step(trainer: GRPOTrainer, inputs: dict[str, Any], rtol: float = 1e-5) -> Patch:
    trainer.model.train()
    expected = step(trainer, inputs)
    with patch_grpo_trainer() as active:
        got = step(trainer, inputs)
    torch.testing.assert_close(got[0], expected[0], rtol=rtol, atol=rtol / 10)
    assert got[1].keys() == expected[1].keys() == dict(trainer.model.named_parameters()).keys()
    for name, gradient in expected[1].items():
        error = (got[1][name] - gradient).norm() / gradient.norm()
        assert float(error) < 2 * rtol and float(gradient.norm()) > 0, name
    assert got[2].keys() == expected[2].keys()
    for name, values in expected[2].items():
        assert got[2][name] == pytest.approx(values, rel=rtol, abs=rtol / 10, nan_ok=True), name
    return active


# Settings by the name under which the trainer reads them; `args.…` for those that it reads from its arguments.
FUSED: dict[str, dict[str, Any]] = {
    "dapo": {},
    "dapo, delta": {"args.delta": 1.3, "epsilon_high": 0.28},
    "dapo, on policy": {"on_policy": True},
    "dapo, unbiased KL": {"beta": 0.04, "args.use_bias_correction_kl": True},
    "dapo, tools": {"tools": True, "beta": 0.04},
    "grpo": {"loss_type": "grpo"},
    "grpo, KL, per sequence": {"loss_type": "grpo", "beta": 0.04, "importance_sampling_level": "sequence"},
    "grpo, tools, per sequence": {"loss_type": "grpo", "tools": True, "importance_sampling_level": "sequence"},
    "bnpo, KL": {"loss_type": "bnpo", "beta": 0.04},
    "dr_grpo, per sequence": {"loss_type": "dr_grpo", "importance_sampling_level": "sequence", "args.delta": 1.5},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
    "cispo, on policy, KL": {"loss_type": "cispo", "epsilon_high": 5.0, "on_policy": True, "beta": 0.04},
    "sapo": {"loss_type": "sapo", "args.sapo_temperature_pos": 0.8},
    "sapo, per sequence, KL": {"loss_type": "sapo", "importance_sampling_level": "sequence", "beta": 0.04},
    "vespo": {"loss_type": "vespo"},
    "vespo, KL": {"loss_type": "vespo", "beta": 0.04, "args.vespo_k_neg": 2.0, "args.vespo_lambda_pos": 1.0},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "luspo, per token, KL": {"loss_type": "luspo", "beta": 0.04},
    "dapo, vllm per token": {"vllm": "token"},
    "dapo, vllm uncorrected": {"vllm": "token", "vllm_importance_sampling_correction": False},
    "vespo, vllm uncorrected": {"loss_type": "vespo", "vllm": "token", "vllm_importance_sampling_correction": False},
    "grpo, vllm per sequence": {"loss_type": "grpo", "vllm": "sequence", "beta": 0.04},
    "vespo, vllm per token": {"loss_type": "vespo", "vllm": "token"},
    "vespo, vllm per sequence": {"loss_type": "vespo", "vllm": "sequence"},
}
SCORED: dict[str, dict[str, Any]] = {
    "entropy bonus": {"entropy_coef": 0.02, "_entropy_bonus_enabled": True},
    "high-entropy tokens": {"top_entropy_quantile": 0.5},
    "high-entropy tokens, KL, bonus": {"top_entropy_quantile": 0.5, "beta": 0.04, "entropy_coef": 0.02,
                                       "_entropy_bonus_enabled": True},
    "off-policy mask": {"off_policy_mask_threshold": 0.01, "loss_type": "grpo"},
    "advantage per token": {"advantages": "tokens"},
}  # fmt: skip


def prepared(trainer: GRPOTrainer, monkeypatch: pytest.MonkeyPatch, case: dict[str, Any]) -> dict[str, Any]:
    """The trainer set up and the inputs of one case."""
    inputs, case = batch(trainer), dict(case)
    shape = inputs["completion_mask"].shape
    random = torch.Generator().manual_seed(7)
    if case.pop("on_policy", False):
        del inputs["old_per_token_logps"]
    if case.pop("tools", False):
        inputs["tool_mask"] = (torch.rand(shape, generator=random) > 0.4).long()
    if case.pop("advantages", None):
        inputs["advantages"] = torch.randn(shape, generator=random)
    if kind := case.pop("vllm", None):
        ratio = (0.5 * torch.randn(shape if kind == "token" else (shape[0], 1), generator=random)).exp()
        ratio[0, 0] = 0.0  # masked out by vLLM's importance sampling mask
        if kind == "token":
            ratio = torch.where(inputs["completion_mask"].bool(), ratio, 1.0)
        inputs["importance_sampling_ratio"] = ratio
        case = {"use_vllm": True, "vllm_importance_sampling_correction": True} | case
    for setting, value in case.items():
        owner, name = (trainer.args if setting.startswith("args.") else trainer), setting.removeprefix("args.")
        assert hasattr(owner, name), name
        monkeypatch.setattr(owner, name, value)
    return inputs


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = dispatch.available()[request.param]
    if reason != "ok":
        pytest.skip(reason)
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, request.param)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", FUSED)
def test_fused_loss_is_trls(trainer: GRPOTrainer, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    inputs = prepared(trainer, monkeypatch, FUSED[name])
    assert assert_same_step(trainer, inputs).counts == {"linear_grpo_loss": 1}


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_evaluation(trainer: GRPOTrainer, monkeypatch: pytest.MonkeyPatch, loss_type: str) -> None:
    """It scales for no accumulation, and needs no gradient."""
    inputs = prepared(trainer, monkeypatch, {"loss_type": loss_type})
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.compute_loss(trainer.model, inputs)
        with patch_grpo_trainer() as active:
            got = trainer.compute_loss(trainer.model, inputs)
    assert active.counts == {"linear_grpo_loss": 1} and float(expected) != 0
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", SCORED)
def test_trls_formulas_on_scores(trainer: GRPOTrainer, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What the fused op does not cover runs TRL's formulas on differentiable scores."""
    assert assert_same_step(trainer, prepared(trainer, monkeypatch, SCORED[name])).counts == {"linear_logp": 1}


def test_no_loss_token(trainer: GRPOTrainer) -> None:
    """All truncated: loss 0, and every parameter still gets its (zero) gradient, as DDP needs."""
    inputs = batch(trainer)
    inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])
    trainer.model.train()
    with patch_grpo_trainer():
        loss, gradients, _ = step(trainer, inputs)
    assert float(loss) == 0 and gradients.keys() == dict(trainer.model.named_parameters()).keys()
    assert all(bool((gradient == 0).all()) for gradient in gradients.values())


def test_scores_of_old_policy_and_reference(trainer: GRPOTrainer) -> None:
    """Without gradient, in chunks of the batch, entropies where asked for."""
    inputs = batch(trainer)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    arguments = (trainer.model, ids, mask, 6, 3, True)
    with torch.no_grad():
        expected = trainer._get_per_token_logps_and_entropies(*arguments)
        with patch_grpo_trainer() as active:
            got = trainer._get_per_token_logps_and_entropies(*arguments)
    assert active.counts == {"linear_logp": 2}
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-6)


def test_metrics_where_masked_tokens_are_unlikely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A low temperature gives log-probabilities of -100 and less; those of the tools' tokens are not computed."""
    trainer = make_trainer(tmp_path, tiny_model(), temperature=0.005)
    inputs = prepared(trainer, monkeypatch, {"tools": True, "beta": 0.04, "args.use_bias_correction_kl": True})
    assert float(inputs["old_per_token_logps"][inputs["tool_mask"] == 0].min()) < -100
    assert_same_step(trainer, inputs, rtol=1e-4)


KINDS: dict[str, tuple[torch.dtype, dict[str, Any], float]] = {
    "checkpointing": (torch.float32, {"gradient_checkpointing": True}, 1e-5),
    "temperature": (torch.float32, {"temperature": 0.7}, 1e-5),
    "bf16": (torch.bfloat16, {}, 2e-2),
    "bf16 with fp32 head": (torch.bfloat16, {"cast_lm_head_to_fp32": True}, 5e-3),
    "autocast": (torch.float32, {"bf16": True}, 2e-2),
}


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("name", KINDS)
def test_model_kinds(tmp_path: Path, name: str, tied: bool) -> None:
    dtype, settings, rtol = KINDS[name]
    trainer = make_trainer(tmp_path, tiny_model(tie_word_embeddings=tied).to(dtype), **settings)
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    assert assert_same_step(trainer, batch(trainer), rtol).counts == {"linear_grpo_loss": 1}


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    if torch.distributed.is_initialized():  # by a test of the engine that ran before in this process
        yield
        return
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("static_graph", [False, True])
def test_distributed_data_parallel(tmp_path: Path, static_graph: bool) -> None:
    """DDP looks for unused parameters in the model's output: the fused loss has to be there."""
    trainer = make_trainer(tmp_path, tiny_model())
    settings = {"static_graph": True} if static_graph else {"find_unused_parameters": True}
    trainer.model_wrapped = torch.nn.parallel.DistributedDataParallel(trainer.model, **settings)
    assert assert_same_step(trainer, batch(trainer)).counts == {"linear_grpo_loss": 1}


def test_mixture_of_experts_keeps_its_auxiliary_loss(tmp_path: Path) -> None:
    settings = {"num_local_experts": 2, "num_experts_per_tok": 1, "router_aux_loss_coef": 0.1}
    trainer = make_trainer(tmp_path, tiny_model("mixtral", **settings))
    assert assert_same_step(trainer, batch(trainer)).counts == {"linear_logp": 1}


@pytest.mark.parametrize(("kind", "reason"), [("gemma2", "final_logit_softcapping"), ("cohere", "logit_scale")])
def test_left_to_trl_with_one_warning(tmp_path: Path, kind: str, reason: str) -> None:
    trainer = make_trainer(tmp_path, tiny_model(kind, **{reason: 0.25}))
    inputs = batch(trainer)
    with pytest.warns(UserWarning, match=reason):
        assert assert_same_step(trainer, inputs).counts == {"trl": 1}
    with pytest.warns(UserWarning, match="patch_grpo_trainer") as record, patch_grpo_trainer():
        step(trainer, inputs)
        step(trainer, inputs)
    assert len([warning for warning in record if "patch_grpo_trainer" in str(warning.message)]) == 1


def test_compiled_models_are_left_to_trl(trainer: GRPOTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.args, "torch_compile", True)
    inputs = batch(trainer)
    with pytest.warns(UserWarning, match="torch_compile"):
        assert assert_same_step(trainer, inputs).counts == {}


def test_other_callers_of_the_head_get_trls(trainer: GRPOTrainer) -> None:
    """The head is TRL's for a call that does not come from GRPOTrainer's methods."""
    ids = torch.tensor([[3, 4, 5, 6]])
    with patch_grpo_trainer() as active:
        output = trainer.model(ids, labels=ids, fused_lm_head=True)
    assert active.counts == {} and output.loss.requires_grad


def replaced_names() -> list[Any]:
    names = ("_ChunkedLogProbFunction", "FusedCausalLMOutput", "_use_triton")
    methods = [GRPOTrainer._compute_loss, GRPOTrainer._get_per_token_logps_and_entropies]
    return methods + [getattr(utils, name) for name in names]


def test_patching_twice_and_undoing() -> None:
    before = replaced_names()
    first = patch_grpo_trainer()
    during = replaced_names()
    assert patch_grpo_trainer() is first and all(a is b for a, b in zip(replaced_names(), during, strict=True))
    assert not any(a is b for a, b in zip(during, before, strict=True))
    first()
    first()
    assert all(a is b for a, b in zip(replaced_names(), before, strict=True))
    second = patch_grpo_trainer()
    first()  # an undone patch does not undo another
    assert second is patch_grpo_trainer() and GRPOTrainer._compute_loss is not before[0]
    second()


def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.17.0")
    before = GRPOTrainer._compute_loss
    with pytest.raises(ImportError, match=re.escape("trl must be 1.16.x, got 1.17.0")):
        patch_grpo_trainer()
    assert GRPOTrainer._compute_loss is before


RUNS: dict[str, dict[str, Any]] = {
    "dapo with accumulation": {"gradient_accumulation_steps": 2},
    "grpo, reused": {"loss_type": "grpo", "beta": 0.04, "num_iterations": 2, "gradient_accumulation_steps": 2,
                     "mask_truncated_completions": True, "scale_rewards": "batch"},
    "vespo, more batches than steps": {"loss_type": "vespo", "steps_per_generation": 4, "scale_rewards": "none",
                                       "gradient_accumulation_steps": 2},
    "entropy": {"top_entropy_quantile": 0.5, "entropy_coef": 0.01, "num_iterations": 2, "loss_type": "bnpo"},
}  # fmt: skip


def train(folder: Path, checkpoint: Path, settings: dict[str, Any]) -> tuple[list[float], list[Any], dict[str, Tensor]]:
    """Losses of all micro-batches, logged metrics and final weights of a training run."""
    trainer = make_trainer(folder, str(checkpoint), max_steps=4, seed=3, **settings)
    losses: list[float] = []
    compute_loss = trainer.compute_loss

    def recording(*args: Any, **kwargs: Any) -> Tensor:
        loss = compute_loss(*args, **kwargs)
        losses.append(loss.item())
        return loss

    trainer.compute_loss = recording
    trainer.train()
    timeless = [{k: v for k, v in entry.items() if "time" not in k and "per_second" not in k and k != "total_flos"}
                for entry in trainer.state.log_history]  # fmt: skip
    return losses, timeless, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_training_runs(tmp_path: Path, name: str) -> None:
    checkpoint = tmp_path / "model"
    tiny_model().save_pretrained(checkpoint)
    losses, log, weights = train(tmp_path, checkpoint, RUNS[name])
    with patch_grpo_trainer() as active:
        patched_losses, patched_log, patched_weights = train(tmp_path, checkpoint, RUNS[name])
    assert active.counts["linear_logp" if name == "entropy" else "linear_grpo_loss"] >= len(losses) >= 4
    assert active.counts["trl"] == 0 and max(map(abs, losses)) > 1e-3
    assert patched_losses == pytest.approx(losses, rel=1e-5, abs=1e-6)
    for entry, patched in zip(log, patched_log, strict=True):
        assert patched.keys() == entry.keys()
        for key, value in entry.items():
            assert patched[key] == pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True), key
    initial = dict(AutoModelForCausalLM.from_pretrained(checkpoint).named_parameters())
    for key, weight in weights.items():
        torch.testing.assert_close(patched_weights[key], weight, rtol=1e-4, atol=1e-5)
        assert bool((weight != initial[key]).any()), f"{key} was not trained"


@pytest.mark.slow
def test_the_recipe_is_short_and_trains(tmp_path: Path) -> None:
    assert len(RECIPE.read_text().splitlines()) <= 50
    done = subprocess.run([sys.executable, str(RECIPE)], cwd=tmp_path, env=environment(), capture_output=True,
                          text=True, check=False)  # fmt: skip
    shares = [float(value) for value in re.findall(r"letter a (\d\.\d+)", done.stdout)]
    assert done.returncode == 0 and len(shares) == 2 and shares[1] > shares[0] + 0.3, done.stdout + done.stderr
