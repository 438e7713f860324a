"""scores.py, measured.py and intervals.py: every held-out score under its name, with its items and its interval."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from score_cases import model

from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.show.intervals import MIN_ITEMS, Intervals, intervals_of, wilson
from syncr1.engine.show.measured import PER_ITEM, Measured, dumps, measured_in
from syncr1.engine.show.names import AT_CHANCE, BELOW_CHANCE, FELL, UNTRAINED
from syncr1.engine.show.runlog import RunLog
from syncr1.engine.show.scores import ScoreRow, measures_in, score_rows, show_change, show_interval


def of(values: list[float], *, start: int = 0, **more: object) -> Measured:
    return Measured.of([f"item {start + i}" for i in range(len(values))], values, **more)  # type: ignore[arg-type]


# Intervals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "items", "low", "high"),
    # Newcombe (1998), table I, method 3; Wilson's own formula at the ends.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_published_values(right: int, items: int, low: float, high: float) -> None:
    assert wilson(right, items) == pytest.approx((low, high), abs=5e-5)
    measured = of([1.0] * right + [0.0] * (items - right))
    assert intervals_of([([], [measured])]) == [Intervals(None, wilson(right, items), None)]


def test_the_bootstrap_of_a_mean_is_scipys() -> None:
    from scipy.stats import bootstrap, norm

    values = np.random.default_rng(0).beta(2, 1, 150)
    (found,) = intervals_of([([], [of(values.tolist())])])
    expected = bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    half = norm.ppf(0.975) * values.std(ddof=1) / math.sqrt(150)
    assert found.after is not None
    assert found.after == pytest.approx(tuple(expected), abs=0.005)
    assert found.after == pytest.approx((values.mean() - half, values.mean() + half), abs=0.005)


def test_a_change_is_paired() -> None:
    """Two models that differ on the same few items: the difference is far surer than either score."""
    rng = np.random.default_rng(1)
    old = rng.random(200)
    new = old + np.where(np.arange(200) % 2 == 0, 0.02, 0.04)
    (found,) = intervals_of([([of(old.tolist())], [of(new.tolist())])])
    assert found.before is not None and found.before[1] - found.before[0] > 0.07
    assert found.change is not None and 0.028 < found.change[0] < 0.03 < found.change[1] < 0.032
    # Over the items that both have: those of one model alone say nothing about a change.
    (fewer,) = intervals_of([([of(old[:50].tolist())], [of(new.tolist())])])
    assert fewer.change is not None and fewer.change[1] - fewer.change[0] < 0.007
    (none,) = intervals_of([([of([0.5] * 9)], [of([0.7] * 9, start=100)])])
    assert none.change is None and none.before == (0.5, 0.5)
    (same,) = intervals_of([([of(old.tolist())], [of(old.tolist())])])
    assert same.change is None, "that no item changed does not make it sure"


def test_few_items_have_wider_intervals() -> None:
    """Of small samples of a normal distribution 95 % of the intervals hold the mean, as Student's do; bare percentiles
    leave it out of one in six."""
    rng = np.random.default_rng(5)
    samples = rng.normal(1.0, 1.0, (400, 8))
    found = intervals_of([([], [of(row.tolist(), start=100 * i)]) for i, row in enumerate(samples)])
    held = np.mean([one.after is not None and one.after[0] <= 1.0 <= one.after[1] for one in found])
    assert 0.92 <= held <= 0.98


def test_strata_are_drawn_apart_and_means_of_tasks_together() -> None:
    """Always yes: the yes-recall is 1, the no-recall 0, whatever is drawn, and the mean of two tasks has both."""
    kinds = ["yes"] * 30 + ["no"] * 10
    always_yes = of([1.0] * 30 + [0.0] * 10, strata=kinds)
    assert always_yes.value == 0.5
    other = of([0.0, 1.0] * 40, start=1000)
    alone, both = intervals_of([([], [always_yes]), ([], [always_yes, other])])
    # Arms of Wilson's: of 30 right ones 11.4 % below, of 10 wrong ones 27.8 % above; half of each.
    assert alone.after == pytest.approx((0.5 - 0.1135 / 2, 0.5 + 0.2775 / 2), abs=1e-3)
    assert both.after is not None and both.after[0] < 0.5 < both.after[1]
    width = both.after[1] - both.after[0]
    assert width == pytest.approx(0.5 * math.hypot(0.5 * (0.1135 + 0.2775), 0.213), rel=0.1)
    graded = of([value / 2 for value in other.by_item.values()], start=1000)
    drawn = intervals_of([([], [of([0.5] * 40, strata=kinds)]), ([], [of([0.5] * 40, strata=kinds), graded])])
    assert drawn[0].after == (0.5, 0.5) and drawn[1].after is not None and drawn[1].after[0] < 0.375 < drawn[1].after[1]


def test_nothing_right_is_not_sure_to_stay_so() -> None:
    """Two tasks of eight wrong answers each: the mean of both has an interval as well."""
    wrong = [of([0.0] * 8, start=start) for start in (0, 100)]
    single, mean = intervals_of([([], wrong[:1]), ([], wrong)])
    assert single.after == wilson(0, 8) and single.after[1] > 0.3
    assert mean.after is not None and mean.after[0] == 0.0 and 0.2 < mean.after[1] < single.after[1]


@pytest.mark.parametrize("few", [1, 2, MIN_ITEMS - 1])
def test_few_items_have_no_bootstrap(few: int) -> None:
    (found,) = intervals_of([([of([0.5] * few)], [of([0.25] * few)])])
    assert found == Intervals(None, None, None)
    (whole,) = intervals_of([([], [of([1.0] * few)])])
    assert whole.after is not None and whole.after[0] < 0.7


def test_a_whole_evaluation_s_intervals_are_cheap() -> None:
    before, after = model(0, 0.6), model(1, 0.8)
    score_rows(before, after)  # imports scipy
    started = time.thread_time()
    assert len(score_rows(before, after)) > 20
    assert time.thread_time() - started < 1.0  # about .1 on one core


# Items ----------------------------------------------------------------------------------------------------------------


def test_members_of_an_item_count_as_one() -> None:
    measured = Measured.of(["a", "a", "b", "c"], [1.0, 0.0, 1.0, None])
    assert measured.by_item == {"a": 0.5, "b": 1.0} and measured.value == 0.75
    assert math.isnan(Measured.of([], []).value) and Measured.of(["a"], [math.nan]).by_item == {}


VALUES = st.lists(st.floats(-5, 5), min_size=1, max_size=9)


@given(VALUES, st.booleans(), st.none() | st.floats(0, 1))
def test_what_is_kept_in_a_file_is_the_same(values: list[float], recall: bool, chance: float | None) -> None:
    measured = of(values, strata=[("yes", "no")[i % 2] for i in range(len(values))] if recall else None, chance=chance)
    again = Measured.from_json(json.loads(dumps(measured.to_json())))
    assert again is not None and again.value == pytest.approx(measured.value, abs=1e-6)
    assert again.groups == measured.groups and again.chance == measured.chance


@pytest.mark.parametrize(
    "row",
    [
        None,
        7,
        [],
        {},
        {"items": ["a"], "values": [1, 2]},
        {"items": [1], "values": [1]},
        {"items": ["a"], "values": "x"},
    ]
    + [{"items": ["a"], "values": [value]} for value in (None, "1", True, [1], 1e400, 10**400)]
    + [{"items": ["a"], "values": [1], "strata": 5}, {"items": ["a"], "values": [1], "chance": "half"}],
)
def test_a_file_that_was_changed_loses_intervals_and_nothing_else(row: object) -> None:
    side = {"qa/score/greedy": 0.5, PER_ITEM: {"qa/score/greedy": row}}
    assert measured_in(side) == {} == measured_in({PER_ITEM: [row]})
    (shown,) = score_rows(side, side)
    assert (shown.before, shown.change, shown.change_interval, shown.num_items) == (0.5, 0.0, None, 0)


def test_lists_are_written_on_a_line() -> None:
    content = {"a": [1, 0.5, None], "b": ["x [ y", "z ]"], "c": [], "d": {"e": ["1, 2", "\n"]}, "f": [[1], [2, 3]]}
    text = dumps(content)
    assert json.loads(text) == content
    assert '"a": [1, 0.5, null]' in text and '"e": ["1, 2", "\\n"]' in text


# Rows -----------------------------------------------------------------------------------------------------------------

BEFORE, AFTER = model(0, 0.6, general=0.9), model(1, 0.85, general=0.7)
ROWS = {row.name: row for row in score_rows(BEFORE, AFTER)}


def test_whole_drawings_come_first_and_the_independent_reader_before_the_reward_s() -> None:
    for task in ("pure_gen", "rea_gen", "general_image"):
        found = [row for row in ROWS.values() if row.task == task]
        assert [row.measure for row in found] == [
            *("drawings right, classifier", "drawings right, checker"),
            *("attributes right, classifier", "attributes right, checker"),
        ]
        for whole, share in ((found[0], found[2]), (found[1], found[3])):
            for a, b in ((whole.before, share.before), (whole.after, share.after)):
                assert a is not None and b is not None and a <= b
        assert {row.unit for row in found} == {"% of drawings", "% of attributes"}
    summary = [row.measure for row in ROWS.values() if row.task == "summary"]
    assert summary[2:] == [
        f"{name} right, {reader}" for name in ("drawings", "attributes") for reader in ("classifier", "checker")
    ]


def test_every_row_has_its_items_unit_and_intervals() -> None:
    for row in ROWS.values():
        assert row.num_items in (72, 120, 192) or row.task == "summary", row
        assert row.unit.startswith("% ") and row.before is not None and row.after is not None
        for value, interval in ((row.before, row.before_interval), (row.after, row.after_interval)):
            assert interval is not None and interval[0] <= value <= interval[1], row
        assert row.change_interval is not None and row.change_interval[0] < row.change_interval[1]
    assert ROWS["rec/score/greedy"].unit == "% balanced accuracy" and ROWS["rea/score/greedy"].unit == "% of words"


def test_what_fell_and_what_is_guessed_is_marked() -> None:
    assert ROWS["general_image/all_right/cnn"].marks == (UNTRAINED, FELL)
    assert ROWS["rec/score/greedy"].marks == (AT_CHANCE,) and ROWS["rec/score/greedy"].family == "recognition"
    assert {row.marks for row in ROWS.values() if row.task in ("vqa", "qa", "pure_gen", "summary")} == {()}
    back = {row.name: row for row in score_rows(AFTER, BEFORE)}
    assert FELL in back["vqa/score/greedy"].marks and FELL in back["summary/understanding/greedy"].marks
    assert measures_in(list(ROWS.values())).keys() >= {
        *(AT_CHANCE, FELL, UNTRAINED),
        *("most likely answer", "drawings right", "classifier", "% balanced accuracy"),
    }


@pytest.mark.parametrize(
    ("right", "chance", "marks"),
    [(50, 0.5, (AT_CHANCE,)), (60, 0.5, ()), (40, 0.5, (BELOW_CHANCE,)), (30, 0.25, (AT_CHANCE,)), (60, None, ())],
)
def test_chance_is_compared_with_the_interval(right: int, chance: float | None, marks: tuple[str, ...]) -> None:
    """100 items: 60 of them are more than half, 9.6 points of it are the interval's."""
    measured = of([1.0] * right + [0.0] * (100 - right), chance=chance)
    side = {"mcq/score/greedy": right / 100, PER_ITEM: {"mcq/score/greedy": measured.to_json()}}
    assert score_rows(None, side)[0].marks == score_rows(side, None)[0].marks == marks


