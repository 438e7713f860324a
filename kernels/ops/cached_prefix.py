"""`cached_prefix_attention`: the responses of shared prefixes whose keys and values are in a cache already.

What sampling by masked steps needs: the prompts are computed once, and every step computes all tokens of all responses
anew.  It has no gradient; training takes `shared_prefix_attention`.

Dims: `Tp` tokens of prefixes, `Tr` of responses, `C` columns, `H` query heads, `K` key-value heads, `E` head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import SharedPrefixLayout, choose_attention
from ..attention_ops import reference, two_calls
from ..attention_ops.varlen import plan_of
from ..checks import refuse
from ..ranges import ATTENTION_SCALE
from ..register import fakes, implements, registered
from .shared_prefix import check_operands, provider_of, unit_stride

OP = "cached_prefix_attention"


class CachedPrefixInputs(NamedTuple):
    """Arguments of the registered op."""

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_keys: Tensor
    prefix_values: Tensor
    cu_prefixes: Tensor
    """This one and the next four: `SharedPrefixLayout.host_offsets`."""
    cu_seqlens: Tensor
    group_offsets: Tensor
    whole_prefixes: Tensor | None
    whole_responses: Tensor | None
    scale: float


def cached_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    layout: SharedPrefixLayout,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """The rows of responses of `shared_prefix_attention`, over prefixes whose keys and values are cached.

    Equivalent PyTorch:
        keys, values = (x[:, :Tp].transpose(0, 1) for x in (prefix_keys, prefix_values))
        prefixes = torch.zeros(Tp, H, E)  # their queries; no response sees one
        all_tokens = (torch.cat(x) for x in ((prefixes, q), (keys, k), (values, v)))
        out = shared_prefix_attention(*all_tokens, layout, scale=scale)[Tp:]

    Args:
        q: [Tr, H, E] float, of any strides. Query head h reads key-value head h // (H / K).
        k: [Tr, K, E], dtype of `q`: keys of the responses' own tokens.
        v: [Tr, K, E], dtype of `q`.
        prefix_keys: [K, C, E], dtype of `q`; prefix p's keys are columns cu_prefixes[p] to cu_prefixes[p+1], C ≥ Tp.
            Views of a larger cache are read in place where their stride along E is 1.
        prefix_values: [K, C, E], likewise.
        layout: of the prefixes and responses. After `layout.to(device)` the call may be captured in a CUDA graph, which
            serves this layout alone, for as long as it exists.
        scale: finite, > 0; multiplies the scores; None = 1/√E.
        backend: as in `shared_prefix_attention`.

    Returns:
        [Tr, H, E], dtype of `q`.

    Raises:
        ValueError: a shape, dtype, device or value is out of place.
        BackendError: the backend that was asked for cannot serve the call.
        RuntimeError: an argument requires a gradient while gradients are recorded; the op has none.

    Source: as `shared_prefix_attention`.
    """
    ATTENTION_SCALE.check(OP, "scale", scale)
    tensors = (q, k, v, prefix_keys, prefix_values)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise RuntimeError(
            f"{OP}: no argument may require a gradient, as the op has none, got one that does; "
            "sample under torch.no_grad(), or score the tokens with shared_prefix_attention"
        )
    num_tokens = layout.num_tokens - layout.num_prefix_tokens
    check_operands(OP, q, k, v, num_tokens, "pass the tokens of this layout's responses, without their prefixes")
    _check_cache(q, k, prefix_keys, prefix_values, layout.num_prefix_tokens)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if choose_attention(backend, q, OP) == "reference":
        return reference.attend_over_cache(layout.plan, *tensors, scale)
    out: Tensor = registered.cached_prefix_attention(*CachedPrefixInputs(*tensors, *layout.host_offsets, scale))
    return out


def _check_cache(q: Tensor, k: Tensor, keys: Tensor, values: Tensor, num_prefix_tokens: int) -> None:
    if keys.dim() != 3 or (keys.shape[0], keys.shape[2]) != k.shape[1:] or keys.shape[1] < num_prefix_tokens:
        expected = f"[{k.shape[1]}, ≥ {num_prefix_tokens}, {k.shape[2]}]"
        refuse(
            OP, "prefix_keys", expected, list(keys.shape), "one column per prefix token, heads lead; is it [K, C, E]?"
        )
    if keys.shape != values.shape:
        refuse(OP, "prefix_values", list(keys.shape), list(values.shape), "keys and values have one shape")
    for name, x in (("prefix_keys", keys), ("prefix_values", values)):
        if (x.dtype, x.device) != (q.dtype, q.device):
            remedy = "keep the cache where the model is and in its dtype, or convert it with .to(q)"
            refuse(OP, name, f"{q.dtype} on {q.device}", f"{x.dtype} on {x.device}", remedy)


@implements(OP, CachedPrefixInputs, "Tensor")
def attend_over_cache(inputs: CachedPrefixInputs) -> Tensor:
    """[Tr, H, E]."""
    plan = plan_of(*inputs[5:10])
    q = inputs.q
    if q.shape[0] != plan.sequences[-1]:
        refuse(OP, "q.shape[0]", plan.sequences[-1], q.shape[0], "is the layout that of this batch?")
    if q.shape[0] == 0:
        return q.new_empty(q.shape)
    q, k, v = map(unit_stride, inputs[:3])
    cache = (inputs.prefix_keys, inputs.prefix_values)
    keys, values = (unit_stride(x[:, : plan.num_prefix_tokens]) for x in cache)
    return two_calls.over_cache(provider_of(q), plan, q, k, v, keys, values, inputs.scale)


@fakes(OP, CachedPrefixInputs)
def _(inputs: CachedPrefixInputs) -> Tensor:
    return inputs.q.new_empty(inputs.q.shape)
