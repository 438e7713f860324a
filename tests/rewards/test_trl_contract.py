"""The same reward functions by TRL's own trainer and here: what they get, what they give, what they log."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import numpy as np
import pytest
import torch
from test_rewards import make_rollout

from syncr1.engine.rewards.hooks import TrainerState
from syncr1.engine.rewards.scoring import RewardTable, score
from syncr1.engine.rewards.yours.adapters import trl, trl_chat

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
if not hasattr(grpo_trainer.GRPOTrainer, "_log_metric"):
    pytest.skip("this TRL has no hooks", allow_module_level=True)

TEXTS = ["", "a", "bb", "ccc"]


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def by_trl(function: Any, loop: asyncio.AbstractEventLoop, *, chat: bool = False) -> SimpleNamespace:
    """Rewards [4] and what was logged, by `GRPOTrainer._calculate_rewards` itself."""
    from accelerate import Accelerator

    trainer = grpo_trainer.GRPOTrainer
    state = SimpleNamespace(global_step=3, max_steps=10)
    this = SimpleNamespace(
        accelerator=Accelerator(cpu=True),
        state=state,
        args=SimpleNamespace(report_to=[]),
        environments=None,
        reward_funcs=[function],
        reward_processing_classes=[None],
        reward_func_names=["mine"],
        async_loop=loop,
        _pending_extra_logs=defaultdict(list),
        _pending_metrics=defaultdict(list),
    )
    this._log_completion_extra = lambda column, values: trainer._log_completion_extra(this, column, values)
    this._log_metric = lambda name, value: trainer._log_metric(this, name, value)
    prompts: list[Any] = ["what colour?"] * len(TEXTS)
    completions: list[Any] = TEXTS
    if chat:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    inputs = [{"prompt": prompt, "solution": "bb", "style": number} for number, prompt in enumerate(prompts)]
    rewards = trainer._calculate_rewards(this, inputs, prompts, completions, [list(text.encode()) for text in TEXTS])
    return SimpleNamespace(rewards=rewards[:, 0], metrics=this._pending_metrics, extras=this._pending_extra_logs)


def here(function: Any) -> RewardTable:
    rollouts = [
        make_rollout(text, f"p{number}", answer="bb", extra={"style": number, "solution": "bb"})
        for number, text in enumerate(TEXTS)
    ]
    return score(rollouts, {"mine": function}, state=TrainerState(global_step=3, max_steps=10))


def of_lists(completions: list[str], solution: list[str], **_: Any) -> list[float | None]:
    return [None if not text else float(text == right) for text, right in zip(completions, solution, strict=True)]


def of_tensors(prompts: list[str], completion_ids: list[list[int]], style: list[int], **_: Any) -> torch.Tensor:
    return torch.tensor([len(ids) + number for ids, number in zip(completion_ids, style, strict=True)])


def of_a_column_vector(completions: list[str], **_: Any) -> torch.Tensor:
    return torch.tensor([[len(text) / 4] for text in completions])


def of_arrays(completions: list[str], **_: Any) -> np.ndarray[Any, Any]:
    return np.array([len(text) for text in completions], dtype=np.float16)


def of_numpy_truths(completions: list[str], **_: Any) -> list[Any]:
    return [np.bool_(text > "a") for text in completions]


def of_a_generator(completions: list[str], **_: Any) -> Iterator[float]:
    return (float(len(text)) for text in completions)


async def of_a_coroutine(completions: list[str], trainer_state: Any, **_: Any) -> list[float | None]:
    await asyncio.sleep(0)
    return [None if len(text) == 1 else trainer_state.global_step / trainer_state.max_steps for text in completions]


def of_hooks(completions: list[str], log_metric: Any = None, log_extra: Any = None, **kwargs: Any) -> list[float]:
    log_metric("length", float(np.mean([len(text) for text in completions])))
    log_metric("length", 1.0)
    log_extra("first", [text[:1] for text in completions])
    return [float(kwargs["trainer_state"].global_step)] * len(completions)


FUNCTIONS = [of_lists, of_tensors, of_a_column_vector, of_arrays, of_numpy_truths, of_a_generator, of_a_coroutine]


@pytest.mark.parametrize("function", [*FUNCTIONS, of_hooks], ids=lambda function: function.__name__)
def test_a_function_as_it_is_gives_what_it_gives_in_trl(function: Any, loop: asyncio.AbstractEventLoop) -> None:
    theirs, ours = by_trl(function, loop), here(function)
    torch.testing.assert_close(ours.values[:, 0], theirs.rewards, rtol=0, atol=0, equal_nan=True)
    assert not ours.errors and dict(ours.metrics) == dict(theirs.metrics) and dict(ours.extras) == dict(theirs.extras)
    adapted = here(trl(function))
    torch.testing.assert_close(adapted.values, ours.values, rtol=0, atol=0, equal_nan=True)
    assert adapted.extras == ours.extras


def test_nan_counts_as_none_behind_the_adapter(loop: asyncio.AbstractEventLoop) -> None:
    def mine(completions: list[str], **_: Any) -> torch.Tensor:
        return torch.tensor([float("nan") if not text else 1.0 for text in completions])

    torch.testing.assert_close(here(trl(mine)).values[:, 0], by_trl(mine, loop).rewards, equal_nan=True)


def test_conversations(loop: asyncio.AbstractEventLoop) -> None:
    def mine(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        assert prompts[0] == [{"role": "user", "content": "what colour?"}]
        return [float(len(completion[0]["content"])) for completion in completions]

    assert here(trl_chat(mine)).values[:, 0].tolist() == by_trl(mine, loop, chat=True).rewards.tolist()


def test_the_state_has_the_fields_of_transformers_own() -> None:
    from transformers import TrainerState as theirs

    ours = {field.name for field in dataclasses.fields(TrainerState)}
    assert {field.name for field in dataclasses.fields(theirs)} <= ours
    default = theirs()
    for name in ("logging_steps", "eval_steps", "save_steps", "epoch", "global_step", "log_history"):
        assert (getattr(default, name) or 0) == (getattr(TrainerState(), name) or 0), name
