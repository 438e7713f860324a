"""The contract between ops and backends: the records that an op hands over, and the functions that it calls.

An accelerated backend (`syncr1.kernels.native`, `syncr1.kernels.triton_ops`) is a module with the functions of
`Backend`. It never validates and never sees autograd: `syncr1.kernels.ops` does both, once for all backends. What it is
given is detached and on one device.

Dims: `T` packed tokens, `S` sequences, `P` groups, `M` 1 or 2 modalities with rewards of their own,
`C` rows of a chunk, `V` vocabulary, `B` decode rows; `R` rows, `H` heads, `E` width of an attention step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple, Protocol

from torch import Tensor

from .layout import PackedLayout
from .options import LossOptions, decode, for_modality
from .outputs import CFGSample
from .streams import Modality

RowLoss = Literal["clip", "cispo", "sapo"]
ROW_LOSSES: tuple[RowLoss, ...] = ("clip", "cispo", "sapo")
"""Token losses whose gradient is known from the token alone; the order is the code in C++ and Triton."""
METRICS_PER_MODALITY = ("clip_low", "clip_high", "ratio_mean", "kl", "entropy", "ratio_max", "ratio_min", "tokens")
METRICS = ("frac_reward_zero_std", "frac_kept", *(f"{m}/{d}" for d in ("text", "image") for m in METRICS_PER_MODALITY))
"""Order of `TokenLoss.metrics`; entries without meaning for a call hold anything finite."""


def row_loss(loss_type: str) -> RowLoss | None:
    """Which token loss a row can compute alone; None where it needs the whole sequence (vespo)."""
    if loss_type in ("cispo", "sapo"):
        return loss_type  # type: ignore[return-value]
    return None if loss_type == "vespo" else "clip"


def padded(vocabulary: int) -> int:
    """Length of a row of products in memory: every row begins where the vendor's products and the row kernels read and
    write 16 bytes at a time, in any dtype."""
    return -(-vocabulary // 16) * 16


class LossInputs(NamedTuple):
    """What both losses are given beside log-probabilities or streams, as the caller gave it but for settings in one
    string: arguments of the registered ops."""

    old_logp: Tensor | None
    """[T]."""
    rewards: Sequence[Tensor]
    """[S] or [S, K]: one, or those of text and image; none where `advantages` are given."""
    advantages: Sequence[Tensor]
    """[S] each, likewise."""
    cu_seqlens: Tensor
    """[S+1]."""
    group_offsets: Tensor
    """[P+1]."""
    loss_mask: Tensor | None
    """[T] bool."""
    modality: Tensor | None
    """[T]."""
    ref_logp: Tensor | None
    """[T]."""
    is_ratio: Tensor | None
    """[T], [S] or [S, 1]."""
    entropy: Tensor | None
    """[T]; of `grpo_loss` alone."""
    weights: Tensor | None
    """[K]."""
    num_items: Tensor | None
    """[1] or [2]; replaces the setting where that was given as a tensor."""
    settings: str
    """`LossOptions`, encoded."""
    backend: str
    """Its name."""

    @property
    def options(self) -> LossOptions:
        return decode(self.settings)

    def layout(self, num_tokens: int) -> PackedLayout:
        return PackedLayout(self.cu_seqlens, self.group_offsets, self.modality, self.loss_mask, num_tokens)


class SampleInputs(NamedTuple):
    """What `cfg_sample` is given, checked: arguments of the registered op and of a backend's `sample`."""

    cond: Tensor
    """[B, V] float, any strides."""
    uncond: Tensor | None
    """[B, V] float, any strides; None = no guidance."""
    cfg_weight: float
    temperature: float
    """0 is greedy."""
    top_k: int
    """0 = all."""
    top_p: float
    min_p: float
    """0 = all."""
    seed: Tensor
    """[B] int64."""
    offset: Tensor
    """[B] int64."""
    forbidden: Tensor | None
    """[F] int64 vocabulary ids."""
    with_support: bool
    """The kept set is wanted, and log-probabilities and entropy over it."""
    backend: str
    """Its name."""


