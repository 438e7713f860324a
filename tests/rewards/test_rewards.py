"""Calling rewards: signature, isolation, timeouts, contract, and what a missing value does to its group."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import multiprocessing
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import fields
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from syncr1.engine.errors import RewardError
from syncr1.engine.records import Prompt, Rollout, Segment
from syncr1.engine.rewards.calling import call_all, still_running
from syncr1.engine.rewards.ensemble import combine
from syncr1.engine.rewards.reward import columns_for, columns_of, mode_of
from syncr1.engine.rewards.scoring import score


def make_rollout(text: str = "red", prompt: str = "p0", member: int = 0, **fields_of_prompt: Any) -> Rollout:
    zeros = torch.zeros(len(text))
    tokens = torch.tensor([ord(c) for c in text], dtype=torch.int64)
    segment = Segment(kind="text", tokens=tokens, logp=zeros, logp_mixed=zeros, entropy=zeros)
    image = fields_of_prompt.pop("drawn", None)
    return Rollout(
        prompt=Prompt(**{"id": prompt, "task": "vqa", "text": "what colour?", "answer": "red", **fields_of_prompt}),
        member=member,
        prompt_tokens=torch.arange(3),
        prompt_image=None,
        segments=(segment,),
        text=text,
        image=image,
    )


def group(texts: list[str], prompt: str = "p0", **fields_of_prompt: Any) -> list[Rollout]:
    return [make_rollout(text, prompt, i, **fields_of_prompt) for i, text in enumerate(texts)]


def lengths(*, completions: list[str], **_: Any) -> list[float | None]:
    return [float(len(text)) for text in completions]


def test_columns_are_every_field_of_prompt_and_trl_names() -> None:
    columns = columns_of(group(["a", "bb"], task="rea", extra={"style": "oil", "prompts": "not these"}))
    assert {f.name for f in fields(Prompt)} - {"extra"} <= set(columns)
    assert columns["style"] == ["oil"] * 2, "further columns of the data come by their own names"
    assert columns["prompts"] == ["what colour?"] * 2
    assert columns["completions"] == ["a", "bb"]
    assert columns["completion_ids"] == [[97], [98, 98]]
    assert columns["mode"] == ["r", "r"]
    assert all(len(column) == 2 for column in columns.values())


def test_mode_follows_the_task() -> None:
    modes = {task: mode_of(make_rollout(task=task).prompt) for task in ("rea", "dense_rea", "rec", "qa", "vqa")}
    assert modes == {"rea": "r", "dense_rea": "r", "rec": "u", "qa": "u", "vqa": "u"}


def test_sync_and_async_functions_share_a_table() -> None:
    async def halves(*, completions: list[str], **_: Any) -> list[float | None]:
        await asyncio.sleep(0.01)
        return [len(text) / 2 for text in completions]

    table = score(group(["a", "bb"]), {"length": lengths, "half": halves})
    assert table.names == ("length", "half")
    assert table.values.dtype == torch.float32
    assert table.values.tolist() == [[1.0, 0.5], [2.0, 1.0]]
    assert table.failures == {"length": 0, "half": 0}
    assert table.means() == {"rewards/length/mean": 1.5, "rewards/half/mean": 0.75}


@pytest.mark.parametrize(
    "result",
    [
        [np.float32(0.5), True, 2],
        (0.5, np.bool_(True), np.int64(2)),
        torch.tensor([0.5, 1.0, 2.0]),
        torch.tensor([[0.5], [1.0], [2.0]], dtype=torch.bfloat16, requires_grad=True),
        np.array([0.5, 1, 2], dtype=np.float16),
        [torch.tensor(0.5), torch.tensor([1]), np.array([[2.0]])],
        [Decimal("0.5"), Fraction(1), torch.tensor(2)],
        deque([0.5, 1.0, 2.0]),
        (value for value in (0.5, 1.0, 2.0)),
        {"a": 0.5, "b": 1, "c": 2}.values(),
    ],
    ids=lambda result: type(result).__name__,
)
def test_what_trl_takes_are_numbers(result: Any) -> None:
    """Numbers of Python, NumPy and torch, in whatever has an order."""
    table = score(group(["a", "b", "c"]), {"mixed": lambda **_: result})
    assert table.values[:, 0].tolist() == [0.5, 1.0, 2.0]


def test_none_stays_none_and_truths_are_numbers() -> None:
    table = score([*group(["a"], "p0"), *group(["b"], "p1")], {"mixed": lambda **_: [None, np.bool_(False)]})
    assert table.values[0].isnan().all() and table.values[1].tolist() == [0.0]
    masked = np.ma.masked_array([7.0, 2.0], [True, False])
    table = score([*group(["a"], "p0"), *group(["b"], "p1")], {"masked": lambda **_: masked})
    assert table.values[0].isnan().all() and table.values[1].tolist() == [2.0]
    values = score(group(["a", "b"]), {"truths": lambda **_: np.array([True, False])}).values
    assert values[:, 0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("result", "index"),
    [
        ([1.0], None),
        ([1.0, 2.0, 3.0], None),
        ([1.0, math.nan], 1),
        ([math.inf, 1.0], 0),
        ([1.0, 1e39], 1),  # infinite once it is a float32
        ([10**400, 1.0], 0),
        (["1.0", 1.0], 0),
        ([1.0, torch.ones(2)], 1),
        ([1.0, 1j], 1),
        ([np.array("1.0"), 1.0], 0),
        (torch.tensor([1.0, math.nan]), 1),
        (torch.ones(2, dtype=torch.complex64), 0),
        (torch.ones(1, 2), None),
        (np.ones((2, 2)), None),
        (torch.tensor(1.0), None),
        ({0: 1.0, 1: 2.0}, None),
        ({1.0, 2.0}, None),
        (1.0, None),
        ("12", None),
        (None, None),
    ],
)
def test_a_broken_contract_names_function_and_index(result: Any, index: int | None) -> None:
    with pytest.raises(RewardError, match="mine") as caught:
        score(group(["a", "b"]), {"mine": lambda **_: result})
    assert (caught.value.function, caught.value.index) == ("mine", index)


def test_an_exception_is_none_for_all_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    def broken(**_: Any) -> list[float | None]:
        raise KeyError("no such column")

    with caplog.at_level(logging.WARNING):
        table = score(group(["a", "b"]), {"broken": broken, "length": lengths})
    assert table.values[:, 0].isnan().all()
    assert table.failures == {"broken": 1, "length": 0}
    assert table.values[:, 1].tolist() == [1.0, 1.0]
    assert "'broken' failed (rank 0) and is None for all 2 trajectories: KeyError: 'no such column'" in caplog.text


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError(), GeneratorExit()], ids=repr)
def test_what_is_no_exception_to_python_is_a_failure_too(error: BaseException) -> None:
    """`sys.exit` in a parser, a client's cancelled request: not the run's end, and no None that breaks the contract."""

    def leaves(**_: Any) -> list[float | None]:
        raise error

    table = score(group(["a", "b"]), {"leaves": leaves, "length": lengths})
    assert table.failures == {"leaves": 1, "length": 0} and table.values[:, 1].tolist() == [1.0, 1.0]


def test_errors_name_rank_step_and_prompt() -> None:
    rollouts = [make_rollout("a", "anchor", rewarded=False), *group(["b", "c"], "p1")]
    with pytest.raises(RewardError, match=r"'mine' at index 1: .* got nan.* \(rank 0, step 7, prompt 'p1'\)"):
        score(rollouts, {"mine": lambda **_: [1.0, math.nan]}, step=7)


def test_a_late_function_is_none_and_not_called_again_while_it_hangs() -> None:
    release = threading.Event()
    calls = []

    def slow(*, completions: list[str], **_: Any) -> list[float | None]:
        calls.append(1)
        release.wait(10)
        return [1.0] * len(completions)

    rollouts = group(["a", "b"])
    threads = threading.active_count()
    start = time.monotonic()
    for _ in range(3):
        table = score(rollouts, {"slow": slow, "length": lengths}, timeout=0.1)
        assert table.failures == {"slow": 1, "length": 0}
        assert table.values[:, 1].tolist() == [1.0, 1.0]
    assert time.monotonic() - start < 2.0
    assert len(calls) == 1
    assert threading.active_count() <= threads + 1
    assert still_running() == ["reward-slow"]
    release.set()
    time.sleep(0.1)
    assert score(rollouts, {"slow": slow}).values[:, 0].tolist() == [1.0, 1.0]
    assert still_running() == []


def test_a_late_coroutine_is_cancelled_and_called_again(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    async def slow_at_first(*, completions: list[str], **_: Any) -> list[float | None]:
        calls.append(1)
        await asyncio.sleep(30 if len(calls) == 1 else 0)
        return [1.0] * len(completions)

    first, second = (score(group(["a", "b"]), {"slow": slow_at_first}, timeout=0.4) for _ in range(2))
    assert first.failures == {"slow": 1} and second.values[:, 0].tolist() == [1.0, 1.0]
    assert "cancelled" in caplog.text and still_running() == []


def test_the_log_says_where_a_late_function_is(caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()

    def spins(**_: Any) -> list[float | None]:
        while not release.is_set():
            pass
        return [None]

    score(group(["a"]), {"spins": spins}, timeout=0.1, step=3)
    release.set()
    assert "rank 0, step 3" in caplog.text and Path(__file__).name in caplog.text and "in spins" in caplog.text


def test_many_failures_cost_no_step_and_no_thread() -> None:
    """Of 200 calls 20 raise and 2 hang for three steps: the other reward is whole in every one. The overhead is counted
    in CPU seconds, since cores are shared."""
    rollouts = [rollout for p in range(8) for rollout in group(["a" * 64] * 8, f"p{p}")]
    release = threading.Event()
    step = 0

    def unreliable(*, completions: list[str], **_: Any) -> list[float | None]:
        if step % 10 == 3:
            raise OSError("the service is away")
        if step % 100 == 25:
            release.wait(30)
        return [1.0] * len(completions)

    failed, most, before, start = 0, 0, threading.active_count(), time.process_time()
    for step in range(200):
        if step % 100 == 28:
            release.set()
            while still_running():
                time.sleep(0.001)
            release.clear()
        table = score(rollouts, {"unreliable": unreliable, "length": lengths}, timeout=0.6)
        assert table.values[:, 1].tolist() == [64.0] * 64
        failed += table.failures["unreliable"]
        most = max(most, threading.active_count())
    assert failed == 20 + 2 * 3
    assert most <= before + 1
    assert (time.process_time() - start) / (2 * 200) < 0.005


RANKS = 2


def fails(how: str, done: threading.Event) -> Callable[..., list[float | None]]:
    def reward(*, completions: list[str], **_: Any) -> list[float | None]:
        if dist.get_rank() == 1:
            if how == "raises":
                raise OSError("the service is away")
            if how == "hangs":
                done.wait(30)
            if how == "garbage":
                return [math.nan] * len(completions)
        return [1.0] * len(completions)

    return reward


def one_rank(rank: int, folder: Path) -> None:
    """What each kind of failure, on the last rank alone, does on this rank."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("syncr1.engine.rewards.scoring").addHandler(handler)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    found: dict[str, Any] = {}
    done = threading.Event()
    for how in ("raises", "hangs", "garbage"):
        lines.clear()
        try:
            table = score(group(["a", "b"]), {"mine": fails(how, done), "length": lengths}, timeout=0.5, step=9)
            said = "".join(lines)
        except RewardError as error:
            table, said = None, str(error)
        met = torch.ones(1)
        dist.all_reduce(met)  # the step's own collectives: nobody waits in vain
        found[how] = [None if table is None else table.values.isnan().any(0).tolist(), said, met.item()]
    done.set()
    (folder / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_one_rank_s_failure_costs_the_others_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=one_rank, args=(rank, tmp_path)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    first, last = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS))
    assert list(first.values()) == [[[False, False], "", 2.0]] * 3
    for how, what in {"raises": "OSError", "hangs": "TimeoutError: no answer within 0.5 s"}.items():
        missing, said, met = last[how]
        assert missing == [True, False] and met == 2.0
        assert "'mine' failed (rank 1, step 9)" in said and what in said
    missing, said, _ = last["garbage"]
    assert missing is None and "rank 1, step 9, prompt 'p0'" in said and "got nan" in said


