"""Whatever people, models and disks hand in, only documented errors come back, and fast.

`HYPOTHESIS_PROFILE=nightly pytest tests/repo/test_fuzz.py -rP` tries 1,000,000 inputs, new ones every time, and
tells each reader's slowest; `SYNCR1_FUZZ_INPUTS` sets another number. Without either a few thousand fixed ones are
tried. A failure shows the input, cut down to what it takes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
from fuzz_cases import (
    COLUMNS,
    JSON_PIECES,
    MEAN_SECONDS,
    SETTINGS_FILES,
    TAGS,
    YAML_PIECES,
    Arguments,
    Draw,
    Trial,
    as_bytes,
    as_json_text,
    brackets,
    share,
)

from syncr1.engine.corl.config import CorlConfig
from syncr1.engine.data.samples import load_prompts, load_samples
from syncr1.engine.errors import ConfigError, DataError, RewardError
from syncr1.engine.evaluate.graders import clauses_of, verdict_of
from syncr1.engine.evaluate.sources import load_geneval
from syncr1.engine.methods.evaluation_config import EvaluateConfig
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.processes.hosts import check_launcher, parse_hostfile
from syncr1.engine.rewards.builtin.accuracy import AccuracyReward, soft_jaccard
from syncr1.engine.rewards.builtin.format import format_reward
from syncr1.engine.rewards.builtin.tags import answer_of, parse_tagged
from syncr1.engine.rewards.judge.llm_judge import read_scores
from syncr1.engine.settings.schema import settings_of
from syncr1.engine.settings.yaml_files import from_yaml, to_yaml


@pytest.fixture
def trial() -> Iterator[Trial]:
    made = Trial()
    yield made
    print(made)
    assert made.count and made.seconds / made.count < MEAN_SECONDS


# Settings -------------------------------------------------------------------------------------------------------------

CONFIGS: list[type[Any]] = [SyncR1Config, CorlConfig, EvaluateConfig]
NAMES = sorted({setting.name for config in CONFIGS for setting in settings_of(config)})
KNOWN = {config: [setting.name for setting in settings_of(config)] for config in CONFIGS}


def settings_text(draw: Draw) -> str:
    if draw.once_in(2):
        return draw.mutated(SETTINGS_FILES, [*YAML_PIECES, *NAMES], long=2000)
    lines = ""
    for _ in range(draw.randint(0, 4)):
        name = draw.choice(NAMES) if draw.random() < 0.8 else draw.text()
        written = draw.choice(YAML_PIECES) if draw.once_in(2) else as_json_text(draw.value())
        lines += f"{name}: {written}\n"
    return lines


@share(20)
def test_settings_files(trial: Trial, seed: int) -> None:
    trial(seed, lambda draw: (draw.choice(CONFIGS), settings_text(draw)), from_yaml, ConfigError)


@share(10)
def test_settings_from_python(trial: Trial, seed: int) -> None:
    def make(draw: Draw) -> Arguments:
        config = draw.choice(CONFIGS)
        return config, draw.fields(KNOWN[config], 4)

    trial(seed, make, lambda config, given: config(**given), ConfigError)


@pytest.mark.parametrize("depth", [7, 900, 30_000])
def test_deep_settings(depth: int) -> None:
    """Refused at the eighth bracket, not at the last."""
    with pytest.raises(ConfigError, match="within lists"):
        from_yaml(SyncR1Config, "beta: " + "[" * (depth + 1))


def test_settings_that_grow(tmp_path: Path) -> None:
    """Nine lines that stand for 9^9 items (a `billion laughs`)."""
    rows = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    rows += [f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]" for i in range(8)]
    start = time.perf_counter()
    with pytest.raises(ConfigError, match="an alias"):
        from_yaml(SyncR1Config, "\n".join(rows))
    assert time.perf_counter() - start < 1.0


def test_settings_that_are_all_unknown() -> None:
    """Each name is compared with all that are known, so only the first are looked at."""
    start = time.process_time()
    with pytest.raises(ConfigError, match="980 more settings were not looked at") as caught:
        from_yaml(SyncR1Config, "".join(f"see{number}: 1\n" for number in range(1000)))
    assert str(caught.value).count("\n") == 20
    assert time.process_time() - start < 1.0


def test_a_settings_text_that_is_none() -> None:
    with pytest.raises(ConfigError, match="at most 65536 characters"):
        from_yaml(SyncR1Config, "# x\n" * 20_000)
    assert len(to_yaml(CorlConfig())) < 65536 / 2


HOSTFILES = ["worker-1 slots=8\nworker-2 slots=8\n", "# two\nroot@10.0.0.1 slots=1  # here\n", "a slots=4"]


@share(1)
def test_hostfiles(trial: Trial, seed: int) -> None:
    def read(written: str, launcher: str) -> None:
        assert all(host.slots > 0 and not host.name.startswith("-") for host in parse_hostfile(written))
        check_launcher(launcher)

    def make(draw: Draw) -> Arguments:
        pieces = [" ", "slots=", "0", "-oProxyCommand=x", "@", "#", "\n", "\r\n", "{host}", "ssh", "'", "\\", "$(id)"]
        return draw.mutated(HOSTFILES, pieces), draw.mutated(["ssh", "ip netns exec {host}"], pieces)

    trial(seed, make, read, ConfigError)


# Rows of data ---------------------------------------------------------------------------------------------------------

GOOD_ROWS = [
    {
        "prompt": "a cat",
        "qa_problem": "What?\nA. a cat\nB. a dog",
        "qa_solution": "<answer>A</answer>",
        "qa_type": "MC",
    },
    {"problem": "What is it?", "solution": "cat"},
    {"prompt": [{"role": "user", "content": "How many?"}], "reward_model": {"ground_truth": "3"}},
    {"prompt": "a cat", "segments": "text+image", "attributes": {"colour": "red"}, "options": ["a", "b"]},
    {"prompt": "What?", "segments": ["image", "text"], "follow_up": "And?", "follow_up_answer": "so", "answer": 3},
    {"id": 7, "question": "Which?", "options": ["a", "b"], "answer": "b", "qa_type": ["MCQ"], "concept": "x"},
    {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "so"}]},
    {"question": "<image 1> Which? (A) x (B) y", "answer": "B", "choices": "['x' 'y']", "hint": "z"},
    {"question": "Which?", "A": "x", "B": "y", "answer": 1},
    {"query": "Which?", "options": {"text": ["1", "2"], "label": ["a", "b"]}, "answers": ["a", "b"]},
]
ROW_TEXTS = [json.dumps(row) for row in GOOD_ROWS]
ROW_PIECES = [*JSON_PIECES, "<answer>", "</answer>", "<image>", "\\nA. ", "\\nB) ", " ", *map(json.dumps, COLUMNS)]


def row(draw: Draw) -> dict[str, Any]:
    def message() -> dict[str, Any]:
        content = draw.value() if draw.random() < 0.7 else [{"type": draw.choice(["text", "image"]), "text": "x"}]
        return {"role": draw.choice(["user", "system", "assistant", "x"]), "content": content}

    changes = draw.fields(COLUMNS, 3)
    if draw.once_in(3):
        changes[draw.choice(COLUMNS)] = draw.several(message, 3)
    return {**draw.choice(GOOD_ROWS), **changes}


def deep_row(draw: Draw) -> str:
    return f'{{"prompt": "x", "{draw.choice(COLUMNS)}": {brackets(draw.depth())}}}'


def rows_text(draw: Draw) -> str:
    kind = draw.random()
    if kind < 0.6:
        return "\n".join(as_json_text(found) for found in draw.several(lambda: row(draw), 2, 1))
    return draw.mutated(ROW_TEXTS, ROW_PIECES) if kind < 0.95 else deep_row(draw)


@share(24)
def test_rows_of_data(trial: Trial, tmp_path: Path, seed: int) -> None:
    path = tmp_path / "train.jsonl"

    def read(load: Callable[[Path], object], written: str) -> None:
        path.write_bytes(as_bytes(written))
        load(path)

    trial(seed, lambda draw: (draw.choice([load_samples, load_prompts]), rows_text(draw)), read, DataError)


@share(2)
def test_geneval_rows(trial: Trial, tmp_path: Path, seed: int) -> None:
    path = tmp_path / "rows.jsonl"
    good = ['{"prompt": "a cat", "tag": "single", "include": []}']

    def read(written: str) -> None:
        path.write_bytes(as_bytes(written))
        load_geneval(path)

    trial(seed, lambda draw: (deep_row(draw) if draw.once_in(9) else draw.mutated(good, JSON_PIECES),), read, DataError)


@pytest.mark.parametrize(
    "odd",
    [
        {"qa_problem": f"What?\nA. {'x' * 5000}\nB. {'y' * 5000}\nC. {'z' * 5000}", "qa_solution": "q" * 5000},
        {"real_image": ["\udcfc"]},
        {"real_image": "a/" * 30_000},
        {"x" * 30_000: 1, "qa_solution": None},
    ],
)
def test_rows_that_were_found(tmp_path: Path, odd: dict[str, Any]) -> None:
    """Their messages were too long, could not be printed, or took long."""
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(GOOD_ROWS[0] | odd))
    start = time.process_time()
    with pytest.raises(DataError) as caught:
        load_samples(path)
    assert len(str(caught.value).encode()) < 10_000
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"solution": "<answer>cat</answer>" + "<answer>" * 20_000}, "cat"),
        ({"solution": "cat" + "<answer>" * 20_000}, None),
        ({"problem": "What?\nA. x" + " " * 60_000 + "y\nB. z", "solution": "z"}, "B"),
        ({"problem": "What?\nA. x  \t\nB. z\t", "solution": "X"}, "A"),
    ],
)
def test_what_took_quadratic_time(tmp_path: Path, changes: dict[str, Any], text: str | None) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(GOOD_ROWS[1] | changes))
    start = time.process_time()
    ((prompt,),) = load_samples(path)
    assert prompt.answer == (changes["solution"] if text is None else text)
    assert time.process_time() - start < 0.5


# Answers --------------------------------------------------------------------------------------------------------------

SAID = ["<think> it is </think><answer> B </answer>", "<answer>a red dog</answer>", "twenty one", "(C) a cat"]


@share(15)
def test_tags(trial: Trial, seed: int) -> None:
    def read(said: str) -> None:
        found, tagged = answer_of(said), parse_tagged(said)
        assert format_reward(completions=[said], segments=[("text",)]) == [float(tagged is not None)]
        assert tagged is None or found == tagged.answer

    trial(seed, lambda draw: (draw.mutated(SAID, TAGS),), read)


@share(14)
def test_accuracy(trial: Trial, seed: int) -> None:
    graders = [AccuracyReward("paper"), AccuracyReward("released")]

    def read(said: str, answer: str, options: list[str], kind: str | None, grader: AccuracyReward) -> None:
        asked = {"completions": [said], "answer": [answer], "segments": [("text",)]}
        (reward,) = grader(**asked, options=[options], qa_type=[kind])
        assert reward is not None and 0 <= reward <= 1
        assert 0 <= soft_jaccard(said, answer) <= 1

    def make(draw: Draw) -> Arguments:
        answer = draw.mutated(SAID, TAGS) if draw.once_in(2) else draw.text()
        options = draw.several(draw.text, 3)
        return draw.mutated(SAID, TAGS), answer, options, draw.choice(["MC", "OE", None, "x"]), draw.choice(graders)

    trial(seed, make, read, RewardError)


def test_texts_of_thousands_of_words() -> None:
    """A policy that writes without end: its words are not compared one by one with as many others."""
    start = time.process_time()
    said, right = (" ".join(f"{number:x}{end}" for number in range(12_000)) for end in "wv")
    assert soft_jaccard(said, right + " 1w") == pytest.approx(1 / 24_000)
    assert time.process_time() - start < 0.5


@share(2)
def test_verdicts(trial: Trial, seed: int) -> None:
    replies = ["[1, 2]", '{"scores": [85, 90]}', "85/100", "1", "Verdict: 0.5.", "a red dog, on grass; at night."]

    def read(reply: str, count: int) -> None:
        scores = read_scores(reply, count, 100.0)
        assert scores is None or (len(scores) == count and all(0 <= score <= 100 for score in scores))
        assert verdict_of(reply, (0.0, 0.5, 1.0)) in (None, 0.0, 0.5, 1.0)
        assert all(clauses_of(reply))

    def make(draw: Draw) -> Arguments:
        pieces = [*JSON_PIECES, "0.5", "1", ".", " ", ", "]
        return brackets(draw.depth()) if draw.once_in(9) else draw.mutated(replies, pieces), draw.randint(1, 3)

    trial(seed, make, read)
