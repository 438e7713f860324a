"""What a training is made with, from its settings: the loss, the optimizer, the sampler. Converted once, here."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..forward.objective import Objective
from ..policies.base import Policy
from ..rollout.sampler import RolloutEngine
from ..rollout.sampling import Sampling
from ..settings.masked_rules import order_problems
from ..settings.train_config import TrainConfig
from .optimizer import LearnerSettings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def objective_of(config: TrainConfig, num_image_tokens: int, anchor_beta: float = 0.0) -> Objective:
    """The loss's settings; `anchor_beta` is the KL weight on prompts without a reward.

    Raises:
        ConfigError: the loss is to score a guided distribution, and the policy draws nothing that could be guided.
    """
    if config.policy_logp != "conditional" and config.cfg_weight != 1.0 and not num_image_tokens:
        raise ConfigError(
            f"policy_logp: expected conditional for a model that draws no images, got {config.policy_logp} with "
            f"cfg_weight {config.cfg_weight:g}, and no classifier-free branch to guide by; set --policy_logp "
            "conditional, or --cfg_weight 1"
        )
    # An image counts once for each state in which all of it, or a share of up to all, is scored.
    times = {"all": config.image_steps, "random_mask": config.masked_steps or 1}.get(config.masked_logp, 1)
    return Objective(
        **named_alike(Objective, config, "anchor_beta", "max_length"),
        anchor_beta=anchor_beta,
        max_length=config.max_completion_length + num_image_tokens * times,
    )


def check_order(config: TrainConfig, policy: Policy) -> None:
    """Refuses settings that a policy's decoding order has no use for.

    Raises:
        ConfigError: a line for each.
    """
    usual = {field.name: field.default for field in fields(config)}
    name, order = type(policy).__name__, policy.decoding_order
    if problems := order_problems(config, name, order, policy.num_image_tokens, usual):
        raise ConfigError.of(problems)


def settings_of(config: TrainConfig) -> LearnerSettings:
    """The optimizer's and DeepSpeed's settings."""
    return LearnerSettings(**named_alike(LearnerSettings, config))


def named_alike(target: type[DataclassInstance], config: TrainConfig, *others: str) -> dict[str, Any]:
    """The flags that `target` has a field for, but for the `others`."""
    return {field.name: getattr(config, field.name) for field in fields(target) if field.name not in others}


def sampler_of(config: TrainConfig, policy: Policy) -> RolloutEngine:
    """A sampler of the policy in training. ZeRO-3 gathers parameters again each time, so neither graphs, which hold
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
        unconditional=config.unconditional,
        drawing_turn=config.drawing_turn,
        image_steps=config.image_steps,
        image_noise=config.image_noise,
        seed=config.seed,
        step=-1,
    )
