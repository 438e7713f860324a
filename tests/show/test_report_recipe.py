"""recipes/report.py and report_compare.py: a page remade, two runs beside each other, and folders that are no run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from run_folders import finished_run, run_of_several
from test_report import Page

from syncr1.engine.show.report import write_report
from syncr1.engine.show.report_compare import distinct_names, write_comparison

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, one with another rate and fewer steps, and one of several trainings."""
    folder = tmp_path_factory.mktemp("runs")
    finished_run(folder, "one")
    (folder / "garbage").mkdir()
    (folder / "garbage" / "metrics.jsonl").write_bytes(b"\x00\xff no JSON\n" * 9)
    finished_run(folder, "two", max_steps=25, learning_rate=1e-3)
    run_of_several(folder)
    return folder


def report(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", ROOT / "recipes" / "report.py", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What it printed on stderr, without the times of imports."""
    return [line for line in done.stderr.splitlines() if not line.startswith("import time:")]


def test_a_page_is_remade_in_its_folder_without_torch(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(folder / "one", run)
    (run / "report.html").unlink()
    done = report(run)
    assert (done.returncode, said(done)) == (0, [])
    assert done.stdout.strip() == str(run / "report.html")
    assert "all 30 steps done" in Page((run / "report.html").read_text(encoding="utf-8")).text
    assert not any(line.endswith("| torch") for line in done.stderr.splitlines()), "seconds for nothing"


def test_two_runs_beside_each_other(folder: Path, tmp_path: Path) -> None:
    done = report(folder / "one", folder / "two", "--output", tmp_path / "page.html")
    assert (done.returncode, said(done)) == (0, [])
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    for words in ("one against two", "Settings that differ", "learning_rate", "0.0005", "0.001", "Curves of both"):
        assert words in page.text, words
    assert "report_steps" not in page.text, "the same in both"
    assert page.tags["article"] == 3, "each request once"
    sides = [word for word in page.words if word in ("before", "one after", "two after", "one before")]
    assert sides == ["before", "one after", "two after"] * 3, "both began alike, so before is shown once"


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "scores.json", "environment.json", "before_after"])
def test_a_comparison_bears_what_is_missing(folder: Path, tmp_path: Path, missing: str) -> None:
    run = tmp_path / "copy"
    shutil.copytree(folder / "two", run)
    shutil.rmtree(run / missing) if (run / missing).is_dir() else (run / missing).unlink()
    page = Page(write_comparison(folder / "one", run, tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "one against copy" in page.text
    assert ("Curves of both" in page.text) and ("no scores after training" in page.text) == (missing == "scores.json")


def test_runs_of_several_trainings_are_compared_training_by_training(folder: Path, tmp_path: Path) -> None:
    run = folder / "several"
    page = Page(write_comparison(run, run, tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "several (A) against several (B)" in page.text and "Curves of both: both" in page.text


def test_names_of_runs_differ(tmp_path: Path) -> None:
    assert distinct_names(tmp_path / "a" / "run", tmp_path / "b" / "run") == ("a/run", "b/run")
    assert distinct_names(tmp_path / "x", tmp_path / "y") == ("x", "y")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere, which is not there"),
        (["."], "it holds runs: garbage, one, several, two"),
        (["one/samples"], "a run's folder has config.yaml or metrics.jsonl"),
        (["one/config.yaml"], "one/config.yaml, a file"),
        (["one", "nowhere"], "nowhere, which is not there"),
        (["one", "two", "one"], "runs: expected a run's folder, or two to compare, got 3"),
        (["one", "--output", "p.html"], "output: expected two runs"),
        (["one", "two", "--output", "no/such/folder.html"], "no/such, which is not there; make it first"),
        (["one", "two", "--output", "."], "got ., a folder"),
        (["garbage"], "metrics.jsonl without a line of it"),
        (["one", "--outptu", "x"], "did you mean --output?"),
        ([], "got 0; name one or two"),
    ],
)
def test_what_is_no_run_ends_in_a_line(
    folder: Path, arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import report as recipe

    with pytest.raises(SystemExit) as ended:
        recipe.main()
    told = capsys.readouterr()
    assert ended.value.code == 2 and told.out == ""
    assert told.err.count("\n") == 1 and words in told.err and told.err.startswith("report.py: ")


def test_a_run_of_several_trainings_is_one_page(folder: Path) -> None:
    run = folder / "several"
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "stopped after 1 of 3 parts" in page.text and "0 of 6 steps" not in page.text
    for words in ("Every model of the run", "starting model", "not begun", "made from both and second"):
        assert words in page.text, words
    assert "Before: “starting model”. After: scores of drawings from “both” and of answers from “both”" in page.text
    assert "first/report.html" in page.loads
    own = Page(write_report(run / "first").read_text(encoding="utf-8"))
    assert "../report.html" in own.loads, "and back"


def test_a_run_of_several_trainings_of_an_older_version(folder: Path, tmp_path: Path) -> None:
    """It has no parts.json and no status.json."""
    run = tmp_path / "old"
    shutil.copytree(folder / "several", run)
    for path in (*run.rglob("parts.json"), *run.rglob("status.json")):
        path.unlink()
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "1 training" in page.text and "Every model of the run" in page.text and "first/report.html" in page.loads


@pytest.mark.parametrize(
    "parts",
    [
        [],
        {"parts": 3},
        {"parts": [3, {"name": 4}, {"name": "../.."}, {"name": "first", "from": 7, "state": []}], "models": [1]},
        {"parts": [{"name": "\ud800", "title": "<script>"}], "models": {"base": 3, "b": {"table": [{"task": 1}, 2]}}},
        {"parts": [{"name": "first"}], "before": 1, "after": {"drawings": 2}, "models": {"x": {"table": {}}}},
    ],
)
def test_damaged_parts_still_give_a_page(folder: Path, tmp_path: Path, parts: object) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "several", run)
    (run / "parts.json").write_text(json.dumps(parts))
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.tags["h1"] == 1 and page.tags["script"] == 1
