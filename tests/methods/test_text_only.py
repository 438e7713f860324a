"""What a user of TRL tries first: a language model's folder, prompts in JSONL, rewards by name, one command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from text_models import policy as text_policy
from transformers import AutoModelForCausalLM, AutoTokenizer

from syncr1.engine.corl.config import CorlConfig
from syncr1.engine.corl.run import run
from syncr1.engine.errors import Preempted
from syncr1.engine.settings.flags import parse

SMALL = ["--prompts_per_step", 2, "--num_generations", 4, "--max_completion_length", 8, "--warmup_steps", 1,
         "--learning_rate", 1e-2, "--replay_check_steps", 1]  # fmt: skip
OWN = """
import os, signal
from pathlib import Path

def short(*, completions, topic, **_):
    wanted = Path(__file__).with_name("machine_is_wanted")
    if wanted.exists():
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


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "unified" / "metrics.jsonl").read_text().splitlines()]


def same(first: list[dict[str, float]], second: list[dict[str, float]]) -> bool:
    kept = ([{k: v for k, v in row.items() if "second" not in k and "time" not in k} for row in rows]
            for rows in (first, second))  # fmt: skip
    return next(kept) == next(kept)


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
    whole = metrics(tmp_path / "run")
    assert all(row["rewards/short/mean"] > 4 and row["rewards/format/mean"] == 0 for row in whole)
    assert all(row["grad_norm"] > 0 and row["rollout/replay_logp_max_abs"] < 1e-4 for row in whole)

    scores = json.loads((tmp_path / "run" / "unified" / "scores.json").read_text())
    assert scores["before"]["oe/num_items"] == 3 and scores["after"].keys() == scores["before"].keys()
    assert not [name for name in scores["after"] if "image" in name or "t2i" in name]
    last = tmp_path / "run" / "unified" / "checkpoints" / "last"
    card = (last / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "Qwen2ForCausalLM" in card and "draws" not in card
    said = re.sub("<[^>]*>", " ", (tmp_path / "run" / "unified" / "report.html").read_text().split("</style>")[1])
    assert not re.search("image|picture|photo|draw(?!n)", said.split("To repeat this run")[0])
    start, loaded = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model, last))
    assert AutoTokenizer.from_pretrained(last).chat_template
    learnt = (p is not q and not torch.equal(p, q) for p, q in zip(start.parameters(), loaded.parameters(), strict=True))
    assert any(learnt)

    flags += ["--output_dir", tmp_path / "again", "--eval_samples", 0, "--resume_from_checkpoint", "latest"]
    (tmp_path / "machine_is_wanted").touch()
    with pytest.raises(Preempted):
        corl(*flags)
    assert len(metrics(tmp_path / "again")) == 1
    corl(*flags)
    assert same(metrics(tmp_path / "again"), whole)
