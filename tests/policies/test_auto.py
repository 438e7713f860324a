"""A checkpoint's configuration alone decides which policy reads it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import make_prompt, sharp_policy
from small_chameleon import sharp_chameleon
from small_emu3 import sharp_emu3
from small_liquid import sharp_liquid
from small_show_o import sharp_show_o
from stepping_cases import same_draws
from text_models import config, model, tokenizer
from text_models import policy as text_policy

from syncr1.engine.errors import ConfigError
from syncr1.engine.policies.auto import KNOWN, load_policy, policy_class
from syncr1.engine.policies.base import Policy
from syncr1.engine.policies.causal_lm import CausalLMPolicy
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling

DRAWING = {
    "chameleon": sharp_chameleon,
    "emu3": sharp_emu3,
    "gemma": sharp_liquid,
    "janus": sharp_policy,
    "show_o": sharp_show_o,
}


@pytest.mark.parametrize(("kind", "make"), DRAWING.items())
def test_a_saved_policy_comes_back_as_what_it_was(kind: str, make: type[Policy], tmp_path: Path) -> None:
    policy = make()
    policy.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind
    loaded = load_policy(tmp_path)
    assert type(loaded) is type(policy)
    prompts, sampling = [make_prompt("draw it")], Sampling(num_generations=2, cfg_weight=2.0, max_text_tokens=4)
    same_draws(generate(loaded.eval(), prompts, sampling), generate(policy, prompts, sampling))
    assert load_policy(str(tmp_path), dtype=torch.bfloat16).cache_shape().dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma", "granite", "cohere", "mistral", "gpt2"])
def test_a_text_decoder_loads_by_its_name_alone(family: str, tmp_path: Path) -> None:
    made = text_policy(family)
    made.save(tmp_path)
    loaded = load_policy(tmp_path)
    assert type(loaded) is CausalLMPolicy and not loaded.num_image_tokens
    prompts, sampling = [make_prompt("what is it?", ("text",))], Sampling(num_generations=2, max_text_tokens=4)
    same_draws(generate(loaded.eval(), prompts, sampling), generate(made, prompts, sampling))


@pytest.mark.parametrize("kind", [*DRAWING, "qwen3", "gpt2"])
def test_a_policy_without_weights_has_the_sizes_of_the_one_with(kind: str, tmp_path: Path) -> None:
    """What `--dry_run` counts memory by."""
    made: Policy = DRAWING.get(kind, lambda: text_policy(kind))()
    made.save(tmp_path)
    empty = policy_class(tmp_path).without_weights(tmp_path)
    assert all(parameter.is_meta for parameter in empty.parameters())
    shapes = ({name: p.shape for name, p in policy.named_parameters()} for policy in (empty, made))
    assert next(shapes) == next(shapes)
    facts = ("num_image_tokens", "image_size", "image_start", "decoding_order", "mask_token")
    for fact in (*facts, "end_tokens", "max_positions"):
        assert getattr(empty, fact) == getattr(made, fact), fact
    assert replace(empty.cache_shape(), device=made.device) == made.cache_shape()


@pytest.mark.parametrize("settings", [{"model_type": "showo"}, {"hidden_size": 8}])
def test_an_unknown_type_is_refused_by_name(settings: dict[str, object], tmp_path: Path) -> None:
    """Known to transformers or not, or not told; the message says what there is, and where a new model begins."""
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError) as raised:
        load_policy(tmp_path)
    for part in (*KNOWN, "llama", repr(settings.get("model_type")), str(tmp_path), "CONTRIBUTING.md"):
        assert part in str(raised.value)


def test_a_text_decoder_that_packed_layouts_get_wrong_is_refused_with_the_reason(tmp_path: Path) -> None:
    model("mistral", sliding_window=16).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    for load in (load_policy, policy_class(tmp_path).without_weights):
        with pytest.raises(ConfigError, match=r"sliding_window=16 hides keys.*Expected full causal attention"):
            load(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    config("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"can read.*safetensors"):
        load_policy(tmp_path)


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got no config\.json in"):
        load_policy(tmp_path)
