"""cost.py beside torch's own counter over the real sampler and the real update of tiny models."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import all_kinds_of_prompts, make_prompt, own_process_group, random_advantages, sharp_policy
from small_emu3 import sharp_emu3
from small_show_o import sharp_show_o
from text_models import policy as text_model
from torch.utils.flop_counter import FlopCounterMode

from syncr1.engine.forward.masked_states import MaskedPlan
from syncr1.engine.forward.packing import pack
from syncr1.engine.learn.from_settings import objective_of, settings_of
from syncr1.engine.methods.cost import Assumed, Layout, StepWork, Unit, add_rollout
from syncr1.engine.methods.memory import prepare
from syncr1.engine.methods.starting import add_adapters
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.methods.training_cost import add_training
from syncr1.engine.policies.base import Policy
from syncr1.engine.records import Prompt, Rollout
from syncr1.engine.rollout.preview_gate import PreviewGate
from syncr1.engine.rollout.sampler import RolloutEngine
from syncr1.engine.rollout.sampling import Sampling

OPS = torch.ops.syncr1


def own_pairs(lengths: torch.Tensor, whole: torch.Tensor | None) -> list[int]:
    """Of each run of tokens that sees itself, the first `whole` of it each other."""
    leads = [0] * len(lengths) if whole is None else whole.tolist()
    return [n * (n + 1) // 2 + w * (w - 1) // 2 for n, w in zip(lengths.tolist(), leads, strict=True)]


def behind(prefixes: Any, sequences: Any, groups: Any, whole: Any) -> int:
    """Pairs of responses, with their prefixes and with themselves."""
    lengths, pairs = sequences.diff().tolist(), sum(own_pairs(sequences.diff(), whole))
    for group, prefix in enumerate(prefixes.diff().tolist()):
        pairs += prefix * sum(lengths[groups[group] : groups[group + 1]])
    return pairs


def attention(q: torch.Tensor, k: Any, v: Any, prefixes: Any, sequences: Any, groups: Any, *rest: Any, **_: Any) -> int:
    """Scores and their products with values, of the pairs that the layout shows to each other, one by one."""
    pairs = sum(own_pairs(prefixes.diff(), rest[0])) + behind(prefixes, sequences, groups, rest[1])
    return 4 * pairs * q.shape[1] * q.shape[2]


def over_cache(q: torch.Tensor, k: Any, v: Any, keys: Any, values: Any, *layout: Any, **_: Any) -> int:
    return 4 * behind(*layout[:3], layout[4]) * q.shape[1] * q.shape[2]


def attention_backward(*given: Any, **_: Any) -> int:
    return attention(*given) * 5 // 2


def decode(query: torch.Tensor, *given: Any, **_: Any) -> int:
    spans = next(x for x in given if isinstance(x, torch.Tensor) and x.dtype == torch.int64)
    return int(4 * (spans[:, 1] + spans[:, 3] + 1).sum()) * query.shape[1] * query.shape[2]


def scored(hidden: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * hidden.shape[0] * weight.numel()


def learned(hidden: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Logits and both gradients, all three in the forward."""
    return sum(3 * 2 * h.shape[0] * w.numel() for h, w in zip(hidden, weight, strict=True))


def nothing(*_: Any, **__: Any) -> int:
    return 0


FORMULAS = {
    OPS.shared_prefix_attention: attention,
    OPS.shared_prefix_attention_backward: attention_backward,
    OPS.cached_prefix_attention: over_cache,
    OPS.prefix_decode_attention: decode,
    OPS.linear_logp: scored,
    OPS.linear_grpo_loss: learned,
    OPS.linear_grpo_loss_backward: nothing,
}
"""Of our own ops, by the shapes and offsets that they are called with."""


class Counted(FlopCounterMode):
    """Multiply-adds of what runs inside."""

    def __init__(self) -> None:
        mapping: dict[Any, Any] = dict(FORMULAS)
        for formula in mapping.values():
            formula._get_raw = True  # type: ignore[attr-defined]  # tensors, not their shapes
        super().__init__(display=False, custom_mapping=mapping)

    @property
    def multiply_adds(self) -> float:
        return self.get_total_flops() / 2


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    with own_process_group():
        yield


def rollout(policy: Policy, prompts: list[Prompt], sampling: Sampling, gate: PreviewGate | None) -> Any:
    """(trajectories, what they cost, multiply-adds) of the real sampler."""
    engine = RolloutEngine(policy, cuda_graphs=False, trunk=policy.trunk)
    with Counted() as counted:
        rollouts = engine.generate(prompts, sampling, gate)
    return rollouts, engine.stats, counted.multiply_adds


def update(policy: Policy, config: SyncR1Config, rollouts: list[Rollout]) -> tuple[float, float, int]:
    """(multiply-adds of scoring, of the update, tokens) of the real learner."""
    from syncr1.engine.learn.learner import Learner
    from syncr1.engine.processes.group import init_distributed

    init_distributed()
    frozen = add_adapters(config, policy)
    learner = Learner(policy, objective_of(config, policy.num_image_tokens), settings_of(config), frozen)
    learner.engine.train()  # as `sampling` leaves it
    batches = pack(
        policy,
        rollouts,
        random_advantages(len(rollouts), config.num_generations),
        torch.ones(len(rollouts), dtype=torch.bool),
        num_generations=config.num_generations,
        max_tokens=config.max_tokens_per_microbatch,
        share_prefix=config.share_prefix,
        guided=config.policy_logp != "conditional",
        masked=MaskedPlan(config.masked_logp, config.masked_steps),
    )
    with Counted() as scoring:
        scored = learner.score(batches)
    with Counted() as updating:
        learner.update(scored)
    return scoring.multiply_adds, updating.multiply_adds, sum(batch.num_tokens for batch in batches)


