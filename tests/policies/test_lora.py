"""LoRA: the right matrix, seen by every path, trained alone, and written as peft and transformers read it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import all_kinds_of_prompts, everything_partitioned, own_process_group, packed, sampled, sharp_policy
from peft import PeftModel
from safetensors import safe_open
from test_fused_trunk import assert_same_steps
from text_models import policy as text_policy
from torch import Tensor, nn
from transformers import JanusForConditionalGeneration

from syncr1.engine.forward.objective import Objective, PolicyForward
from syncr1.engine.learn.learner import Learner, replay_error
from syncr1.engine.learn.optimizer import LearnerSettings
from syncr1.engine.policies.base import Policy
from syncr1.engine.policies.fused import use_liger_kernels
from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.policies.lora import (
    adapter_disabled,
    add_lora,
    base_of,
    has_lora,
    merged,
    save_adapter,
)
from syncr1.engine.records import MODALITY_NAMES, PackedBatch, Rollout
from syncr1.engine.rollout.compiled import CompiledTrunk
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
RANK, ALPHA = 4, 12.0


def adapted(policy: Policy | None = None, **more: Any) -> Any:
    """Adapters that do something: B is drawn as well."""
    made = sharp_policy() if policy is None else policy
    add_lora(made, RANK, ALPHA, **more)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    return made


def logp(policy: Policy, batch: PackedBatch) -> Tensor:
    with torch.no_grad():
        return PolicyForward(policy, Objective())(batch)["logp"]


def weights(policy: Policy) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def rollouts(folder: Path) -> list[Rollout]:
    """Sampled with adapters, through weights laid out for few rows."""
    return sampled(adapted(), folder, num_generations=2)


@pytest.fixture(scope="module")
def batch(rollouts: list[Rollout]) -> PackedBatch:
    return packed(sharp_policy(), rollouts, 2)[0]


# The matrix -----------------------------------------------------------------------------------------------------------


def test_a_layer_is_the_formula() -> None:
    policy = adapted()
    layer = policy.decoder().layers[1].mlp.down_proj
    x = torch.randn(7, layer.in_features)
    w, a, b = (m.weight.double() for m in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]))
    want = x.double() @ w.T + ALPHA / RANK * (x.double() @ a.T) @ b.T
    torch.testing.assert_close(layer(x).double(), want, rtol=1e-5, atol=1e-5)
    with merged(policy):
        plain = policy.decoder().layers[1].mlp.down_proj
        assert type(plain) is nn.Linear
        torch.testing.assert_close(plain(x).double(), want, rtol=1e-5, atol=1e-5)


def test_new_adapters_change_nothing_and_are_alike_on_every_rank(batch: PackedBatch) -> None:
    policies = [sharp_policy() for _ in range(3)]
    plain = logp(policies[0], batch)
    for policy, seed in zip(policies, (0, 0, 1), strict=True):
        torch.rand(seed + 1)
        state = torch.get_rng_state()
        add_lora(policy, RANK, ALPHA, seed=seed)
        assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(logp(policies[0], batch), plain)
    a, b, c = (weights(policy) for policy in policies)
    assert_equal(a, b)
    assert any(not torch.equal(a[name], c[name]) for name in a if "lora_A" in name)


@pytest.mark.parametrize("train_heads", [False, True])
def test_gradients_reach_adapters_and_heads_alone(train_heads: bool, batch: PackedBatch) -> None:
    policy = adapted(train_heads=train_heads)
    PolicyForward(policy.train(), Objective())(batch, num_items={"text": 10.0, "image": 99.0})["loss"].backward()
    reached = {n for n, p in policy.named_parameters() if p.grad is not None and bool(p.grad.abs().max() > 0)}
    lora = {n for n, _ in policy.named_parameters() if ".lora_" in n}
    assert lora <= reached and len(lora) == 2 * 7 * 4
    heads = ("lm_head", "generation_")
    assert (reached > lora) is train_heads
    assert all(any(part in name for part in heads) for name in reached - lora)
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert reached == trained


def test_chosen_modules_of_the_decoder_only() -> None:
    policy = sharp_policy()
    add_lora(policy, 2, 2.0, target_modules=("q_proj", "v_proj"))
    named = {name for name, _ in policy.named_parameters() if ".lora_A." in name}
    assert len(named) == 2 * 4 and all("language_model" in name for name in named), "the vision tower has them too"


def test_tied_heads_are_frozen_with_the_embeddings() -> None:
    policy = adapted(text_policy("llama_tied_mha"), train_heads=True)
    assert all(".lora_" in name for name, p in policy.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"dropout": 0.1}, "dropout 0, got 0.1"),
        ({"rank": 0}, "rank >= 1"),
        ({"target_modules": ("q_proj", "wq")}, "some of .*down_proj.* got .*wq"),
        ({"target_modules": ()}, "got none"),
    ],
)
def test_refused(more: dict[str, Any], message: str) -> None:
    policy = sharp_policy()
    before = weights(policy)
    with pytest.raises(ValueError, match=message):
        add_lora(policy, **{"rank": 2, "alpha": 4.0} | more)
    assert_equal(weights(policy), before)


def test_adapters_are_added_once() -> None:
    policy = adapted()
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(policy, 2, 2.0)
    assert has_lora(policy)


# Views ----------------------------------------------------------------------------------------------------------------


def test_merged_is_the_same_network_and_leaves_no_trace(batch: PackedBatch) -> None:
    policy = adapted()
    before, adapters = weights(policy), logp(policy, batch)
    plain = [name for name, _ in sharp_policy().named_parameters()]
    with pytest.raises(RuntimeError, match="broke"), merged(policy):
        assert not has_lora(policy)
        assert [name for name, _ in policy.named_parameters()] == plain
        torch.testing.assert_close(logp(policy, batch), adapters, rtol=1e-5, atol=1e-5)
        raise RuntimeError("it broke")
    assert_equal(weights(policy), before)
    assert torch.equal(logp(policy, batch), adapters)


def test_the_base_is_inside_bit_for_bit(batch: PackedBatch) -> None:
    policy, plain = adapted(), logp(sharp_policy(), batch)
    adapters, trained = logp(policy, batch), [n for n, p in policy.named_parameters() if p.requires_grad]
    assert float((adapters - plain).abs().max()) > 0.05
    with pytest.raises(RuntimeError, match="broke"), adapter_disabled(policy):
        assert torch.equal(logp(policy, batch), plain)
        raise RuntimeError("it broke")
    assert torch.equal(logp(policy, batch), adapters)
    assert [n for n, p in policy.named_parameters() if p.requires_grad] == trained
    untouched = sharp_policy()
    with adapter_disabled(untouched), merged(untouched):
        assert torch.equal(logp(untouched, batch), plain)


@pytest.mark.parametrize("train_heads", [False, True])
def test_the_base_as_a_policy_shares_what_is_frozen(train_heads: bool, batch: PackedBatch) -> None:
    policy, plain = adapted(train_heads=train_heads), logp(sharp_policy(), batch)
    base = base_of(policy)
    kept = {p.data_ptr() for p in policy.parameters()}
    copied = sum(p.nbytes for p in base.parameters() if p.data_ptr() not in kept)
    heads = sum(p.nbytes for n, p in policy.named_parameters() if p.requires_grad and ".lora_" not in n)
    assert copied == heads and (heads > 0) is train_heads
    assert not has_lora(base) and has_lora(policy) and any(p.requires_grad for p in policy.parameters())
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert torch.equal(logp(base, batch), plain), "it does not follow the training"
    assert not any(p.requires_grad for p in base.parameters())


# Sampling -------------------------------------------------------------------------------------------------------------


def test_the_sampler_is_the_network_in_training(rollouts: list[Rollout], batch: PackedBatch) -> None:
    """Replay of the sampler's log-probabilities; without adapters it fails, so they did take part."""
    policy = adapted()
    assert replay_error(batch, logp(policy, batch)) <= 1e-4
    with adapter_disabled(policy):
        assert replay_error(batch, logp(policy, batch)) > 0.05


