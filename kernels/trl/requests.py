"""What the head of a trainer's model is asked for: scores, or the loss of one `_compute_loss`.

Dims: `B` sequences, `C` completion length, `N` completion tokens (packed), `V` vocabulary, `D` hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..api import TokenStream, linear_grpo_loss, linear_logp
from ..options import LOSS_TYPES

DIVIDED_BY_ITEMS = ("cispo", "dapo", "vespo")
"""Loss types that TRL divides by the tokens of the whole generation batch."""
HEAD_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, eq=False)
class HeadCall:
    """The arguments of `ChunkedLogProbFunction.apply`, in its order."""

    hidden: Tensor
    """[N, D]."""
    weight: Tensor
    """[V, D]."""
    bias: Tensor | None
    """[V]."""
    targets: Tensor
    """[N] int64."""
    temperature: float
    chunk_size: int
    final_logit_softcapping: float | None
    logit_scale: float
    outputs: tuple[str, ...]

    def unserved_reason(self) -> str | None:
        """Why TRL's own head has to answer this call; None where ours can."""
        if self.final_logit_softcapping is not None:
            return "the model caps its logits (final_logit_softcapping)"
        if self.logit_scale != 1.0:
            return f"the model multiplies its logits by {self.logit_scale} (logit_scale)"
        if not {"log_probs", "entropy"}.issuperset(self.outputs):
            return f"the head was asked for {', '.join(self.outputs)}, not just log_probs and entropy"
        if self.weight.dtype not in HEAD_DTYPES:
            return f"the head's weight is {self.weight.dtype} (quantized)"
        if hasattr(self.weight, "ds_id"):
            return "DeepSpeed ZeRO-3 partitions the head"
        return None

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the products run in: as in TRL, the autocast dtype or that of the hidden states."""
        device = self.hidden.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.hidden.dtype

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states, weight and bias in `compute_dtype`."""
        dtype = self.compute_dtype
        return self.hidden.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)


class ScoreRequest:
    """Differentiable log-probabilities and entropies; TRL's formulas do the rest."""

    op = "linear_logp"
    loss: Tensor | None = None
    """What the model's output shall carry as its loss."""
    left_to_trl: str | None = None
    """Why TRL's formulas take a loss that was asked for here."""

    def serve(self, call: HeadCall) -> tuple[Tensor, Tensor]:
        """(logp, entropy), [N] each."""
        hidden, weight, bias = call.operands()
        return linear_logp(hidden, weight, call.targets, bias=bias, temperature=call.temperature)


class LossRequest(ScoreRequest):
    """The loss of one `_compute_loss`: all of it but hidden states and head, with the completion tokens packed."""

    def __init__(self, trainer: Any, inputs: Mapping[str, Any]) -> None:
        completion_BC = inputs["completion_mask"].bool()
        index_N = completion_BC.flatten().nonzero().squeeze(1)
        loss_mask_BC = completion_BC & inputs["tool_mask"].bool() if "tool_mask" in inputs else completion_BC

        def packed(values_BC: Tensor | None) -> Tensor | None:
            return None if values_BC is None else values_BC.flatten()[index_N]

        lengths = completion_BC.sum(dim=1)
        self.cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        self.loss_mask_N: Tensor = loss_mask_BC.flatten()[index_N]
        self.advantages_B = inputs["advantages"]
        self.old_logp_N = packed(inputs.get("old_per_token_logps"))
        self.ref_logp_N = packed(inputs["ref_per_token_logps"]) if trainer.beta != 0.0 else None
        ratio = sampler_ratio(trainer, inputs)
        self.is_ratio = packed(ratio) if ratio is not None and ratio.shape == completion_BC.shape else ratio
        self.options = loss_options(trainer, inputs)
        self.loss_scale = loss_scale(trainer)

    def serve(self, call: HeadCall) -> tuple[Tensor, Tensor]:
        """(logp, entropy), [N] each and without gradient; sets `loss`.

        Falls back to scores, and with them to TRL's loss, where the gradients that the fused op forms in forward would
        escape fp16's loss scaling, or where DataParallel handed this replica a part of the batch.
        """
        num_tokens = self.loss_mask_N.shape[0]
        if call.compute_dtype == torch.float16:
            self.left_to_trl = "fp16: gradients formed in the forward would escape its loss scaling"
        elif call.targets.shape[0] != num_tokens:
            self.left_to_trl = "DataParallel: a replica has a part of the batch alone"
        if self.left_to_trl is not None:
            return super().serve(call)
        hidden, weight, bias = call.operands()
        rows = torch.arange(num_tokens, device=hidden.device)
        groups = torch.tensor([0, self.advantages_B.shape[0]], device=hidden.device)
        output = linear_grpo_loss(
            [TokenStream(hidden, weight, call.targets, rows, bias, call.temperature)],
            None,
            self.cu_seqlens,
            groups,
            advantages=self.advantages_B,
            old_logp=self.old_logp_N,
            loss_mask=self.loss_mask_N,
            ref_logp=self.ref_logp_N,
            is_ratio=self.is_ratio,
            **self.options,
        )
        assert output.entropy is not None
        self.loss, self.op = output.loss * self.loss_scale, "linear_grpo_loss"
        # TRL multiplies masked tokens by 0: their ratio has to be finite, and 1 is.
        unscored = 0.0 if self.old_logp_N is None else self.old_logp_N
        return torch.where(self.loss_mask_N, output.logp, unscored), output.entropy


