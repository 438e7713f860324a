"""The report in headless Chromium: three widths, print, hovering, with and without scripts; skipped where there is no
browser (Debian: `apt-get install chromium`).
"""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, browser, found
from PIL import Image
from run_folders import finished_run, run_of_several
from run_records import make_metrics

from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.show.report import write_report
from syncr1.engine.show.report_compare import write_comparison
from syncr1.engine.show.runlog import RunLog

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(found() is None, reason="no Chromium; Debian's package chromium has it"),
]

WIDTHS = (400, 800, 1280)
# What sticks out of the page, but for what scrolls in a frame of its own; and text that its box cuts off.
STICKS_OUT = """
[...document.querySelectorAll("main *")]
  .filter((e) => !e.closest(".scroll, svg, .heard") && e.getBoundingClientRect().right > innerWidth + 1)
  .map((e) => e.outerHTML.slice(0, 200))
"""
CUT_OFF = """
[...document.querySelectorAll(".card, td, th, dd, p, li")]
  .filter((e) => e.scrollWidth > e.clientWidth + 1 && !e.closest(".heard, thead"))
  .filter((e) => getComputedStyle(e).display != "inline")
  .map((e) => e.outerHTML.slice(0, 200))
"""
TOO_FAINT = """
[...document.querySelectorAll("h1, h2, p, td, dd, dt, li, figcaption, text")].map((e) => {
  const light = (colour) => {
    const parts = colour.match(/[\\d.]+/g).map((part) => part / 255);
    const [r, g, b] = parts.map((v) => (v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const ground = (box) => getComputedStyle(box).backgroundColor;
  let behind = e;
  while (behind.parentElement && ground(behind) == "rgba(0, 0, 0, 0)") behind = behind.parentElement;
  const style = getComputedStyle(e);
  const a = light(e.tagName == "text" ? style.fill : style.color), b = light(ground(behind));
  return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.outerHTML.slice(0, 120)];
}).filter(([contrast]) => contrast < 4.5)
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def pages(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind."""
    folder = tmp_path_factory.mktemp("others")
    other = finished_run(folder, "a_run_with_quite_a_long_name", max_steps=25, learning_rate=1e-3)
    return {
        "run": run / "report.html",
        "run of several": run_of_several(folder) / "report.html",
        "comparison": write_comparison(run, other),
    }


@pytest.mark.parametrize("kind", ["run", "run of several", "comparison"])
def test_fits_every_width_and_complains_of_nothing(chromium: Browser, pages: dict[str, Path], kind: str) -> None:
    chromium.complaints.clear()
    for width in WIDTHS:
        chromium.resize(width)
        chromium.show(pages[kind])
        assert chromium.value(STICKS_OUT) == [], (kind, width)
        assert chromium.value("[innerWidth, document.documentElement.scrollWidth]") == [width, width], kind
        assert chromium.value(CUT_OFF) == [], (kind, width)
        shot = Image.open(io.BytesIO(chromium.picture()))
        assert shot.width == width and shot.height > 1500
        assert len(shot.resize((64, 64)).convert("RGB").getcolors(4096) or []) > 50, "a blank page"
    assert chromium.complaints == []


def test_what_is_written_can_be_read_in_light_and_dark(chromium: Browser, pages: dict[str, Path]) -> None:
    """Contrast of at least 4.5 to 1, as WCAG 2.2 asks for text of this size."""
    for scheme in ("light", "dark"):
        chromium.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        chromium.show(pages["run"])
        assert chromium.value(TOO_FAINT) == [], scheme
    chromium.call("Emulation.setEmulatedMedia", features=[])


def test_prints_everything_on_a4(chromium: Browser, pages: dict[str, Path]) -> None:
    chromium.show(pages["run"])
    printed = chromium.printed()
    assert printed.startswith(b"%PDF") and 2 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 20
    chromium.call("Emulation.setEmulatedMedia", media="print")
    chromium.resize(718)  # A4 between margins of 10 mm
    try:
        assert chromium.value(STICKS_OUT) == []
        assert chromium.value("getComputedStyle(document.querySelector('.card')).overflowX") == "visible"
        assert chromium.value("document.querySelector('table.settings').getBoundingClientRect().height") > 100
    finally:
        chromium.call("Emulation.setEmulatedMedia", media="")


