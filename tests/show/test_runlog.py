"""runlog.py, sheets.py and trackers.py: what a run leaves on disk, and that it overwrites nothing."""

from __future__ import annotations

import inspect
import json
import math
import os
import sqlite3
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from run_records import SCORES_AFTER, SCORES_BEFORE, make_group, make_metrics, make_prompt, make_rollout

from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.settings.yaml_files import from_yaml
from syncr1.engine.show import sheets
from syncr1.engine.show.environment import environment
from syncr1.engine.show.runlog import NullRunLog, RunLog, open_run_log
from syncr1.engine.show.trackers import Completion, Trackers, wanted

SUPPORT = Path(__file__).resolve().parents[1] / "support"
ROOT = SUPPORT.parents[1]


def read_lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def test_folder_is_never_shared_and_never_overwritten(tmp_path: Path) -> None:
    wanted = tmp_path / "runs" / "one"
    first = RunLog(wanted, SyncR1Config(seed=1))
    first.metrics(make_metrics(0))
    second, third = RunLog(wanted, SyncR1Config(seed=2)), RunLog(wanted, SyncR1Config(seed=3))
    assert [log.folder.name for log in (first, second, third)] == ["one", "one-2", "one-3"]
    assert [from_yaml(SyncR1Config, log.folder / "config.yaml").seed for log in (first, second, third)] == [1, 2, 3]
    assert len(read_lines(first.folder / "metrics.jsonl")) == 1


def test_a_folder_without_a_run_is_used_and_a_finished_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    assert RunLog(tmp_path / "a", SyncR1Config()).folder.name == "a"
    (tmp_path / "b" / "checkpoints").mkdir(parents=True)
    assert RunLog(tmp_path / "b", SyncR1Config()).folder.name == "b-2"


def test_runs_that_start_at_once_get_different_folders(tmp_path: Path) -> None:
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(RunLog(tmp_path / "r", SyncR1Config()).folder)) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 6


def test_metrics_are_json_at_once_with_null_for_nan(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "r", SyncR1Config())
    log.metrics(make_metrics(0, grad_norm=math.inf))
    row = read_lines(log.folder / "metrics.jsonl")[0]  # not closed: flushed
    assert row["step"] == 1, "as the terminal counts"
    assert row["rewards/text/mean"] is None
    assert row["grad_norm"] is None
    assert row["seconds/rollout"] == 0.3
    log.close()
    log.close()
    with pytest.raises(RuntimeError, match="closed"):
        log.metrics(make_metrics(1))


def test_environment_repeats_the_run_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-secret")
    monkeypatch.setenv("WANDB_API_KEY", "planted-secret")
    with RunLog(tmp_path / "r", SyncR1Config(max_steps=80)) as log:
        log.metrics(make_metrics(0))
    facts = json.loads((log.folder / "environment.json").read_text())
    assert facts["packages"]["torch"] == torch.__version__
    assert {"python", "commit", "device", "packages", "started"} <= facts.keys() == environment().keys()
    for path in log.folder.rglob("*"):
        assert not path.is_file() or b"planted-secret" not in path.read_bytes(), path


def test_samples_are_a_picture_and_lines(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "r", SyncR1Config())
    rollouts = [*make_group(make_prompt("bobo", tmp_path)), *make_group(make_prompt("mimi", draws=False))]
    rewards = {"reward": torch.tensor([0.1, 0.2, math.nan, 0.4, 0.5, 0.6]), "text": [None, 1.0, 1.0, 0.0, 0.5, 1.0]}
    log.samples(20, rollouts, rewards)
    rows = read_lines(log.folder / "samples" / "step_000021.jsonl")
    assert [row["member"] for row in rows] == [0, 1, 2, 0, 1, 2]
    assert rows[0]["rewards"] == {"reward": pytest.approx(0.1), "text": None}
    assert rows[2]["rewards"]["reward"] is None
    assert [row["has_image"] for row in rows] == [True] * 3 + [False] * 3
    with Image.open(log.folder / "samples" / "step_000021.png") as picture:
        assert picture.width > 3 * 128
        assert picture.height > 128
    log.samples(40, rollouts, torch.arange(6.0))  # the total alone, as the trainer hands it over
    assert read_lines(log.folder / "samples" / "step_000041.jsonl")[5]["rewards"] == {"reward": 5.0}
    assert "extra" not in rows[0]
    log.samples(50, rollouts, torch.arange(6.0), {"said": [f"t{i}" for i in range(6)], "boxes": [[1, 2], *[None] * 5]})
    row = read_lines(log.folder / "samples" / "step_000051.jsonl")[0]
    assert row["extra"] == {"said": "t0", "boxes": [1, 2]}, "what rewards logged of it"
    with pytest.raises(ValueError, match="expected 6 values of reward"):
        log.samples(60, rollouts, torch.arange(5.0))
    log.samples(80, [], {})
    assert not (log.folder / "samples" / "step_000081.png").exists()


