"""The steps of the sampler: read and mix a row, find where top_k and top_p cut, draw by inverse CDF.

    z = u + w (c − u),   weight_v = 2^(scale z_v − offset),   token = first v with Σ_{j≤v} weight_j > U · Σ_j weight_j

A resident row stays in registers; a longer one is read again for every quantity, mostly from L2. top_k and top_p need
no sort: both keep the ids whose weight is at least some bound (ties: the lower ids), found by bisection over the
float32 numbers, which from 0 up have the order of their bits: at most 31 steps. Sums are float32 inside a line of a
tile, float64 across lines.

Dims: `B` rows, `V` vocabulary.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .row_math import LOWEST, WORD, finite, moved, readable, weights_of, whole_row

ALL_IDS = tl.constexpr(2147483647)


class SampleForm(NamedTuple):
    """What a launch is compiled for."""

    GREEDY: Any
    TOP_K: Any
    TOP_P: Any
    MIN_P: Any
    SUPPORT: Any
    """What is kept is written, and scored over."""
    RAGGED: Any
    """Rows begin at multiples of 16 bytes and end elsewhere."""
    RESIDENT: Any
    """One tile holds the whole row."""
    LINES: Any
    COLUMNS: Any
    """A tile is LINES × COLUMNS neighbouring ids."""
    TILES: Any
    """A power of two, at least the number of tiles of a row."""


class Row(NamedTuple):
    """One row of logits: pointers, None where absent."""

    cond: Any
    uncond: Any
    forbidden: Any
    """[V] uint8, shared by all rows."""
    V: Any
    cfg_weight: Any


class Cut(NamedTuple):
    """What top_k, top_p and min_p leave: weights above `bound`, and of those that are `bound` the ids up to `last`."""

    bound: Any
    last: Any


@triton.jit
def load_mixed(row, ids, RAGGED: tl.constexpr):
    """(conditional, mixed) logits in float32; -inf outside the row and at forbidden ids."""
    inside = ids < readable(row.cond, row.V, RAGGED)
    cond = tl.load(row.cond + ids, mask=inside, other=LOWEST).to(tl.float32)
    allowed = ids < row.V
    if row.forbidden is not None:
        inside = ids < readable(row.forbidden, row.V, RAGGED)
        allowed = allowed & (tl.load(row.forbidden + ids, mask=inside, other=1) == 0)
    if RAGGED or row.forbidden is not None:
        cond = tl.where(allowed, cond, LOWEST)
    mixed = cond
    if row.uncond is not None:
        inside = ids < readable(row.uncond, row.V, RAGGED)
        uncond = tl.load(row.uncond + ids, mask=inside, other=LOWEST).to(tl.float32)
        if RAGGED or row.forbidden is not None:
            uncond = tl.where(allowed, uncond, LOWEST)
        # Where both are -inf their difference would be NaN.
        mixed = tl.where(cond == uncond, cond, tl.fma(cond - uncond, row.cfg_weight, uncond))
    return cond, mixed


@triton.jit
def tile_ids(tile, FORM: tl.constexpr):
    first = tile * (FORM.LINES * FORM.COLUMNS)
    return first + tl.arange(0, FORM.LINES)[:, None] * FORM.COLUMNS + tl.arange(0, FORM.COLUMNS)[None, :]


@triton.jit
def num_tiles(row, FORM: tl.constexpr):
    return tl.cdiv(row.V, FORM.LINES * FORM.COLUMNS)


@triton.jit
def within(weights, ids, cut):
    """0 at the ids that `cut` drops."""
    return tl.where((weights > cut.bound) | ((weights == cut.bound) & (ids <= cut.last)), weights, 0.0)


@triton.jit
def tile_weights(row, tile, cut, scale, offset, FORM: tl.constexpr):
    """A tile of a row that is not resident."""
    ids = tile_ids(tile, FORM)
    _, mixed = load_mixed(row, ids, FORM.RAGGED)
    weights, _ = weights_of(mixed, scale, offset)
    return within(weights, ids, cut) if FORM.TOP_K or FORM.TOP_P or FORM.MIN_P else weights


@triton.jit
def tile_values(row, tile, cut, bound, scale, offset, EQUAL: tl.constexpr, FORM: tl.constexpr):
    """What `locate` adds up."""
    weights = tile_weights(row, tile, cut, scale, offset, FORM)
    return (weights == bound).to(tl.float32) if EQUAL else weights


@triton.jit
def add_statistics(logits, scale, offset, total, weighted):
    """The sums of the tiles so far and of one more."""
    _, tile_offset, tile_total, tile_weighted = whole_row(logits, scale)
    # A tile of nothing but -inf has offset 0 and sums 0; it must not raise the offset.
    tile_offset = tl.where(tile_total == 0, LOWEST, tile_offset)
    new_offset = tl.maximum(offset, tile_offset)
    base = finite(new_offset)
    total, weighted = moved(total, weighted, offset, base)
    tile_total, tile_weighted = moved(tile_total, tile_weighted, tile_offset, base)
    return new_offset, total + tile_total, weighted + tile_weighted


@triton.jit
def swept_statistics(row, scale, FORM: tl.constexpr):
    """(offset, total, weighted) of the conditional logits, (offset, total, highest) of the mixed ones."""
    nothing = scale * 0
    cond_offset, cond_total, cond_weighted = nothing + LOWEST, nothing, nothing
    offset, total, weighted, highest = nothing + LOWEST, nothing, nothing, nothing + LOWEST
    for tile in range(num_tiles(row, FORM)):
        cond, mixed = load_mixed(row, tile_ids(tile, FORM), FORM.RAGGED)
        cond_offset, cond_total, cond_weighted = add_statistics(cond, scale, cond_offset, cond_total, cond_weighted)
        highest = tl.maximum(highest, tl.max(mixed))
        if row.uncond is not None:
            offset, total, weighted = add_statistics(mixed, scale, offset, total, weighted)
    if row.uncond is None:
        offset, total = cond_offset, cond_total
    return finite(cond_offset), cond_total, cond_weighted, finite(offset), total, highest


@triton.jit
def mass_from(row, weights, cut, bound, scale, offset, FORM: tl.constexpr):
    """(mass, number) of the weights within `cut` that are at least `bound`, as float32."""
    if FORM.RESIDENT:
        chosen = weights >= bound
        mass, count = tl.sum(tl.where(chosen, weights, 0.0)), tl.sum(chosen.to(tl.float32))
    else:
        mass, count = scale * 0, scale * 0
        for tile in range(num_tiles(row, FORM)):
            part = tile_weights(row, tile, cut, scale, offset, FORM)
            part_chosen = part >= bound
            mass += tl.sum(tl.where(part_chosen, part, 0.0))
            count += tl.sum(part_chosen.to(tl.float32))
    return mass, count


@triton.jit
def first_above(sums, threshold, base, SIZE: tl.constexpr):
    """(position, running sum before it) of the first positive entry with `base` + running sum > `threshold`.

    `sums` is [SIZE] float64. Rounding may leave none: then the last positive entry, or 0 where there is no such.
    """
    position = tl.arange(0, SIZE)
    running = base + tl.cumsum(sums, axis=0)
    first = tl.min(tl.where((sums > 0) & (running > threshold), position, SIZE))
    found = tl.where(first < SIZE, first, tl.max(tl.where(sums > 0, position, 0)))
    return found, tl.sum(tl.where(position == found, running - sums, 0.0))


@triton.jit
def locate(row, values, cut, bound, level, scale, offset, EQUAL: tl.constexpr, FORM: tl.constexpr):
    """The first id at which the running sum of the values within `cut` exceeds a threshold.

    The values are 1 at weights equal to `bound` (EQUAL), else the weights; those of a resident row are given. The
    threshold is `level` (EQUAL), else `level` times the sum of all values.
    """
    tile, before = row.V * 0, level * 0
    if FORM.RESIDENT:
        lines = tl.sum(values, axis=1).to(tl.float64)
        threshold = level if EQUAL else level * tl.sum(lines)
        chosen_tile = values
    else:
        tiles = tl.arange(0, FORM.TILES)
        sums = tl.full([FORM.TILES], 0, tl.float64)
        for index in range(num_tiles(row, FORM)):
            part = tile_values(row, index, cut, bound, scale, offset, EQUAL, FORM)
            sums = tl.where(tiles == index, tl.sum(tl.sum(part, axis=1).to(tl.float64)), sums)
        threshold = level if EQUAL else level * tl.sum(sums)
        tile, before = first_above(sums, threshold, before, FORM.TILES)
        chosen_tile = tile_values(row, tile, cut, bound, scale, offset, EQUAL, FORM)
        lines = tl.sum(chosen_tile, axis=1).to(tl.float64)
    line, before = first_above(lines, threshold, before, FORM.LINES)
    chosen = tl.arange(0, FORM.LINES)[:, None] == line
    entries = tl.sum(tl.where(chosen, chosen_tile, 0.0), axis=0).to(tl.float64)
    column, _ = first_above(entries, threshold, before, FORM.COLUMNS)
    return (tile * FORM.LINES + line) * FORM.COLUMNS + column


@triton.jit
def truncate(row, weights, cut, target, by_count, scale, offset, FORM: tl.constexpr):
    """`cut` narrowed to the fewest ids, most likely first, whose number (`by_count`) or mass is at least `target`."""
    # At `low` the target is reached, at `high` (+inf) it is not; a step halves the float32 numbers between them.
    low, high = row.V * 0, row.V * 0 + 0x7F800000
    count_low, count_high, mass_high = row.V + scale * 0, scale * 0, scale * 0
    open_ids = count_low
    while (high - low > 1) & (open_ids > 1):
        middle = low + ((high - low) >> 1)
        mass, count = mass_from(row, weights, cut, middle.to(tl.float32, bitcast=True), scale, offset, FORM)
        reached = tl.where(by_count, count, mass) >= target
        low, high = tl.where(reached, middle, low), tl.where(reached, high, middle)
        count_low, count_high = tl.where(reached, count, count_low), tl.where(reached, count_high, count)
        mass_high = tl.where(reached, mass_high, mass)
        # Done as well where `low` gives just enough, or all but one id are settled.
        open_ids = count_low - tl.where(by_count, tl.maximum(count_high, target - 1), count_high)
    bound = low.to(tl.float32, bitcast=True)
    num_equal = tl.where(by_count, target - count_high, tl.maximum(tl.ceil((target - mass_high) / bound), 1.0))
    last = row.V * 0 + ALL_IDS
    if (num_equal < count_low - count_high) & (bound > 0):
        equal = (weights == bound).to(tl.float32)
        last = locate(row, equal, cut, bound, num_equal.to(tl.float64) - 0.5, scale, offset, True, FORM)
    # An early end leaves `bound` between two weights; it must not readmit what `cut` drops.
    last = tl.where(bound > cut.bound, last, tl.where(bound == cut.bound, tl.minimum(last, cut.last), cut.last))
    return Cut(tl.maximum(bound, cut.bound), last)


@triton.jit
def at_least(cut, bound):
    """`cut` narrowed to weights of at least `bound`."""
    return Cut(tl.maximum(bound, cut.bound), tl.where(bound > cut.bound, ALL_IDS, cut.last))


@triton.jit
def store_support(out, tile, kept, V, FORM: tl.constexpr):
    """Writes the bits of a tile's ids; returns how many are kept."""
    WORDS: tl.constexpr = FORM.LINES * FORM.COLUMNS // WORD
    bits = tl.reshape(kept.to(tl.int32), [WORDS, WORD])
    index = tile * WORDS + tl.arange(0, WORDS)
    words = tl.xor_sum(bits << tl.arange(0, WORD)[None, :], axis=1)
    tl.store(out + index, words, mask=index * WORD < V)
    return tl.sum(bits)