def test_a_text_model_too(tmp_path: Path) -> None:
    policy = adapted(text_policy("qwen3"))
    prompts = [p for p in all_kinds_of_prompts(tmp_path) if p.segments == ("text",) and not p.images]
    rollouts = generate(policy, prompts, Sampling(num_generations=3, max_text_tokens=6))
    (made,) = packed(policy, rollouts, 3)
    assert replay_error(made, logp(policy, made)) <= 1e-4
    with adapter_disabled(policy):
        assert replay_error(made, logp(policy, made)) > 0.01


@pytest.mark.slow
def test_a_compiled_trunk_sees_adapters() -> None:
    torch._dynamo.reset()
    policy = adapted(text_policy("llama", num_hidden_layers=1))
    compiled = CompiledTrunk(policy, backend="eager")
    for rows in (4, 2):
        assert_same_steps(policy, compiled, rows=rows)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_liger_kernels_see_adapters(batch: PackedBatch) -> None:
    policy = adapted().to("cuda")
    plain = logp(policy, batch.to(torch.device("cuda")))
    assert use_liger_kernels(policy.decoder())[0].startswith(("RMSNorm", "rotary", "SwiGLU"))
    fused = logp(policy, batch.to(torch.device("cuda")))
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
    assert float((fused - logp(adapted(), batch).to("cuda")).abs().max()) < 0.02


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_merged_checkpoint_is_a_plain_one(tmp_path: Path, batch: PackedBatch) -> None:
    policy = adapted()
    with merged(policy):
        policy.save(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "lora" in name or "base_layer" in name]  # noqa: SIM118
    loaded = JanusPolicy.from_pretrained(tmp_path)
    torch.testing.assert_close(logp(loaded, batch), logp(policy, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train_heads", [False, True])
def test_adapter_files_are_pefts(train_heads: bool, tmp_path: Path, batch: PackedBatch) -> None:
    """Loaded by peft onto transformers' model: the same numbers, bit for bit before it merges them."""
    policy = adapted(train_heads=train_heads)
    if train_heads:
        with torch.no_grad():
            policy.model.model.generation_head.proj_out.weight.add_(0.1)
            policy.model.lm_head.weight.mul_(0.9)
    want = logp(policy, batch)
    save_adapter(policy, tmp_path / "adapter")
    sharp_policy().save(tmp_path / "base")
    theirs = JanusForConditionalGeneration.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"), is_trainable=True)
    assert torch.equal(logp(JanusPolicy(loaded.base_model.model, policy.processor), batch), want)
    theirs = loaded.merge_and_unload()
    torch.testing.assert_close(logp(JanusPolicy(theirs, policy.processor), batch), want, rtol=1e-5, atol=1e-5)


def test_without_adapters_there_is_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a policy with adapters"):
        save_adapter(sharp_policy(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# Training -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _process_group() -> Iterator[None]:
    with own_process_group(), everything_partitioned():
        yield


def by_hand(batch: PackedBatch) -> dict[str, Tensor]:
    policy = adapted()
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    forward = PolicyForward(policy.train(), Objective())
    masks = {name: batch.loss_mask & (batch.modality == code) for code, name in enumerate(MODALITY_NAMES)}
    items = {name: float(mask.sum()) for name, mask in masks.items()}
    for _ in range(2):
        optimizer.zero_grad()
        forward(batch, num_items=items)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return weights(policy)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_deepspeed_trains_adapters_alone(stage: int, batch: PackedBatch, _process_group: None) -> None:
    """With activation checkpointing: the weights are those of plain torch, the base's bits stay."""
    policy, start = adapted(), weights(adapted())
    want = by_hand(batch)
    settings = LearnerSettings(learning_rate=1e-3, zero_stage=stage, gradient_checkpointing=True)
    learner = Learner(policy, Objective(), settings)
    plain = logp(sharp_policy(), batch)
    for _ in range(2):
        with torch.no_grad(), adapter_disabled(policy):  # as a reference is scored where weights are split
            torch.testing.assert_close(learner.engine(batch)["logp"], plain, rtol=1e-5, atol=1e-5)
        metrics = learner.update(learner.score([batch]))
    assert metrics["grad_norm"] > 0
    with learner.sampling() as whole:
        got = weights(whole)
        with adapter_disabled(whole):
            assert torch.equal(logp(whole, batch), plain)
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert torch.equal(value, start[name]) is (".lora_" not in name), name
        torch.testing.assert_close(value, want[name], rtol=0, atol=5e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_the_reference_costs_no_second_copy(stage: int, batch: PackedBatch, _process_group: None) -> None:
    """KL to the base: 0 while adapters do nothing, then it grows, as with a frozen copy."""
    kls = []
    for reference in ("shared", "copy"):
        policy = sharp_policy()
        frozen = policy.frozen_copy() if reference == "copy" else None
        add_lora(policy, RANK, ALPHA)
        settings = LearnerSettings(learning_rate=1e-2, zero_stage=stage)
        learner = Learner(policy, Objective(beta=0.1), settings, frozen or base_of(policy))
        kls.append([learner.update(learner.score([batch]))["kl/image"] for _ in range(3)])
    assert kls[0] == pytest.approx(kls[1], rel=1e-4, abs=1e-7) and kls[0][0] <= 1e-8 and kls[0][2] > 1e-6