def test_functions_run_at_the_same_time_and_without_gradients() -> None:
    barrier = threading.Barrier(2, timeout=5)

    def meet(*, completions: list[str], **_: Any) -> list[float | None]:
        barrier.wait()
        return [float(torch.is_grad_enabled())] * len(completions)

    def meet_too(**columns: Any) -> list[float | None]:
        return meet(**columns)

    assert score(group(["a"]), {"one": meet, "two": meet_too}).values.tolist() == [[0.0, 0.0]]


def test_no_function_sees_what_another_did_to_the_columns() -> None:
    def vandal(*, completions: list[str], **_: Any) -> list[float | None]:
        completions[:] = ["x" * 99] * len(completions)
        return [0.0] * len(completions)

    assert score(group(["a", "bb"]), {"vandal": vandal, "length": lengths}).values[:, 1].tolist() == [1.0, 2.0]


def test_nor_what_it_did_to_a_picture_to_the_data_or_to_torch() -> None:
    about, images = {"tag": "position", "include": [{"count": 1}]}, [torch.ones(3, 2, 2)]
    prompt = Prompt(id="a", task="t2i", text="a dog", segments=("image",), extra={"metadata": about})
    columns = columns_for([prompt], [""], images)

    def vandal(*, images: list[torch.Tensor], metadata: list[dict[str, Any]], **_: Any) -> list[float | None]:
        images[0].zero_()
        metadata[0].pop("tag")
        metadata[0]["include"][0].clear()
        torch.set_default_dtype(torch.float64)
        return [float(images[0].sum())]

    assert call_all({"vandal": vandal}, columns, 5.0)["vandal"].values == [0.0]
    assert images[0].sum() == 12 and about == {"tag": "position", "include": [{"count": 1}]}
    assert torch.get_default_dtype() == torch.float32


