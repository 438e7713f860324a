"""CoRL's reward functions, built from the settings: the paper's by default, the released code's by option.

    stage 1       R = R_cycle + R_TIM + lambda (R_acc + R_format), shared by both halves of a sample
    stage 2       R_cycle + R_TIM for drawings, R_acc + R_format for answers

Only what a training can use is loaded: answers need no captioner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from syncr1.engine.assemble import remote_judge
from syncr1.engine.corl.config import ConfigError, CorlConfig, Training
from syncr1.engine.pictures import ImageRef
from syncr1.engine.policies.base import Policy
from syncr1.engine.rewards.accuracy import AccuracyReward, soft_jaccard
from syncr1.engine.rewards.base import RewardFunction, RewardValues
from syncr1.engine.rewards.captioner import BlipCaptioner, Captioner, PolicyCaptioner
from syncr1.engine.rewards.clip import ClipScorer, ClipTextReward
from syncr1.engine.rewards.custom import load_reward, reward_name
from syncr1.engine.rewards.cycle import CycleReward
from syncr1.engine.rewards.ensemble import RewardSet
from syncr1.engine.rewards.format import format_reward
from syncr1.engine.rewards.perceptual import ImageSimilarity, LpipsSimilarity, RmseSimilarity
from syncr1.engine.rewards.spice import FactualParser, Spice, WordNet
from syncr1.engine.rewards.text import text_reward
from syncr1.engine.rewards.text_similarity import BertScore, TextSimilarity
from syncr1.engine.rewards.tim import TextImageMatching
from syncr1.engine.world.corl_parts import captioner_folder
from syncr1.engine.world.scene_graph import parse_captions

IMAGE_REWARDS = ("cycle", "tim", "clip_text", "clip_image", "judge")
TEXT_REWARDS = ("accuracy", "format", "bleu")
EMBEDDED = "world"
"""Value of `captioner` and `spice_parser` that means the rendered world's own."""


class RewardParts:
    """Makes reward functions; what is costly is loaded at first use and shared by the trainings.

    Args:
        config: which rewards, and their models.
        frozen: the starting model, which does not follow the training.
        device: of captioner, LPIPS, BERT and CLIP.
        report: takes lines about what is being made.
    """

    def __init__(
        self, config: CorlConfig, frozen: Policy, device: torch.device, report: Callable[[str], None] | None = None
    ) -> None:
        self.config, self.frozen, self.device, self.report = config, frozen, device, report
        self._made: dict[str, RewardFunction] = {}

    def of(self, training: Training, policy: Policy) -> RewardSet:
        """The rewards that apply to a training of `policy`, with their weights.

        Raises:
            ConfigError: none of them applies, or two have one name.
        """
        config = self.config
        wanted = {"t2i": ("image",), "generation": ("image",), "unified": ("text", "image")}.get(training, ("text",))
        columns: list[tuple[str, RewardFunction, float, str]] = []
        for spec in config.reward_funcs:
            if spec in IMAGE_REWARDS + TEXT_REWARDS:
                kind = "image" if spec in IMAGE_REWARDS else "text"
                if kind in wanted:
                    columns.append((spec, self._built_in(spec, policy), config.weight_of(spec), kind))
            else:
                function = (
                    self._made.setdefault(spec, load_reward(spec)) if spec not in self._made else self._made[spec]
                )
                kind = str(getattr(function, "kind", wanted[0]))
                if kind in wanted:
                    columns.append((reward_name(spec), function, config.weight_of(spec), kind))
        if not columns:
            raise ConfigError(
                f"reward_funcs: none of {', '.join(config.reward_funcs)} judges what training {training} produces "
                f"({' and '.join(wanted)}); add one that does"
            )
        names = [name for name, *_ in columns]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ConfigError(f"reward_funcs: two rewards are called {', '.join(repeated)}; rename one of them")
        refined = training in ("t2i", "mcq", "oe") and not config.reward_weights
        return RewardSet(
            functions={name: function for name, function, _, _ in columns},
            weights=tuple(1.0 if refined else weight for _, _, weight, _ in columns),
            kinds=tuple(kind for *_, kind in columns),
        )

    def _built_in(self, name: str, policy: Policy) -> RewardFunction:
        if name == "tim" and self.config.tim_policy == "live":
            return TextImageMatching(policy)
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def _make(self, name: str) -> RewardFunction:
        config = self.config
        if name == "cycle":
            return self._cycle()
        if name == "tim":
            return TextImageMatching(self.frozen)
        if name == "accuracy":
            return AccuracyReward(config.accuracy_variant)
        if name == "judge":
            judge = remote_judge(config)
            assert judge is not None  # the settings were checked
            return judge
        if name in ("clip_text", "clip_image"):
            scorer = ClipScorer.from_pretrained(config.clip, device=self.device)
            return ClipTextReward(scorer) if name == "clip_text" else LikenessReward(scorer)
        return format_reward if name == "format" else text_reward

    def _cycle(self) -> CycleReward:
        config = self.config
        image: ImageSimilarity | None = None
        if config.cycle_image == "lpips":
            image = LpipsSimilarity(config.lpips_net, size=config.lpips_size or None, weights=config.lpips_weights,
                                    device=self.device)  # fmt: skip
        elif config.cycle_image == "rmse":
            image = RmseSimilarity()
        if config.cycle_text == "none":
            return CycleReward(image, None, None, normalise=config.cycle_normalise)
        return CycleReward(image, self._captioner(), self._text_similarity(), normalise=config.cycle_normalise)

    def _captioner(self) -> Captioner:
        name = self.config.captioner
        if name == "policy":  # a copy of its own: rewards run at the same time, and decoding rearranges a policy
            return PolicyCaptioner(self.frozen.frozen_copy())
        folder = captioner_folder(self.report) if name == EMBEDDED else name
        return BlipCaptioner.from_pretrained(folder, device=self.device)

    def _text_similarity(self) -> TextSimilarity:
        config = self.config
        if config.cycle_text == "soft_jaccard":
            return lambda candidates, references: [
                soft_jaccard(a, b) for a, b in zip(candidates, references, strict=True)
            ]
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


class LikenessReward:
    """CLIP-I: cosine of the features of drawing and real picture; None without either."""

    def __init__(self, scorer: ClipScorer) -> None:
        self.scorer = scorer
        self.__name__ = "clip_image"

    def __call__(
        self, *, images: Sequence[torch.Tensor | None], real_image: Sequence[ImageRef | None], **_: Any
    ) -> RewardValues:
        rows = [i for i, image in enumerate(images) if image is not None and real_image[i] is not None]
        rewards: RewardValues = [None] * len(images)
        drawn = [image for i in rows if (image := images[i]) is not None]
        real = [[ref] for i in rows if (ref := real_image[i]) is not None]
        for row, value in zip(rows, self.scorer.clip_i(drawn, real), strict=True):
            rewards[row] = value
        return rewards
