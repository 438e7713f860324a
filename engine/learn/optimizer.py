"""The optimizer's settings, what DeepSpeed is told of them, and AdamW where DeepSpeed leaves clipping to us."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSettings:
    """Settings of the optimizer and of DeepSpeed."""

    learning_rate: float
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    zero_stage: int = 0
    bf16: bool = False
    num_iterations: int = 1
    max_skipped_updates: int = 10
    gradient_checkpointing: bool = False


def bucket_size(num_trained: int) -> int:
    """Elements of DeepSpeed's buffer of gradients to reduce, its own 500 million but no more than there are gradients:
    ZeRO 3 keeps it, ZeRO 1 and 2 make it for each backward."""
    return min(500_000_000, max(1, num_trained))


def deepspeed_config(settings: LearnerSettings, num_trained: int) -> dict[str, Any]:
    """DeepSpeed's configuration: micro-batches vary in number, so gradient accumulation is driven by our own loop."""
    zero = {"stage": settings.zero_stage, "overlap_comm": False, "reduce_bucket_size": bucket_size(num_trained)}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if clips_here(settings) else settings.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": settings.bf16, "check_grad_overflow": True},
    }


def clips_here(settings: LearnerSettings) -> bool:
    """Without ZeRO and in float32 DeepSpeed leaves the optimizer as it is: then ours clips."""
    return settings.zero_stage == 0 and not settings.bf16


class ClippedAdamW(torch.optim.AdamW):
    """Clips gradients that are summed over ranks; where they are not finite it steps nowhere.

    DeepSpeed's wrappers do so, but without ZeRO and in float32 there is none: its engine clips, does not tell the norm,
    and lets NaN into the weights."""

    max_norm, norm = math.inf, math.nan

    def step(self, closure: Any = None) -> Any:
        trained = [p for group in self.param_groups for p in group["params"]]
        self.norm = float(torch.nn.utils.clip_grad_norm_(trained, self.max_norm))
        return super().step(closure) if math.isfinite(self.norm) else None