def test_scores_before_alone_then_both(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "r", SyncR1Config())
    log.scores(before=SCORES_BEFORE)
    assert json.loads((log.folder / "scores.json").read_text())["after"] == {}
    prompts = [make_prompt("bobo"), make_prompt("mimi", draws=False)]
    old = [make_rollout(prompt, 0, text="blue") for prompt in prompts]
    new = [make_rollout(prompt, 1) for prompt in prompts]
    log.scores(before=SCORES_BEFORE, after={**SCORES_AFTER, "rec": math.nan}, examples_before=old, examples_after=new)
    scores = json.loads((log.folder / "scores.json").read_text())
    assert scores["after"]["qa/sampled"] == 0.88
    assert scores["after"]["rec"] is None
    rows = read_lines(log.folder / "before_after" / "examples.jsonl")
    assert (rows[0]["before_text"], rows[0]["after_text"]) == ("blue", "red")
    assert (log.folder / rows[0]["after_image"]).is_file()
    assert rows[1]["before_image"] is None
    assert (log.folder / "before_after.png").is_file()
    with pytest.raises(ValueError, match="same prompts"):
        log.scores(examples_before=old, examples_after=new[::-1])


def test_report_is_written_even_when_the_run_breaks(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), RunLog(tmp_path / "r", SyncR1Config(max_steps=80)) as log:
        log.metrics(make_metrics(0))
        raise KeyboardInterrupt
    assert "interrupted after 1 of 80 steps" in (log.folder / "report.html").read_text(encoding="utf-8")


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # a test before may have joined a group
    monkeypatch.setenv("RANK", "1")
    with open_run_log(tmp_path / "r", SyncR1Config()) as log:
        log.metrics(make_metrics(0))
        log.samples(0, make_group(make_prompt("bobo")), torch.zeros(3))
        log.scores(before=SCORES_BEFORE, after=SCORES_AFTER)
    assert isinstance(log, NullRunLog)
    assert list(tmp_path.iterdir()) == []
    for name, method in inspect.getmembers(RunLog, inspect.isfunction):
        if not name.startswith("_"):
            assert inspect.signature(getattr(NullRunLog, name)) == inspect.signature(method), name
    monkeypatch.setenv("RANK", "0")
    assert isinstance(open_run_log(tmp_path / "r", SyncR1Config()), RunLog)


TWO_RANKS = """
import sys, torch.distributed as dist
from datetime import timedelta
from pathlib import Path
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.show.runlog import open_run_log
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2,
                        timeout=timedelta(seconds=50))
with open_run_log(folder / "r", SyncR1Config()) as log:
    print(type(log).__name__, log.folder.name)
"""


@pytest.mark.slow
def test_ranks_agree_on_the_folder(tmp_path: Path) -> None:
    RunLog(tmp_path / "r", SyncR1Config())  # so that rank 0 has to take the next name, which rank 1 cannot guess
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=90)[0].split() for process in started]
    assert said == [["RunLog", "r-2"], ["NullRunLog", "r-2"]]


