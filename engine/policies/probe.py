"""Whether a text decoder of transformers can run on our attention layouts and heads, found out by running it.

A model that caps its logits, slides its window or keeps a recurrent state would run without an error and be wrong.
What its configuration tells is refused by name; then a few tokens go through transformers' own forward and through
ours, and the two must agree.

Dims: L tokens of a sequence, T packed tokens, V vocabulary, D hidden, K key-value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from syncr1.kernels.api import SharedPrefixLayout

from ..errors import ConfigError
from .attention_interface import ATTENTION_NAME, AttentionLayout, PackedLayout

PROBE_NAME = ATTENTION_NAME + "_probe"
_LENGTHS = (5, 3)
_TOLERANCE = {torch.float16: 0.1, torch.bfloat16: 0.1}
"""Relative error of logits; 1e-3 for other dtypes. A missing factor or mask is far above either."""


@dataclass(frozen=True, slots=True)
class DecoderFacts:
    """What the probe measured."""

    num_layers: int
    num_heads: int
    """Key-value heads of every layer."""
    head_dim: int
    logit_scale: float
    """`logits = logit_scale * (hidden @ weight.T + bias)`."""


@dataclass
class _Witness:
    """A layout that notes what each attention layer hands over."""

    layout: AttentionLayout
    shapes: list[tuple[int, int, int]] = field(default_factory=list)
    """(layer, K, E), one entry per call."""
    ignored: set[str] = field(default_factory=set)
    """What layers ask of attention that a layout does not do."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.shapes.append((layer, key.shape[1], key.shape[3]))
        if key.shape[3] != value.shape[3]:
            raise ConfigError(
                f"CausalLMPolicy: layer {layer} has keys of size {key.shape[3]} and values of size {value.shape[3]} "
                "(latent attention); expected equal sizes, because one cache holds both; use another model"
            )
        return self.layout.attend(layer, query, key, value, scale)


def _noting_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    witness = kwargs.get("layout")
    if not isinstance(witness, _Witness):
        raise TypeError(f"{type(module).__name__} does not hand its keyword arguments to the attention function")
    if mask is not None:
        witness.ignored.add("an attention mask")
    asked = {
        "softcap": "soft-capped attention scores",
        "s_aux": "attention sinks",
        "sinks": "attention sinks",
        "position_bias": "a position bias",
    }
    witness.ignored |= {what for name, what in asked.items() if kwargs.get(name) is not None}
    return witness.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(PROBE_NAME, _noting_attention)


def refusals(model: PreTrainedModel, policy: str) -> list[str]:
    """Reasons in the configuration why our layouts and heads would be wrong for this model; empty if there are none."""
    config = model.config.get_text_config(decoder=True)
    settings = config.to_dict()
    found = []
    if not type(model)._supports_attention_backend:
        found.append("it does not take its attention from transformers' attention interface")
    for name, value in settings.items():
        if name.replace("_", "").endswith("softcapping") or "softcap" in name.replace("_", ""):
            found += [f"{name}={value} caps scores or logits by tanh"] if value else []
    reach = max_positions(model, policy)
    window = settings.get("sliding_window")
    others = {str(kind) for kind in settings.get("layer_types") or ()} - {"full_attention", "attention"}
    slides = "sliding_attention" in others or (window is not None and not settings.get("layer_types"))
    if slides and (window is None or window < reach):
        found.append(
            f"sliding_window={window} hides keys within its {reach} positions (a config whose "
            f"max_position_embeddings does not exceed the window is accepted)"
        )
    found += [f"layer_types has {kind}" for kind in sorted(others - {"sliding_attention"})]
    if any("sink" in name for name, _ in model.named_parameters()):
        found.append("its attention has sinks")
    rope = settings.get("rope_parameters") or {}
    kinds = {str(r.get("rope_type")) for r in (rope, *(v for v in rope.values() if isinstance(v, dict)))}
    if "longrope" in kinds:
        found.append("rope_type=longrope rotates a token by the longest sequence of its batch")
    return found


def check_decoder(policy: str, decoder: PreTrainedModel, *reasons: str) -> None:
    """One rule for all policies, whatever decoder a checkpoint's configuration puts into them.

    Raises:
        ConfigError: it does something that packed layouts or a linear head cannot express; `reasons` are further ones.
    """
    found = [*refusals(decoder, policy), *reasons]
    if found:
        raise ConfigError(
            f"{policy}: {type(decoder).__name__} cannot be trained on packed sequences: {'; '.join(found)}. "
            "Expected full causal attention and a plain linear head (Llama, Qwen2, Qwen3, Gemma, Granite, …)"
        )


