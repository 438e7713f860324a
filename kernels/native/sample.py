"""Sampling of one token per row in C++. Dims: `B` rows, `V` vocabulary."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_double, c_int64, c_void_p

import torch
from torch import Tensor

from ..outputs import CFGSample
from ..reference.sample import least_share, wanted_share
from ..support import num_words
from ..terms import SampleInputs
from .library import POINTER, function, pointer


class Sampling(ctypes.Structure):
    """`syncr1_sampling` of csrc/sample.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("cond", "uncond", "forbidden", "seed", "offset", "support")),
        *((name, c_int64) for name in ("cond_bfloat16", "uncond_bfloat16", "cond_stride", "uncond_stride")),
        *((name, c_int64) for name in ("num_rows", "vocabulary", "num_forbidden", "top_k", "num_threads")),
        *((name, c_double) for name in ("cfg_weight", "temperature", "top_p", "min_p")),
    )


def sample(inputs: SampleInputs) -> CFGSample:
    """One token per row. A row with NaN gives token 0 and NaN log-probabilities."""
    call = function("syncr1_sample", POINTER, POINTER, POINTER, POINTER, POINTER)
    cond, uncond, forbidden = _unit_stride(inputs.cond), inputs.uncond, inputs.forbidden
    guided = None if uncond is None or inputs.cfg_weight == 1.0 else _unit_stride(uncond)
    seed, offset = inputs.seed.contiguous(), inputs.offset.contiguous()
    num_rows, vocabulary = cond.shape
    support = torch.empty(num_rows, num_words(vocabulary), dtype=torch.int32) if inputs.with_support else None
    if support is not None:
        support.zero_()
    sampling = Sampling(
        pointer(cond),
        pointer(guided),
        pointer(forbidden),
        pointer(seed),
        pointer(offset),
        pointer(support),
        cond.dtype == torch.bfloat16,
        guided is not None and guided.dtype == torch.bfloat16,
        cond.stride(0),
        0 if guided is None else guided.stride(0),
        num_rows,
        vocabulary,
        0 if forbidden is None else forbidden.numel(),
        inputs.top_k,
        torch.get_num_threads(),
        inputs.cfg_weight,
        inputs.temperature,
        wanted_share(inputs.top_p),
        least_share(inputs.min_p),
    )
    token_B = torch.empty(num_rows, dtype=torch.int64)
    logp_B, logp_mixed_B, entropy_B = (torch.empty(num_rows) for _ in range(3))
    call(byref(sampling), pointer(token_B), pointer(logp_B), pointer(logp_mixed_B), pointer(entropy_B))
    return CFGSample(token_B, logp_B, logp_mixed_B, entropy_B, support)


def _unit_stride(logits_BV: Tensor) -> Tensor:
    return logits_BV if logits_BV.stride(1) == 1 or logits_BV.shape[1] == 1 else logits_BV.contiguous()
