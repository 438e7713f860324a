"""What a training is made with, from its settings: the loss, the optimizer, the sampler. Converted once, here."""

from __future__ import annotations

from ..forward.objective import Objective
from ..policies.base import Policy
from ..rollout.sampler import RolloutEngine, Sampling
from ..settings.train_config import TrainConfig
from .optimizer import LearnerSettings


def objective_of(config: TrainConfig, num_image_tokens: int, anchor_beta: float = 0.0) -> Objective:
    """The loss's settings; `anchor_beta` is the KL weight on prompts without a reward."""
    return Objective(
        loss_type=config.loss_type,
        ratio=config.importance_sampling_level,
        clip_low=config.epsilon,
        clip_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
        delta=config.delta,
        beta=config.beta,
        anchor_beta=anchor_beta,
        scale=config.scale_rewards,
        temperature=config.temperature,
        credit=config.credit,
        text_weight=config.text_loss_weight,
        image_weight=config.image_loss_weight,
        max_length=config.max_completion_length + num_image_tokens,
    )


def settings_of(config: TrainConfig) -> LearnerSettings:
    """The optimizer's and DeepSpeed's settings."""
    return LearnerSettings(
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        zero_stage=config.zero_stage,
        bf16=config.bf16,
        num_iterations=config.num_iterations,
        max_skipped_updates=config.max_skipped_updates,
        gradient_checkpointing=config.gradient_checkpointing,
    )


def sampler_of(config: TrainConfig, policy: Policy) -> RolloutEngine:
    """A sampler of the policy in training. ZeRO-3 gathers parameters anew each time, so neither graphs, which hold
    their addresses, nor a compiled trunk, which its hooks would break, are used there."""
    if config.zero_stage == 3:
        return RolloutEngine(policy, cuda_graphs=False)
    trunk = None
    if config.compile_decode:
        from ..rollout.compiled import CompiledTrunk  # brings Inductor with it

        trunk = CompiledTrunk(policy)
    return RolloutEngine(policy, cuda_graphs=None if config.cuda_graphs else False, trunk=trunk)


def held_out_sampling(config: TrainConfig) -> Sampling:
    """How held-out items are drawn, before and after alike: no step of a training has this one's random numbers."""
    return Sampling(
        num_generations=1,
        max_text_tokens=config.max_completion_length,
        cfg_weight=config.eval_cfg_weight,
        seed=config.seed,
        step=-1,
    )