def max_positions(model: PreTrainedModel, policy: str = "CausalLMPolicy") -> int:
    """Longest sequence that the position ids reach; `policy` is named in the error."""
    config = model.config.get_text_config(decoder=True)
    reach = getattr(config, "max_position_embeddings", None)
    if reach is None:
        raise ConfigError(
            f"{policy}: {type(model).__name__} names no max_position_embeddings; expected a model with a bounded "
            "context, set config.max_position_embeddings to the longest sequence it may see"
        )
    return int(reach)


def measure(model: PreTrainedModel, forward: Callable[[Tensor, Tensor, AttentionLayout], Tensor]) -> DecoderFacts:
    """Runs two short sequences through transformers and packed through `forward`, and compares the logits.

    On the device `meta`, where there are no numbers, the shapes alone are found out.

    Args:
        model: loaded, on its device.
        forward: token ids [1, T], position ids [1, T], a layout -> final hidden states [1, T, D].

    Raises:
        ConfigError: the two disagree, or the layers cannot share one cache shape.
    """
    name = type(model).__name__
    head = model.get_output_embeddings()
    weight: Tensor = head.weight
    ids = [torch.arange(1, n + 1, device=weight.device) * (weight.shape[0] - 1) // (n + 1) for n in _LENGTHS]
    with _as_it_was(model), torch.no_grad():
        model.eval().set_attn_implementation("eager")
        plain = [] if weight.is_meta else [model(input_ids=r[None], use_cache=False).logits[0].float() for r in ids]
        # Training mode for ours: what is random there would make a ratio of probabilities random.
        model.train().set_attn_implementation(PROBE_NAME)
        ends = torch.tensor([0, *_LENGTHS]).cumsum(0).int()
        nobody = torch.zeros_like(ends)
        shared = SharedPrefixLayout(ends, nobody[:1], nobody).to(weight.device)
        witness = _Witness(PackedLayout(shared))
        try:
            hidden = forward(torch.cat(ids)[None], shared.position_ids()[None], witness)[0]
        except TypeError as error:
            raise ConfigError(
                f"CausalLMPolicy: {name} cannot carry a layout to its attention layers ({error}); use a decoder that "
                "passes keyword arguments to transformers' attention interface"
            ) from error
        bare = F.linear(hidden, weight, head.bias).float()
    if witness.ignored:
        raise ConfigError(f"CausalLMPolicy: {name} asks for {', '.join(sorted(witness.ignored))}, which layouts ignore")
    scale = _agreeing_scale(model, plain, bare, weight.dtype) if plain else 1.0
    return DecoderFacts(*_cache_shape(name, witness.shapes), scale)


def _agreeing_scale(model: PreTrainedModel, plain: Sequence[Tensor], bare: Tensor, dtype: torch.dtype) -> float:
    """The factor on logits. Models of one name for it differ in multiplying and dividing, so it is measured."""
    config = model.config.get_text_config(decoder=True)
    named = (getattr(config, name, None) for name in ("logits_scaling", "logit_scale", "lm_head_multiplier"))
    candidates = {1.0, *(s for f in named if f for s in (float(f), 1 / float(f)))}
    errors = {}
    for scale in candidates:
        pieces = (scale * bare).split([len(p) for p in plain])
        # The median row: a mixture of experts may send a token elsewhere after one rounding.
        rows = [(ours - p).norm(dim=1) / p.norm(dim=1) for ours, p in zip(pieces, plain, strict=True)]
        errors[scale] = max(float(row.median()) for row in rows)
    best = min(errors, key=lambda scale: errors[scale])
    allowed = _TOLERANCE.get(dtype, 1e-3)
    if not errors[best] <= allowed:
        raise ConfigError(
            f"CausalLMPolicy: packed, {type(model).__name__} gives other logits than transformers' own forward "
            f"(relative error {errors[best]:.2g}, expected at most {allowed}): it does more than attention over a "
            "sequence and one linear head; use another model, or write a policy for it"
        )
    return best


def _cache_shape(name: str, shapes: Sequence[tuple[int, int, int]]) -> tuple[int, int, int]:
    """(layers, K, E) when every layer attends once and keeps keys and values of one size."""
    layers, kinds = [shape[0] for shape in shapes], {shape[1:] for shape in shapes}
    if layers != list(range(len(layers))) or len(kinds) != 1:
        raise ConfigError(
            f"CausalLMPolicy: {name} attends in layers {layers} with (key-value heads, head size) {sorted(kinds)}; "
            "expected each layer once, all alike, because one cache holds them all"
        )
    ((num_heads, head_dim),) = kinds
    return len(layers), num_heads, head_dim


@contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Mode and attention of every part come back, whatever happens inside."""
    modes = [(module, module.training) for module in model.modules()]
    attention = model.config._attn_implementation
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        model.set_attn_implementation(attention)
