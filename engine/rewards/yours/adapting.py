"""What adapters of other codebases' rewards have in common: rows in, numbers and further entries out.

Dims: S trajectories, n of them shown to a function.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ...errors import RewardError
from ..hooks import HOOKS
from ..places import defined_at
from ..reward import RewardFunction, RewardValues, checked

Foreign = Callable[..., Any]
Columns = dict[str, Any]
"""What a reward gets: columns, and the hooks of hooks.py."""

NO_DATA = frozenset({"prompts", "completions", "completion_ids", "images", *HOOKS})
"""Keywords that stand for the trajectory or the training, not for the data."""


def like(function: Foreign, kind: str | None = None) -> Callable[[Callable[..., Any]], RewardFunction]:
    """Gives a reward their function's name (an object's own, else its class's) and the kind of segment it judges."""
    kind = getattr(function, "kind", kind)

    def named(reward: Callable[..., Any]) -> RewardFunction:
        reward.__name__ = getattr(function, "__name__", type(function).__name__)
        reward.defined = defined_at(function)  # type: ignore[attr-defined]
        if kind is not None:
            reward.kind = kind  # type: ignore[attr-defined]
        return reward

    return named


def with_text(columns: Columns) -> list[int]:
    """Rows whose prompt asks for a text; all, where nothing is said about segments."""
    segments = columns.get("segments")
    return [row for row in range(len(columns["completions"])) if segments is None or "text" in segments[row]]


def with_image(columns: Columns) -> list[int]:
    """Rows that have a drawn image."""
    return [row for row, image in enumerate(columns["images"]) if image is not None]


def data_of(columns: Columns) -> dict[str, list[Any]]:
    """The columns that are the data's."""
    return {name: column for name, column in columns.items() if name not in NO_DATA}


def row_of(columns: Columns, row: int, own: str) -> dict[str, Any]:
    """All columns of one row as a dict; those in its column `own`, a dict, come first."""
    values = {name: column[row] for name, column in data_of(columns).items() if name != own}
    given = columns[own][row] if own in columns else None
    return values | {"images": columns["images"][row], "prompts": columns["prompts"][row]} | dict(given or {})


def spread(scores: Any, rows: Sequence[int], columns: Columns, name: str) -> RewardValues:
    """[S] values: `scores` at `rows`, None elsewhere; RewardError as `reward.checked`, named by their own row."""
    values: RewardValues = [None] * len(columns["images"])
    for row, value in zip(rows, checked_at(scores, rows, name), strict=True):
        values[row] = value
    return values


def checked_at(scores: Any, rows: Sequence[int], name: str) -> RewardValues:
    """The scores of `rows`, as `reward.checked` takes them; an error's index is the row's."""
    if isinstance(scores, Tensor | np.ndarray):
        scores = scores.reshape(-1)  # [n, 1] and a single number of one row
    try:
        return checked(name, scores, len(rows))
    except RewardError as error:
        if error.index is None:
            raise
        raise RewardError(name, rows[error.index], error.problem) from None


def log_entries(columns: Columns, entries: Mapping[int, Mapping[str, Any]]) -> None:
    """Logs what a function says of rows beside their scores, as columns of the completions.

    Args:
        columns: what the reward got, with its hooks.
        entries: row -> name -> value.
    """
    log_extra = columns.get("log_extra")
    if log_extra is None:
        return
    for name in dict.fromkeys(name for entry in entries.values() for name in entry):
        log_extra(name, [entries.get(row, {}).get(name) for row in range(len(columns["images"]))])


def log_means(columns: Columns, found: Mapping[str, Any]) -> None:
    """Logs the mean of each entry that is a number, or a list, an array or a tensor of them."""
    log_metric = columns.get("log_metric")
    if log_metric is None:
        return
    for name, value in found.items():
        listed = value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value
        listed = listed if isinstance(listed, list | tuple) else [listed]
        plain = [item.item() if isinstance(item, Tensor | np.generic) else item for item in listed]
        if plain and all(isinstance(item, numbers.Real) for item in plain):
            log_metric(name, sum(map(float, plain)) / len(plain))


def only_wanted(function: Foreign, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a function names; all of them where it takes any, or where nothing tells."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return dict(arguments)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in parameters}


def later(results: Awaitable[list[Any]], finish: Callable[[list[Any]], RewardValues]) -> Awaitable[RewardValues]:
    """What `finish` makes of results that are still to come."""

    async def finished() -> RewardValues:
        return finish(await results)

    return finished()


def to_picture(image: Tensor) -> Image.Image:
    """[3, H, W] float in [0, 1] to a PIL image, rounded to 8 bits."""
    pixels = (image.detach().float().cpu().nan_to_num(0.0).clamp(0.0, 1.0) * 255.0).round().byte().permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(pixels.numpy()))