class DecodeStep(NamedTuple):
    """What `prefix_decode_attention` is given, checked: arguments of the registered op and of a backend.

    One dtype; the caches have unit stride along E, and before a backend query, key and value have it too."""

    query: Tensor
    """[R, Hq, E]."""
    key: Tensor
    """[R, Hkv, E], of the new token."""
    value: Tensor
    """[R, Hkv, E], likewise."""
    prefix_keys: Tensor
    """[Hkv, Np, E], all prefixes one after another."""
    prefix_values: Tensor
    """[Hkv, Np, E], likewise."""
    own_keys: Annotated[Tensor, "Tensor(a!)"]
    """[Hkv, Nc, E]; takes `key` in each row's new column."""
    own_values: Annotated[Tensor, "Tensor(b!)"]
    """[Hkv, Nc, E]; takes `value` there."""
    spans: Tensor
    """[R, 4] int64: prefix start, prefix length, own start, own length before this token."""
    scale: float
    """Of the scores."""
    backend: str
    """Its name."""


@dataclass(frozen=True, slots=True, eq=False)
class LossTerms:
    """Everything of a GRPO loss from log-probabilities: validated, contiguous, detached."""

    settings: LossOptions
    cu_seqlens: Tensor
    """[S+1] int64, contiguous."""
    group_offsets: Tensor
    """[P+1] int64, contiguous."""
    logp: Tensor
    """[T] float32; anything outside the mask, NaN included."""
    old_logp: Tensor | None = None
    """[T] float32; None = on policy: the ratio is exactly 1 and its gradient flows."""
    ref_logp: Tensor | None = None
    """[T] float32; there whenever a beta is not 0."""
    entropy: Tensor | None = None
    """[T] float32; for metrics and the quantile."""
    loss_mask: Tensor | None = None
    """[T] bool."""
    modality: Tensor | None = None
    """[T] uint8; None = all text."""
    is_ratio: Tensor | None = None
    """[T] or [S] float32 > 0 (at masked tokens: anything)."""
    is_per_sequence: bool = False
    """is_ratio is [S]."""
    rewards: Tensor | None = None
    """[M, S] float64, columns summed by weight, NaN = none; row 0 text and row 1 image where M is 2. None: `advantages`
    and `keep` are given."""
    advantages: Tensor | None = None
    """[M, S] float32; given when they cannot be computed group by group (see `plan.fusable`)."""
    keep: Tensor | None = None
    """[S] bool; given together with `advantages`."""
    frac_reward_zero_std: Tensor | None = None
    """Scalar float32; given together with `advantages`."""
    entropy_thresholds: Tensor | None = None
    """[2] float32, text and image: the policy term acts on tokens of at least that entropy. None = on all."""
    num_items: Tensor | None = None
    """[1] or [2] float32; replaces `settings.num_items` where that is a tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenLoss:
    """What a backend returns for LossTerms."""

    loss: Tensor
    """Scalar float32."""
    grad_logp: Tensor
    """[T] float32: d loss / d logp; exactly 0 outside the mask, at pruned sequences and where nothing acts."""
    advantages: Tensor
    """[M, S] float32."""
    keep: Tensor
    """[S] bool."""
    metrics: Tensor
    """[18] float32 in the order of METRICS."""
    finite: bool = True
    """False where a value at a token of the loss mask was NaN or infinite (of a backend that FINDS_NONFINITE)."""


@dataclass(frozen=True, slots=True)
class RowSettings:
    """The numbers of one stream's token loss."""

    loss: RowLoss
    clip_low: float
    clip_high: float
    delta: float | None
    beta: float
    bias_corrected_kl: bool
    sapo_temperature_pos: float
    sapo_temperature_neg: float

    @classmethod
    def of(cls, settings: LossOptions, modality: Modality) -> RowSettings:
        """The settings that hold for one modality; only for loss types with a `row_loss`."""
        loss = row_loss(settings.loss_type)
        assert loss is not None
        return cls(
            loss,
            for_modality(settings.clip_low, modality),
            for_modality(settings.clip_high, modality),
            None if settings.delta is None else for_modality(settings.delta, modality),
            for_modality(settings.beta, modality),
            settings.bias_corrected_kl,
            settings.sapo_temperature_pos,
            settings.sapo_temperature_neg,
        )


