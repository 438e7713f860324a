"""What Sync-R1 is put together from, by its settings: data, rewards, preview, evaluation.

Without `--model` and `--data` the parts are the embedded ones: a tiny Janus on a rendered world, made on first use and
kept in a cache folder.  With them, the same functions load a checkpoint and read a folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..evaluate.drawing import together
from ..evaluate.held_out import Evaluator, score_rollouts
from ..learn.from_settings import held_out_sampling
from ..policies.base import Policy
from ..records import Prompt, Rollout
from ..rewards.builtin.caption import CaptionLikelihood
from ..rewards.builtin.clip import ClipScorer
from ..rewards.builtin.identity import IdentityReward
from ..rewards.ensemble import RewardSet, build_rewards, combine
from ..rewards.judge.attribute_judge import posterior_scorer
from ..rewards.judge.llm_judge import LLMJudge
from ..rewards.reward import score
from ..rollout.preview_gate import PreviewGate
from ..settings.train_config import TrainConfig
from ..world.attributes import VALUES
from ..world.base_model import BaseSettings
from ..world.embedded import tiny_base, world_folder
from .judges import checker_of, remote_judge, world_readers
from .sync_r1_config import SyncR1Config


def prepare_data(config: SyncR1Config) -> Path:
    """The data folder: the user's, or the rendered world, written on first use."""
    return world_folder() if config.data is None else config.data


def prepare_model(config: TrainConfig, report: Callable[[str], None] | None = None) -> str | Path:
    """The checkpoint to start from: the user's, or the tiny base, trained on first use."""
    return config.model or tiny_base(BaseSettings(), report)


def build_reward_set(config: SyncR1Config, frozen: Policy, prompts: Sequence[Prompt]) -> RewardSet:
    """The ensemble reward: identity by a frozen vision tower, judge by attributes or by likelihood, text by BLEU.

    Args:
        config: weights.
        frozen: the policy as training begins (`Policy.frozen_copy`); it judges and does not change.
        prompts: what will be trained on; decides whether attributes can be read.
    """
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


def build_preview(config: TrainConfig, rewards: RewardSet) -> PreviewGate | None:
    """Preview DGS, judged by the run's own image rewards on the partly drawn image; a redraw changes no text reward.

    A remote judge, slow and dear, is not asked.  None when it is switched off, and when no reward looks at images.
    """
    judged = zip(rewards.kinds, rewards.functions.values(), strict=True)
    columns = [k for k, (kind, judge) in enumerate(judged) if kind == "image" and not isinstance(judge, LLMJudge)]
    weights = rewards.weight_tensor()[columns]
    if config.preview_fraction == 0 or not bool((weights > 0).any()):
        return None
    judges = {rewards.names[k]: rewards.functions[rewards.names[k]] for k in columns}

    def scorer(prompts: Sequence[Prompt], texts: Sequence[str], images: Tensor) -> Tensor:
        partial = [
            Rollout(
                prompt=prompt,
                member=0,
                prompt_tokens=torch.zeros(0),
                prompt_image=None,
                segments=(),
                text=text,
                image=image,
            )
            for prompt, text, image in zip(prompts, texts, images.cpu(), strict=True)
        ]
        return combine(score(partial, judges, timeout=config.reward_timeout).values, weights, renormalise=True)

    return PreviewGate(
        scorer,
        fraction=config.preview_fraction,
        threshold=config.preview_threshold,
        acceptance=config.preview_acceptance,
        max_attempts=config.preview_max_attempts,
        min_keep=config.preview_min_keep,
    )


def evaluator_of(config: TrainConfig, frozen: Policy, benchmark: Mapping[str, Sequence[Prompt]]) -> Evaluator:
    """Scores a policy on the held-out half of the data, before and after.

    Args:
        config: for sampling settings and the number of items.
        frozen: whose image tokenizer reads the rendered world and whose vision tower judges likeness.
        benchmark: task -> held-out prompts.
    """
    named = any(prompt.attributes for prompts in benchmark.values() for prompt in prompts)
    return Evaluator(
        batches=together(benchmark, config.eval_samples),
        sampling=held_out_sampling(config),
        score=partial(
            score_rollouts,
            image_scorers=world_readers(checker_of(frozen)) if named else None,
            identity=IdentityReward(frozen.vision_features, frozen.image_size),
        ),
    )
