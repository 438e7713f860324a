"""What a reward function is: TRL's keyword signature in, a list with one entry per trajectory out.

A reward is any callable, plain or async, `fn(*, prompts, completions, completion_ids, images, **columns)` that returns
`list[float | None]`, one entry per trajectory (None: it does not apply). `columns` are all the fields of `Prompt`, each
as a list, what is in its `extra`, `mode` and `follow_up_completions`.  scoring.py shows trajectories to functions and
calling.py calls them.

Dims: n trajectories.  Source of the signature: TRL's GRPOTrainer, `reward_funcs`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from dataclasses import fields
from decimal import Decimal
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import RewardError
from ..records import Prompt, Rollout

RewardValues = list[float | None]
RewardFunction = Callable[..., RewardValues | Awaitable[RewardValues]]
Columns = dict[str, list[Any]]
"""The keyword arguments of a reward function: each a list with one entry per trajectory."""

REASONING_TASKS = frozenset({"rea", "dense_rea"})
"""Tasks of Sync-R1's mode `r`; every other one is of mode `u`."""

ANYTHING = frozenset({"info", "request"})
"""Fields of `Prompt` that data may have a column of another meaning under: that one is what a reward gets."""

LARGEST = torch.finfo(torch.float32).max
"""A reward beyond it would be infinite in the table."""


def mode_of(prompt: Prompt) -> str:
    """Sync-R1's mode: `r` (reasoning, implicit prompt to explicit description) or `u` (understanding)."""
    return "r" if prompt.task in REASONING_TASKS else "u"


def columns_of(rollouts: Sequence[Rollout]) -> Columns:
    """What finished trajectories [n] are to a reward function."""
    texts = [[s for s in rollout.segments if s.kind == "text"] for rollout in rollouts]
    return columns_for(
        [rollout.prompt for rollout in rollouts],
        [rollout.text for rollout in rollouts],
        [rollout.image for rollout in rollouts],
        completion_ids=[list(chain.from_iterable(s.tokens.tolist() for s in segments)) for segments in texts],
        follow_up_completions=[rollout.follow_up_text for rollout in rollouts],
    )


def columns_for(
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    images: Sequence[Tensor | None],
    *,
    completion_ids: list[list[int]] | None = None,
    follow_up_completions: list[str] | None = None,
) -> Columns:
    """What trajectories [n] are to a reward function, finished or, without the last two, under way."""
    names = [f.name for f in fields(Prompt) if f.name != "extra"]
    columns: Columns = {name: [getattr(prompt, name) for prompt in prompts] for name in names}
    columns["image"] = [prompt.images[0] if prompt.images else None for prompt in prompts]
    columns["shown_images"] = columns["images"]
    further = {name for prompt in prompts for name in prompt.extra if name not in columns or name in ANYTHING}
    columns |= {name: [prompt.extra.get(name) for prompt in prompts] for name in sorted(further)}
    return columns | {
        "mode": [mode_of(prompt) for prompt in prompts],
        "prompts": [prompt.text for prompt in prompts],
        "completions": list(texts),
        "completion_ids": completion_ids or [[] for _ in prompts],
        "images": list(images),
        "follow_up_completions": follow_up_completions or [""] * len(prompts),
    }


def checked(name: str, result: Any, num_expected: int) -> RewardValues:
    """What a function returned, as a list of numbers and None.

    Taken is what TRL takes: a list or any other sequence in order, an array or a tensor of one dimension (or [n, 1]),
    whose entries are numbers of Python, NumPy or torch, truths, or None.

    Raises:
        RewardError: another number of values, or one that is neither None nor a finite number.
    """
    values = _listed(name, result, num_expected)
    if len(values) != num_expected:
        raise RewardError(
            name,
            None,
            f"expected {num_expected} values, one per trajectory, got {len(values)}; return one for each completion",
        )
    absent = (None, np.ma.masked)  # the latter's number would be 0
    return [None if any(value is one for one in absent) else _number(name, i, value) for i, value in enumerate(values)]


def _listed(name: str, result: Any, num_expected: int) -> list[Any]:
    """The entries of what is a sequence of rewards; RewardError where it is none."""
    if isinstance(result, Tensor | np.ndarray):
        if result.ndim != 1 and tuple(result.shape) != (num_expected, 1):
            what = f"expected {num_expected} values in one dimension, got an array of shape {tuple(result.shape)}"
            raise RewardError(name, None, f"{what}; return one number for each completion")
        return list(result.detach().cpu() if isinstance(result, Tensor) else result)
    no_order = isinstance(result, str | bytes | Mapping | Set)
    if result is None or no_order or not isinstance(result, Iterable):
        what = f"expected a list of {num_expected} numbers or None, got {type(result).__name__}"
        raise RewardError(name, None, f"{what}; return one number for each completion")
    return list(result)


def _number(name: str, index: int, value: Any) -> float:
    """One entry; RewardError where it is no finite number."""
    single = isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1
    said = value.item() if single else value
    if not isinstance(said, numbers.Real | np.bool_ | Decimal):
        raise RewardError(name, index, f"expected a number or None, got {type(said).__name__}; use float(...)")
    try:
        number = float(said)
    except OverflowError:  # Python's integers have no limit
        number = math.inf
    if not -LARGEST <= number <= LARGEST:  # false for NaN
        what = f"expected a finite float32, got {number:g}; return None where there is nothing to say"
        raise RewardError(name, index, what)
    return number
