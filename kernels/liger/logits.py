"""Liger's losses from logits: `fused_selective_log_softmax` and `triton_grpo_loss`.

Logits are (B, T+1, V) as a model returns them for T kept tokens: the last position predicts nothing, is not used and
gets gradient 0. They are never copied and, with `inplace`, become their own gradient.

Dims: `B` sequences, `T` tokens of each, padding included, `V` vocabulary, `N` rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..api import grpo_loss, selective_logp
from ..dispatch import choose, module_of, same_device
from ..register import registered
from ..terms import Head
from .padded import TOKEN_LEVEL_ONLY, Settings, loss_metrics, make_batch, padded_loss, token_terms

REFERENCE_ROWS = 1024
"""Rows that backend `reference` has in float32 at a time."""


class _SelectiveLogp(torch.autograd.Function):
    """`selective_logp` of (B, T+1, V) logits that can write the gradient into the logits' memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets_BT: Tensor, temperature: float, inplace: bool) -> Tensor:
        same_device("selective_logp", logits=logits, completion_ids=targets_BT)
        targets = F.pad(targets_BT, (0, 1))
        backend, whole = choose("selective_logp", None, logits), logits.is_contiguous()
        rows = zip(_rows(logits, whole), _rows(targets, whole), strict=True)
        scored = [_score(backend, rows_NV, targets_N, temperature) for rows_NV, targets_N in rows]
        logp, entropy, lse = (torch.cat(part) for part in zip(*scored, strict=True))
        ctx.save_for_backward(logits, targets, entropy, lse)
        ctx.temperature, ctx.inplace, ctx.backend, ctx.whole = temperature, inplace and whole, backend, whole
        return logp.view(targets.shape)[:, :-1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, entropy, lse = ctx.saved_tensors
        if ctx.inplace:
            out = logits.detach()
            # kernels write unseen by autograd: whoever has saved the logits must not take the gradient for them
            torch.autograd.graph.increment_version(logits)
        else:
            out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        per_row = (targets, lse.view(targets.shape), entropy.view(targets.shape), F.pad(grad_BT, (0, 1)))
        rows = (_rows(values, ctx.whole) for values in (logits, *per_row, out))
        for rows_NV, targets_N, *others in zip(*rows, strict=True):
            _differentiate(ctx.backend, rows_NV, targets_N, ctx.temperature, *others)
        return out, None, None, None


def _rows(values: Tensor, whole: bool) -> Sequence[Tensor]:
    """[B, T+1, ...] as rows of all sequences at once, or of one after another: no copy of what is not contiguous."""
    return [values.flatten(0, 1)] if whole else values.unbind()


def _score(backend: str, rows_NV: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, logsumexp), [N] each."""
    if backend != "reference":
        scored: tuple[Tensor, Tensor, Tensor] = registered.selective_logp(
            rows_NV, targets_N, temperature, None, None, backend
        )
        return scored
    parts = zip(rows_NV.split(REFERENCE_ROWS), targets_N.split(REFERENCE_ROWS), strict=True)
    scores = [selective_logp(rows, targets, temperature=temperature, backend=backend) for rows, targets in parts]
    logp_N, entropy_N = (torch.cat(part) for part in zip(*scores, strict=True))
    return logp_N, entropy_N, torch.empty_like(logp_N)  # nobody reads it


def _differentiate(
    backend: str,
    rows_NV: Tensor,
    targets_N: Tensor,
    temperature: float,
    lse_N: Tensor,
    entropy_N: Tensor,
    grad_N: Tensor,
    out_NV: Tensor,
) -> None:
    """Writes Σ_n grad_n d logp_n into `out_NV`; exactly 0 in rows of gradient 0, whatever the logits there."""
    if backend != "reference":
        rows_NV = rows_NV if rows_NV.stride(1) == 1 else rows_NV.contiguous()
        head, grad_N = Head(temperature=temperature), grad_N.float().contiguous()
        module_of(backend).gradient_rows(rows_NV, targets_N, head, lse_N, entropy_N, grad_N, None, out_NV)
        return
    parts = (values.split(REFERENCE_ROWS) for values in (rows_NV, targets_N, grad_N, out_NV))
    for rows, targets, grad, out in zip(*parts, strict=True):
        with torch.enable_grad():
            leaf = rows.detach().requires_grad_()
            logp, _ = selective_logp(leaf, targets, temperature=temperature, backend=backend)
        (gradient,) = torch.autograd.grad(logp, leaf, grad)
        out.copy_(gradient.masked_fill_((grad == 0).unsqueeze(1), 0.0))


@torch.no_grad()
def fused_selective_log_softmax(
    logits: Tensor, input_ids: Tensor, temperature: float = 0.9, mask: Tensor | None = None
) -> Tensor:
    """Log-probabilities of the last T ids from (B, T+1, V) logits, without gradient.

    Args:
        logits: [B, T+1, V] float.
        input_ids: [B, ≥ T] int; the last T columns are taken. Anything at masked positions.
        temperature: divides the logits.
        mask: [B, ≥ T] or None; 0 = masked.

    Returns:
        [B, T] float32 (float64 for float64 logits), nats; 0 at masked positions.
    """
    length = logits.shape[1] - 1
    ids_BT = input_ids[:, input_ids.shape[1] - length :].long()
    if mask is None:
        return _SelectiveLogp.apply(logits, ids_BT, temperature, False)
    mask_BT = mask[:, mask.shape[1] - length :] != 0
    logp_BT = _SelectiveLogp.apply(logits, torch.where(mask_BT, ids_BT, 0), temperature, False)
    return torch.where(mask_BT, logp_BT, 0.0)


def triton_grpo_loss(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None = None,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: Tensor | float | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> tuple[Tensor, list[Tensor]] | tuple[Tensor, Tensor | None, Tensor]:
    """GRPO loss of padded sequences from logits.

    Args:
        logits: [B, T+1, V]; with gradient, which at the last position and at masked ones is 0.
        old_logp: [B, T]; None = on policy.
        ref_logp: [B, T], of the reference policy; needed where beta is not 0.
        completion_ids: [B, T] int; anything at masked positions.
        advantages: [B].
        completion_mask: [B, T]; 0 = no loss. None = all carry loss.
        temperature: divides the logits.
        beta: weight of the KL.
        eps_low, eps_high: clip bounds 1 - low and 1 + high; for cispo `eps_high` is the raw bound.
        inplace: backward writes the gradient into the memory of `logits`, if they are contiguous.
        loss_type: grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo or vespo.
        max_completion_length: in dr_grpo's divisor; None = T.
        importance_sampling_level: token, or sequence: the geometric mean of the ratios (GSPO).
        reduce: whether the loss comes as a scalar.
        sapo_temperature_pos, sapo_temperature_neg: τ of sapo for A > 0 and for A ≤ 0.
        vllm_is_ratio: [B], [B, 1] or [B, T], multiplied onto the policy loss.
        delta: upper bound of the unclipped ratio.
        use_bias_correction_kl: multiplies the KL by the importance ratio.
        num_items_in_batch: divisor of dapo, cispo and vespo before it is divided by the number of ranks.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: shape of vespo's weight.

    Returns:
        With `reduce`, (loss, [kl, clipped fraction]), the latter alone where beta is 0. Without, (loss, kl or None
        where beta is 0, 1 where clipped), [B, T] each and 0 at masked positions; the first takes any gradient.
    """
    given = "must provide logits, completion_ids and advantages"
    assert logits is not None and completion_ids is not None and advantages is not None, given
    assert importance_sampling_level in ("token", "sequence"), (
        f"importance_sampling_level must be 'token' or 'sequence', got {importance_sampling_level}"
    )
    assert beta == 0 or ref_logp is not None, "ref_logp must be provided where beta is not 0"
    settings = Settings(
        loss_type=loss_type,
        ratio=importance_sampling_level,
        clip_low=eps_low,
        clip_high=eps_high,
        delta=delta or None,  # 0 switches it off
        beta=beta,
        bias_corrected_kl=use_bias_correction_kl,
        max_length=completion_ids.shape[1] if max_completion_length is None else max_completion_length,
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        vespo_k_pos=vespo_k_pos,
        vespo_lambda_pos=vespo_lambda_pos,
        vespo_k_neg=vespo_k_neg,
        vespo_lambda_neg=vespo_lambda_neg,
    )
    settings.check()
    if delta is not None and loss_type in TOKEN_LEVEL_ONLY:
        raise ValueError(f"delta (two-sided clipping) is not supported for loss_type='{loss_type}'.")
    if loss_type == "sapo":
        settings.check_sapo_temperatures()
    mask = torch.ones_like(completion_ids) if completion_mask is None else completion_mask
    batch = make_batch(
        settings,
        mask,
        completion_ids,
        advantages,
        old_logp,
        ref_logp,
        vllm_is_ratio,
        num_items_in_batch,
        luspo_by_sequence=False,
    )
    logp_BT = _SelectiveLogp.apply(logits, batch.targets, temperature, inplace)
    if not reduce:
        policy, kl, clipped = token_terms(logp_BT, batch)
        kl_BT = None if beta == 0 else kl.detach()
        return policy + beta * kl, kl_BT, clipped.to(policy.dtype)
    loss = grpo_loss(logp_BT.flatten(), **batch.packed()).loss if batch.packable else padded_loss(logp_BT, batch)
    return loss, loss_metrics(logp_BT.detach(), batch)
