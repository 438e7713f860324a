"""Reward functions that were written for other codebases, called as ours are.

Each adapter takes their function and returns one with our signature: it passes what their trainer would pass, for the
rows that have it (a text, an image), and gives None for the others. Results may be lists, arrays or tensors; columns of
the data (`Prompt.extra`) go by their own names. The result has their function's name, and says in `kind` whether it
judges `text` or `image` where the form of the call tells. `ADAPTERS` names them for `load_reward`.

Dims: S trajectories, n of them with an image.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...errors import RewardError
from ..builtin.batches import by_shape
from ..places import defined_at
from ..reward import RewardFunction, RewardValues

Foreign = Callable[..., Any]
Columns = dict[str, list[Any]]

_OURS = frozenset({"prompts", "completions", "completion_ids", "images"})
"""Columns that stand for the trajectory, not for the data."""


def verl(function: Foreign) -> RewardFunction:
    """`fn(data_source, solution_str, ground_truth, extra_info) -> float | dict with "score"`, row by row, also async.

    `ground_truth` is our `answer`, `data_source` a column of that name, else the task. `extra_info` is that column's
    dict, to which all other columns of the row are added. Rows without a text segment get None.

    Source: verl's `verl/experimental/reward_loop/reward_manager/naive.py`; older ones have "reward" for "score".
    """

    @_like(function, "text")
    def reward(**columns: Any) -> RewardValues | Awaitable[RewardValues]:
        rows = _with_text(columns)
        results = [
            function(
                data_source=source,
                solution_str=columns["completions"][row],
                ground_truth=columns["answer"][row],
                extra_info=extra_info,
            )
            for row, (source, extra_info) in zip(rows, _verl_rows(columns, rows), strict=True)
        ]
        if any(inspect.isawaitable(result) for result in results):
            return _gathered(results, rows, columns, reward.__name__)
        return _spread([_verl_score(result) for result in results], rows, columns, reward.__name__)

    return reward


def verl_batch(function: Foreign) -> RewardFunction:
    """`fn(data_sources, solution_strs, ground_truths, extra_infos) -> list` of what `verl` returns per row.

    Source: verl's `verl/workers/reward_manager/batch.py`.
    """

    @_like(function, "text")
    def reward(**columns: Any) -> RewardValues:
        rows = _with_text(columns)
        pairs = _verl_rows(columns, rows)
        if not rows:
            return [None] * len(columns["completions"])
        results = function(
            data_sources=[source for source, _ in pairs],
            solution_strs=[columns["completions"][row] for row in rows],
            ground_truths=[columns["answer"][row] for row in rows],
            extra_infos=[extra for _, extra in pairs],
        )
        scores = [_verl_score(result) for result in results] if isinstance(results, list | tuple) else results
        return _spread(scores, rows, columns, reward.__name__)

    return reward


def openrlhf(function: Foreign) -> RewardFunction:
    """`fn(queries, prompts, labels) -> tensor | list | {"rewards": …}`; a query is the prompt with its response.

    Rows without a text segment get None. The whole batch goes in at once; OpenRLHF itself calls with one row at a time
    since it became asynchronous, so a function that returns a single number for many rows is refused.

    Source: OpenRLHF's `examples/python/reward_func.py` and `openrlhf/utils/agent.py`.
    """

    @_like(function, "text")
    def reward(**columns: Any) -> RewardValues:
        rows = _with_text(columns)
        if not rows:
            return [None] * len(columns["completions"])
        prompts = [columns["prompts"][row] for row in rows]
        queries = [prompt + columns["completions"][row] for prompt, row in zip(prompts, rows, strict=True)]
        result = function(queries, prompts, [columns["answer"][row] for row in rows])
        return _spread(result["rewards"] if isinstance(result, dict) else result, rows, columns, reward.__name__)

    return reward


def flow_grpo(function: Foreign) -> RewardFunction:
    """`fn(images, prompts, metadata) -> (scores, …)`, images a float tensor [n, 3, H, W] in [0, 1].

    `metadata` is a list of dicts, one per image: the column `metadata`, to which the row's other columns are added.
    `scores` may be the dict of their `multi_score`, of which "avg" counts. Images of different sizes go in one call
    per size. Their `jpeg_compressibility` and the like *make* such a function: `flow_grpo@flow_grpo.rewards:name()`.

    Source: flow_grpo's `flow_grpo/rewards.py`.
    """

    @_like(function, "image")
    def reward(**columns: Any) -> RewardValues:
        images: list[Tensor | None] = columns["images"]
        values: RewardValues = [None] * len(images)
        with_image = [row for row, image in enumerate(images) if image is not None]
        drawn = [image for image in images if image is not None]
        for members in by_shape(drawn):
            rows = [with_image[i] for i in members]
            batch = torch.stack([drawn[i] for i in members])
            metadata = [_row(columns, row, "metadata") for row in rows]
            result = function(batch, [columns["prompts"][row] for row in rows], metadata)
            scores = result[0] if isinstance(result, tuple) else result
            scores = scores["avg"] if isinstance(scores, dict) else scores
            for row, value in zip(rows, _numbers(scores, len(rows), reward.__name__), strict=True):
                values[row] = value
        return values

    return reward


def t2i_r1(function: Foreign) -> RewardFunction:
    """An object with `__call__(prompts, images, **columns) -> list`, images PIL, such as `HPSv2` or `GIT`.

    Its `load_to_device(device)`, if it has one, is called before its first use. Columns such as `nouns`,
    `attr_nouns`, `spatial_info`, `numeracy_info` and `task_type` must be in the data. Its constructor takes the run's
    arguments, so name a function of your own that makes it, `t2i_r1@my_rewards.py:hps()`.

    Source: T2I-R1's `src/t2i-r1/src/utils/reward_{hps,git,gdino,orm}.py` and `open_r1/trainer/grpo_trainer.py`.
    """
    lock = threading.Lock()
    loaded = False

    @_like(function, "image")
    def reward(**columns: Any) -> RewardValues:
        nonlocal loaded
        with lock:
            if not loaded and hasattr(function, "load_to_device"):
                function.load_to_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
            loaded = True
        rows = [row for row, image in enumerate(columns["images"]) if image is not None]
        if not rows:
            return [None] * len(columns["images"])
        data = {name: [column[row] for row in rows] for name, column in columns.items() if name not in _OURS}
        pictures = [to_picture(columns["images"][row]) for row in rows]
        result = function(prompts=[columns["prompts"][row] for row in rows], images=pictures, **data)
        return _spread(result, rows, columns, reward.__name__)

    return reward


def trl(function: Foreign) -> RewardFunction:
    """TRL's own signature, `fn(prompts, completions, **columns) -> list`, sync or async.

    It is ours, too; this is for functions that expect a drawn image as the completion itself, a PIL image, as the
    trainers for images that are built on TRL pass it (ULM-R1): a row without a text segment has its image there.
    `images` are PIL, and `solution`, which TRL's own rewards read, is our `answer`.

    Source: TRL's `GRPOTrainer._calculate_rewards`; ULM-R1's `rewards/r_t2i.py`.
    """
    return _trl(function, as_chat=False)


def trl_chat(function: Foreign) -> RewardFunction:
    """As `trl`, for functions that read `completion[0]["content"]`: data in the form of conversations.

    Source: TRL's `trl/rewards/format_rewards.py`.
    """
    return _trl(function, as_chat=True)


def _trl(function: Foreign, *, as_chat: bool) -> RewardFunction:
    def arguments(columns: Columns) -> Columns:
        pictures = [None if image is None else to_picture(image) for image in columns["images"]]
        spoken = set(_with_text(columns))
        completions: list[Any] = [
            text if row in spoken or pictures[row] is None else pictures[row]
            for row, text in enumerate(columns["completions"])
        ]
        prompts: list[Any] = columns["prompts"]
        if as_chat:
            completions = [[{"role": "assistant", "content": content}] for content in completions]
            prompts = [[{"role": "user", "content": content}] for content in prompts]
        given = {"solution": columns["answer"], **columns}
        return given | {"prompts": prompts, "completions": completions, "images": pictures}

    @_like(function)
    def reward(**columns: Any) -> RewardValues | Awaitable[RewardValues]:
        everyone = range(len(columns["completions"]))
        result = function(**arguments(columns))
        if not inspect.isawaitable(result):
            return _spread(result, everyone, columns, reward.__name__)

        async def later() -> RewardValues:
            return _spread(await result, everyone, columns, reward.__name__)

        return later()

    return reward


ADAPTERS: dict[str, Callable[[Foreign], RewardFunction]] = {
    adapter.__name__: adapter for adapter in (verl, verl_batch, openrlhf, flow_grpo, t2i_r1, trl, trl_chat)
}


def to_picture(image: Tensor) -> Image.Image:
    """[3, H, W] float in [0, 1] to a PIL image, rounded to 8 bits."""
    pixels = (image.detach().float().cpu().clamp(0.0, 1.0) * 255.0).round().byte().permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(pixels.numpy()))


def _like(function: Foreign, kind: str | None = None) -> Callable[[Callable[..., Any]], RewardFunction]:
    """Gives a reward their function's name (an object's own, else its class's) and the kind of segment it judges."""
    kind = getattr(function, "kind", kind)

    def named(reward: Callable[..., Any]) -> RewardFunction:
        reward.__name__ = getattr(function, "__name__", type(function).__name__)
        reward.defined = defined_at(function)  # type: ignore[attr-defined]
        if kind is not None:
            reward.kind = kind  # type: ignore[attr-defined]
        return reward

    return named


