"""Validation of what the public ops are given: one form of message, before anything is computed.

Every error names the op, the argument, what was expected, what came and the remedy. Shapes and dtypes are always
checked; values only where reading them makes nobody wait (`checks_values`).

Dims: `T` packed tokens, `S` sequences, `P` prompts (groups), `N` rows of a stream, `V` vocabulary, `D` hidden.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import NoReturn

import torch
from torch import Tensor

from .layout import PackedLayout
from .streams import MODALITIES, TokenStream
from .support import holds, num_words

INTEGER_DTYPES = (torch.int32, torch.int64)
CHECKS_VARIABLE = "SYNCR1_CHECKS"
"""`auto` (default): values are checked on the CPU only, because reading them makes a GPU wait; `always`; `never`."""

SMALL = 1024
"""Up to so many values a Python list is read faster than a tensor op starts."""


_passing = ContextVar("passing", default=False)


class NonFiniteError(ValueError):
    """A log-probability that carries loss is NaN or infinite."""


@contextmanager
def non_finite_passes() -> Iterator[None]:
    """Inside, log-probabilities that are NaN or infinite go into the loss and its gradients instead of raising.

    For a trainer of several ranks: an error on one would leave the others waiting in backward's collectives, while a
    NaN reaches all of them in the reduced gradients, so that all skip the update together."""
    token = _passing.set(True)
    try:
        yield
    finally:
        _passing.reset(token)


def checks_values(tensor: Tensor) -> bool:
    """Whether the values of tensors on this device are checked, beside shapes and dtypes."""
    mode = os.environ.get(CHECKS_VARIABLE, "auto")
    if mode not in ("auto", "always", "never"):
        raise ValueError(f"{CHECKS_VARIABLE} must be auto, always or never, got {mode!r}; unset it for auto")
    return mode == "always" or (mode == "auto" and tensor.device.type == "cpu")


def refuse(op: str, what: str, expected: object, got: object, remedy: str) -> NoReturn:
    """Raises the one form of error message: op, expected, got, remedy."""
    raise ValueError(f"{op}: {what} must be {expected}, got {got}; {remedy}")


def check_vector(op: str, name: str, tensor: Tensor, length: int, remedy: str) -> None:
    """`tensor` is [length]."""
    if tensor.shape != (length,):
        refuse(op, name, [length], list(tensor.shape), remedy)


def check_float(op: str, name: str, tensor: Tensor) -> None:
    """`tensor` is of a floating type."""
    if not tensor.is_floating_point():
        refuse(op, name, "a float tensor", tensor.dtype, "convert it with .float()")


def check_offsets(op: str, name: str, offsets: Tensor, end: int | None = None) -> None:
    """`offsets` is [n+1] int, starts at 0, never falls, and ends at `end` where that is given."""
    if offsets.dim() != 1 or offsets.numel() == 0:
        refuse(op, name, "[n+1]", list(offsets.shape), "pass cumulative counts that begin with 0")
    if offsets.dtype not in INTEGER_DTYPES:
        refuse(op, name, "int32 or int64", offsets.dtype, "convert it with .int()")
    if not checks_values(offsets):
        return
    if end is not None and int(offsets[-1]) != end:
        refuse(op, f"{name}[-1]", end, int(offsets[-1]), "the last offset counts everything on that axis")
    values = offsets.tolist()
    if values[0] != 0:
        refuse(op, f"{name}[0]", 0, values[0], "prepend a 0 to the cumulative counts")
    if values != sorted(values):
        fall = next(i for i, (before, after) in enumerate(pairwise(values)) if after < before)
        refuse(op, name, "non-decreasing", f"a fall after entry {fall}", "pass cumulative counts, not lengths")


def check_layout(op: str, layout: PackedLayout) -> None:
    """Offsets, mask and modality of the packed layout fit together."""
    check_offsets(op, "cu_seqlens", layout.cu_seqlens, layout.total)
    check_offsets(op, "group_offsets", layout.group_offsets, layout.num_sequences)
    mask, modality, num_tokens = layout.loss_mask, layout.modality, layout.num_tokens
    if mask is not None:
        check_vector(op, "loss_mask", mask, num_tokens, "it covers every packed token")
        if mask.dtype != torch.bool:
            refuse(op, "loss_mask", torch.bool, mask.dtype, "convert it with .bool()")
    if modality is not None:
        check_vector(op, "modality", modality, num_tokens, "it covers every packed token")
        if modality.is_floating_point():
            refuse(op, "modality", torch.uint8, modality.dtype, "pass 0 for text and 1 for image as uint8")
        if checks_values(modality) and bool((modality >= len(MODALITIES)).any()):
            refuse(op, "modality", "0 (text) or 1 (image)", "other values", "pass a uint8 tensor of 0 and 1")


def has_infinity(values: Tensor) -> bool:
    """Some value is infinite (NaN is not)."""
    if values.numel() > SMALL:
        return bool(torch.isinf(values).any())
    numbers = values.flatten().tolist()
    return math.inf in numbers or -math.inf in numbers


def check_rewards(op: str, rewards: Tensor, group_offsets: Tensor, weights: Tensor | None = None) -> None:
    """`rewards` is [S] or [S, K] float, finite or NaN; `weights` is [K]."""
    if rewards.dim() not in (1, 2):
        refuse(op, "rewards", "[S] or [S, K]", list(rewards.shape), "flatten groups onto one sequence axis")
    check_float(op, "rewards", rewards)
    check_offsets(op, "group_offsets", group_offsets, rewards.shape[0])
    if checks_values(rewards) and has_infinity(rewards):
        refuse(op, "rewards", "finite, or NaN for a missing reward", "an infinite value", "clamp it or return NaN")
    if weights is not None:
        if rewards.dim() == 1:
            refuse(op, "weights", "None for rewards [S]", list(weights.shape), "scale the rewards themselves")
        check_vector(op, "weights", weights, rewards.shape[1], "one weight per reward column")
        if checks_values(weights) and not bool(torch.isfinite(weights).all()):
            refuse(op, "weights", "finite", weights.tolist(), "0 switches a reward off")


def check_rows(op: str, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    """The operands of a linear head: hidden [N, D], weight [V, D], targets [N] in [0, V), bias [V]."""
    check_float(op, "hidden", hidden)
    if hidden.dim() != 2:
        refuse(op, "hidden", "[N, D]", list(hidden.shape), "select the loss rows first")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        refuse(op, "weight", f"[V, {hidden.shape[1]}]", list(weight.shape), "pass the head as nn.Linear stores it")
    if weight.dtype != hidden.dtype:
        refuse(op, "weight.dtype", hidden.dtype, weight.dtype, "cast the hidden states to the head's dtype")
    if bias is not None:
        check_vector(op, "bias", bias, weight.shape[0], "one entry per vocabulary id")
    check_vector(op, "targets", targets, hidden.shape[0], "one target per row; did packing drop a first token?")


def check_logits(op: str, logits: Tensor) -> None:
    """`logits` is [N, V] float."""
    check_float(op, "logits", logits)
    if logits.dim() != 2:
        refuse(op, "logits", "[N, V]", list(logits.shape), "flatten batch and time first")


def check_targets(op: str, targets: Tensor, num_rows: int, vocabulary: int) -> None:
    """`targets` is [num_rows] int in [0, vocabulary)."""
    check_vector(op, "targets", targets, num_rows, "one target per row; did packing drop a first token?")
    if targets.dtype not in INTEGER_DTYPES:
        refuse(op, "targets", "int64", targets.dtype, "convert them with .long()")
    if num_rows and checks_values(targets) and bool(((targets < 0) | (targets >= vocabulary)).any()):
        got = f"[{int(targets.min())}, {int(targets.max())}]"
        refuse(op, "targets", f"within [0, {vocabulary})", got, "is this the other modality's vocabulary?")


def check_forbidden(op: str, forbidden: Tensor | None, vocabulary: int) -> None:
    """`forbidden` is a 1-D int64 tensor of vocabulary ids, and leaves at least one id."""
    if forbidden is None or forbidden.numel() == 0:
        return
    if forbidden.dim() != 1 or forbidden.dtype != torch.int64:
        got = f"{list(forbidden.shape)} {forbidden.dtype}"
        refuse(op, "forbidden", "a 1-D int64 tensor of vocabulary ids", got, "pass ids, not a mask")
    if not checks_values(forbidden):
        return
    if bool(((forbidden < 0) | (forbidden >= vocabulary)).any()):
        got = f"[{int(forbidden.min())}, {int(forbidden.max())}]"
        refuse(op, "forbidden", f"within [0, {vocabulary})", got, "is this the other modality's vocabulary?")
    if torch.unique(forbidden).numel() >= vocabulary:
        refuse(op, "forbidden", f"fewer than all {vocabulary} ids", "all of them", "leave something to sample")


def check_support(op: str, support: Tensor | None, num_rows: int, vocabulary: int, name: str = "support") -> None:
    """`support` is [num_rows, ceil(vocabulary / 32)] int32."""
    if support is None:
        return
    remedy = "pass the rows of CFGSample.support that belong to these targets"
    if support.dtype != torch.int32:
        refuse(op, name, torch.int32, support.dtype, remedy)
    shape = [num_rows, num_words(vocabulary)]
    if list(support.shape) != shape:
        refuse(op, name, f"{shape} (32 ids of {vocabulary} a word)", list(support.shape), remedy)


def check_supported(
    op: str, targets: Tensor, support: Tensor | None, forbidden: Tensor | None, acting: Tensor | None = None
) -> None:
    """Every row's target, of those where `acting` [N] is True, is in the row's support and not forbidden."""
    if support is None or not checks_values(targets):
        return
    inside = holds(support, targets.long())
    if forbidden is not None:
        inside &= ~torch.isin(targets, forbidden)
    if acting is not None:
        inside |= ~acting
    if not bool(inside.all()):
        row = int((~inside).nonzero()[0])
        got = f"one without target {int(targets[row])} at row {row}"
        remedy = "give each row the set that its token was drawn from, at the same vocabulary"
        refuse(op, "support", "a set that holds the row's own target", got, remedy)


def check_stream_records(op: str, streams: Sequence[TokenStream]) -> None:
    """A non-empty sequence of records, each with shapes, dtypes and settings that fit together."""
    if isinstance(streams, TokenStream) or not all(isinstance(s, TokenStream) for s in streams):
        refuse(op, "streams", "a sequence of TokenStream", type(streams).__name__, "wrap a single stream in a list")
    if not streams:
        refuse(op, "streams", "at least one TokenStream", "none", "pass an empty stream to keep the head in the graph")
    for stream in streams:
        if stream.modality not in MODALITIES:
            refuse(op, "stream.modality", MODALITIES, repr(stream.modality), "text or image")
        check_vector(op, "stream.rows", stream.rows, stream.hidden.shape[0], "one packed position per hidden state")
        if stream.rows.dtype not in INTEGER_DTYPES:
            refuse(op, "stream.rows", "int64", stream.rows.dtype, "pass positions, not a mask")


def check_streams(op: str, streams: Sequence[TokenStream], num_tokens: int) -> None:
    """Operands fit, targets and rows are in range, and no packed position is scored twice."""
    for stream in streams:
        check_rows(op, stream.hidden, stream.weight, stream.targets, stream.bias)
        check_targets(op, stream.targets, stream.hidden.shape[0], stream.weight.shape[0])
        check_forbidden(op, stream.forbidden, stream.weight.shape[0])
        check_support(op, stream.support, stream.hidden.shape[0], stream.weight.shape[0], "stream.support")
    rows = torch.cat([stream.rows.long() for stream in streams])
    if not checks_values(rows):
        return
    if rows.numel() and bool(((rows < 0) | (rows >= num_tokens)).any()):
        got = f"[{int(rows.min())}, {int(rows.max())}]"
        refuse(op, "stream.rows", f"within [0, {num_tokens})", got, "rows are positions on the packed axis")
    if rows.numel() and int(torch.bincount(rows, minlength=1).max()) > 1:
        refuse(op, "stream.rows", "free of duplicates over all streams", "a position twice", "each token has one head")


def check_allowed(op: str, streams: Sequence[TokenStream], acting_T: Tensor) -> None:
    """No acting token is one that could never be sampled."""
    for stream in streams:
        check_supported(op, stream.targets, stream.support, stream.forbidden, acting_T[stream.rows.long()])
        if stream.forbidden is None or not checks_values(stream.targets):
            continue
        if bool((torch.isin(stream.targets, stream.forbidden) & acting_T[stream.rows.long()]).any()):
            remedy = "take that token out of loss_mask"
            refuse(op, "targets", "outside `forbidden`", "a forbidden id among them", remedy)


def check_log_probabilities(
    op: str, mask_T: Tensor | None, num_tokens: int, *, finite: bool = True, **named: Tensor | None
) -> None:
    """Each is [num_tokens] float, and `finite` wherever `mask_T` (None = everywhere) says that it carries loss."""
    for name, values in named.items():
        if values is None:
            continue
        check_vector(op, name, values, num_tokens, "did packing drop a first token?")
        check_float(op, name, values)
        if not finite or _passing.get() or not checks_values(values):
            continue
        if math.isfinite(float(values.detach().sum())):  # one pass without a temporary; a NaN may still be masked
            continue
        wrong_T = ~torch.isfinite(values.detach())
        if mask_T is not None:
            wrong_T &= mask_T
        if bool(wrong_T.any()):
            token = int(wrong_T.nonzero()[0])
            got = values.detach()[token].item()
            raise NonFiniteError(
                f"{op}: {name} must be finite at every loss token, got {got} at token {token}; "
                "mask that token, or find what made it (an overflow, a forbidden target, a bad checkpoint)"
            )


def check_modality_keys(op: str, name: str, values: Mapping[str, object]) -> None:
    """A per-modality setting names exactly text and image."""
    if set(values) != set(MODALITIES):
        refuse(op, name, f"a number or a dict with keys {list(MODALITIES)}", sorted(values), "name both modalities")


def check_drawn(op: str, logp_B: Tensor) -> None:
    """Every row of logits gave a distribution."""
    if checks_values(logp_B) and not math.isfinite(float(logp_B.sum())):
        wrong = (~torch.isfinite(logp_B)).nonzero()
        if wrong.numel():
            raise NonFiniteError(
                f"{op}: logits must be finite or -inf with one finite value, got a row without a distribution at row "
                f"{int(wrong[0])}; find what made it (an overflow, a bad checkpoint, everything masked)"
            )
