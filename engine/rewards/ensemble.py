"""Sync-R1's reward: R = .65 (.4 R_id + .6 R_vlm) + .35 R_txt, as columns and weights.

The columns stay apart, so that failures and credit are known per reward, until learn/credit.py sums them with these
weights (`combine`, which leaves NaN out).  Where a component does not apply (a text-only or an image-only trajectory)
it is left out *without* renormalising: members of a group share their components, so only the group's scale differs,
which `scale="group"` divides away.  Under `scale="none"` or `"batch"` a text-only group therefore counts for .35; pass
`renormalise=True` to `combine` where totals of different kinds are compared, as reports do.

Dims: S trajectories, K rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..pictures import Fit, to_tensor
from .builtin.identity import Features, IdentityReward
from .builtin.text import text_reward
from .images.face import FaceReader, FaceReward
from .judge.attribute_judge import AttributeScorer, CaptionScorer, Judge
from .reward import RewardFunction

IDENTITY_WEIGHT, JUDGE_WEIGHT, TEXT_WEIGHT = 0.26, 0.39, 0.35
"""Of 1: .65 x .4, .65 x .6 and .35."""


class Column(NamedTuple):
    """One reward of a set."""

    name: str
    function: RewardFunction
    weight: float
    kind: str
    """`text` or `image`: what it judges."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSet:
    """Reward functions in column order, with the weight and the segment kind of each."""

    functions: dict[str, RewardFunction]
    weights: tuple[float, ...]
    """[K], of the weighted sum."""
    kinds: tuple[str, ...]
    """[K] `text` or `image`: the segment that a reward judges, for `credit="per_segment"`."""
    preview: RewardFunction | None = None
    """What scores partly drawn images; None: those of `functions` that judge images."""

    @classmethod
    def of(cls, columns: Sequence[Column]) -> RewardSet:
        """Raises ConfigError: two of them have one name."""
        names = [column.name for column in columns]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"reward_funcs: two rewards are called {', '.join(repeated)}; rename one of them")
        return cls(
            functions={column.name: column.function for column in columns},
            weights=tuple(column.weight for column in columns),
            kinds=tuple(column.kind for column in columns),
        )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.functions)

    def columns(self) -> list[Column]:
        """What `of` made it of."""
        parts = zip(self.functions.items(), self.weights, self.kinds, strict=True)
        return [Column(name, function, weight, kind) for (name, function), weight, kind in parts]

    def weight_tensor(self) -> Tensor:
        """[K] float32."""
        return torch.tensor(self.weights, dtype=torch.float32)


def build_rewards(
    *,
    features: Features | None = None,
    image_size: int = 384,
    fit: Fit = to_tensor,
    scorer: AttributeScorer | None = None,
    captions: CaptionScorer | None = None,
    judge: RewardFunction | None = None,
    faces: FaceReader | None = None,
    identity_weight: float = IDENTITY_WEIGHT,
    judge_weight: float = JUDGE_WEIGHT,
    text_weight: float = TEXT_WEIGHT,
) -> RewardSet:
    """Sync-R1's rewards, as far as they can be computed.

    Args:
        features: frozen image features; None leaves R_id out.
        image_size: pixels squared that reference photos are brought to.
        fit: how they are.
        scorer: reads attributes off an image (rendered world).
        captions: says how well a description fits an image. Neither this nor `scorer`: no judge, and R_id takes
            the whole bracket, as in the released code; without `features` the judge takes it.
        faces: R_id of people is their faces' likeness, with that of `features` where a face is not seen; None: of
            everything it is that of `features`.
        judge: takes the place of `scorer` and `captions`, such as `LLMJudge`.
        identity_weight, judge_weight, text_weight: at least 0; 0 leaves the reward out.

    Returns:
        RewardSet with columns `identity`, `judge`, `text`, those that apply.

    Raises:
        ValueError: a weight is negative.
        ConfigError: nothing is left.
    """
    weights = {"identity_weight": identity_weight, "judge_weight": judge_weight, "text_weight": text_weight}
    for name, weight in weights.items():
        if not 0.0 <= weight < float("inf"):
            raise ValueError(f"build_rewards: expected {name} >= 0, got {weight}")
    columns: list[Column] = []
    if judge is None and (scorer is not None or captions is not None):
        judge = Judge(scorer, captions)
    has_judge = judge is not None and judge_weight > 0
    has_identity = features is not None and identity_weight > 0
    bracket = identity_weight + judge_weight
    if has_identity:
        assert features is not None
        weight = identity_weight if has_judge else bracket
        identity: RewardFunction = IdentityReward(features, image_size, fit=fit)
        if faces is not None:
            identity = FaceReward(faces, identity, "identity")
        columns.append(Column("identity", identity, weight, "image"))
    if has_judge:
        assert judge is not None
        columns.append(Column("judge", judge, judge_weight if has_identity else bracket, "image"))
    if text_weight > 0:
        columns.append(Column("text", text_reward, text_weight, "text"))
    if not columns:
        raise ConfigError(
            "identity_weight, judge_weight, text_weight: expected a positive one for what the data ask for, got none; "
            "raise it"
        )
    return RewardSet.of(columns)


def combine(values: Tensor, weights: Tensor, *, renormalise: bool = False) -> Tensor:
    """The weighted sum over rewards that are there: `nansum(values * weights, -1)`, NaN where none is.

    Args:
        values: [S, K] float32; NaN = no reward.
        weights: [K] float32.
        renormalise: divide by the weight of the rewards that are there, so that every total is on [0, 1].

    Returns:
        [S] float32.
    """
    if values.shape[-1] != weights.numel():
        raise ValueError(f"combine: expected {values.shape[-1]} weights, one per reward, got {weights.numel()}")
    present = ~values.isnan()
    total = (values.nan_to_num(nan=0.0) * weights).sum(-1)
    weight = (present * weights).sum(-1)
    if renormalise:
        total = total / weight
    return torch.where(present.any(-1), total, torch.full_like(total, float("nan")))
