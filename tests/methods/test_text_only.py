"""What a user of TRL tries first: a language model's folder, prompts in JSONL, rewards by name, one command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import rows_of, sharp_policy
from PIL import Image
from text_models import policy as text_policy
from transformers import AutoModelForCausalLM, AutoTokenizer

from syncr1.engine.corl.config import CorlConfig
from syncr1.engine.corl.run import run
from syncr1.engine.errors import DataError, Preempted
from syncr1.engine.methods.sync_r1 import run as run_sync_r1
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.settings.flags import parse

SIZES = {"prompts_per_step": 2, "num_generations": 4, "max_completion_length": 8, "warmup_steps": 1}
SMALL = [f"--{name}={value}" for name, value in (SIZES | {"learning_rate": 1e-2, "replay_check_steps": 1}).items()]
OWN = """
import os, signal
from pathlib import Path

def short(*, completions, topic, **_):
    wanted = Path(__file__).with_name("machine_is_wanted")
    if wanted.exists() and len(completions) == 8:  # a step's, not the trial call before training
        wanted.unlink()
        os.kill(os.getpid(), signal.SIGTERM)
    return [1 / (1 + len(text)) + len(word) for text, word in zip(completions, topic)]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    text_policy("qwen2", max_position_embeddings=512).save(folder)
    return folder


def corl(*flags: object) -> None:
    """What recipes/corl.py does with these flags."""
    run(parse(CorlConfig, [str(flag) for flag in flags]))


def rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {n} + {n}?", "answer": str(2 * n), "topic": "sums"} for n in range(count)]


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def untimed(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if "second" not in name and "time" not in name} for row in rows]


@pytest.mark.slow
def test_from_questions_to_a_model_that_transformers_loads(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """An own reward beside built-in ones and a test split; then the same run, ended by SIGTERM and gone on with."""
    data = tmp_path / "data"
    data.mkdir()
    table(data / "train.jsonl", rows(6))
    table(data / "test.jsonl", rows(3))
    (tmp_path / "mine.py").write_text(OWN)
    flags = ["--model", model, "--data", data, "--max_steps", 3, *SMALL, "--lora_rank", 2]
    flags += ["--reward_funcs", "accuracy", "format", f"{tmp_path / 'mine.py'}:short"]
    corl(*flags, "--output_dir", tmp_path / "run")
    assert "the first stage is all there is" in " ".join(capfd.readouterr().out.split())
    whole = rows_of(tmp_path / "run" / "unified")
    assert all(row["rewards/short/mean"] > 4 and row["rewards/format/mean"] == 0 for row in whole)
    assert all(row["grad_norm"] > 0 and row["rollout/replay_logp_max_abs"] < 1e-4 for row in whole)

    scores = json.loads((tmp_path / "run" / "unified" / "scores.json").read_text())
    assert scores["before"]["oe/num_items"] == 3 and scores["after"].keys() == scores["before"].keys()
    assert not [name for name in scores["after"] if "image" in name or "t2i" in name]
    last = tmp_path / "run" / "unified" / "checkpoints" / "last"
    card = (last / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "Qwen2ForCausalLM" in card and "draws" not in card
    said = re.sub("<[^>]*>", " ", (tmp_path / "run" / "unified" / "report.html").read_text().split("</style>")[1])
    said = said.replace("from the picture if there is one", "")  # of the question's instruction
    assert not re.search("image|picture|photo|draw(?!n)", said.split("To repeat this run")[0])
    start, loaded = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model, last))
    assert AutoTokenizer.from_pretrained(last).chat_template
    assert not all(torch.equal(*pair) for pair in zip(start.parameters(), loaded.parameters(), strict=True))

    flags += ["--output_dir", tmp_path / "again", "--eval_samples", 0, "--resume_from_checkpoint", "latest"]
    (tmp_path / "machine_is_wanted").touch()
    with pytest.raises(Preempted):
        corl(*flags)
    assert len(rows_of(tmp_path / "again" / "unified")) == 1
    corl(*flags)
    assert untimed(rows_of(tmp_path / "again" / "unified")) == untimed(whole)


