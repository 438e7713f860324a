"""Calling reward functions: TRL's keyword signature in, one `[S, K]` table out.

A reward is any callable, plain or async, `fn(*, prompts, completions, completion_ids, images, **columns)` that returns
`list[float | None]`, one entry per trajectory (None: it does not apply). `columns` are all the fields of `Prompt`, each
as a list, what is in its `extra`, `mode` and `follow_up_completions`. Functions run at once, each in its own thread,
with gradients off, and under a timeout. A function that raises or is late gives None for all and is counted: never 0.0,
which would be a verdict.

Every rank calls them for its own trajectories, and nothing here talks to other ranks: a function that fails on one of
them costs that rank's rewards of this step alone, and the others wait for it no longer than the timeout. A Python
thread cannot be killed, so a plain function that never returns is not called again on that rank (an async one is
cancelled), and one that keeps the interpreter's lock, or takes the process down, cannot be contained here: isolated.py
runs such functions in a process of their own.

Dims: S trajectories, K rewards, P prompts.  Source of the signature: TRL's GRPOTrainer, `reward_funcs`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import numbers
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import RewardError
from ..records import Prompt, Rollout

RewardValues = list[float | None]
RewardFunction = Callable[..., RewardValues | Awaitable[RewardValues]]

logger = logging.getLogger(__name__)

REASONING_TASKS = frozenset({"rea", "dense_rea"})
"""Tasks of Sync-R1's mode `r`; every other one is of mode `u`."""

LARGEST = torch.finfo(torch.float32).max
"""A reward beyond it would be infinite in the table."""
CANCELLED = 5.0
"""Seconds that a late function has to come back once its `cancel` was called."""

_abandoned: dict[int, threading.Thread] = {}
"""Threads that outlived their timeout, by id of their function (which the thread keeps alive, so the id stays its own).
Not calling a function that still hangs is what keeps their number bounded: one for each function."""


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
        "completion_ids": [list(chain.from_iterable(s.tokens.tolist() for s in segments)) for segments in texts],
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
    step: int | None = None,
) -> RewardTable:
    """Score trajectories by every function.

    Args:
        rollouts: [S], groups one after another or not; anchors (`prompt.rewarded` False) and what a preview dropped
            are not shown to the functions.
        reward_functions: [K] name -> function; names become columns in this order.
        timeout: seconds that a function may take, counted from the common start.
        strict: raise on a broken contract (a bug will not mend itself); False counts it as a failure, for functions
            that reach out to services.
        step: of the training, for errors and the log.

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
        shown = [rollouts[i] for i in rows]
        for column, (name, outcome) in enumerate(_run_all(shown, reward_functions, timeout).items()):
            scores: RewardValues = []
            error = outcome.error
            if error is None:
                try:
                    scores = checked(name, outcome.value, len(rows))
                except RewardError as broken:
                    error = broken
            if strict and isinstance(error, RewardError):
                error.where = _where(step, shown, error.index)
                raise error from None
            if error is not None:
                failures[name] += 1
                logger.warning(
                    "reward %r failed (%s) and is None for all %d trajectories: %s: %s",
                    name, _where(step), len(rows), type(error).__name__, error,
                )  # fmt: skip
                continue
            values[rows, column] = torch.tensor([math.nan if s is None else float(s) for s in scores])
    incomplete = _incomplete(rollouts, values)
    values[incomplete] = math.nan
    return RewardTable(
        values=values, names=tuple(reward_functions), failures=failures, incomplete=int(incomplete.sum())
    )


def still_running() -> list[str]:
    """Names of the threads of functions that never came back. One that waits for a thread pool of its own keeps Python
    from ending when the run does."""
    return sorted(thread.name for thread in _abandoned.values() if thread.is_alive())


def _where(step: int | None, rollouts: Sequence[Rollout] = (), index: int | None = None) -> str:
    """This rank, the step and the prompt, as far as they are known."""
    parts = [f"rank {dist.get_rank() if dist.is_initialized() else 0}"]
    if step is not None:
        parts.append(f"step {step}")
    if index is not None and 0 <= index < len(rollouts):
        parts.append(f"prompt {rollouts[index].prompt.id!r}")
    return ", ".join(parts)


@dataclass(slots=True)
class Outcome:
    """Where a thread leaves what came out; one that is abandoned keeps its own and disturbs nobody."""

    value: Any = None
    error: BaseException | None = None


def _run_all(
    rollouts: Sequence[Rollout], functions: Mapping[str, RewardFunction], timeout: float
) -> dict[str, Outcome]:
    """What came out, by name: a value, or why a function has none (it raised, ran late, hangs from an earlier call)."""
    outcomes: dict[str, Outcome] = {}
    threads: dict[str, threading.Thread] = {}
    deadline = time.monotonic() + timeout
    columns = columns_of(rollouts)
    for name, function in functions.items():
        earlier = _abandoned.get(id(function))
        if earlier is not None and earlier.is_alive():
            outcomes[name] = Outcome(error=TimeoutError(f"an earlier call is still running{_stuck_at(earlier)}"))
            continue
        _abandoned.pop(id(function), None)
        own = _copied(columns)
        outcome = outcomes[name] = Outcome()
        thread = threading.Thread(
            target=call, args=(function, own, outcome, deadline), name=f"reward-{name}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # the system has no more threads
            outcome.error = error
        else:
            threads[name] = thread
    for name, thread in threads.items():
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            outcomes[name] = Outcome(error=TimeoutError(f"no answer within {timeout:g} s{_stuck_at(thread)}"))
            cancel = getattr(functions[name], "cancel", None)
            if cancel is not None:
                cancel()
                thread.join(CANCELLED)
            if thread.is_alive():
                _abandoned[id(functions[name])] = thread
    return outcomes


def _copied(columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Fresh lists for each function, so that none can change what another sees; their entries are shared."""
    own = {name: list(column) for name, column in columns.items()}
    return own | {"completion_ids": [list(ids) for ids in columns["completion_ids"]]}


