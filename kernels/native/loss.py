"""The loss of log-probabilities in C++: one call from rewards to loss, gradient and metrics (`csrc/loss.cpp`).

Dims: `T` packed tokens, `S` sequences, `M` modalities with rewards of their own.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch

from ..options import RATIOS, RULES, SCALES, LossOptions, PerModality, for_modality
from ..streams import MODALITIES
from ..terms import METRICS, ROW_LOSSES, LossTerms, TokenLoss, row_loss
from .library import DOUBLE, INT, POINTER, function, pointer

KINDS = (*ROW_LOSSES, "vespo")
"""The order is the code in C++."""
REDUCTIONS = {"grpo": 0, "sapo": 0, "bnpo": 1, "dapo": 2, "cispo": 2, "vespo": 2, "dr_grpo": 3, "luspo": 3}
"""0 mean over each sequence, 1 over tokens, 2 sum / num_items, 3 sum / (num_sequences · max_length)."""
PAIR = DOUBLE * 2


class _Settings(ctypes.Structure):
    """`LossSettings` of csrc/loss_terms.h, field by field."""

    _fields_ = (
        *((name, INT) for name in ("kind", "reduction", "ratio", "bias_corrected_kl")),
        *((name, INT) for name in ("scale", "rule", "keep", "min_keep", "seed")),
        *((name, INT) for name in ("split_modalities", "has_num_items")),
        *((name, DOUBLE) for name in ("eps", "mass", "num_sequences", "max_length")),
        *((name, PAIR) for name in ("clip_low", "clip_high", "delta", "beta", "weight", "num_items")),
        *((name, PAIR) for name in ("sapo_tau", "vespo_k", "vespo_lambda")),
    )


class _Inputs(ctypes.Structure):
    """`LossInputs` of csrc/loss_terms.h, field by field."""

    _fields_ = (
        *((name, POINTER) for name in ("cu_seqlens", "group_offsets", "logp", "old_logp", "ref_logp", "entropy")),
        *((name, POINTER) for name in ("loss_mask", "modality", "is_ratio", "rewards", "advantages", "keep")),
        *((name, POINTER) for name in ("frac_reward_zero_std", "entropy_thresholds", "num_items")),
        *((name, INT) for name in ("num_sequences", "num_groups", "num_rewards", "is_per_sequence")),
        ("num_items_count", INT),
    )


def _pair(value: PerModality) -> tuple[float, ...]:
    return tuple(for_modality(value, m) for m in MODALITIES)


def _pack(settings: LossOptions) -> _Settings:
    s, kind = settings, row_loss(settings.loss_type) or "vespo"
    return _Settings(
        KINDS.index(kind),
        REDUCTIONS[s.loss_type],
        RATIOS.index(s.ratio),
        s.bias_corrected_kl,
        SCALES.index(s.scale),
        RULES.index(s.dgs),
        -1 if s.dgs_keep is None else s.dgs_keep,
        s.dgs_min_keep,
        s.dgs_seed,
        s.splits_modalities,
        s.num_items is not None,
        s.eps,
        s.dgs_mass,
        -1.0 if s.num_sequences is None else s.num_sequences,
        # For dr_grpo alone: LossOptions demands it there, luspo divides by num_sequences only.
        s.max_length if s.loss_type == "dr_grpo" else 1.0,
        _pair(s.clip_low),
        _pair(s.clip_high),
        (math.inf, math.inf) if s.delta is None else _pair(s.delta),
        _pair(s.beta),
        _pair(s.weight),
        (0.0, 0.0) if s.num_items is None else _pair(s.num_items),
        (s.sapo_temperature_pos, s.sapo_temperature_neg),
        (s.vespo_k_pos, s.vespo_k_neg),
        (s.vespo_lambda_pos, s.vespo_lambda_neg),
    )


_pack_once = lru_cache(maxsize=64)(_pack)
_NAMES = tuple(field.name for field in fields(LossOptions))
_values = attrgetter(*_NAMES)


@lru_cache(maxsize=64)
def _pack_items(values: tuple[Any, ...]) -> _Settings:
    """From the values of all fields, dicts as tuples of their items."""
    thawed = (dict(value) if isinstance(value, tuple) else value for value in values)
    options: dict[str, Any] = dict(zip(_NAMES, thawed, strict=True))
    return _pack(LossOptions(**options))


def _packed(settings: LossOptions) -> _Settings:
    """From a cache; settings that hold a dict have no hash, their values have."""
    try:
        return _pack_once(settings)
    except TypeError:
        return _pack_items(tuple([tuple(v.items()) if isinstance(v, Mapping) else v for v in _values(settings)]))


def _inputs(terms: LossTerms, num_rewards: int) -> _Inputs:
    return _Inputs(
        pointer(terms.cu_seqlens),
        pointer(terms.group_offsets),
        pointer(terms.logp),
        pointer(terms.old_logp),
        pointer(terms.ref_logp),
        pointer(terms.entropy),
        pointer(terms.loss_mask),
        pointer(terms.modality),
        pointer(terms.is_ratio),
        pointer(terms.rewards),
        pointer(terms.advantages),
        pointer(terms.keep),
        pointer(terms.frac_reward_zero_std),
        pointer(terms.entropy_thresholds),
        pointer(terms.num_items),
        terms.cu_seqlens.numel() - 1,
        terms.group_offsets.numel() - 1,
        num_rewards,
        terms.is_per_sequence,
        0 if terms.num_items is None else terms.num_items.numel(),
    )


def token_loss(terms: LossTerms) -> TokenLoss:
    """Loss, its gradient with respect to logp, advantages, keep and metrics."""
    scores = terms.rewards if terms.advantages is None else terms.advantages
    assert scores is not None  # LossTerms holds one of the two
    settings, inputs = _packed(terms.settings), _inputs(terms, scores.shape[0])
    finite = ctypes.c_int64()
    loss = torch.empty((), dtype=torch.float32)
    grad_logp = torch.empty(terms.logp.shape, dtype=torch.float32)
    advantages = torch.empty(scores.shape, dtype=torch.float32)
    keep = torch.empty(scores.shape[1:], dtype=torch.bool)
    metrics = torch.empty(len(METRICS), dtype=torch.float32)
    call = function("syncr1_token_loss", *(POINTER,) * 8, INT)
    call(
        ctypes.addressof(settings),
        ctypes.addressof(inputs),
        pointer(loss),
        pointer(grad_logp),
        pointer(advantages),
        pointer(keep),
        pointer(metrics),
        ctypes.addressof(finite),
        torch.get_num_threads(),
    )
    return TokenLoss(loss, grad_logp, advantages, keep, metrics, bool(finite.value))
