"""The remote judge as a reward and as an examiner, against a real server on this machine."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from judge_server import JudgeServer, pictures, reds
from PIL import Image

from syncr1.engine.errors import ChatError
from syncr1.engine.records import Prompt, Rollout
from syncr1.engine.rewards.judge.llm_judge import LLMJudge, read_scores
from syncr1.engine.rewards.scoring import score


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    server = JudgeServer()
    yield server
    server.http.shutdown()
    server.http.server_close()


def judge(server: JudgeServer, **settings: Any) -> LLMJudge:
    return LLMJudge(server.url, "judge-1", **{"backoff": 0.01, "timeout": 5.0, "retries": 2, **settings})


def red(share: float, side: int = 8) -> torch.Tensor:
    image = torch.zeros(3, side, side)
    image[0] = share
    return image


def texts(content: list[dict[str, Any]]) -> str:
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def test_scores_of_a_group_come_from_one_call_in_order(server: JudgeServer) -> None:
    shares = [0.0, 1.0, 0.2, 0.6]
    rewards = judge(server)(
        prompts=["a", "b", "a", "a"], id=["1", "2", "1", "1"], images=[red(share) for share in shares]
    )
    assert rewards == pytest.approx(shares, abs=1e-3)
    assert sorted(len(pictures(content)) for content in server.calls) == [1, 3]


def test_single_images_are_judged_side_by_side_but_not_all_at_once(server: JudgeServer) -> None:
    def slow(content: list[dict[str, Any]], _: int) -> tuple[int, str]:
        time.sleep(0.05)
        return 200, str(reds(content)[0])

    server.answer = slow
    shares = [0.2, 0.4, 0.6, 0.8, 1.0, 0.0]
    examiner = judge(server, batch_by="single", max_concurrency=3)
    assert examiner(prompts=["p"] * 6, images=[red(share) for share in shares]) == pytest.approx(shares, abs=1e-3)
    assert len(server.calls) == 6 and 1 < server.most_at_once <= 3


def test_large_groups_are_split(server: JudgeServer) -> None:
    rewards = judge(server, max_images=2)(prompts=["p"] * 5, images=[red(i / 4) for i in range(5)])
    assert rewards == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=1e-2)
    assert sorted(len(pictures(content)) for content in server.calls) == [1, 2, 2]


def test_rows_without_an_image_are_none_and_cost_nothing(server: JudgeServer) -> None:
    assert judge(server)(prompts=["p", "p"], images=[None, red(1.0)]) == [None, 1.0]
    assert judge(server)(prompts=["p"], images=[None]) == [None]
    assert judge(server)(prompts=[], images=[]) == []
    assert len(server.calls) == 1


def test_what_the_judge_is_told(server: JudgeServer, tmp_path: Path) -> None:
    photo = tmp_path / "bobo.png"
    Image.new("RGB", (600, 300), (51, 0, 0)).save(photo)
    server.answer = lambda content, _: (200, json.dumps(reds(content)[1:]))
    examiner = judge(server, prompt_template="{num_images} of {prompt}: {target}, 0-{top}", max_side=64, top=100)
    row: dict[str, Any] = {"prompts": ["{name} draws"], "target": ["a red {hat}"], "references": [(photo, photo)]}
    assert examiner(images=[red(0.4, 128)], **row) == [pytest.approx(0.4, abs=1e-2)]
    assert examiner(images=[red(0.4, 32)], **row) == [pytest.approx(0.4, abs=1e-2)]
    first, second = server.calls
    assert texts(first).splitlines() == ["1 of {name} draws: a red {hat}, 0-100", "Reference photo:", "Image 1:"]
    assert [picture.size for picture in pictures(first)] == [(64, 32), (64, 64)], "made smaller, never larger"
    assert [picture.size for picture in pictures(second)] == [(64, 32), (32, 32)]
    assert reds(first)[0] == 20.0


def test_reference_columns(server: JudgeServer, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.new("RGB", (8, 8)).save(photo)
    server.answer = lambda content, _: (200, json.dumps(reds(content)[-1:]))
    row: dict[str, Any] = {"prompts": ["p"], "images": [red(1.0)], "references": [()], "real_image": [photo]}
    for reference, shown in (("references", 1), ("real_image", 2), (None, 1)):
        judge(server, reference=reference)(**row)
        assert len(pictures(server.calls[-1])) == shown
    judge(server, reference="real_image")(**{**row, "real_image": [None]})
    assert len(pictures(server.calls[-1])) == 1


@pytest.mark.parametrize("wrong", ["[50]", "[1, 2, 3, 4]", "50", "no", "[50, 101]", "[50, -1]", "[50, null]"])
def test_a_reply_with_wrong_scores_is_asked_for_again(server: JudgeServer, wrong: str) -> None:
    server.answer = lambda _, call: (200, wrong if call < 2 else "[10, 20]")
    assert judge(server)(prompts=["p", "p"], images=[red(0), red(1)]) == [0.1, 0.2]
    assert len(server.calls) == 3
    assert "exactly 2 numbers" in texts(server.calls[1]) and "exactly 2 numbers" not in texts(server.calls[0])


def test_four_scores_for_nine_images_are_none_and_never_a_constant(
    server: JudgeServer, caplog: pytest.LogCaptureFixture
) -> None:
    def answer(content: list[dict[str, Any]], _: int) -> tuple[int, str]:
        scores = reds(content)
        return 200, json.dumps(scores[:4] if len(scores) == 9 else scores)

    server.answer = answer
    examiner = judge(server)
    rewards = examiner(prompts=["p"] * 9 + ["q"], images=[red(i / 10) for i in range(10)])
    assert rewards == [None] * 9 + [pytest.approx(0.9, abs=1e-2)]
    assert len(server.calls) == 3 + 1 and examiner.num_failed == 9
    assert "no answer for 9 of 10" in caplog.text


def test_a_busy_server_is_asked_again_and_a_dead_one_is_an_error(server: JudgeServer) -> None:
    server.answer = lambda content, call: (503 if call < 2 else 200, json.dumps(reds(content)))
    assert judge(server)(prompts=["p"], images=[red(1.0)]) == [1.0]
    server.answer = lambda *_: (500, "")
    with pytest.raises(ChatError, match="HTTP 500"):  # counted, and the run ends where it stays so
        judge(server)(prompts=["p"], images=[red(1.0)])
    server.answer = lambda _, call: (200, "[100]") if call >= 3 else (500, "")
    server.calls.clear()
    assert judge(server, max_concurrency=1)(prompts=["p", "q"], images=[red(1.0)] * 2).count(None) == 1


def test_requests_that_are_given_up_are_counted_in_the_step(server: JudgeServer) -> None:
    """Each of them, whether the others of the step were answered or not; a step without any has none."""
    refused = {"q", "r"}

    def answer(content: list[dict[str, Any]], _: int) -> tuple[int, str]:
        bad = any(f"request:\n{name}\n" in texts(content) for name in refused)
        return (400, "") if bad else (200, json.dumps(reds(content)))

    server.answer = answer
    functions = {"judge": judge(server)}
    rollouts = [
        Rollout(
            prompt=Prompt(id=name, task="gen", text=name, segments=("image",)),
            member=member,
            prompt_tokens=torch.zeros(0),
            prompt_image=None,
            segments=(),
            image=red(0.5),
        )
        for member, name in enumerate(["p", "p", "q", "r"])
    ]
    table = score(rollouts, functions)
    assert table.failures == {"judge": 2} and not table.errors
    assert table.values[:2, 0].isfinite().all() and table.values[2:, 0].isnan().all()
    refused.add("p")
    table = score(rollouts, functions)
    assert table.failures == {"judge": 3} and "HTTP 400" in table.errors["judge"]
    refused.clear()
    table = score(rollouts, functions)
    assert table.failures == {"judge": 0} and table.values.isfinite().all()


def test_what_misses_the_budget_is_none_and_the_rest_is_kept(server: JudgeServer) -> None:
    release = threading.Event()

    def answer(content: list[dict[str, Any]], _: int) -> tuple[int, str]:
        if reds(content) == [0.0]:
            release.wait(10)
        return 200, json.dumps(reds(content))

    server.answer = answer
    start = time.monotonic()
    rewards = judge(server, budget=1.0)(prompts=["p", "q"], images=[red(0.0), red(1.0)])
    release.set()
    assert rewards == [None, 1.0] and time.monotonic() - start < 4.0


def test_a_wrong_key_is_an_error_for_all(server: JudgeServer) -> None:
    server.answer = lambda *_: (401, "")
    with pytest.raises(ChatError, match="HTTP 401"):
        judge(server)(prompts=["p", "q"], images=[red(0), red(1)])
    with pytest.raises(ChatError, match="HTTP 401"):
        judge(server).ask_many(["is it red?"], [red(1)])
    server.answer = lambda _, call: (200, "[100]") if call % 2 else (404, "")
    server.calls.clear()
    rewards = judge(server, max_concurrency=1)(prompts=["p", "q"], images=[red(0), red(1)])
    assert rewards == [None, 1.0], "an answer to others is kept"


def test_questions(server: JudgeServer) -> None:
    def answer(content: list[dict[str, Any]], _: int) -> tuple[int, str]:
        question = texts(content)
        return (400, "") if "bad" in question else (200, f"{question} {reds(content)}")

    server.answer = answer
    examiner = judge(server)
    assert examiner.ask("red?", red(1.0)) == "red? [100.0]"
    assert examiner.ask("red?") == "red? []"
    replies = examiner.ask_many(["one", "bad", "three"], [red(0.2), red(0.4), None])
    assert replies == ["one [20.0]", None, "three []"]
    assert examiner.ask_many([], []) == []
    with pytest.raises(ValueError, match="shorter"):
        examiner.ask_many(["one"], [])


def test_odd_pixels_and_shapes(server: JudgeServer) -> None:
    odd = torch.tensor([2.0, float("nan"), -1.0]).reshape(3, 1, 1).expand(3, 5, 7)
    assert judge(server)(prompts=["p"], images=[odd]) == [1.0]
    assert pictures(server.calls[0])[0].size == (7, 5)
    with pytest.raises(ValueError, match=r"\[3, H, W\]"):
        judge(server)(prompts=["p"], images=[torch.zeros(8, 8)])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"prompt_template": "{image}"}, "image"),
        ({"prompt_template": "{target.__class__}"}, "known fields"),
        ({"prompt_template": "{}"}, "known fields"),
        ({"batch_by": "group"}, "batch_by"),
        ({"reference": "photo"}, "reference"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"top": float("inf")}, "top"),
        ({"budget": 0}, "budget"),
        ({"base_url": "http://judge.example"}, "plain http"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        LLMJudge(**{"base_url": "https://judge.example/v1", "model": "m", **settings})


@pytest.mark.parametrize(
    ("reply", "count", "expected"),
    [
        ("[80, 70.5]", 2, [80, 70.5]),
        ('{"scores": [80, 70]}', 2, [80, 70]),
        ("```json\n[80, 70]\n```", 2, [80, 70]),
        ("[1] is a fine one, so: [80, 70].", 2, [80, 70]),
        ("[80]", 1, [80]),
        ("85", 1, [85]),
        ("Score: 85/100.", 1, [85]),
        ("85.5 ", 1, [85.5]),
        ("between 80 and 90", 1, None),
        ("[80, 70]", 1, None),
        ("80 70", 2, None),
        ("[80, true]", 2, None),
        ('[80, "70"]', 2, None),
        ("[[80, 70]]", 2, None),
        ("[80, 70", 2, None),
        ("] [", 2, None),
        ("", 1, None),
        ("[" * 5000 + "]" * 5000, 1, None),
        ("[1e999, 2]", 2, None),
        ("-5", 1, None),
    ],
)
def test_read_scores(reply: str, count: int, expected: list[float] | None) -> None:
    assert read_scores(reply, count, 100.0) == expected


@pytest.mark.slow
@given(st.text(alphabet='[]{},.-0123456789e"/ nultr') | st.text(), st.integers(1, 3))
def test_read_scores_takes_any_reply(reply: str, count: int) -> None:
    scores = read_scores(reply, count, 100.0)
    assert scores is None or (len(scores) == count and all(0 <= score <= 100 for score in scores))


def test_repr_names_the_server_and_the_variable() -> None:
    text = repr(LLMJudge("https://judge.example/v1", "m"))
    assert "judge.example" in text and "api_key_env=None" in text
