"""TRL's GRPOTrainer on these kernels: `patch_grpo_trainer()`, then train as before.

A step of TRL 1.16, outermost first, and what becomes of each layer:

    GRPOTrainer._compute_loss                         formulas and metrics on [B, C]        runs; its loss is swapped
    GRPOTrainer._get_per_token_logps_and_entropies    calls the model                       runs
    model.forward (from `add_fused_lm_head`)          backbone, picks completion tokens     runs
    ChunkedLogProbFunction.apply                      hidden states and head -> logp        replaced

The replaced layer is all that touches the vocabulary. It answers one of two requests: `LossRequest` has
`linear_grpo_loss` compute log-probabilities, loss and gradients in one sweep (three matrix products), `ScoreRequest`
has `linear_logp` compute differentiable log-probabilities and entropies, from which TRL's formulas take the loss.
Because TRL's formulas run either way, every metric is TRL's own, under its own name.

The loss leaves the model in the `loss` field of its output, so that autograd hooks of DDP and FSDP see it.

Dims: `B` sequences, `C` completion length, `N` completion tokens (packed), `V` vocabulary, `D` hidden.
"""

from .patch import Patch, patch_grpo_trainer

__all__ = ["patch_grpo_trainer", "Patch"]
