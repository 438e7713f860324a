"""What stands between a public op and the registered one: defaults, the backend, the records handed back.

Backend `reference` is called directly, as the differentiable PyTorch code that it is; all others, and losses of meta
tensors, which have no values to select rows by, through `torch.ops.syncr1.*`. Nothing here reads a tensor's values, so
that `torch.compile` can trace through it.

Dims: `T` packed tokens, `S` sequences, `N` rows of a stream, `B` decode rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

# Importing them registers torch.ops.syncr1.*
import syncr1.kernels.ops.linear_loss
import syncr1.kernels.ops.logp
import syncr1.kernels.ops.sample
import syncr1.kernels.ops.scores  # noqa: F401

from . import checks, ranges
from .dispatch import choose, same_device
from .layout import PackedLayout
from .ops.loss import run as run_grpo_loss
from .ops.register import constant_when_traced, registered
from .options import decode, encode
from .plan import Rewards, by_modality, check_credit, per_modality, stream_layout
from .records import MODALITIES, GRPOOutput, TokenStream
from .reference import backend as reference
from .terms import METRICS, METRICS_PER_MODALITY

Setting = tuple[str, Any, str]
"""Name, value (a dict as a tuple of its items) and type: to a cache, True and 1 are the same key."""


@constant_when_traced
def _encode(op: str, settings: tuple[Setting, ...]) -> str:
    try:
        return _encode_once(op, settings)
    except TypeError:  # a value without a hash, which no setting is
        return _encode_once.__wrapped__(op, settings)


@lru_cache(maxsize=256)
def _encode_once(op: str, settings: tuple[Setting, ...]) -> str:
    return encode(op, {name: dict(value) if kind.startswith("dict") else value for name, value, kind in settings})


def _split_num_items(options: dict[str, Any]) -> tuple[tuple[Setting, ...], Tensor | None]:
    """Settings without tensors, and `num_items` as [1] or [2] where it was given as a tensor or as a dict of them."""
    value = options.get("num_items")
    tensor: Tensor | None = None
    if isinstance(value, Mapping) and any(isinstance(part, Tensor) for part in value.values()):
        checks.check_modality_keys("grpo_loss", "num_items", value)
        tensor = torch.stack([torch.as_tensor(value[m]).float().reshape(()) for m in MODALITIES])
    elif isinstance(value, Tensor):
        tensor = value.reshape(-1)
        if tensor.numel() not in (1, 2):
            checks.refuse("grpo_loss", "num_items", "a number, or one per modality", list(value.shape), "sum it first")
    if tensor is not None:
        # The tensor says how much; the setting still says whether modalities are reduced on their own.
        options = options | {"num_items": 1.0 if tensor.numel() == 1 else dict.fromkeys(MODALITIES, 1.0)}
    return tuple(_plain(name, value) for name, value in options.items()), tensor


def _plain(name: str, value: Any) -> Setting:
    """A setting as a key of a cache."""
    if not isinstance(value, Mapping):
        return name, value, type(value).__name__
    return name, tuple(value.items()), "dict " + " ".join(type(part).__name__ for part in value.values())


def _credits(op: str, name: str, values: Rewards | None) -> list[Tensor]:
    return [] if values is None else per_modality(op, name, values)


@cache
def _metric_indices(image: bool, kl: bool, entropy: bool) -> list[tuple[str, int]]:
    """Names and places of the metrics that have a meaning for a call."""
    absent = {name for name, there in (("kl", kl), ("entropy", entropy)) if not there}
    modalities = ("text", "image") if image else ("text",)
    wanted = {f"{name}/{m}" for name in METRICS_PER_MODALITY if name not in absent for m in modalities}
    return [(name, index) for index, name in enumerate(METRICS) if "/" not in name or name in wanted]


def _metrics(values: Tensor, *, image: bool, kl: bool, entropy: bool) -> dict[str, Tensor]:
    each = values.unbind()
    return {name: each[index] for name, index in _metric_indices(image, kl, entropy)}


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    rewards: Rewards | None,
    cu_seqlens: Tensor,
    group_offsets: Tensor,
    *,
    advantages: Rewards | None,
    loss_mask: Tensor | None,
    modality: Tensor | None,
    ref_logp: Tensor | None,
    is_ratio: Tensor | None,
    entropy: Tensor | None,
    weights: Tensor | None,
    backend: str | None,
    options: dict[str, Any],
) -> GRPOOutput:
    """See `syncr1.kernels.api.grpo_loss`."""
    op = "grpo_loss"
    same_device(
        op, logp=logp, old_logp=old_logp, rewards=rewards, cu_seqlens=cu_seqlens, group_offsets=group_offsets,
        advantages=advantages, loss_mask=loss_mask, modality=modality, ref_logp=ref_logp, is_ratio=is_ratio,
        entropy=entropy, weights=weights, num_items=options.get("num_items"),
    )  # fmt: skip
    plain, num_items = _split_num_items(options)
    settings = _encode(op, plain)
    credit, given = _credits(op, "rewards", rewards), _credits(op, "advantages", advantages)
    checks.check_float(op, "logp", logp)
    if logp.dim() != 1:
        checks.refuse(op, "logp", "[T]", list(logp.shape), "pack the sequences onto one axis: logp[mask]")
    chosen = choose(op, backend, logp, old_logp, ref_logp)
    if chosen == "reference" and not logp.is_meta:
        layout, parsed = PackedLayout(cu_seqlens, group_offsets, modality, loss_mask, logp.shape[0]), decode(settings)
        checks.check_loss_inputs(
            op,
            layout,
            parsed,
            {
                "logp": logp,
                "old_logp": old_logp,
                "ref_logp": ref_logp,
                "entropy": entropy,
                "is_ratio": is_ratio,
                "num_items": num_items,
            },
        )
        check_credit(op, credit, given, layout, weights)
        return reference.grpo_loss(
            logp, old_logp, credit, given, layout, parsed, ref_logp=ref_logp, is_ratio=is_ratio, entropy=entropy,
            weights=weights, num_items=num_items,
        )  # fmt: skip
    loss, _, advantages_MS, keep, metrics = run_grpo_loss(
        logp, old_logp, credit, given, cu_seqlens, group_offsets, loss_mask, modality, ref_logp, is_ratio, entropy,
        weights, num_items, settings, chosen,
    )  # fmt: skip
    named = _metrics(metrics.detach(), image=modality is not None, kl=ref_logp is not None, entropy=entropy is not None)
    advantages_S = by_modality(advantages_MS.detach())
    return GRPOOutput(loss, advantages_S, keep, named, logp.detach(), None if entropy is None else entropy.detach())


def linear_grpo_loss(
    streams: Sequence[TokenStream],
    rewards: Rewards | None,
    cu_seqlens: Tensor,
    group_offsets: Tensor,
    *,
    advantages: Rewards | None,
    old_logp: Tensor | None,
    loss_mask: Tensor | None,
    modality: Tensor | None,
    ref_logp: Tensor | None,
    is_ratio: Tensor | None,
    weights: Tensor | None,
    backend: str | None,
    options: dict[str, Any],
) -> GRPOOutput:
    """See `syncr1.kernels.api.linear_grpo_loss`."""
    op = "linear_grpo_loss"
    same_device(
        op, streams=streams, rewards=rewards, cu_seqlens=cu_seqlens, group_offsets=group_offsets,
        advantages=advantages, old_logp=old_logp, loss_mask=loss_mask, modality=modality, ref_logp=ref_logp,
        is_ratio=is_ratio, weights=weights, num_items=options.get("num_items"),
    )  # fmt: skip
    plain, num_items = _split_num_items(options)
    settings = _encode(op, plain)
    credit, given = _credits(op, "rewards", rewards), _credits(op, "advantages", advantages)
    checks.check_stream_records(op, streams)
    for stream in streams:
        ranges.TEMPERATURE.check(op, "stream.temperature", stream.temperature)
    streams = [_autocast(stream) for stream in streams]
    known = [t.shape[0] for t in (old_logp, loss_mask, modality, ref_logp) if t is not None]
    if not known and cu_seqlens.is_meta:
        checks.refuse(op, "old_logp, loss_mask, modality or ref_logp", "given with meta tensors", None, "they tell T")
    num_tokens = known[0] if known else int(cu_seqlens[-1])
    chosen = choose(op, backend, *(s.hidden for s in streams))
    if chosen == "reference" and not streams[0].hidden.is_meta:
        parsed = decode(settings)
        layout = PackedLayout(cu_seqlens, group_offsets, modality, loss_mask, num_tokens)
        checks.check_loss_inputs(
            op,
            layout,
            parsed,
            {"old_logp": old_logp, "ref_logp": ref_logp, "is_ratio": is_ratio, "num_items": num_items},
        )
        checks.check_streams(op, streams, num_tokens)
        check_credit(op, credit, given, layout, weights)
        return reference.linear_grpo_loss(
            streams, old_logp, credit, given, stream_layout(op, streams, layout), parsed, ref_logp=ref_logp,
            is_ratio=is_ratio, weights=weights, num_items=num_items,
        )  # fmt: skip
    nothing, nowhere = streams[0].hidden.new_empty(0), streams[0].targets.new_empty(0, dtype=torch.int64)
    biases = [nothing if s.bias is None else s.bias for s in streams]
    forbidden = [nowhere if s.forbidden is None else s.forbidden for s in streams]
    parts = [part for s, bias in zip(streams, biases, strict=True) for part in (s.hidden, s.weight, bias)]
    needs = [part.requires_grad and torch.is_grad_enabled() for part in parts]
    loss, logp, entropy, advantages_MS, keep, metrics, _ = registered.linear_grpo_loss(
        [s.hidden for s in streams], [s.weight for s in streams], biases,
        [s.targets for s in streams], [s.rows for s in streams], forbidden,
        [float(s.temperature) for s in streams], [MODALITIES.index(s.modality) for s in streams],
        old_logp, credit, given, cu_seqlens, group_offsets, loss_mask, modality, ref_logp, is_ratio, weights,
        num_items, num_tokens, needs, settings, chosen,
    )  # fmt: skip
    named = _metrics(metrics.detach(), image=True, kl=ref_logp is not None, entropy=True)
    return GRPOOutput(loss, by_modality(advantages_MS.detach()), keep, named, logp.detach(), entropy.detach())


def _autocast(stream: TokenStream) -> TokenStream:
    """Under autocast a head runs in the autocast dtype, as `nn.Linear` does."""
    if not autocasts(stream.hidden):
        return stream
    hidden, weight, bias = cast_operands(stream.hidden, stream.weight, stream.bias)
    return TokenStream(hidden, weight, stream.targets, stream.rows, bias, stream.temperature, stream.modality,
                       stream.forbidden)  # fmt: skip


def autocasts(tensor: Tensor) -> bool:
    """Autocast is on for the tensor's device; meta tensors, whose device has none, are shapes alone."""
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def cast_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands of a head in the autocast dtype, where autocast is on."""
    if not autocasts(hidden) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    forbidden: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """See `syncr1.kernels.api.linear_logp`."""
    op = "linear_logp"
    same_device(op, hidden=hidden, weight=weight, targets=targets, bias=bias, forbidden=forbidden)
    hidden, weight, bias = cast_operands(hidden, weight, bias)
    checks.check_rows(op, hidden, weight, targets, bias)
    ranges.TEMPERATURE.check(op, "temperature", temperature)
    chosen = choose(op, backend, hidden, weight)
    if chosen == "reference":
        checks.check_targets(op, targets, hidden.shape[0], weight.shape[0])
        checks.check_forbidden(op, forbidden, weight.shape[0])
        return reference.linear_logp(
            hidden, weight, targets, bias=bias, temperature=float(temperature), forbidden=forbidden
        )
    logp, entropy, _ = registered.linear_logp(hidden, weight, bias, targets, float(temperature), forbidden, chosen)
    return logp, entropy


def selective_logp(
    logits: Tensor, targets: Tensor, temperature: float, forbidden: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    """See `syncr1.kernels.api.selective_logp`."""
    op = "selective_logp"
    same_device(op, logits=logits, targets=targets, forbidden=forbidden)
    checks.check_logits(op, logits)
    ranges.TEMPERATURE.check(op, "temperature", temperature)
    chosen = choose(op, backend, logits)
    if chosen == "reference":
        checks.check_targets(op, targets, logits.shape[0], logits.shape[1])
        checks.check_forbidden(op, forbidden, logits.shape[1])
        return reference.selective_logp(logits, targets, temperature=float(temperature), forbidden=forbidden)
    logp, entropy, _ = registered.selective_logp(logits, targets, float(temperature), forbidden, chosen)
    return logp, entropy
