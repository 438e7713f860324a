"""recipes/evaluate.py as a user starts it: killed, gone on with, scored by CLIP and a judge, exported."""

from __future__ import annotations

import io
import json
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import warm
from benchmark_files import dpg
from benchmark_layouts import pope_github
from helpers import ROOT, environment
from judge_server import server
from made import cache_folder, made_once, session_folder
from PIL import Image
from recipe_cases import recipe_here
from rich.console import Console
from small_models import saved, small_clip

from syncr1.engine.errors import ConfigError
from syncr1.engine.methods.evaluation import graders_of, run_evaluation
from syncr1.engine.methods.evaluation_config import EvaluateConfig
from syncr1.engine.world.attributes import CONCEPTS
from syncr1.engine.world.texts import VOCABULARY
from syncr1.engine.world.tiny_janus import build_policy

RECIPE = str(ROOT / "recipes" / "evaluate.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tiny Janus in transformers' format."""
    names = [concept.name for concept in CONCEPTS]
    return made_once(
        session_folder(tmp_path_factory),
        "untrained",
        lambda folder: build_policy(VOCABULARY, names, seed=0).save(folder),
    )


@pytest.fixture
def cache_dir(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the runs of this session keep the rendered world and the judge."""
    folder = cache_folder()
    monkeypatch.setenv("SYNCR1_CACHE", str(folder))
    return folder


def start(cache_dir: Path, *flags: object) -> warm.Program:
    return warm.Program(RECIPE, *map(str, flags), env=environment(cache_dir))


def photographs(root: Path) -> Path:
    """A user's folder: one concept, no attributes."""
    train, test = root / "concept" / "train" / "mug", root / "concept" / "test" / "mug"
    for folder, colour in ((train, "red"), (test, "brown")):
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 30), colour).save(folder / "0.png")
    lists = {
        "personalized_driven_generation": ["<mug> at its favourite place"],
        "explicit_personalized_driven_generation": ["<mug>, a cup, at home"],
        "dense_prompt_generation": ["<mug>, on a table, in the sun, facing left"],
    }
    questions = [{"query": "What is <mug>?", "answer": "A cup."}]
    (train / "info.json").write_text(json.dumps({"class": "cup", "num_testing_info": 1}))
    (test / "t2i_conditions.json").write_text(json.dumps(lists))
    (test / "text_only.json").write_text(json.dumps(questions))
    return root


