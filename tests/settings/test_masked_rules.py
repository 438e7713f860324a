"""masked_rules.py: what is refused of images that are filled in, and what is not."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from small_show_o import sharp_show_o
from text_models import policy as text_policy

from syncr1.engine.errors import ConfigError
from syncr1.engine.learn.from_settings import check_order
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.settings.masked_rules import UNBIASED, order_problems
from syncr1.engine.settings.train_config import LossType, MaskedLogp

K = {"masked_steps": 2}
ANEW = {"masked_logp": "random_mask"}
STEP = {"masked_logp": "step", "loss_type": "grpo"}
IMPOSSIBLE: list[tuple[dict[str, Any], str, str]] = [
    *[(K | {"loss_type": name}, "loss_type", "the chosen ones are not all") for name in ("grpo", "sapo")],
    (K | {"loss_type": "vespo"}, "loss_type", "weighs a trajectory by all of its tokens; leave masked_steps out"),
    (K | {"masked_logp": "all", "loss_type": "grpo"}, "loss_type", "expected one of dapo, bnpo, cispo, dr"),
    (K | STEP | {"loss_type": "dr_grpo"}, "loss_type", "expected grpo with masked_logp step"),
    (
        STEP | {"importance_sampling_level": "sequence"},
        "importance_sampling_level",
        "expected token with masked_logp step",
    ),
    (K | {"importance_sampling_level": "sequence"}, "importance_sampling_level", "the chosen steps alone"),
    (K | {"importance_correction": "mask", "importance_level": "sequence"}, "importance_level", "take token"),
    (K | {"top_entropy_quantile": 0.5}, "top_entropy_quantile", "expected 1 with masked_steps 2, got 0.5"),
    (ANEW | {"importance_correction": "truncate"}, "importance_correction", "was never in such a state"),
    (
        ANEW | {"importance_correction": "truncate", "rollout_staleness": 1},
        "rollout_staleness",
        "expected 0 with masked_logp random_mask, got 1",
    ),
    (ANEW | {"top_k": 5}, "image_top_k", "got 5 (from top_k); set --image_top_k 0"),
    (ANEW | {"image_top_p": 0.9}, "image_top_p", "got 0.9; set --image_top_p 1"),
    ({"masked_logp": "all", "image_min_p": 0.1}, "image_min_p", "states where other ids were kept"),
    ({"masked_steps": 0}, "masked_steps", "at least 1"),
    ({"image_steps": 0}, "image_steps", "at least 1"),
    ({"image_noise": -1.0}, "image_noise", "at least 0"),
    ({"masked_logp": "each"}, "masked_logp", f"expected one of {', '.join(get_args(MaskedLogp))}"),
]
POSSIBLE: list[dict[str, Any]] = [
    *[K | {"loss_type": name, "epsilon_high": 5.0} for name in UNBIASED],
    *[ANEW | K | {"loss_type": name, "epsilon_high": 5.0} for name in get_args(LossType)],
    ANEW | {"top_k": 5, "image_top_k": 0, "num_iterations": 2, "importance_sampling_level": "sequence"},
    STEP | {"top_k": 5, "importance_correction": "mask"},
    STEP | K,
    K | {"image_top_p": 0.9, "importance_correction": "truncate", "num_iterations": 2},
]


@pytest.mark.parametrize(("settings", "field", "words"), IMPOSSIBLE, ids=lambda value: str(value)[:50])
def test_refused(settings: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        SyncR1Config(**settings)
    (line,) = str(raised.value).splitlines()
    assert line.startswith(f"{field}: ") and words in line


@pytest.mark.parametrize("settings", POSSIBLE, ids=lambda value: str(value)[:60])
def test_possible(settings: dict[str, Any]) -> None:
    SyncR1Config(**settings)


def test_what_a_decoding_order_has_no_use_for() -> None:
    """One line for each setting, all at once; defaults say nothing."""
    others = {"image_steps": 8, "image_noise": 1.8, "masked_logp": "random_mask", "masked_steps": 2}
    usual = SyncR1Config()
    check_order(usual, sharp_show_o())
    check_order(SyncR1Config(**others), sharp_show_o())
    with pytest.raises(ConfigError) as raised:
        check_order(SyncR1Config(**others), text_policy("qwen3"))
    assert str(raised.value).splitlines() == [
        "image_steps: expected 16 for CausalLMPolicy, which draws no images, got 8; leave it out",
        "image_noise: expected 1 for CausalLMPolicy, which draws no images, got 1.8; leave it out",
        "masked_logp: expected committed for CausalLMPolicy, which draws no images, got random_mask; leave it out",
        "masked_steps: expected none for CausalLMPolicy, which draws no images, got 2; leave it out",
    ]
    (line,) = order_problems(
        SyncR1Config(image_steps=8),
        "JanusPolicy",
        "raster",
        576,
        {"image_steps": 16, "image_noise": 1.0} | {"masked_logp": "committed", "masked_steps": None},
    )
    assert "JanusPolicy, which draws one token after another, got 8" in line
    wrong = SyncR1Config(image_steps=17, unconditional="pads", preview_completion="likely")
    with pytest.raises(ConfigError) as raised:
        check_order(wrong, sharp_show_o())
    told = [line.split(":")[0] for line in str(raised.value).splitlines()]
    assert told == ["image_steps", "unconditional", "preview_completion"]
    check_order(SyncR1Config(image_steps=16, preview_completion="likely", preview_fraction=0.0), sharp_show_o())
