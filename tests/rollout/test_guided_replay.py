"""What guidance draws from is what is trained, for every convention, model and plan; the prompts of its free branch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import Gate, PlainJanus, all_kinds_of_prompts, make_prompt, packed, sharp_policy, world_photo
from small_emu3 import PlainEmu3, all_plans, sharp_emu3
from torch import Tensor

from syncr1.engine.errors import ConfigError
from syncr1.engine.forward.objective import Objective, PolicyForward
from syncr1.engine.learn.learner import replay_error
from syncr1.engine.pictures import open_picture
from syncr1.engine.policies.base import Policy
from syncr1.engine.policies.emu3 import Emu3Policy
from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.records import IMAGE, Prompt, Rollout
from syncr1.engine.rollout.free_prompts import FreePrompts
from syncr1.engine.rollout.sampler import RolloutEngine, generate
from syncr1.engine.rollout.sampling import Sampling
from syncr1.engine.settings.train_config import PolicyLogp, Unconditional

pytestmark = pytest.mark.slow
TOLERANCE = 1e-4
"""Nats, float32; about 2e-5 is measured."""
MODELS = ("janus", "emu3")
CONVENTIONS: tuple[PolicyLogp, ...] = ("conditional", "guided", "guided_detached")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Policy, list[Prompt]]]:
    folder = tmp_path_factory.mktemp("photos")
    return {
        "janus": (sharp_policy(), all_kinds_of_prompts(folder)),
        "emu3": (sharp_emu3(), all_plans(world_photo(folder, 3))),
    }


def mixed_by_transformers(policy: Any, rollout: Rollout, weight: float) -> list[Tensor]:
    """Of its images, a sequence at a time, behind the free prompt that the segment names."""
    if isinstance(policy, JanusPolicy):
        return [PlainJanus(policy).replay(rollout, cfg_weight=weight)["image_mixed"]]
    assert isinstance(policy, Emu3Policy)
    pixels = None
    if rollout.prompt.images:
        picture = open_picture(rollout.prompt.images[0])
        pixels = policy.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    pairs = PlainEmu3(policy).replay(rollout, pixels, temperature=1.0, cfg_weight=weight)
    return [mixed for (_, mixed), s in zip(pairs, rollout.segments, strict=True) if s.kind == "image"]


@pytest.mark.parametrize(("unconditional", "previewed"), [("fixed", False), ("pads", True)])
@pytest.mark.parametrize("name", MODELS)
def test_every_convention_replays(
    models: dict[str, tuple[Policy, list[Prompt]]], name: str, unconditional: Unconditional, previewed: bool
) -> None:
    """All plans, follow-ups among them; images drawn to their end, and those drawn again or given up at a preview."""
    policy, prompts = models[name]
    sampling = Sampling(num_generations=3, cfg_weight=5.0, max_text_tokens=6, unconditional=unconditional)
    gate = Gate(threshold=2.0, max_attempts=2, min_keep=2) if previewed else None
    rollouts = generate(policy, prompts, sampling, gate)
    assert any(rollout.dropped for rollout in rollouts) is previewed
    images = {}
    for how in CONVENTIONS:
        (batch,) = packed(policy, rollouts, 3, guided=how != "conditional")  # type: ignore[arg-type]
        with torch.no_grad():
            logp = PolicyForward(policy, Objective(policy_logp=how))(batch)["logp"]
        assert batch.sampled_logp[batch.loss_mask].isfinite().all()
        assert replay_error(batch, logp) <= TOLERANCE, how
        images[how] = logp[batch.loss_mask & (batch.modality == IMAGE)]
    assert float((images["guided"] - images["guided_detached"]).abs().max()) <= TOLERANCE
    assert float((images["guided"] - images["conditional"]).abs().mean()) > 0.5, "the conventions differ"
    chosen = next(rollout for rollout in rollouts if len(rollout.segments) == 3)
    segments = [segment for segment in chosen.segments if segment.kind == "image"]
    for segment, mixed in zip(segments, mixed_by_transformers(policy, chosen, 5.0), strict=True):
        torch.testing.assert_close(segment.logp_mixed, mixed, rtol=0, atol=TOLERANCE)


# The free prompt ------------------------------------------------------------------------------------------------------


def test_padding_stands_where_the_prompt_does(models: dict[str, tuple[Policy, list[Prompt]]]) -> None:
    """Janus's own way: every id between the first and the last becomes padding, so that positions are the same."""
    for name in MODELS:
        policy, prompts = models[name]
        for prompt in prompts:
            ids = torch.cat([policy.prompt_tokens(prompt), torch.tensor([policy.image_start])])
            beside = policy.unconditional_tokens(ids.numel())
            padded = ids.clone()
            padded[1:-1] = policy.tokenizer.pad_token_id
            assert torch.equal(beside, padded) and int(ids[0]) == policy.tokenizer.bos_token_id
        assert torch.equal(policy.unconditional_tokens(2), torch.tensor([ids[0], policy.image_start]))


