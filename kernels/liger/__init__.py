"""Drop-in for the GRPO losses of Liger 0.8.5: its three public names, its signatures and its defaults.

    from . import LigerFusedLinearGRPOLoss, triton_grpo_loss, fused_selective_log_softmax

A padded batch is B packed sequences of T tokens whose loss mask is the attention mask: `linear_grpo_loss`, and
`selective_logp` with `grpo_loss`, do the work on whichever backend serves the tensors.

Where Liger differs from TRL it is followed: beta 0.04; triton_grpo_loss has temperature 0.9 and eps_high 0.4; its
dr_grpo takes T for `max_completion_length=None`; the chunked loss ignores `delta` for cispo, sapo and vespo,
triton_grpo_loss refuses it; luspo is the mean over B·T of the token losses times their sequence's length, except that
the chunked loss counts a sequence-level policy loss once per sequence; vespo sums the logarithms of `vllm_is_ratio`
over masked positions too (NaN counts as 1 there); metrics are [kl, clipped fraction], the KL with its bias correction.

Where it is not followed:

- Masked positions have no influence and may hold anything, vespo's sum apart. In Liger's chunked loss NaN or infinity
  there reaches the loss, and luspo adds the losses and the KL of padding to it.
- |log-ratio| and |ref − logp| are clamped at 20. Liger's exponentials overflow: infinite losses, NaN gradients.
- The backward of its triton_grpo_loss has no gradient where A < 0 and delta < ratio < 1 + eps_high, though the loss
  there is −ratio·A. Here it is the derivative of the loss.
- With reduce=True its token-level luspo reads a [B, 1] gradient as [B, T], past its end: wrong gradients.
- A log-probability that carries loss and is not finite raises (see SYNCR1_CHECKS) where a packed op forms the loss:
  not with reduce=False, luspo with a KL, or vespo with [B, T] ratios. Liger's loss becomes NaN.
- dW is summed in float32; Liger's chunked loss rounds the sum to the weight's dtype after each chunk.
- After an inplace backward the logits are gone, as in Liger, but autograd knows: using them in a further backward
  raises, where Liger returns a wrong gradient. Inputs need not be contiguous; logits that are not stay as they are.
- A mask is taken as zero or not zero. float64 inputs are computed and returned in float64.
"""

from .hidden import LigerFusedLinearGRPOLoss
from .logits import fused_selective_log_softmax, triton_grpo_loss

__all__ = ["LigerFusedLinearGRPOLoss", "triton_grpo_loss", "fused_selective_log_softmax"]
