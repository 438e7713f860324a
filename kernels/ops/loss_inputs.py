"""What `grpo_loss` and `linear_grpo_loss` share: how their arguments become `LossInputs`, what is checked of them, and
the names of their metrics.

Nothing before the checks reads a tensor's values, so that `torch.compile` can trace through it.

Dims: `T` packed tokens, `S` sequences, `M` 1 or 2 modalities with rewards of their own.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from ..checks import (
    check_float,
    check_layout,
    check_log_probabilities,
    check_modality_keys,
    check_rewards,
    check_vector,
    checks_values,
    refuse,
)
from ..layout import PackedLayout
from ..options import LossOptions, encode
from ..plan import per_modality
from ..register import constant_when_traced
from ..streams import MODALITIES
from ..terms import METRICS, METRICS_PER_MODALITY, LossInputs

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


def lists_options(op: Callable[..., Any]) -> Callable[..., Any]:
    """Shows the fields of LossOptions as keywords in `help(op)` and in editors that ask the signature."""
    signature = inspect.signature(op)
    plain = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    listed = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(LossOptions)
    ]
    op.__signature__ = signature.replace(parameters=[*plain, *listed])  # type: ignore[attr-defined]
    return op


def encode_options(op: str, options: dict[str, Any]) -> tuple[str, Tensor | None]:
    """Checked settings as one string, and `num_items` where it came as a tensor."""
    plain, num_items = _split_num_items(options)
    return _encode(op, plain), num_items


def loss_inputs(op: str, given: Mapping[str, Any], settings: str, num_items: Tensor | None, backend: str) -> LossInputs:
    """From the tensors that a caller gave, by name."""
    rewards, advantages = (
        [] if given[name] is None else per_modality(op, name, given[name]) for name in ("rewards", "advantages")
    )
    credit = {"rewards": rewards, "advantages": advantages}
    return LossInputs(**{**given, **credit}, num_items=num_items, settings=settings, backend=backend)


def _split_num_items(options: dict[str, Any]) -> tuple[tuple[Setting, ...], Tensor | None]:
    """Settings without tensors, and `num_items` as [1] or [2] where it was given as a tensor or as a dict of them."""
    value = options.get("num_items")
    tensor: Tensor | None = None
    if isinstance(value, Mapping) and any(isinstance(part, Tensor) for part in value.values()):
        check_modality_keys("grpo_loss", "num_items", value)
        tensor = torch.stack([torch.as_tensor(value[m]).float().reshape(()) for m in MODALITIES])
    elif isinstance(value, Tensor):
        tensor = value.reshape(-1)
        if tensor.numel() not in (1, 2):
            refuse("grpo_loss", "num_items", "a number, or one per modality", list(value.shape), "sum it first")
    if tensor is not None:
        # The tensor says how much; the setting still says whether modalities are reduced on their own.
        options = options | {"num_items": 1.0 if tensor.numel() == 1 else dict.fromkeys(MODALITIES, 1.0)}
    return tuple(_plain(name, value) for name, value in options.items()), tensor


def _plain(name: str, value: Any) -> Setting:
    """A setting as a key of a cache."""
    if not isinstance(value, Mapping):
        return name, value, type(value).__name__
    return name, tuple(value.items()), "dict " + " ".join(type(part).__name__ for part in value.values())


def check_loss_inputs(
    op: str,
    inputs: LossInputs,
    layout: PackedLayout,
    logp: Tensor | None = None,
    *,
    finite: bool = True,
) -> None:
    """The layout and what lies on its axes fit together, and what the options need is there.

    `logp` [T] is None where it is still to be computed. `finite=False` leaves out the search for values that are not.
    """
    options, ref_logp, entropy = inputs.options, inputs.ref_logp, inputs.entropy
    check_layout(op, layout)
    check_log_probabilities(
        op,
        layout.loss_mask,
        layout.num_tokens,
        finite=finite,
        logp=logp,
        old_logp=inputs.old_logp,
        ref_logp=ref_logp,
        entropy=entropy,
    )
    num_items, beta = inputs.num_items, options.beta
    if num_items is not None and checks_values(num_items):
        wrong = [value for value in num_items.tolist() if not 0 <= value < math.inf]
        if wrong:
            refuse(op, "num_items", "finite and ≥ 0", wrong[0], "it is a divisor, and below 1 counts as 1")
    if ref_logp is None and any(b != 0 for b in (beta.values() if isinstance(beta, Mapping) else (beta,))):
        refuse(op, "ref_logp", "given where beta is not 0", None, "pass the reference policy's log-probabilities")
    if logp is not None and options.top_entropy_quantile < 1 and entropy is None:
        refuse(op, "entropy", "given where top_entropy_quantile < 1", None, "pass it, or use linear_grpo_loss")
    _check_is_ratio(op, inputs.is_ratio, layout, finite)
    _check_credit(op, inputs, layout)


def _check_is_ratio(op: str, is_ratio: Tensor | None, layout: PackedLayout, finite: bool) -> None:
    if is_ratio is None:
        return
    num_tokens, num_sequences = layout.num_tokens, layout.num_sequences
    if is_ratio.shape not in ((num_tokens,), (num_sequences,), (num_sequences, 1)):
        expected = f"[{num_tokens}], [{num_sequences}] or [{num_sequences}, 1]"
        refuse(op, "is_ratio", expected, list(is_ratio.shape), "one ratio per token or per sequence")
    if is_ratio.shape != (num_tokens,) and checks_values(is_ratio):
        # One of a sequence without loss may be anything.
        check_log_probabilities(
            op, layout.loss_mask, num_tokens, is_ratio=is_ratio.reshape(-1)[layout.sequence_of_token]
        )
    elif finite:
        check_log_probabilities(op, layout.loss_mask, num_tokens, is_ratio=is_ratio)


def _check_credit(op: str, inputs: LossInputs, layout: PackedLayout) -> None:
    """Either rewards or advantages, one per sequence."""
    rewards, advantages = inputs.rewards, inputs.advantages
    if bool(rewards) == bool(advantages):
        got = "both" if rewards else "neither"
        refuse(op, "rewards, advantages", "one of the two", got, "pass rewards=None with advantages")
    for part in rewards:
        check_rewards(op, part, layout.group_offsets, inputs.weights)
        if part.shape[0] != layout.num_sequences:
            refuse(op, "rewards", f"[{layout.num_sequences}, …]", list(part.shape), "one reward per sequence")
    for part in advantages:
        check_float(op, "advantages", part)
        check_vector(op, "advantages", part, layout.num_sequences, "one advantage per sequence")
        if checks_values(part) and not bool(torch.isfinite(part).all()):
            refuse(op, "advantages", "finite", "NaN or infinity", "give 0 to a sequence without a reward")


@cache
def _metric_indices(image: bool, kl: bool, entropy: bool) -> list[tuple[str, int]]:
    """Names and places of the metrics that have a meaning for a call."""
    absent = {name for name, there in (("kl", kl), ("entropy", entropy)) if not there}
    modalities = ("text", "image") if image else ("text",)
    wanted = {f"{name}/{m}" for name in METRICS_PER_MODALITY if name not in absent for m in modalities}
    return [(name, index) for index, name in enumerate(METRICS) if "/" not in name or name in wanted]


def named_metrics(values: Tensor, *, image: bool, kl: bool, entropy: bool) -> dict[str, Tensor]:
    """The metrics of the loss kernel by name."""
    each = values.unbind()
    return {name: each[index] for name, index in _metric_indices(image, kl, entropy)}
