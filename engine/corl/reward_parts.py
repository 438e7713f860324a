"""CoRL's reward functions, built from the settings: the paper's by default, the released code's by option.

    stage 1       R = R_cycle + R_TIM + lambda (R_acc + R_format), shared by both halves of a sample
    stage 2       R_cycle + R_TIM for drawings, R_acc + R_format for answers

Only what a training can use is loaded: answers need no captioner.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cached_property

import torch

from ..errors import ConfigError
from ..methods.judges import remote_judge
from ..policies.base import Policy
from ..records import MODALITY_NAMES, SegmentKind
from ..rewards.builtin.accuracy import AccuracyReward
from ..rewards.builtin.captioner import BlipCaptioner, Captioner, PolicyCaptioner
from ..rewards.builtin.clip import ClipImageReward, ClipScorer, ClipTextReward
from ..rewards.builtin.cycle import CycleReward
from ..rewards.builtin.format import format_reward
from ..rewards.builtin.perceptual import ImageSimilarity, LpipsSimilarity, RmseSimilarity
from ..rewards.builtin.spice import FactualParser, Spice, WordNet
from ..rewards.builtin.text import text_reward
from ..rewards.builtin.text_similarity import BertScore, SoftJaccard, TextSimilarity
from ..rewards.builtin.tim import TextImageMatching
from ..rewards.ensemble import Column, RewardSet
from ..rewards.images.catalogue import load_models, named_rewards
from ..rewards.reward import RewardFunction
from ..rewards.yours.custom import load_reward, own_column
from ..world.embedded import captioner_folder
from ..world.scene_graph import parse_captions
from .config import IMAGE_REWARDS, TEXT_REWARDS, CorlConfig, Training

SEGMENTS: Mapping[Training, tuple[SegmentKind, ...]] = {
    "unified": ("text", "image"),
    "generation": ("image",),
    "understanding": ("text",),
    "t2i": ("image",),
    "mcq": ("text",),
    "oe": ("text",),
}
"""What a training produces; a user's reward that does not say what it judges counts for the first."""
EMBEDDED = "world"
"""Value of `captioner` and `spice_parser` that means the rendered world's own."""


class RewardParts:
    """Makes reward functions; what is costly is loaded at first use and shared by the trainings.

    Args:
        config: which rewards, and their models.
        frozen: the starting model, which does not follow the training.
        device: of captioner, LPIPS, BERT and CLIP.
        report: takes lines about what is being made.
        own: the user's functions by their names in `reward_funcs`, where they are loaded already.
    """

    def __init__(
        self,
        config: CorlConfig,
        frozen: Policy,
        device: torch.device,
        report: Callable[[str], None] | None = None,
        own: Mapping[str, RewardFunction] | None = None,
    ) -> None:
        self.config, self.frozen, self.device, self.report = config, frozen, device, report
        self._made: dict[str, RewardFunction] = dict(own or {})

    def of(self, training: Training, policy: Policy, asked: Collection[SegmentKind] = MODALITY_NAMES) -> RewardSet:
        """The rewards that apply to a training of `policy` whose prompts ask for `asked`, with their weights.

        Raises:
            ConfigError: none of them applies, two have one name, or one judges neither text nor images.
        """
        config = self.config
        wanted = tuple(kind for kind in SEGMENTS[training] if kind in asked)
        columns: list[Column] = []
        for spec in config.reward_funcs:
            weight = config.weight_of(spec, training)
            if spec in IMAGE_REWARDS + TEXT_REWARDS:
                kind = "image" if spec in IMAGE_REWARDS else "text"
                if kind in wanted:
                    columns.append(Column(spec, self._built_in(spec, policy), weight, kind))
            elif (own := own_column(spec, self._own(spec), weight, wanted[0])).kind in wanted:
                load_models([own.function], self.device)
                columns.append(own)
        if not columns:
            raise ConfigError(
                f"reward_funcs: none of {', '.join(config.reward_funcs)} judges what training {training} produces "
                f"({' and '.join(wanted)}); add one that does"
            )
        return RewardSet.of(columns)

    def _own(self, spec: str) -> RewardFunction:
        if spec not in self._made:
            named = named_rewards([spec], self.config.reward_models)
            self._made[spec] = named.get(spec) or load_reward(spec, budget=0.9 * self.config.reward_timeout)
        return self._made[spec]

    def _built_in(self, name: str, policy: Policy) -> RewardFunction:
        if name == "tim" and self.config.tim_policy == "live":
            return TextImageMatching(policy)
        if name not in self._made:
            self._made[name] = self.makers()[name]()
        return self._made[name]

    def makers(self) -> dict[str, Callable[[], RewardFunction]]:
        """Name -> what makes it, for each of IMAGE_REWARDS and TEXT_REWARDS; called at first use."""
        return {
            "cycle": self._cycle,
            "tim": lambda: TextImageMatching(self.frozen),
            "clip_text": lambda: ClipTextReward(self._clip),
            "clip_image": lambda: ClipImageReward(self._clip),
            "judge": self._judge,
            "accuracy": lambda: AccuracyReward(self.config.accuracy_variant),
            "format": lambda: format_reward,
            "bleu": lambda: text_reward,
        }

    def _judge(self) -> RewardFunction:
        judge = remote_judge(self.config)
        assert judge is not None  # the settings were checked
        return judge

    @cached_property
    def _clip(self) -> ClipScorer:
        return ClipScorer.from_pretrained(self.config.clip, device=self.device)

    def _cycle(self) -> CycleReward:
        config = self.config
        image: ImageSimilarity | None = None
        if config.cycle_image == "lpips":
            image = LpipsSimilarity(
                config.lpips_net, size=config.lpips_size or None, weights=config.lpips_weights, device=self.device
            )
        elif config.cycle_image == "rmse":
            image = RmseSimilarity()
        if config.cycle_text == "none":
            return CycleReward(image, None, None, normalise=config.cycle_normalise)
        return CycleReward(image, self._captioner(), self._text_similarity(), normalise=config.cycle_normalise)

    def _captioner(self) -> Captioner:
        name = self.config.captioner
        if name == "policy":  # its own copy: rewards run at the same time, and decoding rearranges a policy
            return PolicyCaptioner(self.frozen.frozen_copy())
        folder = captioner_folder(self.report) if name == EMBEDDED else name
        return BlipCaptioner.from_pretrained(folder, device=self.device)

    def _text_similarity(self) -> TextSimilarity:
        config = self.config
        if config.cycle_text == "soft_jaccard":
            return SoftJaccard()
        if config.cycle_text == "bertscore":
            return BertScore.from_pretrained(config.bert, device=self.device)
        if config.spice_parser == EMBEDDED:
            return Spice(parse_captions)
        return Spice(FactualParser.from_pretrained(config.spice_parser, device=self.device), self._synonyms())

    def _synonyms(self) -> WordNet | None:
        if self.config.spice_synonyms == "none":
            return None
        try:
            return WordNet.from_package()
        except ModuleNotFoundError:
            raise ConfigError(
                "spice_synonyms: expected WordNet's table, which is not installed; run `pip install --no-deps "
                "FactualSceneGraph` (its requirements would replace torch), or set spice_synonyms none"
            ) from None