def test_a_pointer_and_the_arrow_keys_show_the_values_of_a_step(chromium: Browser, pages: dict[str, Path]) -> None:
    chromium.resize(1280)
    chromium.show(pages["run"])
    chromium.value("document.querySelector('.chart').scrollIntoView()")
    x, y, width, height = chromium.value(
        "(r => [r.x, r.y, r.width, r.height])(document.querySelector('.chart svg').getBoundingClientRect())"
    )
    readout = "document.querySelector('.chart .readout').textContent"
    chromium.point_at(x + 0.5 * width, y + height / 2)
    said = chromium.value(readout)
    assert re.match(r"step 1[456]: total 0\.6[345]", said), said
    chromium.point_at(x + 0.8 * width, y + height / 2)
    later = chromium.value(readout)
    assert later != said and chromium.value("document.querySelectorAll('.chart .at.on').length") == 1
    chromium.value("document.querySelector('.chart svg').focus()")
    chromium.press("ArrowRight")
    step = int(re.findall(r"step (\d+)", later)[0])
    assert f"step {step + 1}:" in chromium.value(readout)


def test_without_scripts_the_page_is_whole(chromium: Browser, pages: dict[str, Path]) -> None:
    chromium.scripts(False)
    try:
        chromium.resize(400)
        chromium.show(pages["run"])
        counts = "['svg', 'table', 'article', '.at title'].map((name) => document.querySelectorAll(name).length)"
        charts, tables, cards, titles = chromium.value(counts)
        assert charts >= 8 and tables >= 2 and cards == 3 and titles >= 8 * 30, (
            "values show as the browser shows titles"
        )
        assert chromium.value("document.documentElement.scrollWidth <= innerWidth")
    finally:
        chromium.scripts(True)


def test_right_and_wrong_are_told_by_signs_and_words(chromium: Browser, pages: dict[str, Path]) -> None:
    chromium.show(pages["run"])
    first, second = chromium.value("[...document.querySelectorAll('article')].slice(0, 2).map((e) => e.innerText)")
    assert "✗ 1 of 2 as asked" in first and "✗ colour blue, not red" in first and "✓ all as asked" in first
    assert "photo of bobo" in second and "the model does not see it" in second
    hidden = chromium.value("document.querySelector('.verdicts .wrong').textContent")
    assert hidden.endswith(", wrong"), "for who hears the page"


def test_the_page_of_a_run_that_goes_on_reloads_itself_until_its_end(chromium: Browser, tmp_path: Path) -> None:
    log = RunLog(tmp_path / "live", SyncR1Config(max_steps=9))
    log.metrics(make_metrics(0))
    page = log.folder / "report.html"
    write_report(log.folder)
    # The wait, made short: the script's and the page's are the same number.
    page.write_text(page.read_text("utf-8").replace('data-reload="10"', 'data-reload="0.2"'), "utf-8")
    chromium.complaints.clear()
    chromium.show(page)
    assert "running, 1 of 9 steps so far" in chromium.value("document.body.innerText")
    log.metrics(make_metrics(1))
    log.close()
    until = time.monotonic() + 20
    while "stopped after 2 of 9 steps" not in chromium.value("document.body?.innerText ?? ''"):  # none as it reloads
        assert time.monotonic() < until
        time.sleep(0.1)
    assert chromium.value("document.querySelector('.live')") is None
    assert chromium.complaints == []


def test_the_page_of_a_killed_run_says_that_it_is_silent(chromium: Browser, tmp_path: Path) -> None:
    log = RunLog(tmp_path / "killed", SyncR1Config(max_steps=9))
    page = log.folder / "report.html"
    old = re.sub(r'data-written="\d+"', f'data-written="{time.time() - 3600:.0f}"', page.read_text("utf-8"))
    page.write_text(old, "utf-8")
    chromium.show(page)
    assert "Not rewritten for 60 minutes" in chromium.value("document.querySelector('.live').textContent")
    status = json.loads((log.folder / "status.json").read_text())
    status["process"]["began"] = "1"  # another process had this number
    (log.folder / "status.json").write_text(json.dumps(status))
    chromium.show(write_report(log.folder))
    said = chromium.value("document.querySelector('.state').innerText")
    assert "killed after 0 of 9 steps" in said and "begins again" in said
    log.close()
