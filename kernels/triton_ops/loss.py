"""GRPO loss from log-probabilities in Triton: two launches, no atomics, no host synchronisation.

The kernels are in `loss_kernels`, the formulas in `token_math`; `syncr1.kernels.reference.loss` is the specification.
About 25 bytes per token are read and written once; the eager form takes some thirty launches.

Dims: `T` packed tokens, `S` sequences, `P` groups, `M` 1 or 2 modalities with rewards of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..options import SCALES, LossOptions, PerModality, for_modality
from ..streams import MODALITIES
from ..terms import METRICS, ROW_LOSSES, LossTerms, TokenLoss, row_loss
from .groups import RULES
from .launching import as_bytes, halves, interpreting, on_device
from .loss_kernels import finish_kernel, loss_kernel
from .loss_terms import Form, Numbers, Outputs, Sequences, Tokens

TILE = 512
"""Tokens per program: 64k tokens are about one program per multiprocessor of an H200."""
MAX_REGISTERS = 128
"""Stated, or ptxas spills a few bytes to fit one program more into a multiprocessor that has no second one to run."""
INTERPRETED_TILE = 64
"""An interpreted program takes time by the call, not by the token, but small batches should span several tiles."""


def _pair(value: PerModality) -> tuple[float, float]:
    """A setting for text and for image."""
    text, image = (for_modality(value, modality) for modality in MODALITIES)
    return text, image


def _known_factors(settings: LossOptions, num_sequences: int) -> tuple[float, float] | None:
    """1 / the divisors of text and of image, the mean over a sequence left out; None where they are counts."""
    count = num_sequences if settings.num_sequences is None else settings.num_sequences
    per_sequence = 1.0 / max(count, 1)
    if settings.loss_type in ("grpo", "sapo", "luspo"):
        return per_sequence, per_sequence
    if settings.loss_type == "dr_grpo":
        assert settings.max_length is not None  # LossOptions checked it
        return per_sequence / settings.max_length, per_sequence / settings.max_length
    if settings.loss_type == "bnpo" or settings.num_items is None:
        return None
    text, image = _pair(settings.num_items)
    return 1.0 / max(text, 1.0), 1.0 / max(image, 1.0)


def _numbers(settings: LossOptions, factors: tuple[float, float]) -> Numbers:
    return Numbers(
        *_pair(settings.clip_low),
        *_pair(settings.clip_high),
        *_pair(float("inf") if settings.delta is None else settings.delta),
        *_pair(settings.beta),
        *_pair(settings.weight),
        float(settings.sapo_temperature_pos),
        float(settings.sapo_temperature_neg),
        float(settings.vespo_k_pos),
        float(settings.vespo_lambda_pos),
        float(settings.vespo_k_neg),
        float(settings.vespo_lambda_neg),
        *halves(settings.eps),
        *halves(settings.dgs_mass),
        float(settings.ratio == "sequence"),
        *factors,
    )


def _form(terms: LossTerms, num_rows: int, tile: int) -> Form:
    settings = terms.settings
    token_loss_type = row_loss(settings.loss_type)
    loss = len(ROW_LOSSES) if token_loss_type is None else ROW_LOSSES.index(token_loss_type)
    per_sequence = settings.ratio != "token"
    corrected = settings.bias_corrected_kl and terms.ref_logp is not None
    return Form(
        LOSS=loss,
        SEQUENCE_RATIO=per_sequence,
        SEQUENCE_GRADIENT=per_sequence and (corrected or token_loss_type in ("clip", "sapo")),
        SEQUENCE_MEAN=settings.loss_type in ("grpo", "sapo"),
        SPLIT=terms.settings.splits_modalities,
        BIAS_CORRECTED=corrected,
        IS_PER_SEQUENCE=terms.is_ratio is not None and terms.is_per_sequence,
        M=num_rows,
        SCALE=SCALES.index(settings.scale) if terms.rewards is not None else 0,
        RULE=RULES.index(settings.dgs) if terms.rewards is not None else 0,
        TILE=tile,
    )


def _tokens(terms: LossTerms, num_items: Tensor | None) -> Tokens:
    return Tokens(
        terms.logp,
        terms.old_logp,
        terms.ref_logp,
        terms.entropy,
        as_bytes(terms.loss_mask),
        terms.modality,
        terms.is_ratio,
        terms.entropy_thresholds,
        num_items,
    )


def token_loss(terms: LossTerms, tile: int | None = None) -> TokenLoss:
    """Loss, d loss / d logp, advantages, keep flags and metrics; `tile` tokens per program."""
    splits_gradient = terms.settings.splits_modalities and terms.settings.ratio != "token"
    if terms.settings.loss_type == "bnpo" and splits_gradient:
        # Two counts divide one gradient: a first run counts the tokens, for the second they are known.
        _, counts = _run(terms, None, tile)
        return _run(terms, counts, tile)[0]
    return _run(terms, None, tile)[0]


def _run(terms: LossTerms, counts: Tensor | None, tile: int | None) -> tuple[TokenLoss, Tensor]:
    """The two launches; `counts` [2] are divisors that an earlier run found. Returns the counts of this one."""
    settings, device = terms.settings, terms.logp.device
    num_tokens, num_sequences = terms.logp.numel(), terms.cu_seqlens.numel() - 1
    given = terms.rewards is None
    scores = terms.advantages if terms.rewards is None else terms.rewards
    assert scores is not None  # one of the two, by the contract
    num_groups = 1 if given else terms.group_offsets.numel() - 1
    tile = tile or (INTERPRETED_TILE if interpreting() else TILE)
    num_tiles = max(-(-num_tokens // tile), 1)

    num_items = counts
    if counts is None and settings.loss_type in ("dapo", "cispo", "vespo"):
        num_items = terms.num_items
    factors = (1.0, 1.0) if num_items is not None else _known_factors(settings, num_sequences)
    counted = factors is None

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    if terms.advantages is not None and terms.keep is not None:
        advantages, keep, varies = terms.advantages, terms.keep, terms.frac_reward_zero_std
    else:
        advantages, keep = empty(*scores.shape), empty(num_sequences, dtype=torch.bool)
        varies = empty(num_groups)
    loss, metrics, counted_tokens = empty(), empty(len(METRICS)), empty(2)
    grad_logp = empty(num_tokens)
    outputs = Outputs(grad_logp, empty(num_tiles, 16), empty(num_tiles, 4), varies, loss, metrics, counted_tokens)
    sequences = Sequences(terms.cu_seqlens, terms.group_offsets, terms.rewards, advantages, as_bytes(keep))
    form = _form(terms, scores.shape[0], tile)
    keep_count = -1 if settings.dgs_keep is None else settings.dgs_keep
    with on_device(terms.logp):
        loss_kernel[(num_tiles + (0 if given else num_groups),)](
            _tokens(terms, num_items),
            sequences,
            _numbers(settings, factors or (1.0, 1.0)),
            outputs,
            num_tokens,
            num_sequences,
            num_groups,
            keep_count,
            settings.dgs_min_keep,
            form,
            maxnreg=MAX_REGISTERS,
        )
        finish_kernel[(num_tiles if counted else 1,)](
            outputs,
            as_bytes(keep),
            terms.modality,
            num_tiles,
            num_tokens,
            num_sequences,
            num_groups,
            counted,
            form.SPLIT,
            given,
            tile,
            maxnreg=MAX_REGISTERS,
        )
    return TokenLoss(loss, grad_logp, advantages, keep, metrics), counted_tokens
