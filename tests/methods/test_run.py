"""Whole runs as a user starts them: the recipe in a process of its own, from flags to report."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
import warm
import yaml
from children import ChildrenSeconds
from helpers import ROOT, environment, own_process_group, rows_of
from made import cache_folder, short_base
from PIL import Image
from recipe_cases import recipe_here
from skimage import data

from syncr1.engine.errors import EXIT_PREEMPTED
from syncr1.engine.learn.trainer import Trainer
from syncr1.engine.policies.janus import JanusPolicy

RECIPE = str(ROOT / "recipes" / "sync_r1.py")
SMALL = ["--prompts_per_step", "4", "--num_generations", "4", "--warmup_steps", "1", "--seed", "3"]


@pytest.fixture(scope="module")
def cache_dir() -> Path:
    """Where the runs of this session keep the rendered world and the judge."""
    return cache_folder()


@pytest.fixture(scope="module")
def base() -> Path:
    return short_base()


def start(cache_dir: Path, *flags: str) -> warm.Program:
    return warm.Program(RECIPE, *flags, env=environment(cache_dir))


def run(cache_dir: Path, *flags: str, expected: int = 0) -> tuple[str, str]:
    return warm.run(RECIPE, *flags, env=environment(cache_dir), expected=expected)


def run_cold(cache_dir: Path, *flags: str, expected: int = 0, timeout: float = 600) -> tuple[str, str]:
    """As a user starts it: an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, RECIPE, *flags],
        cwd=ROOT,
        env=environment(cache_dir),
        text=True,
        capture_output=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == expected, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout, done.stderr


def photo_folder(root: Path) -> Path:
    """A user's data: crops of real photographs of three subjects, no attributes, no general part."""
    for name, kind, pixels in (
        ("chelsea", "cat", data.cat()),
        ("eileen", "woman", data.astronaut()),
        ("mug", "cup", data.coffee()),
    ):
        picture, token = Image.fromarray(pixels), f"<{name}>"
        train, test = root / "concept" / "train" / name, root / "concept" / "test" / name
        for folder, shift in ((train, 0), (test, 6)):
            folder.mkdir(parents=True)
            for k in range(3):
                box = (shift + 9 * k, shift + 5 * k, picture.width - 20 + 9 * k, picture.height - 20 + 5 * k)
                picture.crop(box).resize((96, 72)).save(folder / f"{k}.png")
        lists = {
            "personalized_driven_generation": [f"{token} at its favourite place", f"{token} with what it likes"],
            "explicit_personalized_driven_generation": [f"{token}, a {kind}, at home", f"{token}, a {kind}, with milk"],
            "dense_prompt_generation": [f"{token}, on a table, in the sun, facing left"],
        }
        for folder in (train, test):
            (folder / "t2i_conditions.json").write_text(json.dumps(lists))
        questions = [{"query": f"What is {token}?", "answer": f"A {kind}."}]
        (train / "info.json").write_text(
            json.dumps({"class": kind, "generation_type": "object", "extra_info": ["likes milk"]})
        )
        (train / "conversations.json").write_text(json.dumps({"0.png": questions, "text_only": questions}))
        (test / "vqa.json").write_text(json.dumps({"1.png": questions}))
        (test / "text_only.json").write_text(json.dumps(questions))
    return root


# Before anything is loaded --------------------------------------------------------------------------------------------