def test_anchors_are_not_shown_and_have_no_reward() -> None:
    rollouts = [*group(["a", "bb"], "anchor", rewarded=False), *group(["ccc"], "p1")]
    seen = []

    def count(*, completions: list[str], **_: Any) -> list[float | None]:
        seen.extend(completions)
        return [1.0] * len(completions)

    table = score(rollouts, {"count": count})
    assert seen == ["ccc"]
    assert table.values[:2].isnan().all() and table.values[2, 0] == 1.0
    only_anchors = score(rollouts[:2], {"count": count})
    assert only_anchors.values.isnan().all() and only_anchors.means() == {}


def test_a_member_without_its_groups_reward_is_left_out() -> None:
    rollouts = [*group(["a", "b", "c"], "p0"), *group(["d", "e"], "p1")]

    def partly(*, completions: list[str], **_: Any) -> list[float | None]:
        return [None if text in "bde" else 1.0 for text in completions]

    table = score(rollouts, {"partly": partly, "length": lengths})
    assert table.values.isnan().tolist() == [[False, False], [True, True], [False, False], [True, False], [True, False]]


def test_combine_leaves_out_what_is_missing() -> None:
    values = torch.tensor([[1.0, 0.5, 0.0], [math.nan, math.nan, 1.0], [math.nan] * 3])
    weights = torch.tensor([0.26, 0.39, 0.35])
    total = combine(values, weights)
    assert total[:2].tolist() == pytest.approx([0.455, 0.35])
    assert total[2].isnan()
    assert combine(values, weights, renormalise=True)[:2].tolist() == pytest.approx([0.455, 1.0])
    with pytest.raises(ValueError, match="weights"):
        combine(values, weights[:2])
