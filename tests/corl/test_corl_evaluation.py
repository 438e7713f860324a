"""evaluator.py: what an evaluation of CoRL's tasks reports, and how its summary is made."""

from __future__ import annotations

import io
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import sharp_policy
from rich.console import Console
from torch import Tensor

from syncr1.engine.corl.config import CorlConfig
from syncr1.engine.corl.evaluator import evaluator_of, summary
from syncr1.engine.corl.models_table import models_table
from syncr1.engine.evaluate.held_out import TaskScores, means, table_of
from syncr1.engine.records import Prompt
from syncr1.engine.rewards.builtin.format import format_reward
from syncr1.engine.rewards.ensemble import RewardSet
from syncr1.engine.show.measured import Measured

BY = ("checker", "cnn")


def redness(*, images: list[Tensor | None], **_: object) -> list[float | None]:
    return [None if image is None else float(image[0].mean()) for image in images]


def broken(**_: object) -> list[float | None]:
    raise OSError("the service is away")


REWARDS = RewardSet(
    functions={"red": redness, "away": broken, "format": format_reward},
    weights=(1.0, 1.0, 1.0),
    kinds=("image", "image", "text"),
)


def questions(count: int) -> list[Prompt]:
    return [
        Prompt(
            id=f"q{i}", task="mcq", text="which one?", segments=("text",), answer="B", options=("a", "b"), qa_type="MC"
        )
        for i in range(count)
    ]


def drawings(count: int) -> list[Prompt]:
    return [Prompt(id=f"d{i}", task="t2i", text="a red creature", segments=("image",)) for i in range(count)]


def test_each_task_gets_its_scores_and_a_failed_reward_is_left_out() -> None:
    config = CorlConfig(max_completion_length=6, eval_samples=3, eval_cfg_weight=1.0)
    evaluator = evaluator_of(config, {"mcq": questions(5), "t2i": drawings(3)}, REWARDS)
    found = evaluator(sharp_policy())
    assert set(found.scores) == {"mcq", "t2i"}
    # An untrained policy writes no tags: it is neither right nor in the form.
    answers = {f"{name}/{how}": 0.0 for name in ("score", "format") for how in ("greedy", "sampled")}
    assert found.scores["mcq"] == {"num_items": 3.0, **answers}
    assert set(found.scores["t2i"]) == {"num_items", "reward/red"}
    assert 0.0 < found.scores["t2i"]["reward/red"] < 1.0
    assert found.summary == {
        **{f"{name}/{how}": 0.0 for name in ("understanding", "format") for how in ("greedy", "sampled")},
        "image/red": found.scores["t2i"]["reward/red"],
    }
    again = evaluator(sharp_policy())
    assert again.scores == found.scores
    drawn = zip(again.examples["t2i"], found.examples["t2i"], strict=True)
    assert all(torch.equal(a.image, b.image) for a, b in drawn if a.image is not None and b.image is not None)


def test_without_rewards_and_readers_drawings_are_only_counted() -> None:
    evaluator = evaluator_of(CorlConfig(eval_cfg_weight=1.0), {"t2i": drawings(2)})
    assert evaluator(sharp_policy()).scores == {"t2i": {"num_items": 2.0}}


def test_the_summary_averages_over_tasks() -> None:
    scores = {
        "mcq": {"score/greedy": 1.0, "format/greedy": 0.5, "num_items": 8.0},
        "oe": {"score/greedy": 0.0, "format/greedy": 1.0},
        "t2i": {"attributes/checker": 0.25, "all_right/checker": 0.125, "reward/tim": 0.5},
    }
    assert means(scores, summary(scores)) == {
        "understanding/greedy": 0.5,
        "format/greedy": 0.75,
        "image/checker": 0.25,
        "image/tim": pytest.approx(0.5),
        "image/all_right/checker": 0.125,
    }


def test_the_table_of_all_models_fits_80_characters() -> None:
    """Six models, as a whole run has; whole drawings first, an interval below every score, what is guessed by name."""
    ids = [str(i) for i in range(100)]

    def model(right: float) -> dict[str, Any]:
        hits = [float(i < 100 * right) for i in range(100)]
        answers = {f"score/{how}": Measured.of(ids, hits, chance=0.25) for how in ("greedy", "sampled")}
        whole, share = Measured.of(ids, hits), Measured.of(ids, [0.5 + hit / 2 for hit in hits])
        drawings = {f"{name}/{by}": one for name, one in (("attributes", share), ("all_right", whole)) for by in BY}
        drawings["reward/tim"] = Measured.of(ids, [0.3] * 100)
        measures = {"t2i": drawings, "mcq": answers, "oe": answers}
        tasks = {task: TaskScores(num_items=100, measures=of) for task, of in measures.items()}
        return table_of(tasks, summary)

    names = ("base", "unified", "t2i", "mcq", "oe", "merged")
    models = {name: model(right) for name, right in zip(names, (0.25, 0.4, 0.5, 0.6, 0.99, 0.0), strict=True)}
    stream = io.StringIO()
    Console(file=stream, width=80).print(models_table(models))
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    assert sum(line.split() == [".30–.30"] * 6 for line in lines) == 1, "a reward has no per cent"
    drawn = lines.index(" Draw a caption (100)")
    assert lines[drawn + 1].split("right,")[1].split() == ["25.0", "40.0", "50.0", "60.0", "99.0", "0.0"]
    assert lines[drawn + 2].split() == ["classifier", "18–34", "31–50", "40–60", "50–69", "95–100", "0–4"]
    assert [line.split(",")[0].strip() for line in lines[drawn + 1 : drawn + 9 : 2]] == [
        *("drawings right", "drawings right", "attributes right", "attributes right"),
    ]
    assert "at chance" in stream.getvalue() and "below" in stream.getvalue()