def _with_text(columns: Columns) -> list[int]:
    """Rows whose prompt asks for a text; all, where nothing is said about segments."""
    segments = columns.get("segments")
    return [row for row in range(len(columns["completions"])) if segments is None or "text" in segments[row]]


def _row(columns: Columns, row: int, own: str) -> dict[str, Any]:
    """All columns of one row as a dict; those in its column `own`, a dict, come first."""
    values = {name: column[row] for name, column in columns.items() if name not in _OURS and name != own}
    given = columns[own][row] if own in columns else None
    return values | {"images": columns["images"][row], "prompts": columns["prompts"][row]} | dict(given or {})


def _verl_rows(columns: Columns, rows: Sequence[int]) -> list[tuple[Any, dict[str, Any]]]:
    nothing = [None] * len(columns["completions"])
    own, task = columns.get("data_source", nothing), columns.get("task", nothing)
    return [(task[row] if own[row] is None else own[row], _row(columns, row, "extra_info")) for row in rows]


def _verl_score(result: Any) -> Any:
    return result.get("score", result.get("reward")) if isinstance(result, dict) else result


async def _gathered(results: list[Any], rows: Sequence[int], columns: Columns, name: str) -> RewardValues:
    values = await asyncio.gather(*results)
    return _spread([_verl_score(value) for value in values], rows, columns, name)


def _spread(scores: Any, rows: Sequence[int], columns: Columns, name: str) -> RewardValues:
    """[S] values: `scores` at `rows`, None elsewhere."""
    values: RewardValues = [None] * len(columns["completions"])
    for row, value in zip(rows, _numbers(scores, len(rows), name), strict=True):
        values[row] = value
    return values


def _numbers(scores: Any, count: int, name: str) -> RewardValues:
    """[count] plain numbers or None, from a list, an array or a tensor of numbers.

    Raises:
        RewardError: another number of them, or something that is no number.
    """
    if isinstance(scores, Tensor | np.ndarray):
        scores = scores.reshape(-1).tolist()
    if not isinstance(scores, list | tuple):
        raise RewardError(name, None, f"expected {count} scores, got {type(scores).__name__}")
    if len(scores) != count:
        raise RewardError(name, None, f"expected {count} scores, one per row, got {len(scores)}")
    values: RewardValues = []
    for index, score in enumerate(scores):
        try:
            if isinstance(score, str | bytes):
                raise TypeError
            values.append(None if score is None else float(score))
        except (TypeError, ValueError):
            raise RewardError(name, index, f"expected a number or None, got {type(score).__name__}") from None
    return values
