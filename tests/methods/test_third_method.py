"""methods/training.py: another method is a file of under 150 lines, and gets all that the path gives."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import plain_grpo
import pytest
import torch
from helpers import ROOT, own_process_group, rows_of, sharp_policy

from syncr1.engine.errors import Preempted
from syncr1.engine.forward.objective import Objective
from syncr1.engine.learn.trainer import Trainer
from syncr1.engine.methods.training import Training, write_card
from syncr1.engine.policies.janus import JanusPolicy

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
SUPPORT = ROOT / "tests" / "support"


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    with own_process_group():
        yield


@pytest.fixture
def config(tmp_path: Path) -> plain_grpo.PlainConfig:
    """Four questions and two to score by, an untrained model."""
    rows = [{"prompt": f"the colour of {name}?", "segments": ["text"], "answer": "red"} for name in "abcdef"]
    (tmp_path / "data").mkdir()
    for split, some in (("train", rows[:4]), ("test", rows[4:])):
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    sharp_policy().save(tmp_path / "model")
    small: dict[str, Any] = {"max_steps": 2, "prompts_per_step": 2, "num_generations": 4, "max_completion_length": 8}
    return plain_grpo.PlainConfig(
        model=str(tmp_path / "model"),
        data=tmp_path / "data",
        output_dir=tmp_path / "run",
        reward_funcs=(f"{SUPPORT / 'brevity.py'}:brevity",),
        eval_samples=2,
        learning_rate=1e-3,
        warmup_steps=0,
        **small,
    )


def test_a_third_method_is_one_short_file(config: plain_grpo.PlainConfig) -> None:
    """It trains, scores before and after, saves a model with its card, writes a report, and goes on where it ended."""
    assert len((SUPPORT / "plain_grpo.py").read_text().splitlines()) < 150
    folder = config.output_dir
    summaries = plain_grpo.run(config)
    assert set(summaries) == {"before", "after"} and set(summaries["after"]) >= {"understanding/greedy"}
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == [1, 2] and all(math.isfinite(row["loss"]) for row in rows)
    assert any(row["grad_norm"] > 0 for row in rows) and {"rewards/brevity/mean"} <= rows[0].keys()
    assert "plain GRPO" in (folder / "checkpoints" / "last" / "README.md").read_text()
    assert json.loads((folder / "scores.json").read_text())["after"] and (folder / "report.html").is_file()
    trained, start = (JanusPolicy.from_pretrained(p) for p in (folder / "checkpoints" / "last", str(config.model)))
    assert any(not torch.equal(p, q) for p, q in zip(trained.parameters(), start.parameters(), strict=True))

    plain_grpo.run(replace(config, max_steps=3, eval_samples=0, resume_from_checkpoint="latest"))
    assert rows_of(folder)[:2] == rows and [row["step"] for row in rows_of(folder)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("named", "embedded", "said"),
    [(False, False, "from the tiny base, "), (True, True, "from the tiny base, "), (True, False, "from `model`")],
)
def test_the_card_says_what_was_trained(
    config: plain_grpo.PlainConfig, tmp_path: Path, named: bool, embedded: bool, said: str
) -> None:
    """The embedded base has no name, and is no weights drawn at random."""
    training = Training(
        method="plain GRPO",
        data="the rendered world",
        policy=sharp_policy(),
        objective=Objective(),
        prompts=plain_grpo.stream_of(config, 0, 1),
        rewards=plain_grpo.rewards_of(config),
        embedded=embedded,
    )
    write_card(config if named else replace(config, model=None), training, tmp_path / "model", None, None)
    card = (tmp_path / "model" / "README.md").read_text()
    assert said in card and "the rendered world" in card and "at random" not in card


def test_a_file_save_and_a_dry_run(config: plain_grpo.PlainConfig, capfd: pytest.CaptureFixture[str]) -> None:
    """SAVE in the run's folder leaves the model of that step; a dry run shows prompts and leaves nothing."""
    plain_grpo.run(replace(config, dry_run=True))
    assert "the colour of" in capfd.readouterr().out and not config.output_dir.exists()
    config.output_dir.mkdir()
    (config.output_dir / "SAVE").touch()
    plain_grpo.run(replace(config, max_steps=1, eval_samples=0))
    assert JanusPolicy.from_pretrained(config.output_dir / "checkpoints" / "model_000000").num_image_tokens == 16
    assert not (config.output_dir / "SAVE").exists() and len(rows_of(config.output_dir)) == 1


def test_sigterm_saves_and_ends_after_the_step(config: plain_grpo.PlainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step under way is finished and saved; the same command then goes on with the next one."""
    step = Trainer.train_step

    def asked_to_end(self: Trainer) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    config = replace(config, eval_samples=0, resume_from_checkpoint="latest")
    with monkeypatch.context() as patch, pytest.raises(Preempted, match="stopped after 1 steps; go on with --resume"):
        patch.setattr(Trainer, "train_step", asked_to_end)
        plain_grpo.run(config)
    assert len(rows_of(config.output_dir)) == 1 and not (config.output_dir / "checkpoints" / "last").exists()
    plain_grpo.run(config)
    assert [row["step"] for row in rows_of(config.output_dir)] == [1, 2]
    assert (config.output_dir / "checkpoints" / "last").is_dir()
