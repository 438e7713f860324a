"""What a training is paid for, as a run's folder keeps it (rewards.json) and the terminal says it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..records import Prompt
from ..show.names import RANGES
from .ensemble import RewardSet


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
            "range": _range(getattr(c.function, "range", RANGES.get(c.name))),
        }
        for c in rewards.columns()
    ]
    return {"rewards": columns, "shared": any(prompt.sample is not None for prompt in prompts)}


def _range(ends: Any) -> list[float] | None:
    """What a function of a user's own calls so may be anything."""
    pair = isinstance(ends, tuple | list) and len(ends) == 2 and all(isinstance(end, int | float) for end in ends)
    return [float(end) for end in ends] if pair else None
