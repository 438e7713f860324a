"""Settings of a Sync-R1 run: what every recipe has (train_config.py), and the method's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..errors import ConfigError
from ..settings.rules import AT_LEAST_0, BELOW_1, RANGES, RULES, Range, Rule, may_be_hub_name
from ..settings.schema import from_yaml, to_yaml
from ..settings.train_config import Credit, DGSRule, LossType, TrainConfig, check

__all__ = ["ConfigError", "Credit", "DGSRule", "LossType", "SyncR1Config", "check", "from_yaml", "to_yaml"]


def _own_problems(c: Any) -> list[str]:
    problems = []
    if c.data is not None and not c.data.exists() and not ("/" in str(c.data) and may_be_hub_name(str(c.data))):
        problems.append(
            f"data: expected a folder in the UnifyBench++ layout, a table of prompts or a hub name, got {c.data}, "
            "which is not there; leave it out for the rendered world"
        )
    if c.identity_weight == c.judge_weight == c.text_weight == 0:
        problems.append("identity_weight, judge_weight, text_weight: all are 0; give one of them a positive weight")
    if c.anchor_fraction > 0 and c.anchor_beta == 0:
        problems.append(
            f"anchor_fraction: anchors learn from the KL term alone, so {c.anchor_fraction:g} is pointless with "
            "anchor_beta 0; set --anchor_fraction 0, or a positive anchor_beta"
        )
    return problems


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncR1Config(TrainConfig):
    """Settings of `recipes/sync_r1.py`. Without any, the embedded default runs: a tiny Janus on a rendered world."""

    # --- model, data and output ---
    data: Path | None = None
    """Folder in the UnifyBench++ layout, or prompts: parquet, JSONL, a folder of them, a hub data set's name, with the
    columns that engine/data/samples.py lists. None: the rendered world."""

    # --- rewards ---
    clip: str | None = None
    """CLIP whose features tell likeness to the concept's photos: folder or hub name. None: the frozen vision
    tower's."""
    identity_weight: float = 0.26
    """Does the image show this very concept? The paper's total is R = .65 (.4 R_id + .6 R_vlm) + .35 R_txt."""
    judge_weight: float = 0.39
    """Does the image show what was asked for (R_vlm: a vision-language model's verdict)?"""
    text_weight: float = 0.35
    """Does the text say what is true of the concept (R_txt)?"""

    # --- what stays as it was ---
    anchor_fraction: float = 0.1875
    """Share of a step's groups that are anchors: general prompts without reward, held in place by their KL term."""
    anchor_beta: float = 8.0
    """Weight of the KL term on anchors; it takes nothing from the rewards, so it can be far above beta:
    from 0.5 to 10, general drawing fell by .05 to .00 and a fifth of the gains went with it (measured)."""

    RANGES: ClassVar[dict[str, tuple[Range, str]]] = RANGES | {
        "identity_weight": (AT_LEAST_0, "0 leaves this reward out"),
        "judge_weight": (AT_LEAST_0, "0 leaves this reward out"),
        "text_weight": (AT_LEAST_0, "0 leaves this reward out"),
        "anchor_beta": (AT_LEAST_0, "8 is the default"),
        "anchor_fraction": (BELOW_1, "0 trains without anchors"),
    }
    RULES: ClassVar[tuple[Rule, ...]] = (*RULES, _own_problems)
