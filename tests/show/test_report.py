"""report.py and charts.py: one page that stands alone, escapes what comes from data, and bears missing files."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from run_records import HOSTILE, SCORES_AFTER, SCORES_BEFORE, make_group, make_metrics, make_prompt, make_rollout

from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.show.charts import line_chart, nice_ticks, smooth, stacked_chart, tick_label
from syncr1.engine.show.report import read_jsonl, write_report
from syncr1.engine.show.runlog import RunLog

VOID = {"meta", "img", "path", "circle", "br"}


class Page(HTMLParser):
    """Checks that tags are balanced and collects what a browser would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: dict[str, int] = {}
        self.loads: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        assert not any(name.startswith("on") for name, _ in attrs), attrs
        if tag == "img":
            assert dict(attrs).get("alt")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 30 steps."""
    folder = tmp_path_factory.mktemp("run")
    config = SyncR1Config(output_dir=folder / "r", max_steps=30)
    prompts = [make_prompt("bobo", folder), make_prompt("mimi", draws=False)]
    with RunLog(config.output_dir, config) as log:
        for step in range(30):
            log.metrics(make_metrics(step, reward_failures=float(step == 3)))
            if step % 10 == 0:
                rollouts = [rollout for prompt in prompts for rollout in make_group(prompt)]
                log.samples(step, rollouts, {"reward": [0.5] * len(rollouts)})
        log.scores(
            before=SCORES_BEFORE,
            after=SCORES_AFTER,
            examples_before=[make_rollout(prompt, 0, text=HOSTILE) for prompt in prompts],
            examples_after=[make_rollout(prompt, 1) for prompt in prompts],
        )
    return log.folder


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_page_stands_alone_and_shows_everything(finished: Path) -> None:
    page = page_of(finished)
    assert page.loads, "pictures are embedded"
    assert all(source.startswith("data:image/") for source in page.loads)
    assert "script" not in page.tags
    assert "link" not in page.tags
    css = (finished / "report.html").read_text(encoding="utf-8")
    assert "url(" not in css
    assert "prefers-color-scheme: dark" in css
    titles = ["Before and after training", "All tasks", "Reward", "KL", "Entropy", "Sampled tokens", "Seconds per step"]
    for words in [*titles, "all 30 steps done", "Step 21", "Environment", "learning_rate", "Rewards that failed"]:
        assert words in page.text, words
    assert page.tags["svg"] >= 8


def test_what_comes_from_data_is_escaped(finished: Path) -> None:
    page = page_of(finished)
    assert HOSTILE in page.text  # as text, to the letter
    assert "<script" not in (finished / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "missing",
    ["config.yaml", "environment.json", "metrics.jsonl", "scores.json", "samples", "before_after", "before_after.png"],
)
def test_any_file_may_be_missing(finished: Path, tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    target = folder / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    whole, page = page_of(finished), page_of(folder)
    # Only the metrics have curves: whatever else is missing, they are still there, and without them there are none.
    assert page.tags.get("svg", 0) == (0 if missing == "metrics.jsonl" else whole.tags["svg"])


def test_an_empty_folder_and_one_step(tmp_path: Path) -> None:
    assert "0 steps" in page_of(tmp_path).text
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": 0.5, "seconds/rollout": 1.0, "num_tokens": 5}\n{"st')
    page = page_of(tmp_path)
    assert "1 step" in page.text
    assert page.tags["svg"] == 3


def test_broken_and_hostile_files_are_left_out(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    (folder / "scores.json").write_text("[1")
    (folder / "environment.json").write_text("[]")
    (folder / "config.yaml").write_text("max_steps: !!python/object/apply:os.getcwd []")
    (folder / "samples" / "step_000021.png").write_bytes(b"\x89PNG half")
    (tmp_path / "secret.png").write_bytes((finished / "before_after.png").read_bytes())
    row = {"prompt": "p", "before_image": "../secret.png", "after_image": "/etc/hostname"}
    (folder / "before_after" / "examples.jsonl").write_text(json.dumps(row) + "\n7\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(
            f'{{"step": 30, "reward": "{HOSTILE.replace(chr(34), "")}", "rewards/<b>/mean": 0.1, "loss": null}}\n'
        )
    page = page_of(folder)
    assert "no picture" in page.text
    assert len(page.loads) == 2  # the sheets that are whole
    assert "b" not in page.tags or "<b>" in page.text
    assert "not finite in 1 steps" in page.text


def test_large_pictures_are_embedded_smaller(finished: Path, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    (tmp_path / "samples").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (500, 500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "samples" / "step_000000.png")
    page = page_of(tmp_path)
    assert page.loads[0].startswith("data:image/webp")
    assert len(page.loads[0]) < 700_000


def test_read_jsonl_skips_what_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n[1]\n\n{"b"')
    assert read_jsonl(tmp_path / "a.jsonl") == [{"a": 1}]
    assert read_jsonl(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.31, 0.79), (-0.02, 0.03), (0, 12345), (5, 5), (0, 0), (1e-9, 3e-9), (-3, -1)]
)
def test_ticks_are_round_and_cover_the_data(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 3 <= len(ticks) <= 8
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-12
    assert len({tick_label(tick) for tick in ticks}) == len(ticks)


def test_charts_of_nothing_of_one_point_and_of_gaps() -> None:
    assert line_chart("t", {"a": []}) == ""
    assert stacked_chart("t", {}) == ""
    assert "<circle" in line_chart("t", {"a": [(1, 0.5)]})
    assert "<path" in stacked_chart("t", {"a": [(1, 0.5)], "b": []})
    drawn = stacked_chart("t", {"a": [(1, 1.0), (2, 1.0)], "b": [(2, 2.0)]})
    assert "<b>50 %</b>" in drawn
    assert "nan" not in drawn
    numbers = re.findall(r"-?\d+\.\d+", line_chart("t", {"a": [(x, x * x) for x in range(50)]}))
    assert all(-1 <= float(number) <= 2500 for number in numbers)


def test_smoothing_keeps_steps_and_level() -> None:
    points = [(float(x), float(x % 2)) for x in range(40)]
    smoothed = smooth(points)
    assert [x for x, _ in smoothed] == [x for x, _ in points]
    assert all(0.3 < y < 0.7 for _, y in smoothed[2:-2])
