"""Liger's chunked loss: hidden states of a padded batch → loss and metrics.

Dims: `B` sequences, `T` tokens of each, padding included, `V` vocabulary, `D` hidden, `N` = B·T rows.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..api import linear_grpo_loss, linear_logp
from ..streams import TokenStream
from .padded import PaddedBatch, Settings, loss_metrics, make_batch, padded_loss


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """GRPO loss of padded sequences from hidden states and the head's weight.

    Args:
        beta: weight of the KL.
        compiled: without effect; nothing here is compiled.
        use_ref_model: the KL is to a reference policy; False ignores what is given of it, the KL is then 0.
        chunk_size: without effect; rows are chunked by what fits into a workspace.
        epsilon_low, epsilon_high: clip bounds 1 - low and 1 + high; for cispo `epsilon_high` is the raw bound.
        loss_type: grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo or vespo.
        max_completion_length: in dr_grpo's divisor, needed there.
        importance_sampling_level: token, or sequence: the geometric mean of the ratios (GSPO).
        sapo_temperature_pos, sapo_temperature_neg: τ of sapo for A > 0 and for A ≤ 0.
        temperature: divides the logits.
        delta: upper bound of the unclipped ratio.
        use_bias_correction_kl: multiplies the KL by the importance ratio.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: shape of vespo's weight.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg
        self._settings().check_sapo_temperatures()
        if delta is not None and delta <= 0:
            raise ValueError(f"delta must be positive, got {delta}")

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and metrics.

        Args:
            _input: [B, T, D]; with gradient.
            lin_weight: [V, D]; with gradient unless it is frozen.
            selected_token_ids: [B, T] int; anything at masked positions.
            attention_mask: [B, T]; 0 = no loss.
            advantages: [B].
            bias: [V] or None; with gradient unless it is frozen.
            ref_per_token_logps: [B, T], of the reference policy.
            old_per_token_logps: [B, T]; None = on policy.
            ref_input: [B, T, D], of the reference policy, in place of `ref_per_token_logps`.
            ref_weight: [V, D], for `ref_input`.
            ref_bias: [V] or None, for `ref_input`.
            vllm_is_ratio: [B], [B, 1] or [B, T], multiplied onto the policy loss.
            num_items_in_batch: divisor of dapo, cispo and vespo before it is divided by the number of ranks.

        Returns:
            (loss, metrics): scalar; (kl, clipped fraction), or the latter alone where beta is 0.
        """
        settings = self._settings()
        settings.check()
        if self.loss_type == "dr_grpo":
            needed = "max_completion_length must be provided for loss_type 'dr_grpo'"
            assert self.max_completion_length is not None, needed
        if self.use_ref_model:
            assert ref_per_token_logps is not None or ref_input is not None, (
                "If use_ref_model is True, ref_per_token_logps or ref_input must be provided"
            )
            if ref_per_token_logps is not None and ref_input is not None:
                warnings.warn(
                    "Both ref_per_token_logps and ref_input are provided. Using ref_per_token_logps.", stacklevel=2
                )
        ref = None
        if self.use_ref_model and self.beta != 0:
            ref = ref_per_token_logps
            if ref is None:
                assert ref_input is not None and ref_weight is not None, "ref_input needs ref_weight"
                mask_BT = attention_mask != 0
                with torch.no_grad():
                    ref = _masked_logp(ref_input, ref_weight, ref_bias, mask_BT, selected_token_ids, self.temperature)
        batch = make_batch(
            settings,
            attention_mask,
            selected_token_ids,
            advantages,
            old_per_token_logps,
            ref,
            vllm_is_ratio,
            num_items_in_batch,
            luspo_by_sequence=self.importance_sampling_level == "sequence",
        )
        loss, logp_BT = _linear_loss(_input, lin_weight, bias, self.temperature, batch)
        return loss, tuple(loss_metrics(logp_BT.detach(), batch))

    def _settings(self) -> Settings:
        return Settings(
            loss_type=self.loss_type,
            ratio=self.importance_sampling_level,
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            delta=self.delta,
            beta=self.beta,
            bias_corrected_kl=self.use_bias_correction_kl,
            max_length=self.max_completion_length,
            sapo_temperature_pos=self.sapo_temperature_pos,
            sapo_temperature_neg=self.sapo_temperature_neg,
            vespo_k_pos=self.vespo_k_pos,
            vespo_lambda_pos=self.vespo_lambda_pos,
            vespo_k_neg=self.vespo_k_neg,
            vespo_lambda_neg=self.vespo_lambda_neg,
        )


def _linear_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, batch: PaddedBatch
) -> tuple[Tensor, Tensor]:
    """(loss, log-probabilities [B, T])."""
    if not batch.packable:
        logp_BT = _masked_logp(hidden, weight, bias, batch.mask, batch.targets, temperature)
        return padded_loss(logp_BT, batch), logp_BT
    hidden_ND, targets_N = hidden.flatten(0, 1), batch.targets.flatten()
    rows_N = torch.arange(targets_N.numel(), device=hidden.device)
    weight, bias = _head(hidden, weight, bias)
    stream = TokenStream(hidden_ND, weight, targets_N, rows_N, bias, temperature)
    output = linear_grpo_loss([stream], **batch.packed())
    return output.loss, output.logp.view(batch.mask.shape)


def _masked_logp(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, mask_BT: Tensor, ids: Tensor, temperature: float
) -> Tensor:
    """[B, T] log-probabilities, 0 at masked positions, whose rows are left out of the products."""
    weight, bias = _head(hidden, weight, bias)
    logp_N, _ = linear_logp(hidden[mask_BT], weight, ids[mask_BT].long(), bias=bias, temperature=temperature)
    return torch.zeros(mask_BT.shape, dtype=logp_N.dtype, device=hidden.device).masked_scatter(mask_BT, logp_N)


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in the dtype of the hidden states, in which Liger, too, multiplies."""
    return weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
