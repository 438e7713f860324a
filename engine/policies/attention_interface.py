"""Attention behind transformers' attention interface: any decoder there runs on a layout of ours.

The layout object travels through the model's keyword arguments to every attention layer, so neither masks nor caches of
transformers are involved.  (Its own packed path leaks across sequences unless `use_cache=False` and no mask is given;
its DynamicCache copies all keys and values at every step.)

    decoder.set_attn_implementation(ATTENTION_NAME)
    hidden = decoder(inputs_embeds=..., position_ids=..., layout=PackedLayout(...), use_cache=False)

`PackedLayout` is the training forward's; prefill, decoding steps and follow-up turns have theirs in cache.py.

Dims: T packed tokens, B rows, N tokens of a row, H query heads, K key-value heads, E head size.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

from torch import Tensor, nn
from transformers import AttentionInterface

from syncr1.kernels.api import SharedPrefixLayout, shared_prefix_attention

ATTENTION_NAME = "syncr1"


class AttentionLayout(Protocol):
    """What an attention layer needs to know about where tokens lie."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Queries [B, H, N, E], keys and values [B, K, N, E] of the new tokens -> attended values [B, N, H, E]."""
        ...


class PackedLayout:
    """One packed axis, batch 1: all prompts, then all that was sampled behind them; each prompt lies there once.

    Args:
        shared: which responses continue which prompt; on the device that the model is on.
    """

    def __init__(self, shared: SharedPrefixLayout) -> None:
        self._shared = shared

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        del layer
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return shared_prefix_attention(q, k, v, self._shared, scale=scale)[None]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    layout: AttentionLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if layout is None:
        raise ValueError("syncr1 attention: expected layout=PackedLayout(...), got none; call the policy's `trunk`")
    assert attention_mask is None, "the layout decides what is seen; a mask would be ignored"
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("syncr1 attention: logit soft-capping and attention sinks are not computed; use another model")
    return layout.attend(cast(int, module.layer_idx), query, key, value, scaling), None


AttentionInterface.register(ATTENTION_NAME, _attention)