def test_one_prefill_for_each_length(models: dict[str, tuple[Policy, list[Prompt]]]) -> None:
    """Shared by all members of all prompts of that length; none for prompts that draw nothing, none at w = 1."""
    policy, prompts = models["janus"]
    engine, twice = RolloutEngine(policy, cuda_graphs=False), make_prompt("draw it!", ("image",))
    asked = [*prompts, twice]
    lengths = [policy.prompt_tokens(prompt).numel() for prompt in asked]
    drawing = [n for n, prompt in zip(lengths, asked, strict=True) if "image" in prompt.segments]
    assert len(set(drawing)) < len(drawing) and set(lengths) > set(drawing)
    for weight, more in ((3.0, sum(n + 1 for n in set(drawing))), (1.0, 0)):
        sampling = Sampling(num_generations=2, cfg_weight=weight, max_text_tokens=4, unconditional="pads")
        rollouts = engine.generate(asked, sampling)
        assert engine.stats.prefill_tokens == sum(lengths) + more
        for rollout in rollouts:
            for segment in rollout.segments:
                if segment.kind == "text" or weight == 1.0:
                    assert segment.free_prompt is None and segment.guidance == 1.0
                    continue
                assert segment.free_prompt is not None and segment.guidance == weight
                assert segment.free_prompt.numel() == rollout.prompt_tokens.numel() + 1


def test_draws_do_not_depend_on_the_batch_around(models: dict[str, tuple[Policy, list[Prompt]]]) -> None:
    """Each twin reads the keys of its own length, wherever they lie."""
    policy, prompts = models["janus"]
    sampling = Sampling(num_generations=2, cfg_weight=3.0, max_text_tokens=4, unconditional="pads")

    def tokens(rollouts: Sequence[Rollout]) -> list[list[int]]:
        return [[int(t) for s in rollout.segments for t in s.tokens] for rollout in rollouts]

    together = tokens(generate(policy, prompts, sampling))
    for i in (1, 2, 6):
        assert tokens(generate(policy, prompts[i : i + 1], sampling)) == together[2 * i : 2 * i + 2]


def test_a_policy_that_ignores_the_length_is_refused(
    models: dict[str, tuple[Policy, list[Prompt]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, prompts = models["janus"]
    fixed = policy.unconditional_tokens()
    monkeypatch.setattr(policy, "unconditional_tokens", lambda length=None: fixed)
    with pytest.raises(ConfigError, match=r"unconditional: expected 9 tokens of JanusPolicy.*got 6; take fixed"):
        FreePrompts.of(policy, [4, 8], [False, True], "pads")
    with pytest.raises(ConfigError, match="take fixed"):
        generate(policy, prompts[2:3], Sampling(cfg_weight=2.0, unconditional="pads"))


def test_photos_are_padded_over(models: dict[str, tuple[Policy, list[Prompt]]], tmp_path: Path) -> None:
    """A prompt that shows a photo has its slots padded too: nothing of it reaches the free branch."""
    policy, _ = models["janus"]
    prompt = make_prompt("draw it so.", ("image",), world_photo(tmp_path, 0))
    sampling = Sampling(num_generations=2, cfg_weight=0.0, temperature=0.0, unconditional="pads")
    (one, _) = generate(policy, [prompt], sampling)
    assert one.segments[0].free_prompt is not None and not policy.image_slots(one.segments[0].free_prompt).any()
    (other, _) = generate(policy, [make_prompt("draw it so.", ("image",), world_photo(tmp_path, 77))], sampling)
    assert torch.equal(one.segments[0].tokens, other.segments[0].tokens), "at w = 0 it alone draws"
