"""The packed layout and its validation: all sequences lie one after another on one token axis, no padding.

Sequence s is tokens `cu_seqlens[s]:cu_seqlens[s+1]`; group p is sequences `group_offsets[p]:group_offsets[p+1]`. Both
may be empty: a pruned trajectory keeps its place on the sequence axis with zero tokens, so that group statistics are
always taken over all members.

Dims: `T` tokens, `S` sequences, `P` prompts (groups), `N` rows of a stream, `V` vocabulary, `D` hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from syncr1.kernels.records import MODALITIES, TokenStream

INTEGER_DTYPES = (torch.int32, torch.int64)


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
    values = offsets.tolist()
    if values[0] != 0:
        refuse(op, f"{name}[0]", 0, values[0], "prepend a 0 to the cumulative counts")
    falls = [i for i in range(len(values) - 1) if values[i + 1] < values[i]]
    if falls:
        refuse(op, name, "non-decreasing", f"a fall after entry {falls[0]}", "pass cumulative counts, not lengths")
    if end is not None and values[-1] != end:
        refuse(op, f"{name}[-1]", end, values[-1], "the last offset counts everything on that axis")


def segment_ids(offsets: Tensor, total: int) -> Tensor:
    """Which segment each of `total` positions belongs to: [total] int64."""
    lengths = offsets.long().diff()
    return torch.repeat_interleave(torch.arange(lengths.numel(), device=offsets.device), lengths, output_size=total)


@dataclass(frozen=True, slots=True, eq=False)
class PackedLayout:
    """Which token belongs to which sequence, and which sequence to which group."""

    cu_seqlens: Tensor
    """[S+1] int32."""
    group_offsets: Tensor
    """[P+1] int32."""
    modality: Tensor | None = None
    """[T] uint8, of the *target* token: 0 text, 1 image; None = all text."""
    loss_mask: Tensor | None = None
    """[T] bool, tokens the policy produced; None = all."""

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def num_tokens(self) -> int:
        return int(self.cu_seqlens[-1])

    @property
    def sequence_of_token(self) -> Tensor:
        """[T] int64."""
        return segment_ids(self.cu_seqlens, self.num_tokens)

    def validate(self, op: str) -> None:
        """Raises ValueError naming `op`, what was expected, what came and the remedy."""
        check_offsets(op, "cu_seqlens", self.cu_seqlens)
        check_offsets(op, "group_offsets", self.group_offsets, self.num_sequences)
        num_tokens = self.num_tokens
        if self.loss_mask is not None:
            check_vector(op, "loss_mask", self.loss_mask, num_tokens, "it covers every packed token")
            if self.loss_mask.dtype != torch.bool:
                refuse(op, "loss_mask", torch.bool, self.loss_mask.dtype, "convert it with .bool()")
        if self.modality is not None:
            check_vector(op, "modality", self.modality, num_tokens, "it covers every packed token")
            if self.modality.is_floating_point() or bool((self.modality.long() >= len(MODALITIES)).any()):
                refuse(op, "modality", "0 (text) or 1 (image)", "other values", "pass a uint8 tensor of 0 and 1")


def check_rewards(op: str, rewards: Tensor, group_offsets: Tensor, weights: Tensor | None = None) -> None:
    """`rewards` is [S] or [S, K] float, finite or NaN; `weights` is [K]."""
    if rewards.dim() not in (1, 2):
        refuse(op, "rewards", "[S] or [S, K]", list(rewards.shape), "flatten groups onto one sequence axis")
    check_float(op, "rewards", rewards)
    check_offsets(op, "group_offsets", group_offsets, rewards.shape[0])
    if bool(torch.isinf(rewards).any()):
        refuse(op, "rewards", "finite, or NaN for a missing reward", "an infinite value", "clamp it or return NaN")
    if weights is not None:
        if rewards.dim() == 1:
            refuse(op, "weights", "None for rewards [S]", list(weights.shape), "scale the rewards themselves")
        check_vector(op, "weights", weights, rewards.shape[1], "one weight per reward column")


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
    check_targets(op, targets, hidden.shape[0], weight.shape[0])


def check_targets(op: str, targets: Tensor, num_rows: int, vocabulary: int) -> None:
    """`targets` is [num_rows] int in [0, vocabulary)."""
    check_vector(op, "targets", targets, num_rows, "one target per row; did packing drop a first token?")
    if targets.dtype not in INTEGER_DTYPES:
        refuse(op, "targets", "int64", targets.dtype, "convert them with .long()")
    if num_rows and bool(((targets < 0) | (targets >= vocabulary)).any()):
        got = f"[{int(targets.min())}, {int(targets.max())}]"
        refuse(op, "targets", f"within [0, {vocabulary})", got, "is this the other modality's vocabulary?")


def check_forbidden(op: str, forbidden: Tensor | None, vocabulary: int) -> None:
    """`forbidden` is a 1-D int64 tensor of vocabulary ids, and leaves at least one id."""
    if forbidden is None or forbidden.numel() == 0:
        return
    if forbidden.dim() != 1 or forbidden.dtype != torch.int64:
        got = f"{list(forbidden.shape)} {forbidden.dtype}"
        refuse(op, "forbidden", "a 1-D int64 tensor of vocabulary ids", got, "pass ids, not a mask")
    if bool(((forbidden < 0) | (forbidden >= vocabulary)).any()):
        got = f"[{int(forbidden.min())}, {int(forbidden.max())}]"
        refuse(op, "forbidden", f"within [0, {vocabulary})", got, "is this the other modality's vocabulary?")
    if torch.unique(forbidden).numel() >= vocabulary:
        refuse(op, "forbidden", f"fewer than all {vocabulary} ids", "all of them", "leave something to sample")


def check_temperature(op: str, temperature: float) -> None:
    """`temperature` is a positive number."""
    if not temperature > 0:
        refuse(op, "temperature", "> 0", temperature, "greedy decoding scores at temperature 1")


def check_streams(op: str, streams: Sequence[TokenStream], num_tokens: int) -> None:
    """Every stream is well-formed, and no packed position is scored twice."""
    if isinstance(streams, TokenStream) or not all(isinstance(s, TokenStream) for s in streams):
        refuse(op, "streams", "a sequence of TokenStream", type(streams).__name__, "wrap a single stream in a list")
    if not streams:
        refuse(op, "streams", "at least one TokenStream", "none", "pass an empty stream to keep the head in the graph")
    for stream in streams:
        check_rows(op, stream.hidden, stream.weight, stream.targets, stream.bias)
        check_forbidden(op, stream.forbidden, stream.weight.shape[0])
        check_temperature(op, stream.temperature)
        if stream.modality not in MODALITIES:
            refuse(op, "stream.modality", MODALITIES, repr(stream.modality), "text or image")
        check_vector(op, "stream.rows", stream.rows, stream.hidden.shape[0], "one packed position per hidden state")
        if stream.rows.dtype not in INTEGER_DTYPES:
            refuse(op, "stream.rows", "int64", stream.rows.dtype, "pass positions, not a mask")
    rows = torch.cat([stream.rows.long() for stream in streams])
    if rows.numel() and bool(((rows < 0) | (rows >= num_tokens)).any()):
        got = f"[{int(rows.min())}, {int(rows.max())}]"
        refuse(op, "stream.rows", f"within [0, {num_tokens})", got, "rows are positions on the packed axis")
    if rows.numel() and int(torch.bincount(rows, minlength=1).max()) > 1:
        refuse(op, "stream.rows", "free of duplicates over all streams", "a position twice", "each token has one head")


def check_modality_keys(op: str, name: str, values: Mapping[str, object]) -> None:
    """A per-modality setting names exactly text and image."""
    if set(values) != set(MODALITIES):
        refuse(op, name, f"a number or a dict with keys {list(MODALITIES)}", sorted(values), "name both modalities")
