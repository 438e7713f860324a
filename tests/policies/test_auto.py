"""A checkpoint's configuration alone decides which policy reads it."""

from __future__ import annotations

import json
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import make_prompt, sharp_policy
from small_emu3 import sharp_emu3
from stepping_cases import same_draws

from syncr1.engine.policies.auto import KNOWN, load_policy
from syncr1.engine.policies.base import Policy
from syncr1.engine.rollout.sampler import Sampling, generate


@pytest.mark.parametrize(("kind", "make"), [("emu3", sharp_emu3), ("janus", sharp_policy)])
def test_a_saved_policy_comes_back_as_what_it_was(kind: str, make: type[Policy], tmp_path: Path) -> None:
    policy = make()
    policy.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind
    loaded = load_policy(tmp_path)
    assert type(loaded) is type(policy)
    prompts, sampling = [make_prompt("draw it")], Sampling(num_generations=2, cfg_weight=2.0, max_text_tokens=4)
    same_draws(generate(loaded.eval(), prompts, sampling), generate(policy, prompts, sampling))
    assert load_policy(str(tmp_path), dtype=torch.bfloat16).cache_shape().dtype == torch.bfloat16


@pytest.mark.parametrize("settings", [{"model_type": "llama"}, {"model_type": "showo"}, {"hidden_size": 8}])
def test_an_unknown_type_is_refused_by_name(settings: dict[str, object], tmp_path: Path) -> None:
    """Known to transformers or not, or not told; the message says what there is, and where text models go."""
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError) as raised:
        load_policy(tmp_path)
    for part in (*KNOWN, repr(settings.get("model_type")), str(tmp_path), "CausalLMPolicy"):
        assert part in str(raised.value)


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got no config\.json in"):
        load_policy(tmp_path)
