"""What Sync-R1 is put together from, by its settings: data, rewards, evaluation.

Without `--model` and `--data` the parts are the embedded ones: a tiny Janus on a rendered world, made on first use and
kept in a cache folder.  With them, the same functions load a checkpoint and read a folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..data.mixture import Mixture
from ..data.stream import PromptStream
from ..evaluate.drawing import together
from ..evaluate.held_out import Evaluator, score_rollouts
from ..learn.from_settings import held_out_sampling
from ..pictures import to_tensor
from ..policies.base import Policy
from ..records import MODALITY_NAMES, Prompt
from ..rewards.builtin.caption import CaptionContest, CaptionLikelihood
from ..rewards.builtin.clip import ClipPreview, ClipScorer
from ..rewards.builtin.identity import IdentityReward
from ..rewards.ensemble import Column, RewardSet, build_rewards
from ..rewards.images.catalogue import load_models, named_rewards
from ..rewards.images.face import load_faces
from ..rewards.images.image_rewards import named_models
from ..rewards.judge.attribute_judge import posterior_scorer
from ..rewards.reward import RewardFunction
from ..rewards.yours.custom import load_reward, own_column
from ..settings.train_config import TrainConfig
from ..world.worlds import WORLDS, world_of
from .judges import grader_of, remote_judge, world_reader, world_readers
from .sync_r1_config import SyncR1Config


def prepare_data(config: SyncR1Config) -> Path:
    """The data folder: the user's, or the embedded world's, written on first use."""
    return WORLDS[config.world].folder() if config.data is None else config.data


def prepare_model(config: SyncR1Config, report: Callable[[str], None] | None = None) -> str | Path:
    """The checkpoint to start from: the user's, or the tiny base, trained on first use."""
    return config.model or WORLDS[config.world].bases[config.policy].folder(report)


def own_rewards(config: TrainConfig) -> dict[str, RewardFunction]:
    """What `reward_funcs` names beside the recipe's own: image rewards, their models not yet loaded, and the user's
    functions, by those names.

    Raises:
        RewardSpecError: a function cannot be loaded.
        ConfigError: `reward_models` does not fit.
    """
    named, budget = named_rewards(config.reward_funcs, config.reward_models), 0.9 * config.reward_timeout
    own = [spec for spec in config.reward_funcs if spec not in config.REWARDS]
    return {spec: named.get(spec) or load_reward(spec, budget=budget) for spec in own}


def build_reward_set(
    config: SyncR1Config, frozen: Policy, prompts: Sequence[Prompt], own: Mapping[str, RewardFunction] | None = None
) -> RewardSet:
    """The rewards that `reward_funcs` names, in this order: the ensemble's, then the user's own.

    Args:
        config: which, and their weights.
        frozen: the policy as training begins (`Policy.frozen_copy`); it judges and does not change.
        prompts: what will be trained on; decides which rewards apply.
        own: what `own_rewards` loaded; None: they are loaded now.

    Raises:
        ConfigError: one judges neither texts nor images, or two have one name.
    """
    kinds = [kind for kind in MODALITY_NAMES if any(kind in prompt.segments for prompt in prompts)]
    loaded = own_rewards(config) if own is None else own
    if "image" in kinds:
        load_models(loaded.values(), frozen.cache_shape().device)
    brought = [own_column(spec, function, config.weight_of(spec), kinds[0]) for spec, function in loaded.items()]
    by_clip = config.clip is not None and config.preview_fraction > 0 and config.preview_score != "rewards"
    clip = None
    if config.clip is not None and "image" in kinds and (by_clip or any(map(config.weight_of, config.REWARDS))):
        clip = ClipScorer.from_pretrained(config.clip, device=frozen.cache_shape().device)
    rewards = RewardSet.of([*_ensemble(config, frozen, prompts, clip), *brought])
    return replace(rewards, preview=ClipPreview(clip)) if by_clip and clip is not None else rewards


def _ensemble(config: SyncR1Config, frozen: Policy, prompts: Sequence[Prompt], clip: ClipScorer | None) -> list[Column]:
    """The paper's rewards, as far as they have a weight: identity by a frozen vision tower, judge by attributes or by
    descriptions, text by BLEU. Where nothing is drawn, text is judged alone."""
    weights = {f"{name}_weight": config.weight_of(name) for name in config.REWARDS}
    draws = any("image" in prompt.segments for prompt in prompts)
    if not any(weights.values()) or not (draws or weights["text_weight"]):
        return []
    if not draws:
        return build_rewards(text_weight=weights["text_weight"]).columns()
    named = all(prompt.attributes for prompt in prompts if "image" in prompt.segments)
    world = world_of(prompt.attributes for prompt in prompts if prompt.attributes)
    return build_rewards(
        features=frozen.vision_features if clip is None else clip.image_features,
        image_size=frozen.image_size,
        fit=frozen.fit() if clip is None else to_tensor,  # CLIP's own preparation cuts at the centre
        judge=remote_judge(config),
        faces=load_faces(face_weights(config), device=frozen.cache_shape().device) if config.identity_faces else None,
        scorer=None if world is None else posterior_scorer(grader_of(frozen, world).posterior, world.values),
        captions=None if named else caption_judge(frozen, prompts),
        **weights,
    ).columns()


def face_weights(config: SyncR1Config) -> str | None:
    """FaceNet's, which `reward_models` names by `face=`; None: dlib's half of R_id alone."""
    return named_models(config.reward_models).get("face")


def caption_judge(frozen: Policy, prompts: Sequence[Prompt]) -> CaptionContest | None:
    """Judges drawings by their descriptions among those of the data; None where those are not two."""
    captions = {prompt.target for prompt in prompts if prompt.target and "image" in prompt.segments}
    return CaptionContest(CaptionLikelihood(frozen), captions) if len(captions) > 1 else None


def evaluator_of(config: TrainConfig, frozen: Policy, benchmark: Mapping[str, Sequence[Prompt]]) -> Evaluator:
    """Scores a policy on the held-out half of the data, before and after.

    Args:
        config: for sampling settings and the number of items.
        frozen: whose image tokenizer reads the embedded world and whose vision tower judges likeness.
        benchmark: task -> held-out prompts.
    """
    world = world_of(prompt.attributes for prompts in benchmark.values() for prompt in prompts if prompt.attributes)
    return Evaluator(
        batches=together(benchmark, config.eval_samples),
        sampling=held_out_sampling(config),
        score=partial(
            score_rollouts,
            image_scorers=None if world is None else world_readers(world, grader_of(frozen, world)),
            identity=IdentityReward(frozen.vision_features, frozen.image_size, fit=frozen.fit()),
        ),
        read=None if world is None else partial(world_reader, world),
    )


def stream_of(
    config: SyncR1Config, prompts: Sequence[Prompt], anchors: Sequence[Prompt], rank: int = 0, world_size: int = 1
) -> PromptStream:
    """The prompts of each step: every task's share, and anchors among them."""
    order = Mixture(
        prompts,
        anchors,
        seed=config.seed,
        prompts_per_step=config.prompts_per_step,
        anchor_fraction=config.anchor_fraction,
    )
    return PromptStream(order, rank, world_size)
