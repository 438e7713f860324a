"""Trajectories in, one `[S, K]` table of rewards out.

A function that raises or is late gives None for all and is counted: never 0.0, which would be a verdict.  Every rank
scores its own trajectories.

Dims: S trajectories, n of them shown to the functions, K rewards, P prompts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import RewardError
from ..records import Rollout
from .calling import call_all
from .hooks import TrainerState, logged_columns, logged_metrics
from .places import told
from .reward import Columns, RewardFunction, columns_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTable:
    """What every reward said about every trajectory."""

    values: Tensor
    """[S, K] float32; NaN = did not apply, or failed."""
    names: tuple[str, ...]
    """[K] column names."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Calls that raised or ran late, by name, and those that a function counts itself in `num_failed_calls`, such as a
    remote judge's requests that it gave up; 0 for the others."""
    errors: Mapping[str, str] = field(default_factory=dict)
    """Why a function gave nothing at all, with the line of the user's file."""
    metrics: Mapping[str, list[float]] = field(default_factory=dict)
    """What functions logged by `log_metric`: by name, a number for each time."""
    extras: Mapping[str, list[Any]] = field(default_factory=dict)
    """What they logged by `log_extra`: by column, [S] plain values, None where nothing was logged."""

    def means(self) -> dict[str, float]:
        """`rewards/<name>/mean` over the trajectories that have it; a reward that nobody has is absent."""
        columns = {
            name: column[~column.isnan()] for name, column in zip(self.names, self.values.unbind(1), strict=True)
        }
        return {f"rewards/{name}/mean": float(column.mean()) for name, column in columns.items() if column.numel()}

    def placed(self, rows: Sequence[int], num_rows: int) -> RewardTable:
        """The same of `num_rows` trajectories, of which `rows` are these; the others have no reward."""
        values = torch.full((num_rows, len(self.names)), math.nan)
        values[list(rows)] = self.values
        extras = {name: _placed(column, rows, num_rows) for name, column in self.extras.items()}
        return replace(self, values=values, extras=extras)

    def of_rows(self, rows: Sequence[int]) -> RewardTable:
        """The same of a part of the trajectories."""
        extras = {name: [column[row] for row in rows] for name, column in self.extras.items()}
        return replace(self, values=self.values[list(rows)], extras=extras)

    def and_then(self, later: RewardTable) -> RewardTable:
        """Both, one behind the other, of the same functions. One that gave anything in either has no error."""
        failures = {name: self.failures.get(name, 0) + later.failures.get(name, 0) for name in self.names}
        errors = {**self.errors, **later.errors}
        if self.values.numel() and later.values.numel():
            errors = {name: said for name, said in errors.items() if name in self.errors and name in later.errors}
        both = (self, later)
        logged = {n: [v for part in both for v in part.metrics.get(n, ())] for part in both for n in part.metrics}
        extras = {name: [v for part in both for v in part._extra(name)] for part in both for name in part.extras}
        values = torch.cat([self.values, later.values])
        return RewardTable(
            values=values, names=self.names, failures=failures, errors=errors, metrics=logged, extras=extras
        )

    def _extra(self, name: str) -> list[Any]:
        """[S] values of a column, None where nobody logged it."""
        return self.extras.get(name) or [None] * len(self.values)


def _placed(column: Sequence[Any], rows: Sequence[int], num_rows: int) -> list[Any]:
    known = dict(zip(rows, column, strict=True))
    return [known.get(row) for row in range(num_rows)]


def score(
    rollouts: Sequence[Rollout],
    reward_functions: Mapping[str, RewardFunction],
    timeout: float = 120.0,
    *,
    step: int | None = None,
    state: TrainerState | None = None,
) -> RewardTable:
    """Score trajectories by every function.

    Args:
        rollouts: [S], groups one after another or not; anchors (`prompt.rewarded` False) and what a preview dropped
            are not shown to the functions.
        reward_functions: [K] name -> function; names become columns in this order.
        timeout: seconds that a function may take, counted from the common start.
        step: of the training, for errors and the log.
        state: of the training, for functions that ask for `trainer_state`.

    Returns:
        RewardTable, `values` [S, K]. NaN all over for anchors and for what was dropped. A member that lacks a reward
        which others of its group have gets NaN in every column: summing what is left would read it as zero.

    Raises:
        RewardError: a function returned the wrong number of values, or NaN, infinity, text or a tensor: a bug, which
            will not mend itself.
    """
    shown = [i for i, rollout in enumerate(rollouts) if rollout.prompt.rewarded and not rollout.dropped]
    columns = columns_of([rollouts[i] for i in shown])
    table = score_columns(columns, reward_functions, timeout, step=step, state=state)
    return table.placed(shown, len(rollouts))


def score_columns(
    columns: Columns,
    reward_functions: Mapping[str, RewardFunction],
    timeout: float = 120.0,
    *,
    step: int | None = None,
    state: TrainerState | None = None,
) -> RewardTable:
    """`score` of the trajectories [n] that `columns` describe, all of which are shown."""
    ids = columns["id"]
    values = torch.full((len(ids), len(reward_functions)), math.nan)
    failures, errors = dict.fromkeys(reward_functions, 0), {}
    counted = {name: failed_calls(function) for name, function in reward_functions.items()}
    outcomes = call_all(reward_functions, columns, timeout, state) if ids else {}
    for column, (name, outcome) in enumerate(outcomes.items()):
        error = outcome.error
        failures[name] = failed_calls(reward_functions[name]) - counted[name]
        if isinstance(error, RewardError):
            error.where = _where(step, ids, error.index)
            raise error from None
        if error is None:
            values[:, column] = torch.tensor([math.nan if v is None else float(v) for v in outcome.values])
            continue
        failures[name] = max(1, failures[name])
        said = errors[name] = told(error)
        logger.warning(
            "reward %r failed (%s) and is None for all %d trajectories: %s", name, _where(step), len(ids), said
        )
    values[_incomplete(ids, values)] = math.nan
    calls = {name: outcome.logged for name, outcome in outcomes.items() if outcome.error is None}
    return RewardTable(
        values=values,
        names=tuple(reward_functions),
        failures=failures,
        errors=errors,
        metrics=logged_metrics(calls.values()),
        extras=logged_columns(calls, reward_functions),
    )


def failed_calls(function: RewardFunction) -> int:
    """Calls that a function made and gave up so far, where it counts them."""
    return int(getattr(function, "num_failed_calls", 0))


def _where(step: int | None, ids: Sequence[str] = (), index: int | None = None) -> str:
    """This rank, the step and the prompt, as far as they are known."""
    parts = [f"rank {dist.get_rank() if dist.is_initialized() else 0}"]
    if step is not None:
        parts.append(f"step {step}")
    if index is not None and 0 <= index < len(ids):
        parts.append(f"prompt {ids[index]!r}")
    return ", ".join(parts)


def _incomplete(ids: Sequence[str], values: Tensor) -> Tensor:
    """[n] bool: trajectories that lack a reward which another trajectory of the same prompt has."""
    known: dict[str, int] = {}
    group_n = torch.tensor([known.setdefault(prompt_id, len(known)) for prompt_id in ids], dtype=torch.long)
    present_nK = ~values.isnan()
    applies_PK = torch.zeros(len(known), values.shape[1]).index_add_(0, group_n, present_nK.float()) > 0
    return (applies_PK[group_n] & ~present_nK).any(1)
