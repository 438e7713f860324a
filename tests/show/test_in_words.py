"""in_words.py: what the total reward is made of, who judges, and how many steps were clipped."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import make_prompt
from rich.console import Console
from run_records import make_metrics

from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.rewards.builtin.cycle import CycleReward
from syncr1.engine.rewards.builtin.text import text_reward
from syncr1.engine.rewards.ensemble import Column, RewardSet
from syncr1.engine.rewards.judge.attribute_judge import Judge
from syncr1.engine.rewards.judge.llm_judge import LLMJudge
from syncr1.engine.rewards.told import told_rewards
from syncr1.engine.show.display import Display
from syncr1.engine.show.in_words import clipping_words, reward_lines
from syncr1.engine.show.names import reward_words
from syncr1.engine.show.report import body_of
from syncr1.engine.show.report_curves import curves, overlaid
from syncr1.engine.show.run_files import read_run
from syncr1.engine.show.runlog import RunLog

READER = Judge(scorer=lambda images, wanted: images)


def lines(judge: Any, *more: Column) -> list[str]:
    columns = [Column("judge", judge, 0.65, "image"), Column("text", text_reward, 0.35, "text"), *more]
    return reward_lines(told_rewards(RewardSet.of(columns), []))


def test_the_total_explains_itself() -> None:
    said = lines(READER)
    assert said[0] == (
        "reward = 0.65 judge + 0.35 text, from 0 to 1; what a request does not ask for earns nothing: a text alone "
        "earns at most 0.35, a drawing alone earns at most 0.65"
    )
    assert said[1].startswith("judge, 0 to 1: shows what was asked; said by a reader of the attributes")
    assert said[2] == "text, 0 to 1: says what is right"


def test_a_reward_of_ones_own_has_no_range_and_neither_has_the_total() -> None:
    said = lines(READER, Column("brevity", lambda **_: [], 0.5, "text"))
    assert said[0] == "reward = 0.65 judge + 0.35 text + 0.5 brevity" and said[3] == "brevity: a function of yours"


@pytest.mark.parametrize("name", ["accuracy", "clip", "reward"])
def test_one_that_is_called_like_a_built_in_is_told_as_ones_own(name: str, tmp_path: Path) -> None:
    content = told_rewards(RewardSet.of([Column(name, lambda **_: [], 1.0, "text")]), [])
    assert reward_lines(content) == [f"reward = 1 {name}", f"{name}: a function of yours"]
    rows = [{"step": step, "reward": 1.0, f"rewards/{name}/mean": 0.5 * step} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.json").write_text(json.dumps(content))
    run = read_run(tmp_path)
    for page in (curves(run), overlaid([("a", run), ("b", run)])):
        assert "“reward”" in page if name == "reward" else reward_words(name) not in page and name in page


@pytest.mark.parametrize("odd", [5, "ab", (1, "2"), [1, 2, 3], range(2), object()])
def test_a_range_that_is_none_ends_nothing(odd: object) -> None:
    def mine(**_: Any) -> list[float]:
        return []

    mine.range = odd  # type: ignore[attr-defined]
    assert json.loads(json.dumps(told_rewards(RewardSet.of([Column("mine", mine, 1.0, "text")]), [])))
    assert lines(READER, Column("mine", mine, 1.0, "text"))[-1] == "mine: a function of yours"


def test_a_range_of_its_own_is_told() -> None:
    columns = [Column("cycle", CycleReward(lambda a, b: []), 4.0, "image"), Column("format", text_reward, 0.8, "text")]
    said = reward_lines(told_rewards(RewardSet.of(columns), [replace(make_prompt("a"), sample="s")]))
    assert said[:2] == [
        "reward = 4 cycle + 0.8 format, from 0 to 4.8",
        "cycle, 0 to 1: like the real picture, and captioned back",
    ]


def test_who_the_judge_is() -> None:
    caption = Judge(captions=lambda images, texts: images)
    both = Judge(lambda images, wanted: images, lambda images, texts: images)
    remote = LLMJudge("https://judge.example.org:8443/v1", "qwen-vl")
    assert "the starting model, frozen" in lines(caption)[1] and "reader" not in lines(caption)[1]
    assert (
        "reader of the attributes" in lines(both)[1] and "where it names none by the starting model" in lines(both)[1]
    )
    assert lines(remote)[1].endswith("said by the model qwen-vl at judge.example.org:8443")


@pytest.mark.parametrize(
    "content",
    [{}, {"rewards": 5}, {"rewards": [5, {}]}, {"rewards": [{"name": "a", "weight": "x"}]}, {"rewards": [{"name": 1}]}],
)
def test_a_damaged_file_says_nothing(content: dict[str, Any]) -> None:
    assert reward_lines(content) == []


def test_how_many_steps_were_clipped() -> None:
    assert clipping_words([0.5, 1.5, 2.5, 1.0], 1.0) == (
        "gradient norm before clipping: 1.38 on average, 2.5 at most; 50 % of the steps were cut to max_grad_norm 1"
    )
    assert clipping_words([], 1.0) == "" and "none was cut" in clipping_words([9.0], 0.0)
    stream = io.StringIO()
    display = Display(max_steps=2, console=Console(file=stream, width=200, color_system=None))
    with display.training():
        for step in range(2):
            display.step(make_metrics(step, grad_norm=3.0))
    display.gradients(1.0)
    assert "  gradient norm before clipping: 3 on average, 3 at most; 100 % of the steps" in stream.getvalue()


def test_the_report_says_all_of_it(tmp_path: Path) -> None:
    """The total's parts, what the loss is the sum of, the anchors' KL apart, and the share of clipped steps."""
    with RunLog(tmp_path / "r", SyncR1Config(max_steps=3)) as log:
        log.rewards(told_rewards(RewardSet.of([Column("judge", READER, 1.0, "image")]), []))
        for step in range(3):
            more = {"kl_anchors/text": 0.1, "tokens/text": 9.0, "grad_norm": 0.5 + step, "loss": 0.9}
            log.metrics(make_metrics(step, **more))
    page = body_of(read_run(log.folder))
    for words in (
        "<b>Reward = 1 judge, from 0 to 1</b>",
        "said by a reader of the attributes",
        "beta = 0.02 times the KL; anchor_beta = 8 times the KL on anchors",
        "How far training has moved the model on anchors (KL)",
        "67 % of the steps were cut to max_grad_norm 1",
    ):
        assert words in page, words
    assert "Near 0 by construction" not in page
