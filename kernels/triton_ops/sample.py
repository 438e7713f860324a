"""Classifier-free-guided sampling in Triton: one launch, one program per row, every random number from (seed, offset).

    z = u + w (c − u),   p = softmax(z / temperature),   token = first v with Σ_{j≤v} p_j > U · Σ_j p_j

The eager form takes a dozen launches, a sort for top_p, and reads the logits as often. The steps are in `sample_math`;
`syncr1.kernels.reference.sample` is the specification. Source: FlashInfer's sorting-free sampling; Philox (SC 2011).

Dims: `B` rows, `V` vocabulary.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..outputs import CFGSample
from ..reference.sample import least_share, wanted_share
from ..support import num_words
from ..terms import SampleInputs, padded
from .launching import on_device
from .philox import row_uniform
from .row_math import LN2, LOG2E, entropy_of, weights_of, whole_row
from .sample_math import (
    ALL_IDS,
    Cut,
    Row,
    SampleForm,
    at_least,
    first_highest,
    kept_statistics,
    load_mixed,
    locate,
    mass_from,
    swept_statistics,
    tile_ids,
    truncate,
    within,
)

MAX_RESIDENT = 16384
"""Longest row held in registers: the weights of 32 ids for each of 512 threads."""
STREAM_TILE = 8192
COLUMNS = 128
MAX_WARPS = 16
MAX_REGISTERS = 128
"""Stated, or ptxas spills a few bytes to fit a second program into a multiprocessor, which has no second row."""


@triton.jit
def drop_unlikely(weights, highest, cut, min_p, scale, offset, FORM: tl.constexpr):
    """`cut` after min_p, of weights that still hold the greatest one."""
    greatest = tl.max(weights) if FORM.RESIDENT else weights_of(highest, scale, offset)[0]
    return at_least(cut, min_p * greatest)


@triton.jit
def truncate_row(row, weights, highest, top_k, top_p, min_p, scale, offset, FORM: tl.constexpr):
    """(weights, bound, last) after top_k, then top_p of what it left, then min_p."""
    LAST: tl.constexpr = 2 if FORM.TOP_P else 1
    bound, last = scale * 0 - 1.0, row.V * 0 + ALL_IDS
    # Unrolled: over two rounds the compiler would keep more between the searches than there are registers.
    for stage in tl.static_range(0 if FORM.TOP_K else 1, LAST):
        cut = Cut(bound, last)
        target = scale * 0 + top_k
        if stage == 1:
            total, _ = mass_from(row, weights, cut, 0.0, scale, offset, FORM)
            target = top_p * total
        bound, last = truncate(row, weights, cut, target, stage == 0, scale, offset, FORM)
        if FORM.MIN_P and stage == LAST - 1:
            bound, last = drop_unlikely(weights, highest, Cut(bound, last), min_p, scale, offset, FORM)
        if FORM.RESIDENT:
            # `bound` is never NaN, which the compiler cannot know: else it forms the ids of all that a thread holds
            # before the search, and keeps them through it in more registers than there are.
            tile = (bound != bound).to(tl.int32)
            weights = within(weights, tile_ids(tile, FORM), Cut(bound, last))
    if FORM.MIN_P and not FORM.TOP_K and not FORM.TOP_P:
        bound, last = drop_unlikely(weights, highest, Cut(bound, last), min_p, scale, offset, FORM)
        if FORM.RESIDENT:
            weights = within(weights, tile_ids(0, FORM), Cut(bound, last))
    return weights, bound, last


@triton.jit
def sample_kernel(
    cond,
    cond_stride,
    uncond,
    uncond_stride,
    forbidden,
    seed,
    offset,
    token_out,
    logp_out,
    mixed_out,
    entropy_out,
    support_out,
    words,
    V,
    cfg_weight,
    scale,
    top_k,
    top_p,
    min_p,
    FORM: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    uncond_row = uncond + index * uncond_stride if uncond is not None else None
    row = Row(cond + index * cond_stride, uncond_row, forbidden, tl.program_id(0) * 0 + V, cfg_weight)
    if FORM.RESIDENT:
        cond_logits, mixed = load_mixed(row, tile_ids(0, FORM), FORM.RAGGED)
        weights, cond_base, cond_total, cond_weighted = whole_row(cond_logits, scale)
        base, total = cond_base, cond_total
        if uncond is not None:
            weights, base, total, _ = whole_row(mixed, scale)
        highest = tl.max(mixed)
    else:
        cond_base, cond_total, cond_weighted, base, total, highest = swept_statistics(row, scale, FORM)
        mixed, weights = total, total
    if not FORM.SUPPORT:
        tl.store(entropy_out + index, entropy_of(cond_total, cond_weighted))
    bound, last = base * 0 - 1.0, row.V * 0 + ALL_IDS
    if FORM.GREEDY:
        token = first_highest(row, mixed, highest, FORM)
    else:
        weights, bound, last = truncate_row(row, weights, highest, top_k, top_p, min_p, scale, base, FORM)
        uniform = row_uniform(tl.load(seed + index), tl.load(offset + index))
        token = locate(row, weights, Cut(bound, last), bound, uniform, scale, base, False, FORM)
    cond_logit, mixed_logit = load_mixed(row, token, False)
    tl.store(token_out + index, token.to(tl.int64))
    if FORM.SUPPORT:
        out = support_out + index * words
        cut = Cut(bound, last)
        cond_base, cond_total, cond_weighted, total, count = kept_statistics(row, out, weights, cut, scale, base, FORM)
    logp = (tl.fma(cond_logit, scale, -cond_base) - tl.log2(cond_total)) * LN2
    logp_mixed = (tl.fma(mixed_logit, scale, -base) - tl.log2(total)) * LN2
    if FORM.SUPPORT:
        # Nothing is kept of a row without a distribution; a set of one id is certain, to the last bit.
        logp, logp_mixed = tl.where(count == 0, float("nan"), logp), tl.where(count == 0, float("nan"), logp_mixed)
        logp, logp_mixed = tl.where(count == 1, 0.0, logp), tl.where(count == 1, 0.0, logp_mixed)
        tl.store(entropy_out + index, tl.where(count == 1, 0.0, entropy_of(cond_total, cond_weighted)))
    tl.store(logp_out + index, logp)
    tl.store(mixed_out + index, logp_mixed)


def sample_form(vocabulary: int, inputs: SampleInputs) -> tuple[SampleForm, int]:
    """The cut of a row and its warps, which depend on the vocabulary alone, not on the number of rows."""
    resident = vocabulary <= MAX_RESIDENT
    size = max(triton.next_power_of_2(vocabulary), 32) if resident else STREAM_TILE
    columns = min(size, COLUMNS)
    tiles = triton.next_power_of_2(triton.cdiv(vocabulary, size))
    draws = inputs.temperature != 0
    cuts = (draws and 0 < inputs.top_k < vocabulary, draws and inputs.top_p < 1, draws and inputs.min_p > 0)
    ragged = vocabulary % 16 != 0
    form = SampleForm(not draws, *cuts, inputs.with_support, ragged, resident, size // columns, columns, tiles)
    return form, min(max(size // 512, 1), MAX_WARPS)


def aligned_rows(logits: Tensor) -> Tensor:
    """[B, V] whose rows begin at multiples of 16 bytes, copied where they do not: less than to read ids one by one in
    every sweep, and the sums of a row are added in one order wherever it lies."""
    num_rows, vocabulary = logits.shape
    if logits.stride(1) == 1 and logits.data_ptr() % 16 == 0 and (logits.stride(0) % 16 == 0 or num_rows == 1):
        return logits
    return logits.new_empty(num_rows, padded(vocabulary))[:, :vocabulary].copy_(logits)


def sample(inputs: SampleInputs) -> CFGSample:
    """See `terms.Backend`."""
    cond, uncond, cfg_weight = inputs.cond, inputs.uncond, inputs.cfg_weight
    num_rows, vocabulary = cond.shape
    logp, logp_mixed, entropy = (torch.empty(num_rows, dtype=torch.float32, device=cond.device) for _ in range(3))
    support = None
    if inputs.with_support:
        support = torch.empty(num_rows, num_words(vocabulary), dtype=torch.int32, device=cond.device)
    out = CFGSample(torch.empty(num_rows, dtype=torch.int64, device=cond.device), logp, logp_mixed, entropy, support)
    if num_rows == 0:
        return out
    form, num_warps = sample_form(vocabulary, inputs)
    with on_device(cond):
        cond, uncond = aligned_rows(cond), None if uncond is None or cfg_weight == 1 else aligned_rows(uncond)
        mask = None
        if inputs.forbidden is not None and inputs.forbidden.numel():
            mask = torch.zeros(vocabulary, dtype=torch.uint8, device=cond.device).index_fill_(0, inputs.forbidden, 1)
        sample_kernel[(num_rows,)](
            cond,
            cond.stride(0),
            uncond,
            0 if uncond is None else uncond.stride(0),
            mask,
            inputs.seed.contiguous(),
            inputs.offset.contiguous(),
            out.token,
            out.logp,
            out.logp_mixed,
            out.entropy,
            out.support,
            num_words(vocabulary),
            vocabulary,
            float(cfg_weight),
            # Greedy reports its log-probabilities at temperature 1.
            LOG2E.value / (inputs.temperature or 1.0),
            float(inputs.top_k),
            wanted_share(inputs.top_p),
            least_share(inputs.min_p),
            FORM=form,
            num_warps=num_warps,
            maxnreg=MAX_REGISTERS,
        )
    return out