@dataclass(frozen=True, slots=True, eq=False)
class RowTerms:
    """Per row of a chunk, float32 [C], contiguous."""

    advantage: Tensor
    weight: Tensor
    """The loss is Σ weight · token loss."""
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    is_ratio: Tensor | None = None

    def at(self, positions: Tensor) -> RowTerms:
        """Those at the given positions, in that order."""
        return RowTerms(*(None if part is None else part[positions].float() for part in self._parts))  # type: ignore[arg-type]

    def __getitem__(self, rows: slice) -> RowTerms:
        return RowTerms(*(None if part is None else part[rows] for part in self._parts))  # type: ignore[arg-type]

    @property
    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.advantage, self.weight, self.old_logp, self.ref_logp, self.is_ratio


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """How raw products become logits: z = (product + bias) / temperature, -inf at `forbidden` and outside `support`."""

    bias: Tensor | None = None
    """[V], any float dtype."""
    temperature: float = 1.0
    forbidden: Tensor | None = None
    """[F] int64 vocabulary ids."""
    support: Tensor | None = None
    """[C, ceil(V/32)] int32, contiguous: the ids that each row keeps, see `support.py`; None = all."""

    def of(self, rows: slice | Tensor) -> Head:
        """The head as some of the rows see it."""
        return self if self.support is None else replace(self, support=self.support[rows])


class Backend(Protocol):
    """The functions of an accelerated backend. Row functions take `products` [C, V], float32 or bfloat16, with unit
    stride along V; targets are [C] int64."""

    FINDS_NONFINITE: bool
    """token_loss looks for values that are not finite on its way; else the op looks first."""

    def unavailable_reason(self) -> str | None: ...

    def unsupported_reason(self, op: str, tensors: Sequence[Tensor]) -> str | None: ...

    def group_advantages(self, reward_S: Tensor, group_offsets: Tensor, scale: str, eps: float) -> Tensor:
        """[S] float64 combined rewards, NaN = none -> [S] float32."""
        ...

    def dgs_select(
        self,
        energy_S: Tensor,
        reward_S: Tensor,
        group_offsets: Tensor,
        *,
        rule: str,
        mass: float,
        keep: int | None,
        min_keep: int,
        seed: int,
    ) -> Tensor:
        """[S] float64 sums of squared advantages and [S] float64 rewards to rank by -> [S] bool."""
        ...

    def token_loss(self, terms: LossTerms) -> TokenLoss: ...

    def score_rows(self, products: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
        """(logp [C] float32, entropy [C] float32, logsumexp [C] float64). `products` stays as it is.

        The log-sum-exp is kept in double, because exp(z - lse) errs by as much as lse does."""
        ...

    def loss_rows(
        self, products: Tensor, targets: Tensor, head: Head, terms: RowTerms, settings: RowSettings
    ) -> tuple[Tensor, Tensor]:
        """(logp, entropy), each [C] float32. `products` becomes d loss / d products, in place."""
        ...

    def gradient_rows(
        self,
        products: Tensor,
        targets: Tensor,
        head: Head,
        lse: Tensor,
        entropy: Tensor,
        grad_logp: Tensor | None,
        grad_entropy: Tensor | None,
        out: Tensor,
    ) -> None:
        """Writes Σ_n grad_logp_n d logp_n + grad_entropy_n d H_n with respect to `products` into `out` [C, V], which
        may be `products` itself; `lse` and `entropy` are those of score_rows."""
        ...

    def sample(self, inputs: SampleInputs) -> CFGSample:
        """One token per row."""
        ...

    def prefix_decode_attention(self, step: DecodeStep) -> Tensor:
        """[R, Hq, E]; writes key and value into the own caches. The spans are contiguous, and R > 0."""
        ...