@pytest.mark.parametrize(("size", "shown"), [(24, 144), (64, 128), (128, 128), (256, 256), (384, 256)])
def test_pictures_are_shown_at_a_readable_size(size: int, shown: int) -> None:
    assert sheets.shown_size(size, size) == (shown, shown)
    assert sheets.enlarge(Image.new("RGB", (size, size))).size == (shown, shown)


def test_enlarging_keeps_pixels_square_and_sharp() -> None:
    image = torch.zeros(3, 2, 2)
    image[:, 0, 0], image[0, 1, 1], image[0, 0, 1] = 1.0, math.nan, 7.0
    picture = sheets.enlarge(sheets.to_picture(image))
    assert picture.getpixel((63, 63)) == (255, 255, 255)
    assert picture.getpixel((64, 64)) == (0, 0, 0)
    assert picture.getpixel((64, 63)) == (255, 0, 0)


def test_wrapping_cuts_long_words_and_marks_what_is_left_out() -> None:
    lines = sheets.wrap("a " + "w" * 100 + " end", 80, 13, max_lines=3)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert all(sheets.font(13).getlength(line) <= 80 for line in lines)
    assert sheets.wrap("short", 80, 13, max_lines=3) == ["short"]


def test_sheets_need_no_font_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's own grows with the size that is asked for, and has the signs that sheets use."""
    monkeypatch.setattr(sheets, "FONTS", (("no such font.ttf",) * 2,))
    small, large = sheets.font.__wrapped__(11), sheets.font.__wrapped__(22)
    assert large.getlength("reward 0.50") > 1.8 * small.getlength("reward 0.50")
    missing = bytes(large.getmask("\uffff"))
    assert all(bytes(large.getmask(letter)) != missing for letter in "aZ09:.·…(")


def test_sheet_survives_a_photo_that_is_gone(tmp_path: Path) -> None:
    prompt = make_prompt("bobo", tmp_path)
    (tmp_path / "bobo.png").unlink()
    assert sheets.sample_sheet(0, make_group(prompt), {}).width > 0