def estimate(policy: Policy, config: SyncR1Config, prompts: list[Prompt], sampling: Sampling, assumed: Assumed) -> Any:
    """What is said of it beforehand: the same model without numbers, and no trajectory."""
    bare = prepare(config, copy.deepcopy(policy).to("meta"))
    work, unit = StepWork(), Unit.of(bare)
    layout = Layout.of(bare, prompts, sampling, assumed.text_tokens)
    add_rollout(work, unit, layout, config.num_generations, assumed)
    add_training(
        work,
        unit,
        layout,
        config.num_generations,
        assumed,
        objective_of(config, policy.num_image_tokens),
        share_prefix=config.share_prefix,
        num_iterations=config.num_iterations,
        masked=MaskedPlan(config.masked_logp, config.masked_steps),
    )
    return work


def text_of(rollouts: list[Rollout]) -> float:
    """Tokens of a text segment, on average: what the estimate has to be told."""
    lengths = [s.tokens.numel() for r in rollouts for s in r.segments if s.kind == "text"]
    return sum(lengths) / max(1, len(lengths))


def compare(policy: Policy, config: SyncR1Config, prompts: list[Prompt], gate: PreviewGate | None = None) -> None:
    sampling = Sampling(
        num_generations=config.num_generations,
        cfg_weight=config.cfg_weight,
        max_text_tokens=config.max_completion_length,
        unconditional=config.unconditional,
        drawing_turn=config.drawing_turn,
        image_steps=config.image_steps,
        keep_proposals=config.masked_logp == "all",
    )
    rollouts, stats, sampled = rollout(policy, prompts, sampling, gate)
    drawn = sum(r.image is not None for r in rollouts)
    tries = sum(r.attempts for r in rollouts if r.image is not None) / max(1, drawn)
    early = round(config.preview_fraction * policy.num_image_tokens) if gate is not None else 0
    assumed = Assumed(text_tokens=text_of(rollouts), tries=tries, preview_tokens=early, likely=gate is not None)
    work = estimate(policy, config, prompts, sampling, assumed)
    exact = policy.decoding_order == "raster"  # else drawing turns are among them, as long as their texts are
    assert work.prefill.tokens == pytest.approx(stats.prefill_tokens, rel=0 if exact else 0.03)
    assert work.sampled["text"] == pytest.approx(stats.text_tokens, rel=0.1)
    assert work.drawn[0] == pytest.approx(stats.image_tokens, rel=1e-6)
    said = sum(part.multiply_adds for _, part in work.rollout)
    scoring, updating, tokens = update(policy, config, rollouts)
    pairs = {
        "rollout": (said, sampled),
        "scoring": (work.score.multiply_adds, scoring),
        "update": (work.update.multiply_adds, updating),
        "trained tokens": (work.update.tokens / config.num_iterations, tokens),
    }
    print({name: f"{guess / found - 1:+.2%}" for name, (guess, found) in pairs.items()})
    for name, (guess, found) in pairs.items():
        assert guess == pytest.approx(found, rel=0.1), name


def config_of(**more: Any) -> SyncR1Config:
    return SyncR1Config(
        **{"num_generations": 2, "max_completion_length": 8, "preview_fraction": 0.0, "cfg_weight": 3.0} | more
    )


def likes_half(prompts: Any, texts: Any, images: torch.Tensor) -> torch.Tensor:
    """Scores of which some fail: fixed, by what is in the picture."""
    return images.mean((1, 2, 3)).frac()


GUIDED = {"policy_logp": "guided", "unconditional": "pads", "drawing_turn": "t2i_r1", "gradient_checkpointing": True}


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(GUIDED | {"preview_fraction": 0.25}, id="guided loss, previews, drawing turns, checkpointing"),
        pytest.param({"policy_logp": "guided_detached", "lora_rank": 4, "share_prefix": False}, id="detached, lora"),
    ],
)
def test_multiply_adds_of_a_step(more: dict[str, Any], tmp_path: Path) -> None:
    config, gate = config_of(**more), None
    if config.preview_fraction:
        gate = PreviewGate(
            likes_half, fraction=0.25, threshold=0.5, acceptance=0.5, max_attempts=2, completion="likely"
        )
    prompts = all_kinds_of_prompts(tmp_path)
    compare(sharp_policy(), config, [prompts[kind] for kind in (0, 2, 5, 6)], gate)


def test_emu3_and_the_conditional_loss() -> None:
    compare(sharp_emu3(), config_of(num_iterations=2), [make_prompt("draw a cup", ("image",))])


def test_a_text_model_too() -> None:
    prompts = [make_prompt(text, ("text",)) for text in ("what is the colour?", "red", "the creature is what?")]
    compare(text_model("qwen3"), config_of(), prompts)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(GUIDED | {"unconditional": "fixed", "preview_fraction": 0.25}, id="guided loss, previews, turns"),
        pytest.param({"masked_steps": 2, "share_prefix": False, "masked_logp": "all"}, id="two of six steps, copies"),
    ],
)
def test_images_that_are_filled_in(more: dict[str, Any], tmp_path: Path) -> None:
    config, gate = config_of(**{"image_steps": 6} | more), None
    if config.preview_fraction:
        gate = PreviewGate(likes_half, fraction=0.25, threshold=0.5, acceptance=0.5, max_attempts=2)
    prompts = all_kinds_of_prompts(tmp_path)
    compare(sharp_show_o(), config, [prompts[kind] for kind in (0, 1, 2, 3)], gate)
