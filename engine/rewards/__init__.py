"""Rewards: plain functions with TRL's keyword signature, run off the training path; a failure is None and counted.

What a reward of your own may need, under names that stay: `from syncr1.engine.rewards import LLMJudge, load_reward`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .builtin.accuracy import AccuracyReward
    from .judge.llm_judge import LLMJudge
    from .yours.adapters import ADAPTERS
    from .yours.custom import load_reward
    from .yours.remote import RemoteReward
    from .yours.verl_rewards import Overlong

__all__ = ["ADAPTERS", "AccuracyReward", "LLMJudge", "Overlong", "RemoteReward", "load_reward"]

_HOMES = {
    "ADAPTERS": "yours.adapters",
    "AccuracyReward": "builtin.accuracy",
    "LLMJudge": "judge.llm_judge",
    "Overlong": "yours.verl_rewards",
    "RemoteReward": "yours.remote",
    "load_reward": "yours.custom",
}


def __getattr__(name: str) -> Any:
    """Loads a name once it is asked for, so that importing a file below does not load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