class FakeTracker(types.ModuleType):
    """Stands for the packages trackio and wandb; notes what it is told."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any]] = []

    def init(self, private: bool = False, mode: str = "", **settings: Any) -> FakeTracker:
        self.calls.append(("init", {"private": private, "mode": mode, **settings}))
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.calls.append(("log", (step, values)))

    def finish(self) -> None:
        self.calls.append(("finish", None))

    def Image(self, picture: Any, caption: str = "") -> str:
        return f"image {picture.size if isinstance(picture, Image.Image) else Path(picture).name}"

    def Table(self, columns: list[str], data: list[list[Any]]) -> list[dict[str, Any]]:
        return [dict(zip(columns, row, strict=True)) for row in data]


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_trackers_are_private_offline_and_see_pictures(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = FakeTracker(name)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    trackers = Trackers((name,), tmp_path, {"seed": 0}, "my run")
    trackers.log(3, {"reward": 0.5})
    trackers.picture(3, "samples", tmp_path / "a.png")
    trackers.table(3, "completions", [Completion("draw", "red", Image.new("RGB", (4, 2)), {"reward": 0.5})])
    trackers.close()
    settings = module.calls[0][1]
    assert settings["name"] == "my run"
    assert settings["private"] is (name == "trackio")
    assert settings["mode"] == ("offline" if name == "wandb" else "")
    assert settings["config"] == {"seed": 0}
    row = {"step": 3, "prompt": "draw", "text": "red", "image": "image (4, 2)", "reward": 0.5}
    assert module.calls[1:] == [
        ("log", (3, {"reward": 0.5})),
        ("log", (3, {"samples": "image a.png"})),
        ("log", (3, {"completions": [row]})),
        ("finish", None),
    ]


def test_a_tracker_that_fails_is_reported_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = FakeTracker("trackio")
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.setattr(module, "log", lambda *_, **__: 1 / 0, raising=False)
    trackers = Trackers(("trackio",), tmp_path, {})
    trackers.log(0, {"reward": 1.0})
    trackers.log(1, {"reward": 1.0})
    assert capsys.readouterr().err.count("trackio: log failed") == 1


def test_tensorboard_gets_scalars_scores_pictures_and_completions(tmp_path: Path) -> None:
    """Scalars every `logging_steps` steps, held-out scores whenever they are there."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path / "r", SyncR1Config(report_to=("tensorboard",), logging_steps=2, run_name="a/b")) as log:
        for step in range(4):
            log.metrics(make_metrics(step, **({"eval/score": 0.5} if step % 2 else {})))
        rollouts = [*make_group(make_prompt("bobo")), *make_group(make_prompt("what|is\nit", draws=False))]
        log.samples(2, rollouts, torch.arange(6.0), {"said": ["a|b", *[None] * 5], "n": [{"x": 1}, *range(5)]})
    assert [path.name for path in (log.folder / "tensorboard").iterdir()] == ["a-b"]
    events = EventAccumulator(str(log.folder / "tensorboard" / "a-b"), {"tensors": 0, "images": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("reward")] == [1, 2, 4]
    assert [event.step for event in events.Scalars("eval/score")] == [2, 4]
    assert "rewards/text/mean" not in events.Tags()["scalars"]  # NaN
    images = [name for name in events.Tags()["images"] if name.startswith("completions/")]
    assert {"samples"} <= {*events.Tags()["images"]} and images == [f"completions/{row:02d}" for row in range(3)]
    assert (events.Images(images[0])[0].width, events.Images(images[0])[0].step) == (24, 3)
    (text,) = events.Tensors("completions/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert lines[0] == "| # | prompt | text | reward | said | n |" and len(lines) == 2 + 6
    assert lines[2].endswith('| 0.000 | a\\|b | {"x": 1} |'), lines[2]
    assert lines[3].endswith("| red | 1.000 |  | 0 |") and "<what\\|is it>" in lines[5]


def test_no_completions_where_nobody_wants_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path / "r", SyncR1Config(report_to=("tensorboard",), log_completions=False)) as log:
        log.samples(0, make_group(make_prompt("bobo")), torch.zeros(3))
    events = EventAccumulator(str(log.folder / "tensorboard"))
    events.Reload()
    assert events.Tags()["images"] == ["samples"] and "completions/text_summary" not in events.Tags()["tensors"]


def test_none_and_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else name)
    assert wanted(("none",)) == wanted(()) == ()
    assert wanted(("all",)) == ("tensorboard", "trackio") and wanted(("wandb",)) == ("wandb",)


def test_wandb_itself_takes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: its files have the table, and its store the artifact with the pictures, for `wandb sync`."""
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    with RunLog(tmp_path / "r", SyncR1Config(report_to=("wandb",), run_name="short answers")) as log:
        log.metrics(make_metrics(0))
        log.samples(0, make_group(make_prompt("bobo")), torch.arange(3.0))
    (table,) = (log.folder / "wandb").rglob("completions*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["step", "prompt", "text", "image", "reward"]
    assert [row[4] for row in content["data"]] == [0.0, 1.0, 2.0]
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes()[:4] == b"\x89PNG"]
    assert len([path for path in kept if not path.is_relative_to(log.folder)]) >= 3, kept


def test_trackio_itself_takes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a database on this machine; its place is read when it is imported."""
    pytest.importorskip("trackio")
    program = f"""
import torch
from pathlib import Path
from run_records import make_group, make_metrics, make_prompt
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.show.runlog import RunLog
with RunLog(Path({str(tmp_path / "r")!r}), SyncR1Config(report_to=("trackio",), run_name="short answers")) as log:
    log.metrics(make_metrics(0))
    log.samples(0, make_group(make_prompt("bobo")), torch.arange(3.0))
"""
    known = {"TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)])}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **known}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "left out" not in done.stderr, done.stderr
    assert len([*(tmp_path / "trackio").rglob("*.png")]) >= 3
    (database,) = (tmp_path / "trackio").rglob("syncr1.db")
    with sqlite3.connect(database) as connection:
        logged = "".join(str(row) for row in connection.execute("select * from metrics"))
    assert "trackio.table" in logged and "short answers" in logged and "trackio.image" in logged