@triton.jit
def kept_of(mixed, weights, FORM: tl.constexpr):
    """What could be drawn; greedy decoding leaves nothing out."""
    return mixed > LOWEST if FORM.GREEDY else weights > 0


@triton.jit
def kept_statistics(row, out, weights, cut, scale, offset, FORM: tl.constexpr):
    """(offset, total, weighted) of the conditional logits over what is kept, the mixed ones' total against `offset`,
    how many are kept. Writes the support."""
    if FORM.RESIDENT:
        # The logits are read again: kept through the search they would take more registers than there are.
        tile = (cut.bound != cut.bound).to(tl.int32) if FORM.TOP_K or FORM.TOP_P or FORM.MIN_P else 0
        cond, mixed = load_mixed(row, tile_ids(tile, FORM), FORM.RAGGED)
        kept = kept_of(mixed, weights, FORM)
        total, count = tl.sum(weights), store_support(out, 0, kept, row.V, FORM)
        _, cond_offset, cond_total, cond_weighted = whole_row(tl.where(kept, cond, LOWEST), scale)
    else:
        cond_offset, cond_total, cond_weighted = scale * 0 + LOWEST, scale * 0, scale * 0
        total, count = scale * 0, row.V * 0
        for tile in range(num_tiles(row, FORM)):
            cond, mixed = load_mixed(row, tile_ids(tile, FORM), FORM.RAGGED)
            part = within(weights_of(mixed, scale, offset)[0], tile_ids(tile, FORM), cut)
            kept = kept_of(mixed, part, FORM)
            total += tl.sum(part)
            count += store_support(out, tile, kept, row.V, FORM)
            cond = tl.where(kept, cond, LOWEST)
            cond_offset, cond_total, cond_weighted = add_statistics(cond, scale, cond_offset, cond_total, cond_weighted)
        cond_offset = finite(cond_offset)
    return cond_offset, cond_total, cond_weighted, total, count


@triton.jit
def first_highest(row, mixed, highest, FORM: tl.constexpr):
    """The lowest of the ids whose z is the highest."""
    if FORM.RESIDENT:
        token = tl.min(tl.where(mixed == highest, tile_ids(0, FORM), ALL_IDS))
    else:
        token = row.V * 0 + ALL_IDS
        for tile in range(num_tiles(row, FORM)):
            ids = tile_ids(tile, FORM)
            _, tile_mixed = load_mixed(row, ids, FORM.RAGGED)
            token = tl.minimum(token, tl.min(tl.where(tile_mixed == highest, ids, ALL_IDS)))
    return tl.minimum(token, row.V - 1)
