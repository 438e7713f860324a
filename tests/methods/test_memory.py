"""memory.py: the estimate beside what real runs hold, counted tensor by tensor on a CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import all_kinds_of_prompts, own_process_group, random_advantages
from small_show_o import sharp_show_o

from syncr1.engine.forward.masked_states import MaskedPlan
from syncr1.engine.forward.packing import pack
from syncr1.engine.learn.from_settings import objective_of, sampler_of, settings_of
from syncr1.engine.learn.trajectories import sampling_of
from syncr1.engine.methods.dry_run import policy_without_weights
from syncr1.engine.methods.memory import GATHERED, Memory, PeakBytes, memory_of, prepare
from syncr1.engine.methods.starting import add_adapters
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.records import Prompt
from syncr1.engine.world.attributes import CONCEPTS
from syncr1.engine.world.base_model import corpus
from syncr1.engine.world.tiny_janus import build_policy

MIB = 1 << 20


def config_of(**more: Any) -> SyncR1Config:
    return SyncR1Config(**{"prompts_per_step": 6, "max_completion_length": 8, "preview_fraction": 0.0} | more)


def estimated(config: SyncR1Config, prompts: Any, ranks: int = 1) -> Memory:
    return memory_of(config, prepare(config, policy_without_weights(None)), prompts, ranks)


def tiny_janus() -> Any:
    return build_policy(corpus(), [concept.name for concept in CONCEPTS], seed=0, freeze_vision=True)


def measured(config: SyncR1Config, prompts: Sequence[Prompt], build: Callable[[], Any] = tiny_janus) -> int:
    """Most bytes that tensors hold, from the building of the model to the end of the second step."""
    from syncr1.engine.learn.learner import Learner
    from syncr1.engine.processes.group import init_distributed

    gc.collect()
    with own_process_group(), PeakBytes() as memory:
        init_distributed()
        policy = build()
        policy.to(torch.bfloat16 if config.bf16 else torch.float32)
        frozen = add_adapters(config, policy)
        learner = Learner(policy, objective_of(config, policy.num_image_tokens, 8.0), settings_of(config), frozen)
        gc.collect()
        memory.peak = memory.live
        sampler, sampling = sampler_of(config, learner.policy), replace(sampling_of(config, 0), max_text_tokens=8)
        for _ in range(2):
            with learner.sampling():
                rollouts = sampler.generate(prompts, sampling)
            keep = torch.ones(len(rollouts), dtype=torch.bool)
            batches = pack(
                policy,
                rollouts,
                random_advantages(len(rollouts), config.num_generations),
                keep,
                num_generations=config.num_generations,
                max_tokens=config.max_tokens_per_microbatch,
                guided=config.policy_logp != "conditional",
                masked=MaskedPlan(config.masked_logp, config.masked_steps),
            )
            learner.update(learner.score(batches))
        return memory.peak


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"num_generations": 8}, id="whole"),
        pytest.param({"num_generations": 16, "gradient_checkpointing": True}, id="checkpointing"),
        pytest.param({"num_generations": 8, "lora_rank": 8}, id="lora"),
        pytest.param({"num_generations": 16, "max_tokens_per_microbatch": 500}, id="micro-batches"),
        pytest.param({"num_generations": 8, "bf16": True}, id="bf16"),
        pytest.param({"num_generations": 8, "zero_stage": 2}, id="zero 2"),
        pytest.param({"num_generations": 16, "policy_logp": "guided_detached"}, id="guided_detached"),
    ],
)
def test_estimate_is_within_10_percent(settings: dict[str, Any], tmp_path: Path) -> None:
    config, prompts = config_of(**settings), all_kinds_of_prompts(tmp_path)[:6]
    near(estimated(config, prompts), measured(config, prompts))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            {
                "num_generations": 24,
                "masked_steps": 2,
                "gradient_checkpointing": True,
                "max_tokens_per_microbatch": 1 << 20,
            },
            id="two steps of six",
        ),
        pytest.param({"num_generations": 32, "masked_steps": 1}, id="many images at once"),
    ],
)
def test_estimate_of_images_that_are_filled_in(settings: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(**{"num_generations": 8, "image_steps": 6} | settings)
    prompts = [all_kinds_of_prompts(tmp_path)[kind] for kind in (0, 1, 2, 3)]
    policy: Any = sharp_show_o()
    policy = prepare(config, policy.to("meta"))
    near(memory_of(config, policy, prompts, 1), measured(config, prompts, sharp_show_o))


def near(estimate: Memory, found: int) -> None:
    expected = replace(estimate, cache_stays=False).peak()
    print(f"measured {found / MIB:.1f} MiB, estimated {expected / MIB:.1f} MiB: {expected / found - 1:+.1%}")
    assert expected == pytest.approx(found, rel=0.1), estimate.lines()


def test_truncation_costs_a_bit_for_each_id_of_each_token(tmp_path: Path) -> None:
    policy, prompts = policy_without_weights(None), all_kinds_of_prompts(tmp_path)[:6]
    hidden = torch.empty(1, policy.decoder().config.hidden_size, device="meta")
    text, image = (-(-policy.head(hidden, kind).weight.shape[0] // 32) * 4 for kind in ("text", "image"))
    sizes = [
        memory_of(config_of(num_generations=4, **given), policy, prompts, 1).rollout["kept ids"]
        for given in ({}, {"image_top_k": 9}, {"top_p": 0.9})
    ]
    drawn = 6 * 4 * policy.num_image_tokens * image
    assert sizes == [0, drawn, drawn + 6 * 4 * 8 * text]


def test_peak_bytes_counts_what_is_alive() -> None:
    with PeakBytes() as memory:
        first = torch.empty(MIB, dtype=torch.uint8)
        view = first[: MIB // 2]
        del first
        assert memory.live == MIB  # a view keeps the whole
        second = torch.empty(2 * MIB, dtype=torch.uint8, device="meta")
        del view, second
        assert memory.live == 0
        kept = [torch.empty(MIB, dtype=torch.uint8) for _ in range(2)]
    assert memory.peak == 3 * MIB and memory.live == 2 * MIB and len(kept) == 2


@pytest.mark.slow
def test_zero_shares_what_it_says(tmp_path: Path) -> None:
    """Over 4 ranks: optimizer state from stage 1 on, gradients from stage 2 on, weights under stage 3."""
    prompts = all_kinds_of_prompts(tmp_path)[:6]

    def of(stage: int, ranks: int) -> Memory:
        return memory_of(
            config_of(zero_stage=stage),
            prepare(config_of(zero_stage=stage), policy_without_weights(None)),
            prompts,
            ranks,
        )

    alone, shared = ({stage: of(stage, ranks) for stage in range(4)} for ranks in (1, 4))
    moments = {
        stage: shared[stage].lasting["AdamW's moments"] / alone[stage].lasting["AdamW's moments"] for stage in alone
    }
    assert moments == pytest.approx({0: 1, 1: 0.25, 2: 0.25, 3: 0.25}, abs=1e-4)
    assert shared[2].update["gradients"] == pytest.approx(alone[2].update["gradients"] / 4, rel=1e-4)
    assert shared[0].lasting == alone[0].lasting and shared[0].peak() == alone[0].peak()
    assert shared[3].lasting["weights"] == pytest.approx(alone[3].lasting["weights"] / 4, rel=1e-4)
    assert shared[3].rollout[GATHERED] == shared[3].backward[GATHERED] == alone[3].lasting["weights"]
    assert alone[2].rollout[GATHERED] == 0 and shared[2].cache_stays
    assert not shared[3].cache_stays, "no graph holds addresses that ZeRO 3 moves"


def test_lines_add_up(tmp_path: Path) -> None:
    memory = memory_of(
        config_of(), prepare(config_of(), policy_without_weights(None)), all_kinds_of_prompts(tmp_path)[:6], 1
    )
    assert memory.peak() >= replace(memory, cache_stays=False).peak() > sum(memory.lasting.values())
    lines = memory.lines()
    assert lines[0] == f"memory: {memory.peak() / MIB:.1f} MiB at the worst moment, the backward"
    assert not any(" 0.0," in line for line in lines)
    for line in lines[1:]:
        total, _, parts = line.partition(": ")
        sizes = [float(part.rpartition(" ")[2]) for part in parts.split(", ")]
        assert sum(sizes) == pytest.approx(float(total.rpartition(" ")[2]), abs=0.06 * len(sizes))
