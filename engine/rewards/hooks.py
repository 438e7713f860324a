"""What TRL's trainer hands to a reward function beside the columns: its state, and two functions to log with.

`log_metric(name, value)` is a scalar of the batch, which metrics.jsonl has under that name, averaged over calls and
ranks; `log_extra(column, values)` is a column of the completions, one value per trajectory, which samples/ and the
trackers' tables have.  A function gets those that it names, or all where it takes `**kwargs`, as TRL calls it.

Source: TRL 1.16, `GRPOTrainer._calculate_rewards`, `_log_metric`, `_log_completion_extra`.  Dims: n trajectories.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import RewardError
from ..processes.group import place
from ..settings.train_config import TrainConfig

HOOKS = ("trainer_state", "log_extra", "log_metric")
"""Keywords that are no columns; a column of the data under such a name is not shown, as in TRL."""
MOST_NUMBERS = 1024
"""Of an array that is logged as it is; a picture's would fill the run's files."""
MOST_TEXT = 2000
"""Characters of a logged value that is no number, list or dict: an object's own words may be of any length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """Where the training is: the fields of transformers' `TrainerState`, of which those below are known.

    The others have that class's defaults.  Nothing that a function changes here changes the run."""

    global_step: int = 0
    """Steps that are done: 0 while the first one is rewarded."""
    max_steps: int = 0
    """Of the whole run; 0 where a function is only tried."""
    logging_steps: int = 500
    eval_steps: int = 500
    save_steps: int = 500
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    epoch: float = 0
    train_batch_size: int | None = None
    num_train_epochs: int = 0
    num_input_tokens_seen: int = 0
    total_flos: float = 0
    log_history: list[dict[str, float]] = field(default_factory=list)
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    is_hyper_param_search: bool = False
    trial_name: str | None = None
    trial_params: dict[str, Any] | None = None
    stateful_callbacks: dict[str, Any] = field(default_factory=dict)


def state_of(config: TrainConfig, step: int) -> TrainerState:
    """What a reward function hears of a training after `step` steps. In the process of `rollout_staleness` 1, which is
    no rank, each calls itself the first."""
    return TrainerState(
        global_step=step,
        max_steps=config.max_steps,
        logging_steps=config.logging_steps,
        eval_steps=config.eval_steps,
        save_steps=config.checkpointing_steps,
        is_local_process_zero=os.environ.get("LOCAL_RANK", "0") == "0",
        is_world_process_zero=place()[0] == 0,
    )


class Logged:
    """What one call of a function of n trajectories logged; a call that was given up keeps its own."""

    def __init__(self, function: str, count: int) -> None:
        self.function, self.count = function, count
        self.metrics: dict[str, list[float]] = {}
        """By name, a number for each time that it was logged."""
        self.extras: dict[str, list[Any]] = {}
        """By column, n plain values."""

    def log_metric(self, name: str, value: Any) -> None:
        """Raises TypeError or ValueError where `value` is not one number."""
        self.metrics.setdefault(encodable(str(name)), []).append(float(value))

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        """Raises RewardError where there are not n values. The same column again takes the place of the first."""
        listed = list(values)
        if len(listed) != self.count:
            raise RewardError(
                self.function,
                None,
                f"log_extra({str(column)!r}): expected {self.count} values, one per trajectory, got {len(listed)}; "
                "log one for each completion",
            )
        self.extras[encodable(str(column))] = [plain(value) for value in listed]


def encodable(text: str) -> str:
    """`text` as UTF-8 can carry it: halves of surrogate pairs, which a tokenizer's or JSON's pieces may end in, as
    their numbers."""
    return text.encode("utf-8", "backslashreplace").decode()


def plain(value: Any) -> Any:
    """A logged value as JSON and a pipe can carry it: numbers, texts, lists and dicts so, all else in words."""
    if isinstance(value, str):
        return encodable(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, np.generic | np.ndarray | Tensor):
        if math.prod(value.shape) > MOST_NUMBERS:
            return f"{type(value).__name__} {list(value.shape)} of {value.dtype}"
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {encodable(str(name)): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return encodable(str(value)[:MOST_TEXT])


def hooks_of(function: Callable[..., Any], logged: Logged, state: TrainerState) -> dict[str, Any]:
    """The keyword arguments that `function` gets beside its columns."""
    given = {"trainer_state": state, "log_extra": logged.log_extra, "log_metric": logged.log_metric}
    return {name: given[name] for name in HOOKS if name in _wanted(function)}


def _wanted(function: Callable[..., Any]) -> frozenset[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of what is not written in Python
        return frozenset()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return frozenset(HOOKS)
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return frozenset(HOOKS) & by_name


def logged_columns(calls: Mapping[str, Logged], names: Iterable[str]) -> dict[str, list[Any]]:
    """The columns of several functions' calls by name; one that is another's, or a reward's, has its function's before
    it.

    Args:
        calls: by function.
        names: of the rewards.
    """
    taken, found = {*names, "reward"}, dict[str, list[Any]]()
    for name, call in calls.items():
        for column, values in call.extras.items():
            free = column if column not in taken else f"{name}/{column}"
            taken.add(free)
            found[free] = values
    return found


def logged_metrics(calls: Iterable[Logged]) -> dict[str, list[float]]:
    """The numbers of several functions' calls by name; those of one name are one metric, as in TRL."""
    found: dict[str, list[float]] = {}
    for name, values in chain.from_iterable(call.metrics.items() for call in calls):
        found.setdefault(name, []).extend(values)
    return found
