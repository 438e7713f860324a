"""Puts a run's parts together from its settings: data, policy, rewards, evaluation.

Without `--model` and `--data` the parts are the embedded ones: a tiny Janus on a rendered world, made on first use and
kept in a cache folder.  With them, the same functions load a checkpoint and read a folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ..evaluate.held_out import Evaluation, evaluate
from ..policies.auto import load_policy
from ..policies.base import Policy
from ..records import Prompt, Rollout
from ..rewards.builtin.caption import CaptionLikelihood
from ..rewards.builtin.clip import ClipScorer
from ..rewards.builtin.identity import IdentityReward
from ..rewards.ensemble import RewardSet, build_rewards
from ..rewards.judge.attribute_judge import AttributeScorer, index_scorer, posterior_scorer
from ..rewards.judge.llm_judge import LLMJudge
from ..rollout.sampler import Sampling, generate
from ..settings.train_config import TrainConfig
from ..world.attributes import VALUES
from ..world.base_model import BaseSettings
from ..world.checker import AttributeChecker
from ..world.embedded import judge_cnn, tiny_base, world_folder
from .sync_r1_config import SyncR1Config

Report = Callable[[str], None]


def prepare_data(config: SyncR1Config) -> Path:
    """The data folder: the user's, or the rendered world, written on first use."""
    return world_folder() if config.data is None else config.data


def prepare_policy(config: TrainConfig, settings: BaseSettings | None = None, report: Report | None = None) -> Policy:
    """The starting point: the user's checkpoint, or the tiny base, trained on first use."""
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    return load_policy(config.model or tiny_base(settings or BaseSettings(), report), dtype=dtype)


def build_reward_set(config: SyncR1Config, frozen: Policy, prompts: Sequence[Prompt]) -> RewardSet:
    """The ensemble reward: identity by a frozen vision tower, judge by attributes or by likelihood, text by BLEU.

    Args:
        config: weights.
        frozen: the policy as training begins (`Policy.frozen_copy`); it judges and does not change.
        prompts: what will be trained on; decides whether attributes can be read. Where nothing is drawn, text is judged
            alone.
    """
    if not any("image" in prompt.segments for prompt in prompts):
        return build_rewards(text_weight=config.text_weight)
    named = all(prompt.attributes for prompt in prompts if "image" in prompt.segments)
    features, size = frozen.vision_features, frozen.image_size
    if config.clip is not None:
        clip = ClipScorer.from_pretrained(config.clip, device=frozen.cache_shape().device)
        features = clip.image_features
    return build_rewards(
        features=features,
        image_size=size,
        judge=remote_judge(config),
        scorer=posterior_scorer(checker_of(frozen).posterior, VALUES)
        if any(prompt.attributes for prompt in prompts)
        else None,
        caption_logp=None if named else CaptionLikelihood(frozen),
        identity_weight=config.identity_weight,
        judge_weight=config.judge_weight,
        text_weight=config.text_weight,
    )


def remote_judge(config: TrainConfig) -> LLMJudge | None:
    """The judge behind `judge_url`, which answers well before the step's rewards time out; None without one."""
    if config.judge_url is None or config.judge_model is None:
        return None
    return LLMJudge(
        config.judge_url,
        config.judge_model,
        api_key_env=config.judge_key_env,
        timeout=config.reward_timeout / 2,
        budget=0.9 * config.reward_timeout,
    )


def checker_of(policy: Policy) -> AttributeChecker:
    """The world's attribute reader, as this policy's image tokenizer draws the world."""
    return AttributeChecker.from_round_trip(lambda images: policy.draw(policy.image_tokens(images)))


class Evaluator:
    """Scores a policy on the held-out half of the data, before and after.

    Args:
        config: for sampling settings and the number of items.
        frozen: whose image tokenizer reads the rendered world and whose vision tower judges likeness.
        benchmark: task -> held-out prompts.
    """

    def __init__(self, config: TrainConfig, frozen: Policy, benchmark: Mapping[str, Sequence[Prompt]]) -> None:
        self.config, self.benchmark = config, benchmark
        self._likeness = IdentityReward(frozen.vision_features, frozen.image_size)
        self._scorers: dict[str, AttributeScorer] = {}
        if any(prompt.attributes for prompts in self.benchmark.values() for prompt in prompts):
            self._scorers = {
                "checker": index_scorer(checker_of(frozen).read_indices, VALUES),
                "cnn": index_scorer(judge_cnn().read_indices, VALUES),
            }

    def __call__(self, policy: Policy) -> Evaluation:
        c = self.config

        def draw(prompts: Sequence[Prompt], temperature: float) -> list[Rollout]:
            sampling = Sampling(
                num_generations=1,
                temperature=temperature,
                max_text_tokens=c.max_completion_length,
                cfg_weight=c.eval_cfg_weight,
                seed=c.seed,
                step=-1,
            )
            return generate(policy, prompts, sampling)

        return evaluate(
            draw, self.benchmark, image_scorers=self._scorers, identity=self._likeness, num_items=c.eval_samples, seed=0
        )
