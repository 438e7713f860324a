"""warnings.py: each warning comes when its limit is passed and not before it, once, with what to do about it."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import pytest
import yaml
from rich.console import Console
from run_records import make_metrics
from score_cases import model

from syncr1.engine.corl.config import CorlConfig
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.settings.yaml_files import to_yaml
from syncr1.engine.show import warnings
from syncr1.engine.show.display import Display
from syncr1.engine.show.names import AT_CHANCE, FELL
from syncr1.engine.show.scores import ScoreRow, score_rows
from syncr1.engine.show.warnings import LEAST, WINDOW, Watch, warnings_of

HEALTHY = {
    "reward": 0.5,
    "rewards/judge/mean": 0.5,
    "rewards/judge/std": 0.2,
    "rewards/text/mean": 0.3,
    "rewards/text/std": 0.1,
    "frac_reward_zero_std": 0.1,
    "entropy/text": 1.0,
    "entropy/image": 2.0,
    "tokens/text": 50.0,
    "tokens/image": 90.0,
    "clip_ratio/region_mean": 0.1,
    "completions/clipped_ratio": 0.1,
    "reward_failures": 0.0,
    "updates_skipped": 0.0,
    "loss": 0.1,
    "rollout/replay_logp_max_abs": 1e-5,
    "rollout/guidance_logp_mean_abs": 0.4,
}


def run(steps: int = 20, **changed: Any) -> list[dict[str, Any]]:
    """Metrics of so many steps; a callable makes a value of the step."""
    rows = []
    for step in range(steps):
        rows.append(HEALTHY | {k.replace("__", "/"): v(step) if callable(v) else v for k, v in changed.items()})
    return rows


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [warned.name for warned in warnings_of(rows)]


def test_a_healthy_run_has_none() -> None:
    assert warnings_of(run()) == [] == warnings_of([]) == warnings_of([{}] * 20)
    assert warnings_of([{"reward": "x", "rewards/": 1, "rewards/a": [1], "kl": 10**400}] * 2) == []


@pytest.mark.parametrize(
    ("metric", "below", "above", "name"),
    [
        ("frac_reward_zero_std", 0.5, 0.51, "dead groups"),
        ("clip_ratio/region_mean", 0.3, 0.31, "clipped tokens"),
        ("completions/clipped_ratio", 0.3, 0.31, "truncated texts"),
        ("rollout/replay_logp_max_abs", 0.5, 0.51, "sampler and trainer differ"),
        ("rollout/guidance_logp_mean_abs", 0.01, 0.0099, "guidance without effect"),
        ("rewards/text/std", 0.0021, 0.0019, "constant reward: text"),
        ("reward_failures", 0.0, 1.0, "reward failed"),
        ("updates_skipped", 0.0, 1.0, "updates that were not finite"),
        ("reward", 0.0, math.nan, "no reward"),
        ("reward", 0.0, None, "no reward"),
    ],
)
def test_each_limit(metric: str, below: float, above: float | None, name: str) -> None:
    assert warnings_of([row | {metric: below} for row in run()]) == []
    (warned,) = warnings_of([row | {metric: above} for row in run()])
    assert warned.name == name and warned.last == 20 and 1 <= warned.first <= LEAST
    assert f"(first at step {warned.first}, last at 20): " in warned.text and warned.text.endswith(".")


@pytest.mark.parametrize("kind", ["text", "image"])
def test_entropy_is_compared_with_the_beginning(kind: str) -> None:
    start, name = HEALTHY[f"entropy/{kind}"], f"entropy/{kind}"

    def falling(to: float) -> list[dict[str, Any]]:
        return [row | {name: start if step < 5 else to * start} for step, row in enumerate(run(40))]

    assert warnings_of(falling(0.1)) == []
    (warned,) = warnings_of(falling(0.09))
    assert warned.name == f"entropy collapsed: {kind}" and warned.first == 5 + WINDOW
    # A step without such tokens says nothing.
    assert warnings_of([row | {name: 0.0, f"tokens/{kind}": 0.0} for row in run()]) == []
    mixed = [row | ({name: 0.0, f"tokens/{kind}": 0.0} if step % 2 else {}) for step, row in enumerate(run(40))]
    assert warnings_of(mixed) == []


def test_a_constant_reward_is_found_alone_and_beside_others() -> None:
    """A judge that says 0.00 of everything, as the embedded one does of real photographs."""
    (warned,) = warnings_of(run(rewards__judge__mean=0.0, rewards__judge__std=0.0))
    assert warned.name == "constant reward: judge" and "0.00 on average" in warned.words
    alone = [{"reward": 1.0, "rewards/right/mean": 1.0, "rewards/right/std": 0.0, "loss": 0.0}] * LEAST
    assert [found.name for found in warnings_of(alone)] == ["constant reward: right"]
    # A reward on a scale of its own is not constant, as long as it is the only one, or decides anything.
    assert warnings_of([{"rewards/right/mean": 1e-5, "rewards/right/std": 1e-6}] * 9) == []
    assert warnings_of(run(rewards__judge__std=lambda step: 0.0 if step % 2 else 0.2)) == []


def test_single_steps_do_not_count_where_a_mean_is_meant() -> None:
    assert names(run(frac_reward_zero_std=lambda step: 1.0 if step == 15 else 0.4)) == []
    assert names(run(LEAST - 1, frac_reward_zero_std=1.0)) == []
    assert names(run(LEAST, frac_reward_zero_std=1.0)) == ["dead groups"]


def test_what_is_counted_is_counted_over_the_whole_run() -> None:
    (failed,) = warnings_of(run(30, reward_failures=lambda step: float(step in (3, 17))))
    assert failed.words.endswith("2") and failed.first == 4
    (broken,) = warnings_of([row | ({"loss": None} if step == 7 else {}) for step, row in enumerate(_plain(9))])
    assert "in 1 updates" in broken.words and broken.first == 8


def _plain(steps: int) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "updates_skipped"} for row in run(steps)]


def test_each_is_told_once() -> None:
    watch = Watch()
    told = [
        watch.see(row, step) for step, row in enumerate(run(frac_reward_zero_std=0.9, clip_ratio__region_mean=0.9), 1)
    ]
    assert [[warned.name for warned in new] for new in told if new] == [["dead groups", "clipped tokens"]]


@pytest.mark.parametrize("terminal", [False, True])
def test_the_display_says_it_while_it_trains(terminal: bool) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=terminal, color_system=None)
    display = Display(max_steps=9, console=console)
    with display.training():
        for step in range(9):
            display.step(make_metrics(step, frac_reward_zero_std=0.9))
    text = stream.getvalue()
    assert text.count("warning: 90 % of the groups had equal rewards") == 1 and "double --num_generations" in text
    with display.training(3):  # another training of the same run has its own
        for step in range(3):
            display.step(make_metrics(step, frac_reward_zero_std=0.9))
    assert stream.getvalue().count("warning: ") == 2


def test_what_fell_and_what_is_guessed_is_warned_of() -> None:
    before, after = model(0, 0.6, general=0.9), model(1, 0.85, general=0.7)
    found = {warned.name: warned for warned in warnings_of([], score_rows(before, after))}
    # Once a task, by its first measure: whole drawings, by the independent classifier.
    assert set(found) == {"fell: general_image/all_right/cnn", "at chance: rec/score/greedy"}
    fell, guessed = found["fell: general_image/all_right/cnn"], found["at chance: rec/score/greedy"]
    assert fell.words.startswith("Draw a caption without a concept (drawings right, classifier, 192 items) fell from ")
    assert guessed.threshold == 0.5 and "where guessing scores 50.0 %" in guessed.text
    assert warnings_of([], score_rows(before, None)) == []


BROKEN = {
    "frac_reward_zero_std": 0.9,
    "clip_ratio__region_mean": 0.9,
    "completions__clipped_ratio": 0.9,
    "rewards__text__std": 0.0,
    "rollout__replay_logp_max_abs": 2.0,
    "rollout__guidance_logp_mean_abs": 0.0,
    "reward_failures": 1.0,
    "updates_skipped": 1.0,
}
"""What passes every limit on one metric."""
FLAGS = {name for config in (SyncR1Config(), CorlConfig()) for name in yaml.safe_load(to_yaml(config, comments=False))}


def test_every_remedy_names_flags_that_there_are() -> None:
    before, after = model(0, 0.6, general=0.9), model(1, 0.85, general=0.7)
    rows = run(
        **BROKEN,
        entropy__text=lambda step: 1.0 if step < 5 else 0.01,
    )
    found = [*warnings_of(rows, score_rows(before, after)), *warnings_of(run(reward=None))]
    assert len(found) == 12
    for warned in found:
        named = re.findall(r"--(\w+)", warned.remedy)
        assert named and set(named) <= FLAGS, warned


def test_a_task_has_one_warning_and_it_does_not_contradict_itself() -> None:
    """Recognition that fell to chance by one measure and is at chance by another; that was at chance all along; and
    that was above it, without a fall that is sure."""
    interval, chance = (0.4, 0.6), 0.5

    def row(how: str, before: tuple[float, float], marks: tuple[str, ...]) -> ScoreRow:
        return ScoreRow(
            "rec",
            how,
            sum(before) / 2,
            0.5,
            120,
            "% balanced accuracy",
            before,
            interval,
            (-0.3, -0.1),
            marks,
            "recognition",
            f"rec/score/{how}",
            chance,
        )

    (fell,) = warnings_of([], [row("a", (0.7, 0.8), (AT_CHANCE,)), row("b", (0.7, 0.8), (FELL,))])
    assert fell.name.startswith("fell: rec") and "is now where guessing is (50.0 %)" in fell.words
    assert "halve --learning_rate" in fell.remedy
    (always,) = warnings_of([], [row("a", interval, (AT_CHANCE,)), row("b", interval, (AT_CHANCE,))])
    assert "start from a --model" in always.remedy
    (lost,) = warnings_of([], [row("a", (0.7, 0.8), (AT_CHANCE,))])
    assert "and was at 75.0 % before" in lost.words and lost.remedy == fell.remedy


def test_the_limits_are_named_once() -> None:
    """Every warning says the limit that it passed, and the limits are this module's."""
    limits = {value for name, value in vars(warnings).items() if name.isupper() and isinstance(value, float)}
    broken = run(
        **BROKEN,
    )
    found = warnings_of(broken)
    assert len(found) == 8 and {warned.threshold for warned in found} <= limits | {0.0}