def test_prompts_alone_in_one_file_with_rewards_of_ones_own(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """TRL's prompt-only form, as messages; there is no right answer and nothing is held out."""
    messages = [{"prompt": [{"role": "user", "content": row["prompt"]}], "topic": "sums"} for row in rows(4)]
    data = table(tmp_path / "prompts.jsonl", messages)
    (tmp_path / "mine.py").write_text(OWN)
    own = f"{tmp_path / 'mine.py'}:short"
    corl(
        "--model",
        model,
        "--data",
        data,
        "--max_steps",
        1,
        *SMALL,
        "--reward_funcs",
        own,
        "--output_dir",
        tmp_path / "run",
    )
    assert "no held-out part" in " ".join(capfd.readouterr().out.split())
    (row,) = rows_of(tmp_path / "run" / "unified")
    assert row["rewards/short/mean"] > 4 and row["reward_std"] > 0 and row["grad_norm"] > 0
    said = [json.loads(line) for line in (tmp_path / "run/unified/samples/step_000001.jsonl").read_text().splitlines()]
    assert {sample["prompt"] for sample in said} <= {row["prompt"] for row in rows(4)}


def test_a_model_that_draws_takes_questions_alone(tmp_path: Path) -> None:
    """The default rewards: those of images, which would fetch models, are not loaded where nothing is drawn."""
    sharp_policy().save(tmp_path / "janus")
    data = table(tmp_path / "questions.jsonl", [{"prompt": f"what is {c}?", "answer": c} for c in ("red", "round")])
    corl("--model", tmp_path / "janus", "--data", data, "--max_steps", 1, *SMALL, "--output_dir", tmp_path / "run")
    (row,) = rows_of(tmp_path / "run" / "unified")
    expected = {f"rewards/{name}/{what}" for name in ("accuracy", "format") for what in ("mean", "std")}
    assert expected == {name for name in row if name.startswith("rewards/")}
    assert row["num_tokens"] == 2 * 4 * row["completions/mean_length"] > 0


def test_sync_r1_answers_prompts_and_rewards_the_text_alone(model: Path, tmp_path: Path) -> None:
    data = table(tmp_path / "questions.jsonl", [row | {"answer": "the colour is red"} for row in rows(3)])
    flags = ["--model", model, "--data", data, "--max_steps", 1, *SMALL, "--output_dir", tmp_path / "run"]
    run_sync_r1(parse(SyncR1Config, [str(flag) for flag in flags]))
    (row,) = rows_of(tmp_path / "run")
    assert [name for name in row if name.startswith("rewards/")] == ["rewards/text/mean", "rewards/text/std"]
    assert row["rollout/replay_logp_max_abs"] < 1e-4 and not [name for name in row if "preview" in name]


@pytest.mark.parametrize("recipe", ["corl", "sync_r1"])
def test_what_asks_for_a_drawing_is_refused_by_name_before_training(recipe: str, model: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    drawing = {"id": "cat", "prompt": "a cat", "real_image": "cat.png", "segments": "image"}
    data = table(tmp_path / "prompts.jsonl", [*rows(2), drawing] if recipe == "sync_r1" else [drawing] * 2)
    flags = ["--model", model, "--data", data, *SMALL, "--max_steps", 1, "--output_dir", tmp_path / "run"]
    with pytest.raises(DataError, match=r"prompt prompts/train/.* asks for an image, but CausalLMPolicy draws none"):
        if recipe == "corl":
            corl(*flags, "--captioner", "world", "--spice_parser", "world", "--lpips_weights", "random")
        else:
            run_sync_r1(parse(SyncR1Config, [str(flag) for flag in flags]))
    assert not any(path.read_text() for path in tmp_path.glob("run/**/metrics.jsonl"))


@pytest.mark.parametrize("dry", [True, False], ids=["dry run", "run"])
@pytest.mark.parametrize("recipe", ["corl", "sync_r1"])
def test_a_row_that_the_model_cannot_hold_is_found_before_the_first_step(
    model: Path, tmp_path: Path, recipe: str, dry: bool
) -> None:
    """Tokens are what is long: of twenty other rows each has more bytes, and fits."""
    words, sums = (45, 130) if recipe == "corl" else (105, 300)  # CoRL asks for a form of answer, 270 tokens
    fit = [{"prompt": "hello " * words + str(n), "answer": "1", "topic": "sums"} for n in range(20)]
    fit.insert(7, {"prompt": "9 " * sums, "answer": "2", "topic": "sums"})
    table(tmp_path / "rows.jsonl", fit)
    (tmp_path / "mine.py").write_text(OWN)
    flags = ["--model", model, "--data", tmp_path / "rows.jsonl", "--max_steps", 1, *SMALL, "--eval_samples", 0]
    flags += ["--output_dir", tmp_path / "run", *["--dry_run"] * dry]
    flags += ["--reward_funcs", f"{tmp_path / 'mine.py'}:short"]
    with pytest.raises(DataError, match=r"prompt rows/train/7\S* has \d+ tokens and may grow by 8, .* for 512"):
        corl(*flags) if recipe == "corl" else run_sync_r1(parse(SyncR1Config, [str(flag) for flag in flags]))
    assert not any(path.read_text() for path in tmp_path.rglob("metrics.jsonl"))
