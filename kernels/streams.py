"""The two modalities, and the rows of one vocabulary as the linear ops take them.

Dims: `T` packed tokens, `N` rows of one vocabulary, `V` vocabulary, `D` hidden.
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
    support: Tensor | None = None
    """[N, ceil(V/32)] int32 or None = all; the ids that each row's token was drawn from, as `CFGSample.support` has
    them: the others' logits are -inf."""