def contents(folder: Path) -> dict[str, bytes]:
    files = [*folder.glob("images/*"), *folder.glob("references/*"), folder / "items.jsonl", folder / "scores.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_a_killed_recipe_goes_on_to_the_same_images(
    model: Path, cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL in the middle of stage 1; the same command then leaves what a run in peace leaves."""
    (tmp_path / "prompts").mkdir()
    for number in range(24):
        (tmp_path / "prompts" / f"{number}.txt").write_text(f"draw the creature, {number % 2 * 'round,'} red.")
    flags = ["--model", model, "--data", tmp_path / "prompts", "--batch_size", "2", "--images_per_prompt", "2"]
    killed = start(cache_dir, *flags, "--output_dir", tmp_path / "out")
    items, deadline = tmp_path / "out" / "items.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and killed.poll() is None and not (items.is_file() and items.stat().st_size):
        time.sleep(0.01)
    killed.kill()
    assert killed.poll() == -signal.SIGKILL, "it was done before it could be killed"
    assert 0 < len(items.read_bytes().splitlines()) < 48 and not (tmp_path / "out" / "scores.json").exists()

    out, err = recipe_here(capsys, "evaluate.py", *flags, "--output_dir", tmp_path / "out")
    assert "24 items of 1 tasks" in out and "no CLIP model was given" in out and "Traceback" not in err

    data, peace = str(tmp_path / "prompts"), tmp_path / "peace"
    config = EvaluateConfig(model=str(model), data=data, batch_size=2, images_per_prompt=2, output_dir=peace)
    result = run_evaluation(config, Console(quiet=True))
    assert result is not None and contents(tmp_path / "out") == contents(peace)
    assert len(contents(peace)) == 48 + 2 and set(result.scores) == {"dpg"}


def test_scores_by_clip_and_judge(
    model: Path, cache_dir: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Stage 2 alone, without a model: small real CLIP, served judge; asked twice, the second time from disk."""
    data = str(photographs(tmp_path / "data"))
    base: dict[str, Any] = {"output_dir": tmp_path / "out", "data": data, "max_completion_length": 6}
    assert run_evaluation(EvaluateConfig(model=str(model), stage="generate", **base), Console(quiet=True)) is None
    asked: list[str] = []

    def reply(request: dict[str, Any]) -> tuple[int, str]:
        asked.append(json.dumps(request["messages"]))
        return 200, "0.5" if "Grade an answer" in asked[-1] else "1"

    clip = str(saved(small_clip, tmp_path_factory))
    with server(reply) as url:
        config = EvaluateConfig(stage="score", clip=clip, judge_url=url, judge_model="small", **base)
        result = run_evaluation(config, Console(quiet=True))
        assert result is not None and result.left_out == {}
        count = len(asked)
        assert run_evaluation(config, Console(quiet=True)) == result and len(asked) == count
    assert result.scores["qa"]["judge"] == 0.5 and result.scores["dense_gen"]["clauses"] == 1.0
    assert -1.0 <= result.scores["rea_gen"]["clip_t"] <= 1.0 and -1.0 <= result.scores["rea_gen"]["clip_i"] <= 1.0
    assert {"image/clip_t", "image/clip_i", "image/clauses"} <= set(result.summary)
    assert "CLIP-I" in (tmp_path / "out" / "scores.md").read_text()


def test_dpg_from_prompts_to_grids(model: Path, cache_dir: Path, tmp_path: Path) -> None:
    """Prompts of another benchmark, four images each, in its layout: and CLIP-T is named as left out."""
    data, out = str(dpg(tmp_path / "prompts")), tmp_path / "out"
    config = EvaluateConfig(model=str(model), data=data, images_per_prompt=4, export=("dpg",), output_dir=out)
    console = Console(width=200, record=True, file=io.StringIO())
    result = run_evaluation(config, console)
    assert result is not None and set(result.scores) == {"dpg"} and set(result.left_out) == {"clip_t", "dpg"}
    assert len(list((tmp_path / "out" / "export" / "dpg").glob("*.png"))) == 3
    assert "--resolution 32 --pic-num 4" in console.export_text()


@pytest.mark.slow
def test_what_is_wrong_is_said_without_a_traceback(
    model: Path, cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = start(cache_dir, "--stage", "score", "--output_dir", tmp_path / "nowhere")
    out, err = done.communicate(timeout=120)
    assert done.poll() == 2 and "run --stage generate first" in err and "Traceback" not in err, out + err
    assert "loading torch" not in out
    (tmp_path / "concept").mkdir()
    flags = ["--model", model, "--output_dir", tmp_path / "out"]
    recipe = partial(recipe_here, capsys, "evaluate.py")
    _, err = recipe(*flags, "--data", tmp_path, expected=2)
    assert err.startswith("evaluate.py: ") and "concept/train: missing" in err
    _, err = recipe_here(
        capsys, "evaluate.py", *flags, "--data", dpg(tmp_path / "prompts"), "--tasks", "rec", expected=2
    )
    assert "the data has no rec; it has dpg" in err
    (tmp_path / "prompts" / "long.txt").write_text("red " * 4000)
    _, err = recipe(*flags, "--data", tmp_path / "prompts", expected=2)
    assert "prompt dpg/long has" in err and "shorten the prompt" in err


@pytest.mark.slow
def test_the_rendered_world_is_read_by_both_readers(model: Path, cache_dir: Path, tmp_path: Path) -> None:
    """Trains the independent reader where no earlier test did."""
    config = EvaluateConfig(model=str(model), limit=2, tasks=("pure_gen", "rec"), output_dir=tmp_path / "out")
    result = run_evaluation(config, Console(quiet=True))
    assert result is not None and {"image/checker", "image/cnn", "understanding/greedy"} <= set(result.summary)
    assert all(0.0 <= result.scores["pure_gen"][f"attributes/{reader}"] <= 1.0 for reader in ("checker", "cnn"))


@pytest.mark.parametrize(
    ("values", "said"),
    [({"clip": "./nowhere"}, "^clip: "), ({"judge_url": "http://example.com/v1", "judge_model": "x"}, "^judge_url: ")],
)
def test_graders_that_cannot_be_had(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        graders_of(EvaluateConfig(**values))


def test_a_benchmark_from_its_files_to_its_table(
    model: Path, cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """POPE asked, read by its rule, and put beside what was published; the same command again changes nothing."""
    data, out = pope_github(tmp_path / "pope"), tmp_path / "out"
    flags = ["--model", model, "--benchmark", "pope", "--data", data, "--max_completion_length", "4"]
    said, err = recipe_here(capsys, "evaluate.py", *flags, "--no_sampled_texts", "--output_dir", out)
    assert "12 items of 1 tasks" in said and "Traceback" not in err
    table = (out / "published.md").read_text()
    assert "| benchmark | n | ours | 95 % | published | of | by | source |" in table and "| POPE | 12 | " in table
    assert "| 86.2 | Janus-Pro-1B | authors |" in table and "| … share of yes | 12 | " in table
    scores = json.loads((out / "scores.json").read_text())
    assert scores["scores"]["pope"]["num_items"] == 12 and scores["benchmarks"]["pope"]["of"] == "POPE"
    before = contents(out)
    recipe_here(capsys, "evaluate.py", *flags, "--no_sampled_texts", "--output_dir", out)
    assert contents(out) == before, "it goes on, and has nothing left to do"
