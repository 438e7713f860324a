"""Settings of a Sync-R1 run: what every recipe has (train_config.py), and the method's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from ..settings.rules import TRAINING, sync_r1_problems
from ..settings.schema import Range, Rule
from ..settings.train_config import TinyPolicy, TrainConfig, WorldName

RewardWeight = Annotated[float, Range("0 leaves this reward out", ge=0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncR1Config(TrainConfig):
    """Settings of `recipes/sync_r1.py`. Without any, the embedded default runs: a tiny Janus on a rendered world."""

    # --- model, data and output ---
    world: WorldName = "rendered"
    """Which embedded world trains without model and data: rendered creatures with names, or digits that people wrote by
    hand."""
    policy: TinyPolicy = "janus"
    """Which kind of tiny model trains without a given one: a Janus, which draws one token after another, or a Show-o,
    which fills images in (docs/show_o.md)."""
    data: Path | None = None
    """Folder in the UnifyBench++ layout, or prompts: parquet, JSONL, a folder of them, a hub data set's name, with the
    columns that engine/data/samples.py lists. None: the rendered world."""
    eval_data: Path | None = None
    """What the table before and after is made on, in any of these forms. None: the held-out part of `data`; without one
    nothing is scored."""

    concept_info: bool | None = None
    """Whether the policy is told what info.json has of a concept: extra_info in questions about requests, which then
    ask for the item that is meant, and info in the drawing turn. None: with model and data; the rendered world's tiny
    model has learnt its concepts."""

    # --- rewards ---
    reward_funcs: tuple[str, ...] = ("identity", "judge", "text")
    """identity, judge, text (the paper's three), image rewards such as geneval, pickscore, ocr or face
    (docs/image_rewards.md), or your own: `module:function`, `file.py:function`, `verl@file.py:function`,
    `unirl@http://127.0.0.1:8080#pickscore` (docs/rewards.md)."""
    reward_weights: tuple[float, ...] = ()
    """One for each of reward_funcs. None given: identity_weight, judge_weight and text_weight, and 1 for your own."""
    clip: str | None = None
    """CLIP whose features tell likeness to the concept's photos: folder or hub name. None: the frozen vision
    tower's."""
    identity_faces: bool = False
    """R_id of people by their faces, as the released code's: of concepts whose photos show one. Needs the extra `face`;
    --reward_models face=FILE adds FaceNet's half (docs/image_rewards.md)."""
    preview_score: Literal["clip", "rewards"] | None = None
    """What scores a preview: clip is the released code's .65 CLIP-I + .35 CLIP-T, rewards are the run's own of images.
    None: clip where one is given."""
    identity_weight: RewardWeight = 0.26
    """Does the image show this very concept? The paper's total is R = .65 (.4 R_id + .6 R_vlm) + .35 R_txt."""
    judge_weight: RewardWeight = 0.39
    """Does the image show what was asked for (R_vlm: a vision-language model's verdict)?"""
    text_weight: RewardWeight = 0.35
    """Does the text say what is true of the concept (R_txt)?"""

    # --- what stays as it was ---
    anchor_fraction: Annotated[float, Range("0 trains without anchors", ge=0, lt=1)] = 0.1875
    """Share of a step's groups that are anchors: general prompts without reward, held in place by their KL term."""
    anchor_beta: Annotated[float, Range("8 is the default", ge=0)] = 8.0
    """Weight of the KL term on anchors; it takes nothing from the rewards, so it can be far above beta:
    from 0.5 to 10, general drawing fell by .05 to .00 and a fifth of the gains went with it (measured)."""

    RULES: ClassVar[tuple[Rule, ...]] = (*TRAINING, sync_r1_problems)
    REWARDS: ClassVar[tuple[str, ...]] = ("identity", "judge", "text")

    @property
    def tells_concepts(self) -> bool:
        """`concept_info`, resolved."""
        return (self.model is not None and self.data is not None) if self.concept_info is None else self.concept_info

    def weight_of(self, name: str) -> float:
        """The weight of one of reward_funcs; 0 for a name that is not among them."""
        if name not in self.reward_funcs:
            return 0.0
        if self.reward_weights:
            return self.reward_weights[self.reward_funcs.index(name)]
        weights = {"identity": self.identity_weight, "judge": self.judge_weight, "text": self.text_weight}
        return weights.get(name, 1.0)
