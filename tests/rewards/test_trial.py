"""trial.py, places.py, failing.py: a reward that works for nobody is found before training, or ends it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from judge_server import JudgeServer
from test_adapters import rollout

from syncr1.engine.errors import RewardError
from syncr1.engine.learn.failing import PATIENCE, Failing
from syncr1.engine.records import Prompt
from syncr1.engine.rewards.builtin.text import text_reward
from syncr1.engine.rewards.judge.llm_judge import LLMJudge
from syncr1.engine.rewards.scoring import RewardTable, score
from syncr1.engine.rewards.trial import try_rewards
from syncr1.engine.rewards.yours.adapters import ADAPTERS
from syncr1.engine.rewards.yours.custom import load_reward
from syncr1.engine.rewards.yours.remote import RemoteReward
from syncr1.engine.settings.reward_specs import SERVERS, reward_name

PROMPTS = [
    Prompt(id="a", task="rea", text="draw it", segments=("text", "image"), answer="a dog", extra={"topic": "dogs"}),
    Prompt(id="b", task="mcq", text="which?", segments=("text",), answer="B", options=("x", "y"), qa_type="MC"),
    Prompt(id="c", task="t2i", text="a cat", segments=("image",), target="a cat"),
    Prompt(id="d", task="general", text="held in place", rewarded=False),
]

MINE = """
import torch

def divides(**_): return [1 / 0]
def closed(prompts, completions): return [1.0] * len(prompts)
def few(*, prompts, **_): return [1.0]
def words(*, prompts, **_): return ["good" for _ in prompts]
def nan(*, prompts, **_): return [float("nan") for _ in prompts]
def hooks(*, prompts, log_metric, log_extra, **_):
    log_metric("mean", 0.5); log_extra("said", prompts)
    return [0.0] * len(prompts)
def few_extras(*, prompts, log_extra, **_): return log_extra("said", ["a"]) or [0.0] * len(prompts)
def many_words(*, prompts, log_metric, **_): return log_metric("acc", "much") or [0.0] * len(prompts)
def column(*, prompts, difficulty, **_): return [0.0] * len(prompts)
def tensor(*, prompts, **_): return torch.zeros(len(prompts))
def square(*, prompts, **_): return torch.zeros(2, len(prompts))
def positional(prompts, /, **_): return [0.0]
def nothing(**_): pass
def chat(*, completions, **_): return [1.0 * len(message[0]["content"]) for message in completions]
def chats(*, prompts, **_): return [1.0 * len(message[-1].get("content")) for message in prompts]
def leaves(**_): raise SystemExit(3)

async def server_is_away(*, prompts, **_):
    raise ConnectionError("no server")

class Deep:
    def __call__(self, *, completions, **_):
        return [self.inner(text) for text in completions]

    def inner(self, text):
        return text.nope

def score(data_source, solution_str, ground_truth, extra_info):
    return solution_str.nope

def wide(images, prompts):
    return [0.0]

def sound(*, prompts, completions, images, segments, topic, completion_ids, **_):
    for text, image, kinds, ids in zip(completions, images, segments, completion_ids, strict=True):
        assert bool(text) == ("text" in kinds) == bool(ids)
        assert (image is not None) == ("image" in kinds)
        assert image is None or (image.shape == (3, 8, 8) and image.dtype == torch.float32 and image.max() <= 1)
    assert topic.count("dogs") == 2 and "<answer>B</answer>" in "".join(completions) and "a dog" in completions
    return [None if not text else 1.0 for text in completions]

def none_at_all(*, prompts, **_): return [None] * len(prompts)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mine.py"


def tried(*specs: str, prompts: list[Prompt] = PROMPTS, **more: Any) -> list[str]:
    functions = {reward_name(spec): load_reward(spec) for spec in specs} | more
    return try_rewards(functions, prompts, image_size=8, encode=lambda text: list(text.encode()), timeout=20.0)


def line_of(text: str) -> int:
    return next(number for number, line in enumerate(MINE.splitlines(), 1) if text in line)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("divides", "ZeroDivisionError: division by zero, at mine.py:{here} in divides"),
        ("closed", "unexpected keyword argument 'id'; a reward gets every column as a keyword, and there may be more"),
        ("few", "expected 6 values, one per trajectory, got 1"),
        ("words", "expected a number or None, got str"),
        ("nan", "expected a finite float32, got nan"),
        ("few_extras", "log_extra('said'): expected 6 values, one per trajectory, got 1; log one for each completion"),
        ("many_words", "ValueError: could not convert string to float: 'much', at mine.py:{here} in many_words"),
        ("column", "'difficulty'; the data have no such column; there are id, task, text"),
        ("square", "expected 6 values in one dimension, got an array of shape (2, 6); return one number for each"),
        (
            "positional",
            "missing 1 required positional argument: 'prompts'; a reward gets every column as a keyword: leave out",
        ),
        ("chat", "; prompts and completions are texts here: read them as such, or put trl_chat@"),
        ("chats", "; prompts and completions are texts here"),
        ("nothing", "expected a list of 6 numbers or None, got NoneType"),
        ("leaves", "SystemExit: 3, at mine.py:{here} in leaves"),
        ("server_is_away", "ConnectionError: no server, at mine.py:"),
        ("Deep", "AttributeError: 'str' object has no attribute 'nope', at mine.py:"),
    ],
)
def test_what_fails_always_is_said_in_a_line_with_its_place(mine: Path, spec: str, said: str) -> None:
    here = line_of(f"def {spec}(") if f"def {spec}(" in MINE else line_of(f"class {spec}")
    (line,) = tried(f"mine.py:{spec}")
    assert said.format(here=here) in line and "\n" not in line
    assert line.startswith(f"reward {spec!r} (mine.py:{here + (spec == 'Deep')}): a trial call before training")


