"""Calling reward functions: TRL's keyword signature in, one `[S, K]` table out.

A reward is any callable, plain or async, `fn(*, prompts, completions, completion_ids, images, **columns)` that returns
`list[float | None]`, one entry per trajectory (None: it does not apply). `columns` are all the fields of `Prompt`, each
as a list, what is in its `extra`, `mode` and `follow_up_completions`. Functions run at once, each in its own thread,
with gradients off, and under a timeout. A function that raises or is late gives None for all and is counted: never 0.0,
which would be a verdict.

Dims: S trajectories, K rewards.  Source of the signature: TRL's GRPOTrainer, `reward_funcs`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import numbers
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from syncr1.engine.records import Prompt, Rollout

RewardValues = list[float | None]
RewardFunction = Callable[..., RewardValues | Awaitable[RewardValues]]

logger = logging.getLogger(__name__)

REASONING_TASKS = frozenset({"rea", "dense_rea"})
"""Tasks of Sync-R1's mode `r`; every other one is of mode `u`."""

_abandoned: dict[int, threading.Thread] = {}
"""Threads that outlived their timeout, by id of their function (which the thread keeps alive, so the id stays its own).
A Python thread cannot be killed: not calling a function that still hangs is what keeps their number bounded."""


class RewardError(ValueError):
    """A reward function broke its contract: a wrong number of values, or one that is not a finite number or None."""

    def __init__(self, function: str, index: int | None, problem: str) -> None:
        self.function, self.index = function, index
        where = "" if index is None else f" at index {index}"
        super().__init__(f"reward {function!r}{where}: {problem}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTable:
    """What every reward said about every trajectory."""

    values: Tensor
    """[S, K] float32; NaN = did not apply, or failed."""
    names: tuple[str, ...]
    """[K] column names."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Calls that raised or ran late, by name; 0 for the others."""
    incomplete: int = 0
    """Trajectories left out because they lack a reward that another member of their group has."""

    def means(self) -> dict[str, float]:
        """`rewards/<name>/mean` over the trajectories that have it; a reward that nobody has is absent."""
        columns = {
            name: column[~column.isnan()] for name, column in zip(self.names, self.values.unbind(1), strict=True)
        }
        return {f"rewards/{name}/mean": float(column.mean()) for name, column in columns.items() if column.numel()}


def mode_of(prompt: Prompt) -> str:
    """Sync-R1's mode: `r` (reasoning, implicit prompt to explicit description) or `u` (understanding)."""
    return "r" if prompt.task in REASONING_TASKS else "u"


def columns_of(rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
    """The keyword arguments of a reward function: each a list with one entry per trajectory."""
    prompts = [rollout.prompt for rollout in rollouts]
    names = [f.name for f in fields(Prompt) if f.name != "extra"]
    columns: dict[str, list[Any]] = {name: [getattr(prompt, name) for prompt in prompts] for name in names}
    further = {name for prompt in prompts for name in prompt.extra if name not in columns}
    columns |= {name: [prompt.extra.get(name) for prompt in prompts] for name in sorted(further)}
    texts = [[s for s in rollout.segments if s.kind == "text"] for rollout in rollouts]
    columns |= {
        "mode": [mode_of(prompt) for prompt in prompts],
        "prompts": [prompt.text for prompt in prompts],
        "completions": [rollout.text for rollout in rollouts],
        "completion_ids": [[int(t) for s in segments for t in s.tokens.tolist()] for segments in texts],
        "images": [rollout.image for rollout in rollouts],
        "follow_up_completions": [rollout.follow_up_text for rollout in rollouts],
    }
    return columns


def score(
    rollouts: Sequence[Rollout],
    reward_functions: Mapping[str, RewardFunction],
    timeout: float = 120.0,
    *,
    strict: bool = True,
) -> RewardTable:
    """Score trajectories by every function.

    Args:
        rollouts: [S], groups one after another or not; anchors (`prompt.rewarded` False) and what a preview dropped
            are not shown to the functions.
        reward_functions: [K] name -> function; names become columns in this order.
        timeout: seconds that a function may take, counted from the common start.
        strict: raise on a broken contract (a bug will not mend itself); False counts it as a failure, for functions
            that reach out to services.

    Returns:
        RewardTable, `values` [S, K]. NaN all over for anchors and for what was dropped. A member that lacks a reward
        which others of its group have gets NaN in every column: summing what is left would read it as zero.

    Raises:
        RewardError: `strict` and a function returned the wrong number of values, or NaN, infinity, text or a tensor.
    """
    rows = [i for i, rollout in enumerate(rollouts) if rollout.prompt.rewarded and not rollout.dropped]
    values = torch.full((len(rollouts), len(reward_functions)), math.nan)
    failures = dict.fromkeys(reward_functions, 0)
    if rows:
        results = _run_all([rollouts[i] for i in rows], reward_functions, timeout)
        for column, (name, result) in enumerate(results.items()):
            try:
                scores = _checked(name, result, len(rows))
            except _Failed as failure:
                if strict and isinstance(failure.cause, RewardError):
                    raise failure.cause from None
                failures[name] += 1
                logger.warning(
                    "reward %r failed and is None for all %d trajectories: %s", name, len(rows), failure.cause
                )
                continue
            values[rows, column] = torch.tensor([math.nan if s is None else float(s) for s in scores])
    incomplete = _incomplete(rollouts, values)
    values[incomplete] = math.nan
    return RewardTable(
        values=values, names=tuple(reward_functions), failures=failures, incomplete=int(incomplete.sum())
    )


class _Failed(Exception):
    """Internal: this function has no result; `cause` says why."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


def _run_all(rollouts: Sequence[Rollout], functions: Mapping[str, RewardFunction], timeout: float) -> dict[str, Any]:
    """Results by name; an exception instance where a function raised, ran late, or still hangs from an earlier call."""
    results: dict[str, Any] = {}
    threads: dict[str, threading.Thread] = {}
    deadline = time.monotonic() + timeout
    for name, function in functions.items():
        earlier = _abandoned.get(id(function))
        if earlier is not None and earlier.is_alive():
            results[name] = TimeoutError("an earlier call is still running")
            continue
        _abandoned.pop(id(function), None)
        box = results[name] = _Box()
        columns = columns_of(rollouts)  # fresh lists for each, so that no function can change what another sees
        thread = threading.Thread(target=_call, args=(function, columns, box), name=f"reward-{name}", daemon=True)
        threads[name] = thread
        thread.start()
    for name, thread in threads.items():
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            _abandoned[id(functions[name])] = thread
            results[name] = TimeoutError(f"no answer within {timeout:g} s")
        else:
            results[name] = results[name].value
    return {name: results[name] for name in functions}


class _Box:
    """Where a thread leaves its result; one that is abandoned keeps its own box and disturbs nobody."""

    value: Any = None


def _call(function: RewardFunction, columns: dict[str, list[Any]], box: _Box) -> None:
    try:
        with torch.no_grad():  # grad mode is per thread
            result = function(**columns)
            box.value = asyncio.run(_await(result)) if inspect.isawaitable(result) else result
    except Exception as error:
        box.value = error


async def _await(result: Awaitable[RewardValues]) -> RewardValues:
    return await result


def _checked(name: str, result: Any, num_expected: int) -> RewardValues:
    if isinstance(result, Exception):
        raise _Failed(result)
    if not isinstance(result, list | tuple):
        what = (
            f"expected a list of {num_expected} numbers or None, got {type(result).__name__}; use .tolist() on arrays"
        )
        raise _Failed(RewardError(name, None, what))
    if len(result) != num_expected:
        raise _Failed(RewardError(name, None, f"expected {num_expected} values, one per trajectory, got {len(result)}"))
    for index, value in enumerate(result):
        if value is None:
            continue
        if not isinstance(value, numbers.Real):
            what = f"expected a number or None, got {type(value).__name__}; use float(...) or .item()"
            raise _Failed(RewardError(name, index, what))
        if not math.isfinite(value):
            raise _Failed(RewardError(name, index, f"got {value}; return None where there is nothing to say"))
    return list(result)


def _incomplete(rollouts: Sequence[Rollout], values: Tensor) -> Tensor:
    """[S] bool: trajectories that lack a reward which another trajectory of the same prompt has."""
    groups: dict[str, list[int]] = {}
    for row, rollout in enumerate(rollouts):
        groups.setdefault(rollout.prompt.id, []).append(row)
    marked = torch.zeros(len(rollouts), dtype=torch.bool)
    present = ~values.isnan()
    for members in groups.values():
        applies = present[members].any(0)
        marked[members] = (applies & ~present[members]).any(1)
    return marked & torch.tensor([not rollout.dropped for rollout in rollouts], dtype=torch.bool)
