"""Records that the public ops return. Dims: `T` packed tokens, `S` sequences, `B` decode rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class GRPOPlan:
    """What rewards decide before there is any log-probability: who is trained on, and with which advantage."""

    advantages: Tensor | dict[str, Tensor]
    """[S] float, or one [S] per modality when the rewards came per modality."""
    keep: Tensor
    """[S] bool; False = pruned by `dgs`."""
    frac_reward_zero_std: Tensor
    """Scalar in [0, 1]: groups whose rewards are all equal, in every modality."""


@dataclass(frozen=True, slots=True, eq=False)
class GRPOOutput:
    """What a GRPO loss returns; only `loss` carries a gradient."""

    loss: Tensor
    """Scalar."""
    advantages: Tensor | dict[str, Tensor]
    """[S] float, or one [S] per modality when the rewards came per modality."""
    keep: Tensor
    """[S] bool; False = pruned by `dgs`."""
    metrics: dict[str, Tensor]
    """Scalars, detached; keys end in `/text` or `/image` where they are per modality."""
    logp: Tensor
    """[T] float, nats, detached; 0 where no log-probability was computed."""
    entropy: Tensor | None = None
    """[T] float, nats, detached; None when neither given nor computed."""


@dataclass(frozen=True, slots=True, eq=False)
class CFGSample:
    """One sampled token per row, with its log-probabilities."""

    token: Tensor
    """[B] int64."""
    logp: Tensor
    """[B] float, nats; under the conditional logits alone at this temperature."""
    logp_mixed: Tensor
    """[B] float, nats; under the CFG-mixed logits at this temperature, before top-k, top-p and min-p."""
    entropy: Tensor
    """[B] float, nats; of the conditional distribution at this temperature."""
    support: Tensor | None = None
    """[B, ceil(V/32)] int32: bit j of word w says that id 32 w + j could be drawn. None where it was not asked for;
    where it was, all three figures above are those of the distributions renormalised over this set."""
