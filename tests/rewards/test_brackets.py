"""Which rewards take part: an ensemble is of what there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from syncr1.engine.rewards.ensemble import build_rewards


def test_build_rewards_gives_the_bracket_to_what_is_there() -> None:
    def features(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)

    def likely(images: torch.Tensor, texts: Any) -> torch.Tensor:
        return torch.zeros(len(texts))

    everything = build_rewards(features=features, captions=likely)
    assert everything.names == ("identity", "judge", "text")
    assert everything.weights == pytest.approx((0.26, 0.39, 0.35))
    assert everything.kinds == ("image", "image", "text")
    assert everything.weight_tensor().dtype == torch.float32
    assert build_rewards(features=features).weights == pytest.approx((0.65, 0.35))
    assert build_rewards(captions=likely).weights == pytest.approx((0.65, 0.35))
    assert build_rewards().names == ("text",)
    with pytest.raises(ValueError, match="expected a positive one"):
        build_rewards(text_weight=0.0)
    with pytest.raises(ValueError, match="judge_weight"):
        build_rewards(judge_weight=-1.0)
