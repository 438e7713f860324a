"""CONTRIBUTING's recipe for a model, followed: the skeleton keeps what the engine asks of a policy, and so do the real
ones; it loads, samples, trains and is saved like them. A new model joins POLICIES.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import text_models
import torch
from helpers import all_kinds_of_prompts, make_prompt, packed, rows_of, sharp_policy
from skeleton_policy import SLOT, START, BlocksConfig, BlocksForConditionalGeneration, BlocksPolicy
from small_chameleon import sharp_chameleon
from small_emu3 import sharp_emu3
from small_liquid import sharp_liquid
from small_show_o import sharp_show_o
from stepping_cases import same_draws

from syncr1.engine.errors import ConfigError
from syncr1.engine.forward.objective import Objective, PolicyForward
from syncr1.engine.methods.sync_r1 import run
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.policies.auto import KNOWN, load_policy, policy_class
from syncr1.engine.policies.base import Policy
from syncr1.engine.records import Prompt
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling


def blocks() -> BlocksPolicy:
    tokenizer = text_models.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [START, SLOT]})
    sizes = text_models.SIZES | {"vocab_size": len(tokenizer) + 8, "max_position_embeddings": 256}
    torch.manual_seed(0)
    return BlocksPolicy(BlocksForConditionalGeneration(BlocksConfig(**sizes)), tokenizer).eval()


POLICIES: dict[str, Callable[[], Policy]] = {
    "blocks": blocks,
    "chameleon": sharp_chameleon,
    "emu3": sharp_emu3,
    "janus": sharp_policy,
    "liquid": sharp_liquid,
    "qwen3": lambda: text_models.policy("qwen3"),
    "show_o": sharp_show_o,
}


def prompts_for(policy: Policy, folder: Path) -> list[Prompt]:
    """Every plan that the model can follow, with and without a photo."""
    if not policy.num_image_tokens:
        return [make_prompt("what is it?", ("text",))]
    prompts = all_kinds_of_prompts(folder)
    if policy.decoding_order == "raster":
        return prompts
    # An image is a sequence of its own, of words alone, and ends what is sampled.
    return [p for p in prompts if "image" not in p.segments[:-1] and (not p.images or p.segments[0] == "text")]


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_sampled_is_what_is_trained(name: str, tmp_path: Path) -> None:
    """The sampler's log-probabilities are the trainer's, token by token, with guidance beside them."""
    policy = POLICIES[name]()
    sampling = Sampling(num_generations=2, max_text_tokens=4, cfg_weight=2.0)
    for batch in packed(policy, generate(policy, prompts_for(policy, tmp_path), sampling), 2):
        logp = PolicyForward(policy, Objective())(batch)["logp"][batch.loss_mask]
        assert logp.numel()
        torch.testing.assert_close(logp, batch.sampled_logp[batch.loss_mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", POLICIES)
def test_pictures_and_their_tokens(name: str) -> None:
    """Drawings have the size that the policy says, and a model that draws none says so where it is asked."""
    policy = POLICIES[name]()
    if not policy.num_image_tokens:
        for ask in (policy.draw, policy.see, policy.image_tokens, policy.vision_features):
            with pytest.raises(ConfigError, match="has no image vocabulary"):
                ask(torch.zeros(1, 3, 8, 8))
        assert not policy.image_slots(torch.arange(5)).any()
        return
    pictures = torch.rand(2, 3, policy.image_size, policy.image_size)
    tokens = policy.image_tokens(pictures)
    assert tokens.shape == (2, policy.num_image_tokens)
    drawn = policy.draw(tokens)
    assert drawn.shape == pictures.shape and drawn.min() >= 0 and drawn.max() <= 1
    assert policy.see(pictures).shape[::2] == (2, policy.embed(tokens, "image").shape[-1])
    assert policy.vision_features(pictures).dtype == torch.float32


def test_the_skeletons_codes_are_its_pictures() -> None:
    policy, codes = blocks(), torch.arange(32).view(2, 16) % 8
    assert torch.equal(policy.image_tokens(policy.draw(codes)), codes)


def test_the_skeleton_goes_through_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line in `KNOWN`, and a folder of it samples, is judged, trains, is saved and comes back."""
    monkeypatch.setitem(KNOWN, "blocks", BlocksPolicy)
    blocks().save(tmp_path / "model")
    empty = policy_class(tmp_path / "model").without_weights(tmp_path / "model")
    assert all(parameter.is_meta for parameter in empty.parameters())
    rows = [
        {"prompt": f"describe and draw the {c} cup", "segments": "text+image", "answer": c, "target": f"a {c} cup"}
        for c in ("red", "blue")
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SyncR1Config(
        model=str(tmp_path / "model"),
        data=tmp_path / "data.jsonl",
        output_dir=tmp_path / "run",
        max_steps=1,
        prompts_per_step=2,
        num_generations=4,
        max_completion_length=6,
        replay_check_steps=1,
        cfg_weight=2.0,
    )
    run(config)
    (row,) = rows_of(tmp_path / "run")
    assert row["grad_norm"] > 0 and row["rollout/replay_logp_max_abs"] < 1e-4
    assert row["tokens/text"] > 0 and row["tokens/image"] > 0 and row["reward_failures"] == 0
    trained = load_policy(tmp_path / "run" / "checkpoints" / "last").eval()
    assert isinstance(trained, BlocksPolicy)
    before = blocks().model.lm_head.weight
    assert not torch.equal(trained.model.lm_head.weight, before)
    again = tmp_path / "again"
    trained.save(again)
    prompts, sampling = [make_prompt("draw it")], Sampling(num_generations=2, cfg_weight=2.0, max_text_tokens=4)
    same_draws(generate(load_policy(again).eval(), prompts, sampling), generate(trained, prompts, sampling))
