"""A checkpoint's policy, chosen by the `model_type` of its configuration."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.hub import cached_file

from ..errors import ConfigError
from ..reasons import reading
from .base import Policy
from .causal_lm import CausalLMPolicy
from .chameleon import ChameleonPolicy
from .emu3 import Emu3Policy
from .janus import JanusPolicy
from .kinds import is_liquid
from .liquid import LiquidPolicy
from .show_o import ShowOPolicy

KNOWN: dict[str, type[Policy]] = {
    "chameleon": ChameleonPolicy,
    "emu3": Emu3Policy,
    "janus": JanusPolicy,
    "show_o": ShowOPolicy,
}
"""`model_type` -> policy of the models that draw; a type that transformers knows as a text decoder has CausalLMPolicy,
which itself says why it cannot take one, or LiquidPolicy where its tokenizer is Liquid's."""
CONVERTED: dict[str, type[Policy]] = {"multi_modality": JanusPolicy}
"""`model_type` -> policy of what `local_checkpoint` converts before it is loaded: Janus in DeepSeek's layout."""


def policy_class(name: str | Path) -> type[Policy]:
    """The policy of a checkpoint folder or hub name; its configuration alone is read.

    Raises:
        ConfigError: there is no configuration, or no policy is known for its `model_type`.
    """
    repository, revision = _split(name)
    with reading("model", name):  # the file alone: transformers refuses types that it does not know with its own error
        settings, _ = PreTrainedConfig.get_config_dict(repository, revision=revision or None)
    kind = settings.get("model_type")
    if kind in KNOWN or kind in CONVERTED:
        return (KNOWN | CONVERTED)[kind]
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        with reading("model", name):
            return LiquidPolicy if is_liquid(partial(_found, repository, revision)) else CausalLMPolicy
    got = f"model_type {kind!r}" if settings else "no config.json"
    raise ConfigError(
        f"model: expected a checkpoint of {' or '.join(sorted(KNOWN))}, or a text decoder of transformers (llama, "
        f"qwen2, qwen3, gemma, …), got {got} in {name}; another unified model needs a policy (CONTRIBUTING.md, Add a "
        "model)"
    )


def _split(name: str | Path) -> tuple[str, str]:
    """A folder, or a repository and its revision, which is empty where none is named."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder), ""
    repository, _, revision = str(name).partition("@")
    return repository, revision


def _found(repository: str, revision: str, file: str) -> Path | None:
    path = cached_file(
        repository,
        file,
        revision=revision or None,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if path is None else Path(path)


def model_draws(name: str | Path | None) -> bool:
    """Whether a checkpoint's policy has an image vocabulary; None: the tiny base, which has. No weights are read."""
    return name is None or policy_class(name) is not CausalLMPolicy


def load_policy(name: str | Path, *, dtype: torch.dtype = torch.float32) -> Policy:
    """The model in a checkpoint folder or under a hub name; safetensors only, no remote code.

    Args:
        name: in transformers' format.
        dtype: of the weights.

    Raises:
        ConfigError: no policy is known for it, its own policy refuses it, or a file is missing.
    """
    return policy_class(name).from_pretrained(name, dtype=dtype)
