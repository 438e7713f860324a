"""A checkpoint's policy, chosen by the `model_type` of its configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
from transformers import PreTrainedConfig

from .base import Policy
from .emu3 import Emu3Policy
from .janus import JanusPolicy

KNOWN: Mapping[str, Callable[..., Policy]] = {
    "emu3": Emu3Policy.from_pretrained,
    "janus": JanusPolicy.from_pretrained,
}
"""`model_type` -> loader."""


def load_policy(name: str | Path, *, dtype: torch.dtype = torch.float32) -> Policy:
    """The unified model in a checkpoint folder or under a hub name; safetensors only, no remote code.

    Args:
        name: in transformers' format.
        dtype: of the weights.

    Raises:
        ValueError: there is no configuration, or no policy is known for its `model_type`.
    """
    # The file alone: transformers refuses types that it does not know with an error of its own.
    settings, _ = PreTrainedConfig.get_config_dict(str(name))
    kind = settings.get("model_type")
    if kind not in KNOWN:
        got = repr(kind) if settings else "no config.json"
        raise ValueError(
            f"load_policy: expected a checkpoint with model_type {' or '.join(sorted(KNOWN))}, got {got} in {name}; "
            "a text-only decoder loads with CausalLMPolicy.from_pretrained, another unified model needs a policy"
        )
    return KNOWN[kind](name, dtype=dtype)
