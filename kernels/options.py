"""Settings of the GRPO loss, with TRL's names, meanings and defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, fields
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, Literal, get_args

from . import ranges
from .checks import refuse
from .ranges import check_choice

PerModality = float | Mapping[str, float]
LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
Ratio = Literal["token", "sequence", "product"]
Scale = Literal["group", "batch", "none", "loo"]
Aggregate = Literal["sum_then_normalize", "normalize_then_sum"]
Rule = Literal["variance_mass", "max_variance", "top_k", "random", "none"]
LOSS_TYPES: tuple[str, ...] = get_args(LossType)
RATIOS: tuple[str, ...] = get_args(Ratio)
SCALES: tuple[str, ...] = get_args(Scale)
AGGREGATES: tuple[str, ...] = get_args(Aggregate)
RULES: tuple[str, ...] = get_args(Rule)


def check_statistics(op: str, scale: str, eps: float, aggregate: str) -> None:
    """The options of group-relative advantages are in range."""
    check_choice(op, "scale", scale, SCALES)
    ranges.EPS.check(op, "eps", eps)
    check_choice(op, "aggregate", aggregate, AGGREGATES)


def check_selection(
    op: str, rule: str, mass: float, keep: int | None, min_keep: int, seed: int, *, prefix: str = ""
) -> None:
    """The options of a DGS rule are in range; their names begin with `prefix`, which is `dgs_` in a loss."""
    check_choice(op, prefix.rstrip("_") or "rule", rule, RULES)
    ranges.MASS.check(op, f"{prefix}mass", mass)
    ranges.KEEP.check(op, f"{prefix}keep", keep)
    ranges.MIN_KEEP.check(op, f"{prefix}min_keep", min_keep)
    ranges.SEED.check(op, f"{prefix}seed", seed)


class UnknownOptionError(ValueError, TypeError):
    """A keyword that no op knows: a ValueError like every bad input, and the TypeError that Python raises for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOptions:
    """Keyword settings of `grpo_loss` and `linear_grpo_loss`; which numbers they may be: `syncr1.kernels.ranges`."""

    loss_type: LossType = "dapo"
    """Token loss and reduction; the table is in kernels/README.md."""
    ratio: Ratio = "token"
    """Importance ratio per token, or one per sequence from its loss tokens of both modalities: `sequence`, the
    geometric mean of theirs (GSPO), or `product`, the likelihood ratio of the whole sequence (Mask-GRPO's, of a step's
    tokens). A product leaves the clip range the sooner the longer the sequence: its bounds are the whole sequence's."""
    clip_low: PerModality = 0.2
    """≥ 0; the ratio is clipped below at 1 - clip_low."""
    clip_high: PerModality = 0.2
    """≥ 0; the ratio is clipped above at 1 + clip_high; for cispo the *raw* bound of the ratio, as in TRL (5.0 is
    usual)."""
    delta: PerModality | None = None
    """Upper bound of the unclipped ratio (dual clip), > 0 and as a rule > 1 + clip_high: at 1 or below it takes the
    gradient of every token on policy away. None = no bound."""
    beta: PerModality = 0.0
    """≥ 0; weight of the k3 KL to the reference policy; needs `ref_logp` where not 0."""
    bias_corrected_kl: bool = False
    """Multiplies the KL by the importance ratio."""
    weight: PerModality = 1.0
    """≥ 0; multiplies the token losses (policy and KL)."""
    scale: Scale = "group"
    """See `group_advantages`."""
    eps: float = 1e-4
    """≥ 0; added to the standard deviation."""
    aggregate: Aggregate = "sum_then_normalize"
    """See `group_advantages`."""
    dgs: Rule = "none"
    """Rule of `dgs_select`: tokens of sequences it drops are masked."""
    dgs_mass: float = 0.9
    """`mass` of `dgs_select`."""
    dgs_keep: int | None = None
    """`keep` of `dgs_select`."""
    dgs_min_keep: int = 2
    """`min_keep` of `dgs_select`."""
    dgs_seed: int = 0
    """`seed` of `dgs_select`."""
    num_items: PerModality | None = None
    """Divisor of dapo, cispo and vespo: loss tokens of the whole optimizer step, divided by the number of ranks. A dict
    reduces each modality on its own (divided by its own number) and adds the two, for every loss type. None = the loss
    tokens of this call."""
    num_sequences: float | None = None
    """Divisor of grpo, sapo, luspo and dr_grpo; None = S, pruned sequences included."""
    max_length: int | None = None
    """Completion length of dr_grpo's divisor; required there."""
    score_all: bool = False
    """`linear_grpo_loss` leaves tokens of advantage 0 out of the matrix products where there is no KL (they have no
    gradient); True scores them too, so that log-probabilities, entropies and metrics cover them."""
    top_entropy_quantile: float = 1.0
    """The policy term acts on this fraction of each modality's tokens, those of highest entropy; needs `entropy`."""
    sapo_temperature_pos: float = 1.0
    """τ of sapo for A > 0."""
    sapo_temperature_neg: float = 1.05
    """τ of sapo for A ≤ 0."""
    vespo_k_pos: float = 2.0
    """k of vespo for A ≥ 0."""
    vespo_lambda_pos: float = 3.0
    """λ of vespo for A ≥ 0."""
    vespo_k_neg: float = 3.0
    """k of vespo for A < 0."""
    vespo_lambda_neg: float = 2.0
    """λ of vespo for A < 0."""

    @property
    def splits_modalities(self) -> bool:
        """Each modality is reduced on its own."""
        return isinstance(self.num_items, Mapping)

    op: InitVar[str] = "grpo_loss"
    """Named in errors; no setting."""

    def __post_init__(self, op: str) -> None:
        check_choice(op, "loss_type", self.loss_type, LOSS_TYPES)
        check_choice(op, "ratio", self.ratio, RATIOS)
        check_choice(op, "scale", self.scale, SCALES)
        check_choice(op, "aggregate", self.aggregate, AGGREGATES)
        check_choice(op, "dgs", self.dgs, RULES)
        for name in ranges.LOSS:
            ranges.check_loss_numbers(op, name, getattr(self, name))
        for name in ranges.SWITCHES:
            ranges.check_switch(op, name, getattr(self, name))
        if self.loss_type == "dr_grpo" and self.max_length is None:
            refuse(op, "max_length", "an int > 0 for loss_type='dr_grpo'", None, ranges.LOSS["max_length"].remedy)

    @classmethod
    def parse(cls, op: str, settings: Mapping[str, Any]) -> LossOptions:
        """Settings given as keywords; an unknown name is an error that lists the known ones."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise UnknownOptionError(
                f"{op}: options must be among {', '.join(known)}, got {', '.join(unknown)}; check the spelling"
            )
        return cls(**settings, op=op)


def encode(op: str, settings: Mapping[str, Any]) -> str:
    """Checked settings as one string: what a registered op takes in place of a dataclass."""
    given = {name: dict(value) if isinstance(value, Mapping) else value for name, value in settings.items()}
    LossOptions.parse(op, given)
    return json.dumps(given, default=_builtin)


def _builtin(value: object) -> float:
    """NumPy's numbers as Python's."""
    assert isinstance(value, Real)  # checked
    return int(value) if isinstance(value, Integral) else float(value)


@lru_cache(maxsize=256)
def decode(settings: str) -> LossOptions:
    """The inverse of `encode`."""
    return LossOptions(**json.loads(settings))


def for_modality(value: PerModality, modality: str) -> float:
    """The number that holds for one modality."""
    return float(value[modality]) if isinstance(value, Mapping) else float(value)