def _stuck_at(thread: threading.Thread) -> str:
    """`, at my.py:12 in judge, within socket.py:720 in readinto`: the reward's own line, and the innermost one that it
    waits for; nothing once the thread has ended."""
    frame: FrameType | None = sys._current_frames().get(thread.ident or 0)
    places: list[str] = []
    while frame is not None and frame.f_code is not call.__code__:
        places.append(f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}")
        frame = frame.f_back
    if frame is None or not places:
        return ""
    return f", at {places[-1]}" + (f", within {places[0]}" if len(places) > 1 else "")


def call(function: RewardFunction, columns: dict[str, list[Any]], outcome: Outcome, deadline: float = math.inf) -> None:
    """Leaves in `outcome` what a function returns or raises; an async one is awaited until `deadline` (monotonic)."""
    try:
        with torch.no_grad():  # grad mode is per thread
            result = function(**columns)
            outcome.value = asyncio.run(_awaited(result, deadline)) if inspect.isawaitable(result) else result
    except BaseException as error:  # SystemExit and CancelledError too: a thread would end by them without a word
        outcome.error = error


async def _awaited(result: Awaitable[RewardValues], deadline: float) -> RewardValues:
    """Cancelled shortly before the deadline, so that its thread has ended when the others are given up."""
    left = deadline - time.monotonic()
    limit = asyncio.timeout(left - min(1.0, 0.05 * left))
    try:
        async with limit:
            return await result
    except TimeoutError:
        if limit.expired():
            raise TimeoutError("no answer in time; cancelled") from None
        raise


def checked(name: str, result: Any, num_expected: int) -> RewardValues:
    """What a function returned, as a list.

    Raises:
        RewardError: another number of values, or one that is neither None nor a finite number.
    """
    if not isinstance(result, list | tuple):
        what = (
            f"expected a list of {num_expected} numbers or None, got {type(result).__name__}; use .tolist() on arrays"
        )
        raise RewardError(name, None, what)
    if len(result) != num_expected:
        raise RewardError(name, None, f"expected {num_expected} values, one per trajectory, got {len(result)}")
    for index, value in enumerate(result):
        if value is None:
            continue
        if not isinstance(value, numbers.Real):
            what = f"expected a number or None, got {type(value).__name__}; use float(...) or .item()"
            raise RewardError(name, index, what)
        try:
            number = float(value)
        except OverflowError:  # Python's integers have no limit
            number = math.inf
        if not -LARGEST <= number <= LARGEST:  # false for NaN
            what = f"expected a finite float32, got {number:g}; return None where there is nothing to say"
            raise RewardError(name, index, what)
    return list(result)


def _incomplete(rollouts: Sequence[Rollout], values: Tensor) -> Tensor:
    """[S] bool: trajectories that lack a reward which another trajectory of the same prompt has."""
    known: dict[str, int] = {}
    group_S = torch.tensor([known.setdefault(rollout.prompt.id, len(known)) for rollout in rollouts], dtype=torch.long)
    present_SK = ~values.isnan()
    applies_PK = torch.zeros(len(known), values.shape[1]).index_add_(0, group_S, present_SK.float()) > 0
    finished_S = torch.tensor([not rollout.dropped for rollout in rollouts], dtype=torch.bool)
    return (applies_PK[group_S] & ~present_SK).any(1) & finished_S
