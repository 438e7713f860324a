"""Calling reward functions: all at once, each in its own thread, with gradients off and under a timeout.

A function that raises or is late has an error in place of its values and disturbs no other.  Nothing here talks to
other ranks: a function that fails on one of them costs that rank's rewards of this step alone, and the others wait for
it no longer than the timeout.  A Python thread cannot be killed, so a plain function that never returns is not called
again on that rank (an async one is cancelled), and one that keeps the interpreter's lock, or takes the process down,
cannot be contained here: yours/isolated.py runs such functions in a process of their own.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import sys
import threading
import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch

from .hooks import HOOKS, Logged, TrainerState, hooks_of
from .reward import Columns, RewardFunction, RewardValues, checked
from .torch_state import torch_left_alone

CANCELLED = 5.0
"""Seconds that a late function has to come back once its `cancel` was called."""

PACKAGE = __name__.partition(".rewards.")[0] + "."
"""Functions of this package change nothing of what they are shown."""

_abandoned: dict[int, threading.Thread] = {}
"""Threads that outlived their timeout, by id of their function (which the thread keeps alive, so the id stays its own).
Not calling a function that still hangs is what keeps their number bounded: one for each function."""


@dataclass(slots=True)
class Outcome:
    """Where a thread leaves what came out; one that is abandoned keeps its own and disturbs nobody."""

    values: RewardValues = field(default_factory=list)
    error: BaseException | None = None
    """Why there are no values; a RewardError where the function broke its contract."""
    logged: Logged = field(default_factory=lambda: Logged("", 0))
    """What the call logged, until it ended."""


def call_all(
    functions: Mapping[str, RewardFunction], columns: Columns, timeout: float, state: TrainerState | None = None
) -> dict[str, Outcome]:
    """What came out, by name: values, or why a function has none (it raised, ran late, hangs from an earlier call).

    Args:
        functions: by name.
        columns: their keyword arguments; each function gets lists of its own, a user's also images of its own.
        timeout: seconds that a function may take, counted from the common start.
        state: of the training, for those that ask for it.
    """
    with torch_left_alone():
        return _called_all(functions, columns, timeout, state or TrainerState())


def _called_all(
    functions: Mapping[str, RewardFunction], columns: Columns, timeout: float, state: TrainerState
) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    threads: dict[str, threading.Thread] = {}
    deadline = time.monotonic() + timeout
    for name, function in functions.items():
        earlier = _abandoned.get(id(function))
        if earlier is not None and earlier.is_alive():
            outcomes[name] = Outcome(error=TimeoutError(f"an earlier call is still running{_stuck_at(earlier)}"))
            continue
        _abandoned.pop(id(function), None)
        outcome = outcomes[name] = Outcome(logged=Logged(name, len(columns["images"])))
        given = (name, function, _copied(columns, function), outcome, deadline, state)
        thread = threading.Thread(target=call, args=given, name=f"reward-{name}", daemon=True)
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


def _copied(columns: Columns, function: RewardFunction) -> Columns:
    """Lists of its own for each function, so that none can change what another sees, what is kept of a trajectory, or
    the data; for those of this package their entries are shared."""
    own = {name: list(column) for name, column in columns.items()}
    own |= {"completion_ids": [list(ids) for ids in columns["completion_ids"]]}
    if str(getattr(function, "__module__", None) or type(function).__module__).startswith(PACKAGE):
        return own
    return {name: [_entry(value) for value in column] for name, column in own.items()}


def _entry(value: Any) -> Any:
    """What could be written into, copied."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return copy.deepcopy(value) if isinstance(value, list | dict) else value


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


def call(
    name: str,
    function: RewardFunction,
    columns: Columns,
    outcome: Outcome,
    deadline: float = math.inf,
    state: TrainerState | None = None,
) -> None:
    """Leaves in `outcome` what a function logs and returns, checked, or raises; an async one is awaited until
    `deadline` (monotonic)."""
    shown = {column: values for column, values in columns.items() if column not in HOOKS}
    try:
        with torch.no_grad():  # grad mode is per thread
            result: Any = function(**shown, **hooks_of(function, outcome.logged, state or TrainerState()))
            if inspect.isawaitable(result):
                result = asyncio.run(_awaited(result, deadline))
            outcome.values = checked(name, result, len(columns["images"]))
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


def still_running() -> list[str]:
    """Names of the threads of functions that never came back. One that waits for a thread pool of its own keeps Python
    from ending when the run does."""
    return sorted(thread.name for thread in _abandoned.values() if thread.is_alive())
