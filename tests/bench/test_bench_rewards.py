"""The benchmark of batched rewards: both sides say the same, and it runs at tiny sizes."""

from __future__ import annotations

import sys
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import ROOT

from syncr1.engine.stopwatch import Stopwatch

BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))
try:
    import rewards
finally:
    sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> rewards.Models:
    return rewards.Models(rewards.QUICK, "cpu", tmp_path_factory.mktemp("photos"))


@pytest.mark.parametrize("at_once", [1, 3, rewards.GROUP])
def test_both_sides_say_the_same(made: rewards.Models, at_once: int) -> None:
    n = len(made.images)
    mine, theirs = rewards.ours(made, range(n), Stopwatch()), rewards.looped(made, range(n), Stopwatch(), at_once)
    assert len(mine) == n == rewards.GROUP * rewards.QUICK.prompts
    for column, within in ((0, 1e-4), (2, 1e-4)):
        a, b = (torch.tensor([row[column] for row in side]) for side in (mine, theirs))
        torch.testing.assert_close(a, b, rtol=0, atol=within)
        assert float(a.std()) > 10 * within, "or nothing is compared"
    assert [row[1] for row in mine] == [row[1] for row in theirs]
    assert {len(row[1].split()) for row in mine} == {rewards.QUICK.caption_tokens}, "no caption ends early"
    assert len({row[1] for row in mine}) > 1


def test_pictures_are_looked_at_anew_in_every_run(made: rewards.Models) -> None:
    """Else a second round would measure a cache."""
    before = made.lpips.known.num_computed
    for _ in range(2):
        rewards.ours(made, range(2), Stopwatch())
    assert made.lpips.known.num_computed == before + 2 and len(made.lpips.known) == 0


def test_a_side_that_differs_is_told(made: rewards.Models, monkeypatch: pytest.MonkeyPatch) -> None:
    rewards.check(made)
    monkeypatch.setattr(made, "texts", ["w1 w2"])
    monkeypatch.setattr(rewards, "TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match="the sides disagree"):
        rewards.check(made)


def test_the_floor_counts_what_a_loop_does_more(made: rewards.Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """G photographs' passes more of LPIPS, and a decoding step for each drawing (here all steps take the same time)."""
    monkeypatch.setattr(rewards.rates, "products", lambda step, rows: 1.0)
    batched = rewards.floor(made, photo_passes=1, rows=8)
    looped = rewards.floor(made, photo_passes=8, rows=1)
    assert looped["lpips"] == pytest.approx(batched["lpips"] * 16 / 9) and looped["matching"] == batched["matching"] > 0
    assert looped["captions' words"] == pytest.approx(8 * batched["captions' words"])


@pytest.mark.slow
def test_it_runs_at_tiny_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = rewards.main(["--quick", "--device", "cpu", "--no_memory", "--out", str(tmp_path)])
    rows = {row["provider"]: row for row in content["cases"]["small"]["rows"]}
    assert set(rows) == {"ours", "as released", "per image"} and not content["cases"]["small"]["skipped"]
    assert all(set(row["stages"]) == {"lpips", "captions", "matching"} for row in rows.values())
    assert len(list(tmp_path.glob("*-rewards.json"))) == 1
    assert "| per image |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        rewards.main(["--only", "no_such_case"])