def test_adapters_tell_the_same(mine: Path) -> None:
    verl, flow = tried("verl@mine.py:score", "flow_grpo@mine.py:wide")
    assert f"at mine.py:{line_of('return solution_str.nope')} in score" in verl
    assert "wide() takes 2 positional arguments but 3 were given" in flow and f"(mine.py:{line_of('def wide')})" in flow


def test_what_works_is_called_as_a_step_calls_it(mine: Path) -> None:
    """Right shapes, a right and a wrong text, anchors not shown; giving None to all is no failure."""
    assert tried("mine.py:sound", "mine.py:none_at_all", "mine.py:hooks", "mine.py:tensor") == []
    assert tried("mine.py:divides", prompts=[PROMPTS[3]]) == [], "nothing is rewarded, so nothing is tried"


def test_a_built_in_reward_is_not_tried() -> None:
    unanswerable = Prompt(id="x", task="qa", text="?", segments=("text",), answer="b", options=("a",))  # it raises
    assert tried(text=text_reward, prompts=[unanswerable]) == []


def test_a_judge_behind_an_address_is_tried_with_its_status() -> None:
    server = JudgeServer()
    asked = {"judge": LLMJudge(server.url, "vlm", retries=0, batch_by="single")}
    assert tried(**asked) == [] and len(server.calls) == 4
    server.answer = lambda *_: (401, "wrong key")
    (line,) = tried(**asked)
    assert "HTTP 401" in line and line.endswith("; see what answers at its address")
    assert line.startswith("reward 'judge': a trial call before training failed with ChatError")


# While it trains ------------------------------------------------------------------------------------------------------


def table(*columns: list[float], failed: tuple[str, ...] = ()) -> RewardTable:
    names = tuple("abc"[: len(columns)])
    errors = dict.fromkeys(failed, "RuntimeError: quota, at mine.py:3 in a")
    failures = {name: int(name in failed) for name in names}
    return RewardTable(values=torch.tensor(columns).T, names=names, failures=failures, errors=errors)


NO = math.nan
GOOD, FAILED = table([0.5, 1.0], [0.0, 1.0]), table([NO, NO], [0.0, 1.0], failed=("a",))


def verdicts(*steps: list[RewardTable]) -> list[str]:
    """What every rank comes to after each step, told as they tell it; all must say the same."""
    ranks = [Failing(("a", "b")) for _ in steps[0]]
    said = []
    for tables in steps:
        told = [rank.told(one, len(one.values)) for rank, one in zip(ranks, tables, strict=True)]
        heard = {rank.heard([dict(values) for values in told]) for rank in ranks}
        said.append(heard.pop())
        assert {bool(words) for words in heard} <= {bool(said[-1])}
    return said


def test_a_reward_that_fails_for_everyone_in_its_first_step_ends_the_run() -> None:
    (said,) = verdicts([FAILED, FAILED])
    assert "reward 'a' failed for everyone in the first step that called it: RuntimeError: quota, at mine.py:3" in said


@pytest.mark.parametrize("adapter", [None, *ADAPTERS, *SERVERS])
def test_so_does_one_of_each_other_codebase_and_a_server_that_is_away(adapter: str | None) -> None:
    def theirs(*_: object, **__: object) -> list[float]:
        raise OSError("quota")

    if adapter in SERVERS:
        away = RemoteReward(f"{adapter}@http://127.0.0.1:9#x", retries=0)
        check_first_step(away, "ChatError: 127.0.0.1: ConnectionRefusedError")
    if adapter not in SERVERS or adapter in ADAPTERS:
        check_first_step(ADAPTERS[adapter](theirs) if adapter else theirs, "OSError: quota, at ")


def check_first_step(function: Any, why: str) -> None:
    result = score([rollout(0, "dog", torch.full((3, 4, 6), 0.5))], {"a": function})
    assert result.failures == {"a": 1}
    failing = Failing(("a",))
    said = failing.heard([failing.told(result, 1)])
    assert f"reward 'a' failed for everyone in the first step that called it: {why}" in said


def test_one_rank_or_a_step_now_and_then_is_only_counted() -> None:
    assert verdicts([FAILED, GOOD], [FAILED, FAILED], [FAILED, FAILED], [GOOD, FAILED]) == [""] * 4


def test_steps_in_a_row_end_it_and_a_good_one_starts_anew() -> None:
    steps = [GOOD, *[FAILED] * (PATIENCE - 1), GOOD, *[FAILED] * PATIENCE]
    said = verdicts(*([step] for step in steps))
    assert said[:-1] == [""] * (len(steps) - 1) and f"in {PATIENCE} steps in a row" in said[-1]


def test_no_reward_for_anybody_ends_it_too() -> None:
    said = verdicts(*[[table([NO, NO], [NO, NO])]] * PATIENCE)
    assert said[:-1] == ["", ""] and "no trajectory of 3 steps in a row has a reward: a, b gave None" in said[-1]


def test_a_broken_contract_ends_every_rank() -> None:
    ranks = [Failing(("a", "b")) for _ in range(2)]
    ranks[0].broken(RewardError("a", 1, "got nan"))
    told = [ranks[0].told(table([NO, NO], [NO, NO]), 2), ranks[1].told(GOOD, 2)]
    own, other = (rank.heard([dict(values) for values in told]) for rank in ranks)
    assert "got nan" in own and "another rank" in other


def test_metrics_keep_nothing_of_it() -> None:
    failing = Failing(("a", "b"))
    values = {"reward": 1.0} | failing.told(GOOD, 2)
    failing.heard([values])
    assert values == {"reward": 1.0}