def test_an_unknown_flag_ends_at_once(cache_dir: Path) -> None:
    """Exit code 2, the nearest flag named, and torch is not even imported."""
    with ChildrenSeconds() as seconds:
        out, err = run_cold(cache_dir, "--max_stpes", "3", expected=2, timeout=60)
    assert seconds.used < 3
    assert "did you mean --max_steps?" in err and "loading torch" not in out and "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num_generations", "1"], "num_generations"),
        (["--data", "ABSENT"], "data: expected a UnifyBench++ folder"),
        (["--nodes", "2"], "does not become a run on one machine"),
        (["--zero_stage", "4"], "zero_stage"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(cache_dir: Path, tmp_path: Path, flags: list[str], said: str) -> None:
    flags = [str(tmp_path / "absent") if flag == "ABSENT" else flag for flag in flags]
    _, err = run(cache_dir, *flags, expected=2)
    assert said in err and "Traceback" not in err


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(cache_dir: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("finished") / "run"
    out, _ = run_cold(
        cache_dir,
        "--model",
        str(base),
        "--max_steps",
        "2",
        "--eval_samples",
        "8",
        "--sample_steps",
        "1",
        "--output_dir",
        str(folder),
        *SMALL,
    )
    return folder, out


@pytest.mark.slow
def test_a_run_leaves_everything_that_it_promises(finished: tuple[Path, str]) -> None:
    folder, out = finished
    assert "report" in out and str(folder) in out.replace("\n", "")
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "samples",
        "scores.json",
        "report.html",
        "checkpoints",
    } <= names
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["max_steps"] == 2 and config["seed"] == 3 and config["num_generations"] == 4
    assert {"step_000001.png", "step_000001.jsonl", "step_000002.png"} <= {
        p.name for p in (folder / "samples").iterdir()
    }
    with Image.open(folder / "samples" / "step_000001.png") as sheet:
        assert min(sheet.size) > 64


@pytest.mark.slow
def test_the_ablations_read_a_run(finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    ablations = importlib.import_module("ablations")
    assert ablations.is_finished(finished[0]) and not ablations.is_finished(finished[0] / "checkpoints")
    read = ablations.read_run(finished[0])
    rows = rows_of(finished[0])
    spent = sum(value for row in rows for name, value in row.items() if name.startswith("seconds/update/"))
    assert 0 < spent < read["update_seconds"] < read["seconds"] and read["trained_tokens"] > 0
    assert read["before/qa/score/sampled"] >= 0 and 0 <= read["after/pure_gen/all_right/cnn"] <= 1


@pytest.mark.slow
def test_metrics_are_complete_and_finite(finished: tuple[Path, str]) -> None:
    rows = rows_of(finished[0])
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        for name in (
            *("reward", "reward_std", "loss", "grad_norm", "learning_rate", "kl", "entropy", "num_tokens", "step_time"),
            *("completions/mean_length", "clip_ratio/region_mean", "frac_reward_zero_std", "seconds/rollout/image"),
            *("rewards/identity/mean", "rewards/judge/mean", "rewards/text/mean"),
        ):
            assert isinstance(row[name], float | int), name
        assert 0 < row["reward"] < 1 and row["grad_norm"] > 0 and row["reward_failures"] == 0
        assert all(row[f"rewards/{name}/std"] > 0 for name in ("identity", "judge", "text"))
    assert rows[0]["rollout/replay_logp_max_abs"] <= 1e-4 and "rollout/guidance_logp_mean_abs" not in rows[1]
    assert rows[0]["rollout/guidance_logp_mean_abs"] > 0.01


@pytest.mark.slow
def test_scores_before_and_after(finished: tuple[Path, str]) -> None:
    scores = json.loads((finished[0] / "scores.json").read_text())
    assert set(scores["before"]) == set(scores["after"]) and len(scores["before"]) > 10
    for side in (scores["before"], scores["after"]):
        assert all(0 <= row["values"][0] <= 1 for row in side.pop("per_item").values() if "values" in row)
        for name, value in side.items():
            assert name.endswith("/num_items") or (value is not None and 0 <= value <= 1), name
    assert scores["before"] != scores["after"]


@pytest.mark.slow
def test_the_report_needs_nothing_beside_it(finished: tuple[Path, str]) -> None:
    """One file to send: every picture inside, no script or style from elsewhere."""
    html = (finished[0] / "report.html").read_text()
    assert "data:image/png;base64," in html and "<svg" in html
    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"'#]+)""", html)
    assert sources and all(source.startswith("data:") for source in sources)
    assert not re.search(r"@import|url\(\s*['\"]?http", html)


@pytest.mark.slow
def test_the_checkpoint_is_a_model_that_has_learnt(finished: tuple[Path, str], base: Path) -> None:
    loaded, before = (JanusPolicy.from_pretrained(p) for p in (finished[0] / "checkpoints" / "last", base))
    changed = {
        name.split(".")[2]
        for (name, p), q in zip(loaded.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(p, q)
    }
    assert {"language_model", "generation_head"} <= changed and not {"vision_model", "aligner", "vqmodel"} & changed


@pytest.mark.slow
def test_who_is_asked_to_end_goes_on_as_if_never_asked(
    finished: tuple[Path, str], cache_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same command again, in a folder with a number: SIGTERM in the first step ends it with 75, and `latest` does
    the rest; the numbers and the model are those of the first run, to the last bit."""
    folder, _ = finished
    again = folder.with_name("run-2")
    torch.set_num_threads(1)  # as the first run had
    monkeypatch.setenv("SYNCR1_CACHE", str(cache_dir))
    flags = ("--config", folder / "config.yaml", "--eval_samples", 0, "--sample_steps", 0)
    trained = Trainer.train_step

    def asked(self: Trainer) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return trained(self)

    with own_process_group(), monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", asked)
        _, err = recipe_here(capfd, "sync_r1.py", *flags, expected=EXIT_PREEMPTED)
    assert "stopped after 1 steps; go on with --resume_from_checkpoint latest" in err
    assert len(rows_of(again)) == 1
    with own_process_group():
        out, _ = recipe_here(capfd, "sync_r1.py", *flags, "--resume_from_checkpoint", "latest")
    assert "going on after 1 steps" in out
    timing = re.compile("seconds|time|per_second")
    first, second = (
        [{k: v for k, v in row.items() if not timing.search(k)} for row in rows_of(f)] for f in (folder, again)
    )
    assert first == second and len(first) == 2
    models = [(f / "checkpoints" / "last" / "model.safetensors").read_bytes() for f in (folder, again)]
    assert models[0] == models[1]
    assert not (again / "samples").exists() and (again / "report.html").is_file()


@pytest.mark.slow
def test_ctrl_c_ends_with_scores_and_a_report(cache_dir: Path, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(
        cache_dir,
        "--model",
        str(base),
        "--max_steps",
        "500",
        "--eval_samples",
        "2",
        "--output_dir",
        str(folder),
        *SMALL,
    )
    try:
        deadline = time.monotonic() + 150
        while time.monotonic() < deadline and process.poll() is None:
            if (folder / "metrics.jsonl").exists() and len((folder / "metrics.jsonl").read_text().splitlines()) >= 2:
                break
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.poll() == 0, out[-3000:] + err[-3000:]
    assert "stopped at step" in out and "Traceback" not in err
    assert 2 <= len(rows_of(folder)) < 500
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["before"] and scores["after"]
    assert (folder / "report.html").is_file() and (folder / "checkpoints" / "last" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_users_photographs_in_bf16_under_zero_2(cache_dir: Path, base: Path, tmp_path: Path) -> None:
    """`--data FOLDER` of real pictures: the judge compares descriptions, and all rewards arrive.

    `--bf16`, as in the README: vision, VQ model, heads and optimizer agree on dtypes, close to what was sampled.
    """
    folder = tmp_path / "run"
    mine = ["--model", str(base), "--data", str(photo_folder(tmp_path / "data")), "--output_dir", str(folder)]
    run(
        cache_dir,
        *mine,
        "--max_steps",
        "2",
        "--eval_samples",
        "2",
        "--bf16",
        "--zero_stage",
        "2",
        "--max_tokens_per_microbatch",
        "200",
        *SMALL,
    )
    rows = rows_of(folder)
    assert len(rows) == 2 and all(row["reward_failures"] == 0 and row["grad_norm"] > 0 for row in rows)
    assert all(row["rewards/identity/mean"] >= 0 and row["rewards/judge/mean"] > 0 for row in rows)
    assert 1e-4 < rows[0]["rollout/replay_logp_max_abs"] < 0.5
    scores = json.loads((folder / "scores.json").read_text())
    assert {"rec", "vqa", "qa"} <= {name.split("/")[0] for name in scores["after"]}
    assert (folder / "report.html").is_file()


@pytest.mark.slow
def test_two_ranks_under_zero_3(cache_dir: Path, base: Path, tmp_path: Path) -> None:
    """One folder, written by rank 0; the gathered model is saved whole and has learnt. (Ranks under torchrun:
    tests/campaigns/test_soak.py.)"""
    folder = tmp_path / "run"
    warm.run(
        RECIPE,
        "--model",
        str(base),
        "--max_steps",
        "2",
        "--eval_samples",
        "2",
        "--zero_stage",
        "3",
        "--eval_steps",
        "1",
        "--load_best_model_at_end",
        "--output_dir",
        str(folder),
        *SMALL,
        env=environment(cache_dir),
        ranks=2,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    rows = rows_of(folder)
    assert (
        len(rows) == 2 and all(row["grad_norm"] > 0 for row in rows) and rows[0]["rollout/replay_logp_max_abs"] <= 1e-4
    )
    best = json.loads((folder / "checkpoints" / "best" / "best.json").read_text())
    found = [row["eval/score"] for row in rows]
    assert best["value"] == max(found) and best["step"] == 1 + found.index(max(found))
    assert JanusPolicy.from_pretrained(folder / "checkpoints" / "best").num_image_tokens > 0
    scores = json.loads((folder / "scores.json").read_text())["after"]
    assert scores["summary/understanding/greedy"] == rows[best["step"] - 1]["eval/summary/understanding/greedy"]
    loaded, before = (JanusPolicy.from_pretrained(p) for p in (folder / "checkpoints" / "last", base))
    assert loaded.model.lm_head.weight.shape == before.model.lm_head.weight.shape
    assert not torch.equal(loaded.model.lm_head.weight, before.model.lm_head.weight)
