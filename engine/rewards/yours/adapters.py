"""Reward functions that were written for other codebases, called as ours are.

Each adapter takes their function and returns one with our signature: it passes what their trainer would pass, for the
rows that have it (a text, an image), and gives None for the others. Results may be lists, arrays or tensors; columns of
the data (`Prompt.extra`) go by their own names; what they log beside their scores is logged. The result has their
function's name, and says in `kind` whether it judges `text` or `image` where the form of the call tells. `ADAPTERS`
names them for `load_reward`; verl's are in verl_rewards.py.

Dims: S trajectories, n of them with an image.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import RewardError
from ..builtin.batches import by_shape
from ..reward import RewardFunction, RewardValues
from .adapting import (
    Columns,
    Foreign,
    checked_at,
    data_of,
    later,
    like,
    log_means,
    row_of,
    spread,
    to_picture,
    with_image,
    with_text,
)
from .verl_rewards import verl, verl_batch, verl_omni


def openrlhf(function: Foreign) -> RewardFunction:
    """`fn(queries, prompts, labels) -> tensor | list | {"rewards": …}`; a query is the prompt with its response.

    Rows without a text segment get None. The whole batch goes in at once; a function that gives back a single number
    for many rows is called with one row at a time, as OpenRLHF itself does since it became asynchronous. The numbers
    of `extra_logs` are logged as metrics.

    Source: OpenRLHF's `examples/python/reward_func.py` and `openrlhf/utils/agent.py`.
    """

    @like(function, "text")
    def reward(**columns: Any) -> RewardValues:
        rows = with_text(columns)
        if not rows:
            return [None] * len(columns["images"])
        found = [function(*_queries(columns, rows))]
        if len(rows) > 1 and _count(_rewards_of(found[0], reward.__name__)) == 1:
            found = [function(*_queries(columns, [row])) for row in rows]
        for result in found:
            if isinstance(result, Mapping):
                log_means(columns, result.get("extra_logs") or {})
        scores = [_rewards_of(result, reward.__name__) for result in found]
        if len(scores) == 1:
            return spread(scores[0], rows, columns, reward.__name__)
        each = [checked_at(_as_list(score), [row], reward.__name__)[0] for score, row in zip(scores, rows, strict=True)]
        return spread(each, rows, columns, reward.__name__)

    return reward


def _queries(columns: Columns, rows: Sequence[int]) -> tuple[list[str], list[str], list[Any]]:
    prompts = [columns["prompts"][row] for row in rows]
    queries = [prompt + columns["completions"][row] for prompt, row in zip(prompts, rows, strict=True)]
    return queries, prompts, [columns["answer"][row] for row in rows]


def _rewards_of(result: Any, name: str) -> Any:
    if not isinstance(result, Mapping):
        return _as_list(result)
    if "rewards" not in result:
        raise RewardError(name, None, f"expected a dict with 'rewards', got one with {', '.join(map(str, result))}")
    return _as_list(result["rewards"])


def _as_list(scores: Any) -> Any:
    """A single number as a list of it."""
    return [scores] if isinstance(scores, int | float | np.generic) else scores


def _count(scores: Any) -> int:
    if isinstance(scores, Tensor | np.ndarray):
        return math.prod(scores.shape)
    return len(scores) if isinstance(scores, list | tuple) else 0


def flow_grpo(function: Foreign) -> RewardFunction:
    """`fn(images, prompts, metadata) -> (scores, …)`, images a float tensor [n, 3, H, W] in [0, 1].

    `metadata` is a list of dicts, one per image: the column `metadata`, to which the row's other columns are added.
    `scores` may be the dict of their `multi_score`, of which "avg" counts and the means of the others are logged as
    they log them. A function that asks for `only_strict` hears True, as in training. Images of different sizes go in
    one call per size. Their `jpeg_compressibility` and the like *make* such a function:
    `flow_grpo@flow_grpo.rewards:name()`.

    Source: flow_grpo's `flow_grpo/rewards.py` and `scripts/train_sd3.py`.
    """
    strict = {"only_strict": True} if _asks_for(function, "only_strict") else {}

    @like(function, "image")
    def reward(**columns: Any) -> RewardValues:
        images: list[Tensor | None] = columns["images"]
        values: RewardValues = [None] * len(images)
        present = with_image(columns)
        drawn = [image for image in images if image is not None]
        for members in by_shape(drawn):
            rows = [present[i] for i in members]
            batch = torch.stack([drawn[i] for i in members])
            metadata = [row_of(columns, row, "metadata") for row in rows]
            result = function(batch, [columns["prompts"][row] for row in rows], metadata, **strict)
            scores = result[0] if isinstance(result, tuple) else result
            if isinstance(scores, Mapping):
                if "avg" not in scores:
                    named = ", ".join(map(str, scores))
                    raise RewardError(reward.__name__, None, f"expected a dict with 'avg', got one with {named}")
                own = {name: each for name, each in scores.items() if "accuracy" not in name}
                log_means(columns, {f"reward_{name}": each for name, each in own.items()})
                scores = scores["avg"]
            for row, value in zip(rows, checked_at(_flat(scores), rows, reward.__name__), strict=True):
                values[row] = value
        return values

    return reward


def _flat(scores: Any) -> Any:
    return scores.reshape(-1) if isinstance(scores, Tensor | np.ndarray) else scores


def _asks_for(function: Foreign, name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def t2i_r1(function: Foreign) -> RewardFunction:
    """An object with `__call__(prompts, images, **columns) -> list`, images PIL, such as `HPSv2` or `GIT`.

    Its `load_to_device(device)`, if it has one, is called before its first use. Columns such as `nouns`,
    `attr_nouns`, `spatial_info`, `numeracy_info` and `task_type` must be in the data. Its constructor takes the run's
    arguments, so name a function of your own that makes it, `t2i_r1@my_rewards.py:hps()`.

    Source: T2I-R1's `src/t2i-r1/src/utils/reward_{hps,git,gdino,orm}.py` and `open_r1/trainer/grpo_trainer.py`.
    """
    lock = threading.Lock()
    loaded = False

    @like(function, "image")
    def reward(**columns: Any) -> RewardValues:
        nonlocal loaded
        with lock:
            if not loaded and hasattr(function, "load_to_device"):
                function.load_to_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
            loaded = True
        rows = with_image(columns)
        if not rows:
            return [None] * len(columns["images"])
        data = {name: [column[row] for row in rows] for name, column in data_of(columns).items()}
        pictures = [to_picture(columns["images"][row]) for row in rows]
        result = function(prompts=[columns["prompts"][row] for row in rows], images=pictures, **data)
        return spread(result, rows, columns, reward.__name__)

    return reward


def trl(function: Foreign) -> RewardFunction:
    """TRL's own signature, `fn(prompts, completions, **columns) -> list`, sync or async.

    It is ours, too; this is for functions that expect a drawn image as the completion itself, a PIL image, as the
    trainers for images that are built on TRL pass it (ULM-R1): a row without a text segment has its image there.
    `images` are PIL, and `solution`, which TRL's own rewards read, is our `answer`. NaN is None, as in TRL.

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
        spoken = set(with_text(columns))
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

    @like(function)
    def reward(**columns: Any) -> RewardValues | Awaitable[RewardValues]:
        everyone = range(len(columns["images"]))

        def finish(result: Any) -> RewardValues:
            return spread(_without_nan(result), everyone, columns, reward.__name__)

        result = function(**arguments(columns))
        return later(result, finish) if inspect.isawaitable(result) else finish(result)

    return reward


def _without_nan(result: Any) -> Any:
    """NaN as None: the trainer of TRL makes no difference between them."""
    listed = result.reshape(-1).tolist() if isinstance(result, Tensor | np.ndarray) else result
    if not isinstance(listed, list | tuple):
        return listed
    return [None if isinstance(value, float | Tensor | np.generic) and _is_nan(value) else value for value in listed]


def _is_nan(value: Any) -> bool:
    try:
        return math.isnan(value)
    except (TypeError, ValueError):  # a tensor of many numbers, complex ones: refused behind this
        return False


ADAPTERS: dict[str, Callable[[Foreign], RewardFunction]] = {
    adapter.__name__: adapter for adapter in (verl, verl_batch, verl_omni, openrlhf, flow_grpo, t2i_r1, trl, trl_chat)
}
