"""A third method, whole: plain GRPO on a table of prompts, judged by a user's own rewards, scored on its test split."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

from syncr1.engine.data.prompts import by_task
from syncr1.engine.data.samples import load_prompts
from syncr1.engine.data.stream import PromptStream, Shuffled
from syncr1.engine.errors import ConfigError, DataError
from syncr1.engine.evaluate.drawing import together
from syncr1.engine.evaluate.held_out import Evaluator, score_rollouts
from syncr1.engine.learn.from_settings import held_out_sampling, objective_of
from syncr1.engine.methods.dry_run import show
from syncr1.engine.methods.resume import resume_point
from syncr1.engine.methods.starting import add_adapters, starting_policy
from syncr1.engine.methods.training import Session, Summaries, Training, run_method, run_training
from syncr1.engine.processes.group import local_device, place
from syncr1.engine.records import Prompt
from syncr1.engine.rewards.ensemble import RewardSet
from syncr1.engine.rewards.yours.custom import load_reward
from syncr1.engine.settings.reward_specs import reward_name
from syncr1.engine.settings.train_config import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainConfig(TrainConfig):
    """Settings of plain GRPO; model, data and reward_funcs have to be given."""

    # --- model, data and output ---
    data: Path = Path("data")
    """Prompts: a folder with train.jsonl and test.jsonl, or anything else that `load_prompts` opens."""

    # --- rewards ---
    reward_funcs: tuple[str, ...] = ()
    """`module:function` or `file.py:function`, all of the same weight."""


def run(config: PlainConfig) -> Summaries:
    """Runs to the end and returns the summaries `before` and `after`."""
    return run_method(config, train_and_score, dry_run, num_stages=4)


def train_and_score(config: PlainConfig, session: Session) -> Summaries:
    """The run itself, on a rank of the process group."""
    resumed = resume_point(config, session.display.note)
    session.display.stage("data and starting model")
    if config.model is None:
        raise ConfigError("model: expected a checkpoint to start from, got none; there is no default")
    policy = starting_policy(config, config.model, session.display)
    frozen = add_adapters(config, policy).to(local_device())
    training = Training(
        method="plain GRPO",
        data=config.data,
        policy=policy,
        reference=frozen if config.beta else None,
        objective=objective_of(config, policy.num_image_tokens),
        prompts=stream_of(config, *place()),
        rewards=rewards_of(config),
        evaluator=evaluator_of(config),
    )
    return run_training(config, training, session, resumed).summaries


def stream_of(config: PlainConfig, rank: int, world_size: int) -> PromptStream:
    samples = [(prompt,) for prompt in load_prompts(config.data, "train")]
    return PromptStream(Shuffled(samples, seed=config.seed, prompts_per_step=config.prompts_per_step), rank, world_size)


def rewards_of(config: PlainConfig) -> RewardSet:
    functions = {reward_name(spec): load_reward(spec) for spec in config.reward_funcs}
    kinds = tuple(str(getattr(function, "kind", "text")) for function in functions.values())
    return RewardSet(functions=functions, weights=(1.0,) * len(functions), kinds=kinds)


def evaluator_of(config: PlainConfig) -> Evaluator | None:
    """None where the data has no test split."""
    with suppress(DataError):
        held_out = by_task(load_prompts(config.data, "test"))
        return Evaluator(
            batches=together(held_out, config.eval_samples),
            sampling=held_out_sampling(config),
            score=score_rollouts,
        )
    return None


def dry_run(config: PlainConfig) -> None:
    def prompts_of(world_size: int) -> list[Prompt]:
        return stream_of(config, 0, world_size).next_step()

    show(config, prompts_of)