def loss_options(trainer: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer's settings as options of `linear_grpo_loss`; both use the same names and meanings."""
    args = trainer.args
    options = {
        "loss_type": trainer.loss_type,
        "ratio": trainer.importance_sampling_level,
        "clip_low": trainer.epsilon_low,
        "clip_high": trainer.epsilon_high,
        "delta": args.delta,
        "beta": trainer.beta,
        "bias_corrected_kl": args.use_bias_correction_kl,
        "max_length": trainer.max_completion_length,
        "score_all": True,  # TRL's entropy and clip ratios cover tokens of advantage 0, too
    }
    names = (
        "sapo_temperature_pos",
        "sapo_temperature_neg",
        "vespo_k_pos",
        "vespo_lambda_pos",
        "vespo_k_neg",
        "vespo_lambda_neg",
    )
    options |= {name: getattr(args, name) for name in names}
    if trainer.loss_type in DIVIDED_BY_ITEMS:
        options["num_items"] = inputs["num_items_in_batch"].clamp(min=1)
    return options


def loss_scale(trainer: Any) -> float:
    """What TRL multiplies the reduced loss by: the share of a generation batch, or of an accumulation window."""
    training = trainer.model.training
    accumulation = trainer.current_gradient_accumulation_steps if training else 1
    if trainer.loss_type not in DIVIDED_BY_ITEMS:
        return 1.0 / accumulation
    batches = trainer.args.steps_per_generation if training else 1
    return float(trainer.accelerator.num_processes * batches / accumulation)


def sampler_ratio(trainer: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    """[B, C] or [B, 1] old policy / vLLM's policy, under TRL's conditions: vespo takes it wherever it is."""
    corrects = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    ratio: Tensor | None = inputs.get("importance_sampling_ratio")
    return ratio if corrects or trainer.loss_type == "vespo" else None


def unfused_reason(trainer: Any, inputs: Mapping[str, Any]) -> str | None:
    """What in the settings needs more than the fused op gives; TRL's formulas then run on `linear_logp`."""
    reasons = {
        "the entropy bonus (entropy_coef) needs the gradient of the entropy": trainer._entropy_bonus_enabled,
        "top_entropy_quantile is taken over all ranks": trainer.top_entropy_quantile < 1.0,
        "off_policy_mask_threshold depends on the log-probabilities": trainer.off_policy_mask_threshold is not None,
        "the router's auxiliary loss (router_aux_loss_coef) is added": trainer.aux_loss_enabled,
        "advantages are given per token": inputs["advantages"].dim() != 1,
        f"loss_type={trainer.loss_type!r} is not one of ours": trainer.loss_type not in LOSS_TYPES,
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds) or None
