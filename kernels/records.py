"""Records that the public ops take and return.

Dims: `T` packed tokens, `S` sequences, `N` rows of one vocabulary, `V` vocabulary, `D` hidden, `B` decode rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Modality = Literal["text", "image"]
MODALITIES: tuple[Modality, Modality] = ("text", "image")
"""Order is the code: `modality` tensors hold 0 for text, 1 for image."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenStream:
    """The rows of one vocabulary: text rows use the text head, image rows the image head."""

    hidden: Tensor
    """[N, D] float; the hidden states that *predict* the targets (one position earlier)."""
    weight: Tensor
    """[V, D] float; the head."""
    targets: Tensor
    """[N] int64 in [0, V); the predicted tokens."""
    rows: Tensor
    """[N] int64 in [0, T), no duplicates; positions of the targets on the packed axis."""
    bias: Tensor | None = None
    """[V] float or None; Janus's image head has one."""
    temperature: float = 1.0
    """Divides the logits; the one the tokens were sampled at."""
    modality: Modality = "text"
    """Which loss settings and metrics the rows belong to."""
    forbidden: Tensor | None = None
    """[F] int64 or None; vocabulary ids that may never be sampled: their logits are -inf."""


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
    """[B] float, nats; under the CFG-mixed logits at this temperature, before top-k and top-p."""
    entropy: Tensor
    """[B] float, nats; of the conditional distribution at this temperature."""
