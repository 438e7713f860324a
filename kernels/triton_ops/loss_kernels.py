"""Kernels of the GRPO loss: one program per tile of tokens and per group, then one that finishes.

A tile finds its sequences, works out their advantages and the keep decision from the rewards of their groups, and
writes d loss / d logp and its partial sums; what belongs to a whole sequence (means, ratios per sequence, vespo's
weight) it sums over that sequence again. A group writes the advantages and keep flags that are handed out. The second
kernel adds the partial sums in a fixed order, writes loss and metrics, and applies divisors that are known only then.

Dims: `T` packed tokens, `S` sequences, `P` groups, `M` 1 or 2 modalities with rewards of their own.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .groups import DECIDED, group_statistics, keep_members, member_advantages
from .loss_terms import (
    CISPO,
    NUM_EXTREMES,
    NUM_SUMS,
    VESPO,
    bounded_log,
    is_image,
    join_log_ratios,
    mean_factor,
    sum_ratio_gradient,
    sum_sequence,
    token_factor,
    token_terms,
    used_tokens,
)

FINISH_ROWS = tl.constexpr(32)


@triton.jit
def count_at_most(sorted_ptr, length, value):
    """How many entries are <= value. Loads that do not wait for each other beat the steps of a binary search."""
    lane = tl.arange(0, 256)
    count = tl.zeros([256], tl.int32)
    for first in range(0, length, 256):
        inside = first + lane < length
        entry = tl.load(sorted_ptr + first + lane, mask=inside, other=0)
        count += (inside & (entry <= value)).to(tl.int32)
    return tl.sum(count)


@triton.jit
def both_statistics(sequences, numbers, start, end, num_sequences, FORM: tl.constexpr):
    """`group_statistics` of the rewards for text and for image."""
    SCALE: tl.constexpr = FORM.SCALE
    eps = tl.cast(numbers.eps_high, tl.float64) + tl.cast(numbers.eps_low, tl.float64)
    text = group_statistics(sequences.rewards, start, end, 0.0, eps, SCALE)
    image = text
    if FORM.M == 2:
        image = group_statistics(sequences.rewards + num_sequences, start, end, 0.0, eps, SCALE)
    return text, image


@triton.jit
def score_sequence(
    sequences, s, start, end, text, image, mass, num_sequences, keep_count, min_keep, FORM: tl.constexpr
):
    """(advantage for text tokens, for image tokens, keep) of sequence `s` of the group start..end."""
    M: tl.constexpr = FORM.M
    RULE: tl.constexpr = FORM.RULE
    if sequences.rewards is None:
        advantage = tl.load(sequences.advantages + s)
        advantage_image = advantage
        if FORM.M == 2:
            advantage_image = tl.load(sequences.advantages + num_sequences + s)
        keep = tl.load(sequences.keep + s).to(tl.int32)
    else:
        advantage = member_advantages(tl.load(sequences.rewards + s), text)
        advantage_image = advantage
        if FORM.M == 2:
            advantage_image = member_advantages(tl.load(sequences.rewards + num_sequences + s), image)
        keep_I = keep_members(
            sequences.rewards, None, num_sequences, s + tl.arange(0, 1), start, end, text, image, mass, keep_count,
            min_keep, M, RULE,
        )  # fmt: skip
        keep = tl.max(keep_I.to(tl.int32))
    return advantage, advantage_image, keep


@triton.jit
def score_group(sequences, numbers, outputs, group, num_sequences, keep_count, min_keep, FORM: tl.constexpr):
    """Writes the advantages and keep flags of one group, and whether its rewards vary in any modality."""
    M: tl.constexpr = FORM.M
    RULE: tl.constexpr = FORM.RULE
    start, end = tl.load(sequences.group_offsets + group), tl.load(sequences.group_offsets + group + 1)
    mass = tl.cast(numbers.mass_high, tl.float64) + tl.cast(numbers.mass_low, tl.float64)
    text, image = both_statistics(sequences, numbers, start, end, num_sequences, FORM)
    tl.store(outputs.varies + group, tl.where(tl.minimum(text[1], image[1]) < float("inf"), 1.0, 0.0))
    for first in range(start, end, DECIDED):
        member = first + tl.arange(0, DECIDED)
        inside = member < end
        reward = tl.load(sequences.rewards + member, mask=inside, other=float("nan"))
        tl.store(sequences.advantages + member, member_advantages(reward, text), mask=inside)
        if FORM.M == 2:
            reward = tl.load(sequences.rewards + num_sequences + member, mask=inside, other=float("nan"))
            tl.store(sequences.advantages + num_sequences + member, member_advantages(reward, image), mask=inside)
        keep = keep_members(
            sequences.rewards, None, num_sequences, member, start, end, text, image, mass, keep_count, min_keep,
            M, RULE,
        )  # fmt: skip
        tl.store(sequences.keep + member, keep.to(tl.uint8), mask=inside)


@triton.jit
def store_partials(outputs, numbers, tile, used, image, advantage, loss, ratio, kl, entropy, FORM: tl.constexpr):
    """What the tile adds to loss and metrics: for each modality one sum of eight values and one maximum of two."""
    clip_high = tl.where(image, numbers.clip_high_image, numbers.clip_high_text)
    clip_low = tl.where(image, numbers.clip_low_image, numbers.clip_low_text)
    if FORM.LOSS == CISPO:
        too_high, too_low = ratio > clip_high, ratio < 0
    else:
        too_high, too_low = ratio > 1.0 + clip_high, ratio < 1.0 - clip_low
    too_high, too_low = too_high & (advantage > 0), too_low & (advantage < 0)
    for m in tl.static_range(2):
        mine = used & (image if m == 1 else image == 0)
        zero = tl.where(mine, 0.0, 0.0)
        # Joined in this order, the flattened sums are clip_low, clip_high, ratio, kl, entropy, loss, 0, tokens.
        evens = tl.join(
            tl.join(tl.where(mine & too_low, 1.0, 0.0), tl.where(mine, entropy, 0.0)),
            tl.join(tl.where(mine, ratio, 0.0), zero),
        )
        odds = tl.join(
            tl.join(tl.where(mine & too_high, 1.0, 0.0), tl.where(mine, loss, 0.0)),
            tl.join(tl.where(mine, kl, 0.0), tl.where(mine, 1.0, 0.0)),
        )
        sums = tl.reshape(tl.sum(tl.join(evens, odds), axis=0), [8])
        tl.store(outputs.sums + tile * NUM_SUMS + m * 8 + tl.arange(0, 8), sums)
        extremes = tl.join(tl.where(mine, ratio, float("-inf")), tl.where(mine, -ratio, float("-inf")))
        tl.store(outputs.extremes + tile * NUM_EXTREMES + m * 2 + tl.arange(0, 2), tl.max(extremes, axis=0))


@triton.jit
def store_tile(
    tokens, numbers, outputs, tile, offset, stop, live, image, advantage, is_ratio, mean, sequence_log_ratio,
    log_weight, shared, FORM: tl.constexpr,
):  # fmt: skip
    """Gradient and partial sums of a tile whose tokens know what they need of their sequences."""
    used = used_tokens(tokens, offset, live)
    loss, by_logp, by_ratio, ratio, passes, kl, entropy = token_terms(
        tokens, numbers, offset, used, image, advantage, is_ratio, sequence_log_ratio, log_weight, FORM
    )
    factor = token_factor(tokens, numbers, image, FORM)
    if FORM.SEQUENCE_MEAN:
        factor *= mean
    if FORM.SEQUENCE_RATIO:
        gradient = by_logp * factor + shared * passes
    else:
        gradient = (by_logp + by_ratio * ratio * passes) * factor
    tl.store(outputs.grad_logp + offset, tl.where(used, gradient, 0.0), mask=offset < stop)
    store_partials(outputs, numbers, tile, used, image, advantage, loss * factor, ratio, kl, entropy, FORM)


@triton.jit
def loss_tile(
    tokens, sequences, numbers, outputs, tile, num_tokens, num_sequences, num_groups, keep_count, min_keep,
    FORM: tl.constexpr,
):  # fmt: skip
    """One tile of tokens: what each needs of its sequence, then gradient and partial sums."""
    TILE: tl.constexpr = FORM.TILE
    first = tile.to(tl.int64) * TILE
    offset = first + tl.arange(0, TILE)
    stop = tl.minimum(first + TILE, num_tokens)
    image = is_image(tokens, offset, offset < stop)
    live = offset < 0
    advantage = tl.zeros([TILE], tl.float32)
    is_ratio, mean = advantage + 1.0, advantage + 1.0
    sequence_log_ratio, log_weight, shared = advantage, advantage, advantage
    mass = tl.cast(numbers.mass_high, tl.float64) + tl.cast(numbers.mass_low, tl.float64)
    s = count_at_most(sequences.cu_seqlens + 1, num_sequences, first)
    start = tl.load(sequences.cu_seqlens + s)
    group = s * 0
    if sequences.rewards is not None:
        group = count_at_most(sequences.group_offsets + 1, num_groups, s)
    while (start < stop) & (group < num_groups):
        if sequences.rewards is not None:
            group_start = tl.load(sequences.group_offsets + group)
            group_end = tl.load(sequences.group_offsets + group + 1)
            text, picture = both_statistics(sequences, numbers, group_start, group_end, num_sequences, FORM)
        else:
            group_start, group_end, text, picture = 0, num_sequences, None, None
        while (s < group_end) & (start < stop):
            end = tl.load(sequences.cu_seqlens + s + 1)
            of_text, of_image, keep = score_sequence(
                sequences, s, group_start, group_end, text, picture, mass, num_sequences, keep_count, min_keep, FORM
            )
            inside = (offset >= start) & (offset < tl.where(keep != 0, end, start))
            live = live | inside
            advantage = tl.where(inside, tl.where(image, of_image, of_text), advantage)
            sampler = 1.0
            if FORM.IS_PER_SEQUENCE:
                sampler = tl.load(tokens.is_ratio + s)
                is_ratio = tl.where(inside, sampler, is_ratio)
            if FORM.SEQUENCE_MEAN or FORM.SEQUENCE_RATIO or FORM.LOSS == VESPO:  # noqa: SIM102
                if (keep != 0) & (start < end):
                    num_text, num_image, log_sum, log_sampler = sum_sequence(tokens, start, end, FORM)
                    count = tl.maximum(num_text + num_image, 1.0)
                    mean = tl.where(inside, mean_factor(image, num_text, num_image, FORM), mean)
                    log_ratio, passes, divisor = join_log_ratios(numbers, log_sum, count)
                    sequence_log_ratio = tl.where(inside, log_ratio, sequence_log_ratio)
                    if FORM.IS_PER_SEQUENCE:
                        log_sampler = bounded_log(sampler)
                    log_weight = tl.where(inside, log_sum + log_sampler, log_weight)
                    if FORM.SEQUENCE_GRADIENT:
                        by_ratio = sum_ratio_gradient(
                            tokens, numbers, start, end, of_text, of_image, sampler, log_ratio,
                            log_sum + log_sampler, num_text, num_image, FORM,
                        )  # fmt: skip
                        shared = tl.where(inside, by_ratio * tl.exp(log_ratio) * passes / divisor, shared)
            s += 1
            start = end
        group += 1
    store_tile(
        tokens, numbers, outputs, tile, offset, stop, live, image, advantage, is_ratio, mean, sequence_log_ratio,
        log_weight, shared, FORM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "num_groups", "keep_count", "min_keep"])
def loss_kernel(
    tokens, sequences, numbers, outputs, num_tokens, num_sequences, num_groups, keep_count, min_keep,
    FORM: tl.constexpr,
):  # fmt: skip
    """Programs 0 to tiles - 1 are tiles of tokens, the rest, where there are rewards, are groups."""
    program = tl.program_id(0)
    TILE: tl.constexpr = FORM.TILE
    num_tiles = tl.maximum(tl.cdiv(num_tokens, TILE), 1)
    if program < num_tiles:
        loss_tile(
            tokens, sequences, numbers, outputs, program, num_tokens, num_sequences, num_groups, keep_count, min_keep,
            FORM,
        )  # fmt: skip
    elif sequences.rewards is not None:
        score_group(sequences, numbers, outputs, program - num_tiles, num_sequences, keep_count, min_keep, FORM)


@triton.jit
def store_metrics(outputs, keep_ptr, sums, extremes, tokens, num_sequences, num_groups, GIVEN: tl.constexpr):
    """Metrics in the order of `terms.METRICS`; `tokens` [16] is the count of each column's modality."""
    kept = tl.zeros([256], tl.float32)
    for first in range(0, num_sequences, 256):
        member = first + tl.arange(0, 256)
        kept += tl.load(keep_ptr + member, mask=member < num_sequences, other=0).to(tl.float32)
    tl.store(outputs.metrics + 1, tl.sum(kept) / tl.maximum(num_sequences, 1))
    if GIVEN:
        tl.store(outputs.metrics, tl.load(outputs.varies))
    else:
        varies = tl.zeros([256], tl.float32)
        for first in range(0, num_groups, 256):
            group = first + tl.arange(0, 256)
            varies += tl.load(outputs.varies + group, mask=group < num_groups, other=0.0)
        tl.store(outputs.metrics, (num_groups - tl.sum(varies)) / tl.maximum(num_groups, 1))
    column = tl.arange(0, NUM_SUMS)
    value = tl.where(column % 8 == 7, tokens, sums / tl.maximum(tokens, 1.0)).to(tl.float32)
    tl.store(outputs.metrics + 2 + column, value, mask=(column % 8 != 5) & (column % 8 != 6))
    corner = tl.arange(0, NUM_EXTREMES)
    count = tl.where(corner < 2, tl.sum(tl.where(column == 0, tokens, 0.0)), tl.sum(tl.where(column == 8, tokens, 0.0)))
    extreme = tl.where(corner % 2 == 0, extremes, -extremes)
    tl.store(outputs.metrics + 7 + corner + 6 * (corner // 2), tl.where(count > 0, extreme, 1.0))


@triton.jit(do_not_specialize=["num_tiles", "num_tokens", "num_sequences", "num_groups"])
def finish_kernel(
    outputs, keep_ptr, modality_ptr, num_tiles, num_tokens, num_sequences, num_groups,
    COUNTED: tl.constexpr, SPLIT: tl.constexpr, GIVEN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums; where the divisor is a count, one program per tile also rescales its gradient."""
    row = tl.arange(0, FINISH_ROWS)
    column, corner = tl.arange(0, NUM_SUMS), tl.arange(0, NUM_EXTREMES)
    sums = tl.zeros([NUM_SUMS], tl.float64)
    extremes = tl.full([NUM_EXTREMES], float("-inf"), tl.float32)
    for first in range(0, num_tiles, FINISH_ROWS):
        inside = (first + row < num_tiles)[:, None]
        part = tl.load(outputs.sums + (first + row[:, None]) * NUM_SUMS + column[None, :], mask=inside, other=0.0)
        sums += tl.sum(part.to(tl.float64), axis=0)
        place = outputs.extremes + (first + row[:, None]) * NUM_EXTREMES + corner[None, :]
        extremes = tl.maximum(extremes, tl.max(tl.load(place, mask=inside, other=float("-inf")), axis=0))
    num_text = tl.sum(tl.where(column == 7, sums, 0.0))
    num_image = tl.sum(tl.where(column == 15, sums, 0.0))
    text_factor, image_factor = num_text * 0.0 + 1.0, num_text * 0.0 + 1.0
    if COUNTED:
        if SPLIT:
            text_factor = 1.0 / tl.maximum(num_text, 1.0)
            image_factor = 1.0 / tl.maximum(num_image, 1.0)
        else:
            text_factor = 1.0 / tl.maximum(num_text + num_image, 1.0)
            image_factor = text_factor
    if tl.program_id(0) == 0:
        loss = tl.sum(tl.where(column == 5, sums, 0.0)) * text_factor
        loss += tl.sum(tl.where(column == 13, sums, 0.0)) * image_factor
        tl.store(outputs.loss, loss.to(tl.float32))
        tl.store(outputs.counts, num_text.to(tl.float32))
        tl.store(outputs.counts + 1, num_image.to(tl.float32))
        counts = tl.where(column < 8, num_text, num_image)
        store_metrics(outputs, keep_ptr, sums, extremes, counts, num_sequences, num_groups, GIVEN)
    if COUNTED:
        offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        factor = text_factor.to(tl.float32)
        if SPLIT and modality_ptr is not None:
            image = tl.load(modality_ptr + offset, mask=offset < num_tokens, other=0) != 0
            factor = tl.where(image, image_factor.to(tl.float32), factor)
        gradient = tl.load(outputs.grad_logp + offset, mask=offset < num_tokens, other=0.0)
        tl.store(outputs.grad_logp + offset, gradient * factor, mask=offset < num_tokens)
