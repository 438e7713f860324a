"""Models whose images are rows of the text vocabulary, sampled and trained: what was drawn from is what is trained.

Chameleon, its swin norm and codes in any order, Liquid with tied and untied heads: every plan, plain and with a drawing
turn, conditional and guided, images drawn to their end and again; all of it against transformers' own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import Gate, packed, world_photo
from small_chameleon import PlainChameleon, sharp_chameleon
from small_emu3 import all_plans
from small_liquid import PlainLiquid, sharp_liquid
from torch import Tensor

from syncr1.engine.forward.objective import Objective, PolicyForward
from syncr1.engine.learn.learner import replay_error
from syncr1.engine.policies.lora import add_lora, base_of
from syncr1.engine.policies.one_table import OneTablePolicy
from syncr1.engine.records import IMAGE, Rollout
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling
from syncr1.engine.settings.train_config import PolicyLogp

TOLERANCE = 1e-4
"""Nats, float32; about 2e-5 is measured."""
CONVENTIONS: tuple[PolicyLogp, ...] = ("conditional", "guided", "guided_detached")
MODELS: dict[str, tuple[Callable[[], OneTablePolicy], Any]] = {
    "chameleon": (sharp_chameleon, PlainChameleon),
    "chameleon, swin norm, scattered": (partial(sharp_chameleon, swin_norm=True, scattered=True), PlainChameleon),
    "liquid": (sharp_liquid, PlainLiquid),
    "liquid, untied llama": (partial(sharp_liquid, tied=False, family="llama"), PlainLiquid),
}
WAYS: list[dict[str, Any]] = [
    {"cfg_weight": 1.0},
    {"cfg_weight": 4.0, "temperature": 0.8, "unconditional": "pads", "top_p": 0.9, "image_top_k": 9},
    {"cfg_weight": 3.0, "drawing_turn": "t2i_r1"},
]


def shown(policy: OneTablePolicy, rollout: Rollout) -> Tensor | None:
    if not rollout.prompt.images:
        return None
    return policy.image_tokens(policy.load_images(rollout.prompt.images))[0]


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("chameleon", 1),
        ("chameleon", 2),
        ("chameleon, swin norm, scattered", 0),
        ("liquid", 1),
        ("liquid, untied llama", 2),
    ],
)
def test_what_is_sampled_is_what_is_trained(name: str, way: int, tmp_path: Path) -> None:
    make, plain_of = MODELS[name]
    policy, settings = make(), WAYS[way]
    plain = plain_of(policy)
    truncated = "top_p" in settings
    gate = Gate(threshold=2.0, max_attempts=2, min_keep=2) if truncated else None
    prompts = all_plans(world_photo(tmp_path, 3))
    rollouts = generate(policy, prompts, Sampling(num_generations=2, max_text_tokens=6, **settings), gate)
    temperature, weight = settings.get("temperature", 1.0), settings["cfg_weight"]
    for how in CONVENTIONS:
        (batch,) = packed(policy, rollouts, 2, guided=how != "conditional" and weight != 1.0)
        with torch.no_grad():
            logp = PolicyForward(make().train(), Objective(policy_logp=how, temperature=temperature))(batch)["logp"]
        assert batch.sampled_logp[batch.loss_mask].isfinite().all()
        assert replay_error(batch, logp) <= TOLERANCE, how
        assert int((batch.loss_mask & (batch.modality == IMAGE)).sum())
    if truncated:  # over what was kept alone; `packed` and the trainer have the kept ids
        return
    for rollout in rollouts[::2]:
        pairs = plain.replay(rollout, shown(policy, rollout), temperature=temperature, cfg_weight=weight)
        for segment, (conditional, mixed) in zip(rollout.segments, pairs, strict=True):
            torch.testing.assert_close(segment.logp, conditional, rtol=0, atol=TOLERANCE)
            torch.testing.assert_close(segment.logp_mixed, mixed, rtol=0, atol=TOLERANCE)
    if weight != 1.0:
        gaps = [float((s.logp - s.logp_mixed).abs().max()) for r in rollouts for s in r.segments if s.kind == "image"]
        assert min(gaps) > 0.1, "guidance counts, or the comparison would say little"


@pytest.mark.parametrize("name", ["liquid"])
def test_adapters_sit_in_the_decoder_alone(name: str, tmp_path: Path) -> None:
    """A VQGAN is no part of what is adapted; what is saved has the adapters in its weights, and draws."""
    policy = MODELS[name][0]()
    add_lora(policy, 2, 4.0)
    trained = [n for n, parameter in policy.named_parameters() if parameter.requires_grad]
    assert trained and all(".lora_" in n and "vqmodel" not in n for n in trained)
    with torch.no_grad():
        for n, parameter in policy.named_parameters():
            if ".lora_B" in n:
                parameter.normal_(0, 0.1)
    policy.save(tmp_path)
    loaded, prompt = type(policy).from_pretrained(tmp_path).eval(), all_plans(tmp_path)[1]
    sampling = Sampling(num_generations=1, temperature=0.0, cfg_weight=2.0)
    ours, theirs, base = (generate(p, [prompt], sampling)[0] for p in (policy, loaded, base_of(policy)))
    assert torch.equal(ours.segments[0].tokens, theirs.segments[0].tokens)
    torch.testing.assert_close(ours.segments[0].logp, theirs.segments[0].logp, rtol=0, atol=1e-4)
    assert not torch.equal(ours.segments[0].logp, base.segments[0].logp)
    assert ours.image is not None and theirs.image is not None
    torch.testing.assert_close(ours.image, theirs.image)