def test_a_change_that_may_be_none_is_not_a_fall() -> None:
    old, new = [1.0] * 60 + [0.0] * 40, [1.0] * 58 + [0.0] * 42
    sides = [{"qa/score/greedy": 0.6, PER_ITEM: {"qa/score/greedy": of(values).to_json()}} for values in (old, new)]
    (row,) = score_rows(*sides)
    assert row.marks == () and row.change_interval is not None and row.change_interval[1] == 0


def test_rows_are_the_same_from_the_folder_alone(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "r", SyncR1Config())
    log.scores(before=BEFORE)
    log.scores(before=BEFORE, after=AFTER)
    kept = json.loads((log.folder / "scores.json").read_text())
    again = score_rows(kept["before"], kept["after"])
    assert [row._replace(before=None, after=None) for row in again] == [
        row._replace(before=None, after=None) for row in ROWS.values()
    ]
    assert [
        ScoreRow(**{k: _tuples(v) for k, v in row.items() if k not in ("change", "label")}) for row in kept["table"]
    ] == again
    assert kept["table"][0]["change"] == pytest.approx(again[0].change)
    assert (log.folder / "scores.json").stat().st_size < 200_000


def _tuples(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def test_likeness_is_called_likeness() -> None:
    """Photographs: no attribute is known, and a likeness of 40 % is no share of right drawings."""
    photographs = {"pure_gen": {"identity": 0.4, "score/sampled": 0.4}, "summary": {"image/identity": 0.4}}
    rows = score_rows(photographs, None)
    assert [(row.measure, row.unit) for row in rows] == [
        ("likeness, by own tower", "likeness, 0 to 1"),
        ("drawings: likeness, by own tower", "likeness, 0 to 1"),
    ]
    assert "does not make it right" in measures_in(rows)["likeness"]


def test_answers_that_are_graded_by_characters_say_so() -> None:
    flat = {"qa/bleu/greedy": 0.62, "qa/accuracy/greedy": 0.1, "qa/score/greedy": 0.62}
    (row,) = score_rows(flat, None)
    assert row.unit == "character BLEU, 0 to 1"


@pytest.mark.parametrize(
    ("interval", "unit", "signed", "said"),
    [
        ((-0.004, 0.12), "% of words", True, "[-0.4, +12]"),
        ((-0.0004, 0.0004), "% of words", True, "[-0.04, +0.04]"),
        ((-1e-9, 0.0), "% of words", True, "[0, 0]"),
        ((0.0, 0.14), "% of words", False, "[0, 14]"),
        ((0.004, 1.0), "% of words", False, "[0.4, 100]"),
        ((-0.004, 0.2), "cosine", True, "[-0.004, +0.20]"),
        ((-0.0, 1e-9), "cosine", True, "[0.00, 0.00]"),
        ((-250.0, 0.5), "reward", True, "[-250, +0.5]"),
    ],
)
def test_no_end_is_rounded_to_a_zero_with_a_sign(
    interval: tuple[float, float], unit: str, signed: bool, said: str
) -> None:
    """Whether an interval holds 0 is what it is read for."""
    assert show_interval(interval, unit, signed=signed) == said


@pytest.mark.parametrize(
    ("before", "after", "said"), [(0.5, 0.4999, "0.0"), (0.5, 0.5, "0.0"), (0.5, 0.4994, "-0.1"), (2.0, 2.0, "0")]
)
def test_a_change_of_nothing_has_no_sign(before: float, after: float, said: str) -> None:
    assert show_change(ScoreRow("qa", "most likely answer", before, after)) == said
