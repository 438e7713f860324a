"""What a training is paid for, as a run's folder keeps it (rewards.json) and the terminal says it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..records import Prompt
from ..show.names import RANGES
from .calling import PACKAGE
from .ensemble import RewardSet
from .reward import RewardFunction


def told_rewards(rewards: RewardSet, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What `show/in_words.py` makes sentences of.

    Args:
        rewards: of a training. A function says in `who` who decides and in `range` between what it lies, where its name
            does not.
        prompts: some of those it is trained on; those of one sample share a reward.
    """
    columns = [
        {
            "name": c.name,
            "weight": c.weight,
            "kind": c.kind,
            "who": str(getattr(c.function, "who", "")),
            "range": _range(getattr(c.function, "range", None if is_own(c.function) else RANGES.get(c.name))),
            "own": is_own(c.function),
        }
        for c in rewards.columns()
    ]
    return {"rewards": columns, "shared": any(prompt.sample is not None for prompt in prompts)}


def is_own(function: RewardFunction) -> bool:
    """Whether it is a user's, or a server's, whatever its name: one called `accuracy` need not be ours."""
    where = str(getattr(function, "__module__", None) or type(function).__module__)
    return not where.startswith(PACKAGE) or where.startswith(f"{PACKAGE}rewards.yours.")


def _range(ends: Any) -> list[float] | None:
    """What a function of a user's own calls so may be anything."""
    pair = isinstance(ends, tuple | list) and len(ends) == 2 and all(isinstance(end, int | float) for end in ends)
    return [float(end) for end in ends] if pair else None
