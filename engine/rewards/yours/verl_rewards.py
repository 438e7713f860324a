"""Reward functions of verl and verl-omni, called as ours are: row by row, as a batch, or on drawn images.

`ground_truth` is the row's `reward_model["ground_truth"]`, as verl's data have it, else our `answer` (of an image: what
was to be drawn); `data_source` a column of that name, else the task; `extra_info` that column's dict, to which all
other columns of the row are added, and what verl's managers add.  A result is a number or a dict with "score"; its
other entries are logged per row.

Source: verl's `verl/experimental/reward_loop/reward_manager/{naive,dapo}.py` and
`verl/workers/reward_manager/batch.py`, verl-omni's `verl_omni/reward_loop/reward_manager/{visual,multi}.py`.

Dims: S trajectories.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import RewardError
from ..reward import RewardFunction, RewardValues
from .adapting import Columns, Foreign, later, like, log_entries, only_wanted, row_of, spread, with_image, with_text

SCORES = ("score", "reward")
"""The entry that is trained on; older functions have the second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlong:
    """verl's `reward_kwargs` of the DAPO manager: what a text loses that comes near the longest one allowed.

    min(0, -(length - (max_resp_len - len)) / len * penalty_factor), lengths in tokens."""

    max_resp_len: int
    """The longest text, tokens; `max_completion_length` of the run."""
    len: int
    """Tokens before it within which the loss grows from 0 to `penalty_factor`."""
    penalty_factor: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.len <= self.max_resp_len:
            raise ValueError(
                f"overlong: expected 0 < len <= max_resp_len, got {self.len} and {self.max_resp_len}; correct them"
            )

    def penalty(self, length: int) -> float:
        exceeds = length - (self.max_resp_len - self.len)
        return min(-exceeds / self.len * self.penalty_factor, 0.0)


def verl(function: Foreign, *, overlong: Overlong | None = None) -> RewardFunction:
    """`fn(data_source, solution_str, ground_truth, extra_info) -> float | dict with "score"`, row by row, also async.

    Rows without a text segment get None. With `overlong`, as verl's DAPO manager.
    """

    @like(function, "text")
    def reward(**columns: Any) -> RewardValues | Awaitable[RewardValues]:
        rows = with_text(columns)
        results = [
            function(solution_str=columns["completions"][row], **about)
            for row, about in zip(rows, _about(columns, rows), strict=True)
        ]

        def finish(found: Sequence[Any]) -> RewardValues:
            return _finished(found, rows, columns, reward.__name__, overlong)

        if any(inspect.isawaitable(result) for result in results):
            return later(_gathered(results), finish)
        return finish(results)

    return reward


def verl_batch(function: Foreign, *, overlong: Overlong | None = None) -> RewardFunction:
    """`fn(data_sources, solution_strs, ground_truths, extra_infos) -> list` of what `verl` returns per row."""

    @like(function, "text")
    def reward(**columns: Any) -> RewardValues:
        rows = with_text(columns)
        if not rows:
            return [None] * len(columns["images"])
        about = _about(columns, rows)
        results = function(
            data_sources=[one["data_source"] for one in about],
            solution_strs=[columns["completions"][row] for row in rows],
            ground_truths=[one["ground_truth"] for one in about],
            extra_infos=[one["extra_info"] for one in about],
        )
        return _finished(results, rows, columns, reward.__name__, overlong)

    return reward


def verl_omni(function: Foreign) -> RewardFunction:
    """`fn(data_source, solution_image, ground_truth, extra_info) -> float | dict with "score"`, row by row, also async.

    Images are uint8 tensors [3, H, W] in [0, 255]; a function that names fewer arguments gets those. Where the data
    have no ground truth, what was to be drawn stands for it, as in verl-omni's own data. Rows without an
    image get None.
    """

    @like(function, "image")
    def reward(**columns: Any) -> RewardValues | Awaitable[RewardValues]:
        rows = with_image(columns)
        results = [
            function(**only_wanted(function, about | {"solution_image": _bytes_of(columns["images"][row])}))
            for row, about in zip(rows, _about(columns, rows, drawn=True), strict=True)
        ]

        def finish(found: Sequence[Any]) -> RewardValues:
            return _finished(found, rows, columns, reward.__name__, None)

        if any(inspect.isawaitable(result) for result in results):
            return later(_gathered(results), finish)
        return finish(results)

    return reward


def truths(columns: Columns, rows: Sequence[int], *, drawn: bool = False) -> list[Any]:
    """The ground truth of each row. `drawn`: of its image, which is what was to be drawn, not the answer, where the
    data have none in verl's form."""
    given, answers = columns.get("reward_model"), columns.get("answer")
    found = []
    for row in rows:
        truth = given[row].get("ground_truth") if given and isinstance(given[row], Mapping) else None
        if truth is None:
            truth = asked_of(columns, row) if drawn else answers and answers[row]
        found.append(truth)
    return found


def asked_of(columns: Columns, row: int) -> str:
    """What was to be drawn: the explicit description, where the data have one, else what the user said."""
    targets = columns.get("target")
    return str((targets and targets[row]) or columns["prompts"][row])


def _about(columns: Columns, rows: Sequence[int], *, drawn: bool = False) -> list[dict[str, Any]]:
    """`data_source`, `ground_truth` and `extra_info` of each row."""
    nothing = [None] * len(columns["images"])
    own, task = columns.get("data_source", nothing), columns.get("task", nothing)
    added: dict[str, Any] = {"num_turns": None, "rollout_reward_scores": {}}  # as verl's managers do for a single turn
    return [
        {
            "data_source": task[row] if own[row] is None else own[row],
            "ground_truth": truth,
            "extra_info": row_of(columns, row, "extra_info") | added,
        }
        for row, truth in zip(rows, truths(columns, rows, drawn=drawn), strict=True)
    ]


def _bytes_of(image: torch.Tensor) -> torch.Tensor:
    """[3, H, W] float in [0, 1] -> uint8."""
    return (image.detach().float().cpu().nan_to_num(0.0).clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)


async def _gathered(results: Sequence[Any]) -> list[Any]:
    return list(await asyncio.gather(*results))


def _finished(
    results: Any, rows: Sequence[int], columns: Columns, name: str, overlong: Overlong | None
) -> RewardValues:
    """[S] values of what was returned for `rows`; entries beside the scores are logged."""
    if not isinstance(results, list | tuple) or len(results) != len(rows):  # an array, or what `spread` refuses
        return _shortened(spread(results, rows, columns, name), rows, columns, overlong)
    scores, entries = [], dict[int, dict[str, Any]]()
    for row, result in zip(rows, results, strict=True):
        if isinstance(result, Mapping):
            key = next((key for key in SCORES if key in result), None)
            if key is None:
                keys = ", ".join(map(str, result)) or "nothing"
                raise RewardError(name, row, f"expected a dict with 'score', got one with {keys}; add the score")
            entries[row] = {str(other): value for other, value in result.items() if other != key}
            result = result[key]
        scores.append(result)
    values = spread(scores, rows, columns, name)
    log_entries(columns, entries)
    return _shortened(values, rows, columns, overlong)


def _shortened(values: RewardValues, rows: Sequence[int], columns: Columns, overlong: Overlong | None) -> RewardValues:
    """What the length of a text costs it, taken off and logged as verl does."""
    if overlong is None:
        return values
    penalties = {row: overlong.penalty(len(columns["completion_ids"][row])) for row in rows}
    log_entries(columns, {row: {"overlong_reward": lost, "overlong": lost < 0} for row, lost in penalties.items()})
    return [None if value is None else value + penalties[row] for row, value in enumerate(values)]
