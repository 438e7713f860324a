"""methods/best.py: scores on the way change nothing, and the best model is kept, said, and found again."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import numpy as np
import plain_grpo
import pytest
import torch
from helpers import own_process_group, rows_of, sharp_policy
from hub_server import TOKEN, hub_server

from syncr1.engine.errors import ConfigError
from syncr1.engine.evaluate.held_out import Evaluation, score_rollouts
from syncr1.engine.methods import best, training
from syncr1.engine.methods.best import BEST, RECORD, Best, HeldOut, main_score, metric_of, undisturbed
from syncr1.engine.methods.resume import random_state
from syncr1.engine.policies.janus import JanusPolicy

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
LUCK = """
import torch

def luck(completions, **_):
    return torch.rand(len(completions)).tolist()
"""
"""A reward by which a training depends on a generator that scoring may use as well."""


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    with own_process_group():
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six questions, two of them held out, and an untrained model."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"prompt": f"the colour of {name}?", "segments": ["text"], "answer": "red"} for name in "abcdef"]
    for split, some in (("train", rows[:4]), ("test", rows[4:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    sharp_policy().save(folder / "model")
    (folder / "luck.py").write_text(LUCK)
    return folder


def config_of(inputs: Path, output_dir: Path, **changes: Any) -> plain_grpo.PlainConfig:
    settings: dict[str, Any] = {
        "model": str(inputs / "model"),
        "data": inputs,
        "output_dir": output_dir,
        "reward_funcs": (f"{inputs / 'luck.py'}:luck",),
        "max_steps": 3,
        "prompts_per_step": 2,
        "num_generations": 4,
        "max_completion_length": 8,
        "eval_samples": 2,
        "sample_steps": 0,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
    }
    return plain_grpo.PlainConfig(**(settings | changes))


class Scores:
    """What main scores are taken to be, one evaluation after the other; each takes random numbers while it is made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *values: float) -> None:
        left = list(values)
        self.on_the_way: list[Evaluation] = []
        self.after: Evaluation | None = None
        score, write = HeldOut._score, training.write_scores

        def drawing(greedy: Any, sampled: Any) -> Any:
            random.random(), np.random.rand(), torch.rand(3)
            return score_rollouts(greedy, sampled)

        def watched(held_out: HeldOut, num_steps: int) -> Evaluation:
            self.on_the_way.append(score(held_out, num_steps))
            return self.on_the_way[-1]

        def written(log: Any, before: Any, after: Any = None) -> None:
            self.after = after
            write(log, before, after)

        monkeypatch.setattr(best, "main_score", lambda scores, tasks: left.pop(0))
        monkeypatch.setattr(plain_grpo, "score_rollouts", drawing)
        monkeypatch.setattr(HeldOut, "_score", watched)
        monkeypatch.setattr(training, "write_scores", written)


def learnt(folder: Path) -> tuple[list[dict[str, Any]], bytes]:
    """Metrics but for times and held-out scores, and the weights."""
    rows = [
        {name: value for name, value in row.items() if not any(word in name for word in ("second", "time", "eval/"))}
        for row in rows_of(folder)
    ]
    return rows, (folder / "checkpoints" / "last" / "model.safetensors").read_bytes()


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "checkpoints" / BEST / RECORD).read_text())  # type: ignore[no-any-return]


@pytest.mark.slow
def test_scores_on_the_way_change_nothing_and_the_best_model_is_kept(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With `eval_steps` as without, to the last bit; then on from the middle, where what was best stays so."""
    Scores(monkeypatch, 0.5)
    plain_grpo.run(config_of(inputs, tmp_path / "without"))
    scores = Scores(monkeypatch, 0.5, 0.75, 0.25, 0.625)
    scoring = config_of(inputs, tmp_path / "with", eval_steps=1, checkpointing_steps=1, save_total_limit=1)
    plain_grpo.run(scoring)
    assert learnt(tmp_path / "with") == learnt(tmp_path / "without")
    rows = rows_of(tmp_path / "with")
    assert [row["eval/score"] for row in rows] == [0.75, 0.25, 0.625]
    assert all(row["seconds/evaluation"] > 0 and row["eval/summary/understanding/greedy"] is not None for row in rows)
    assert not any(name.startswith("eval/") for row in rows_of(tmp_path / "without") for name in row)
    folder = tmp_path / "with" / "checkpoints" / BEST
    record = record_of(tmp_path / "with")
    assert (record["step"], record["metric"], record["value"]) == (1, "score", 0.75)
    assert JanusPolicy.from_pretrained(folder).num_image_tokens == 16
    assert "plain GRPO" in (folder / "README.md").read_text()
    assert (folder / "model.safetensors").read_bytes() != learnt(tmp_path / "with")[1]
    out = capfd.readouterr().out
    assert "step 1: held-out score 75.0 % (before 50.0 %), the best so far" in " ".join(out.split())
    assert out.count("the best so far") == 1 and "best model: step 1, score 75.0 %" in " ".join(out.split())
    assert len(scores.on_the_way) == 3 and scores.after is scores.on_the_way[-1], "the last step is scored once"

    Scores(monkeypatch, 0.5, 0.7, 0.9)  # two more steps: one below the best so far, one above it
    plain_grpo.run(replace(scoring, max_steps=5, resume_from_checkpoint="latest", load_best_model_at_end=True))
    assert record_of(tmp_path / "with")["step"] == 5 and "the best so far" in capfd.readouterr().out
    assert [row["eval/score"] for row in rows_of(tmp_path / "with")] == [0.75, 0.25, 0.625, 0.7, 0.9]


@pytest.mark.slow
def test_the_best_model_is_the_runs_result_and_outlives_the_process(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`load_best_model_at_end`: its scores are the run's; it is uploaded, and a resumed run that finds none better
    scores it again."""
    from huggingface_hub import constants

    config = config_of(inputs, tmp_path / "run", max_steps=2, eval_steps=1, load_best_model_at_end=True)
    config = replace(config, push_to_hub=True, hub_model_id="lab/short", run_name="short answers")
    scores = Scores(monkeypatch, 0.9, 0.75, 0.25)
    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        plain_grpo.run(config)
        folder = tmp_path / "run" / "checkpoints" / BEST
        saved = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        assert server.repositories == {"lab/short": saved} and "model.safetensors" in saved
    assert len(scores.on_the_way) == 2 and scores.after is scores.on_the_way[0]
    assert saved["README.md"].decode().count("# short answers\n") == 1
    texts = [path.read_text() for path in (tmp_path / "run").rglob("*") if path.suffix in (".json", ".yaml", ".html")]
    out = " ".join(capfd.readouterr().out.split())
    assert len(texts) > 3 and not any(TOKEN in text for text in [*texts, out])
    assert "no model was better than the starting one, whose score is 90.0 %" in out

    scores = Scores(monkeypatch, 0.9, 0.3)
    on = replace(config, max_steps=3, push_to_hub=False, resume_from_checkpoint="latest")
    plain_grpo.run(on)
    assert record_of(tmp_path / "run")["step"] == 1 and len(scores.on_the_way) == 1
    assert scores.after is not None and scores.after is not scores.on_the_way[0]
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == saved


def test_a_best_model_by_another_measure_counts_no_more(inputs: Path, tmp_path: Path) -> None:
    """Settings that may change from start to start may make its score another one."""
    said: list[str] = []

    def held_out(**changes: Any) -> HeldOut:
        config = config_of(inputs, tmp_path / "run", eval_steps=1, **changes)
        nothing: Any = None
        return HeldOut(config, nothing, lambda policy: policy, None, frozenset(), tmp_path, nothing, said.append)  # type: ignore[arg-type]

    measured = held_out()._measured()
    (tmp_path / BEST).mkdir()
    kept = Best(40, "score", 0.75, measured)
    (tmp_path / BEST / RECORD).write_text(json.dumps(asdict(kept)))
    assert held_out().best == kept and said == []
    assert held_out(eval_samples=1).best is None and "measured otherwise" in said.pop()
    for broken in ("", "{}", "[1]", '{"step": 1, "metric": "score", "value": null, "measured": {}}'):
        (tmp_path / BEST / RECORD).write_text(broken)
        assert held_out().best is None


def test_a_score_that_is_not_there_is_refused_before_training(inputs: Path, tmp_path: Path) -> None:
    config = config_of(inputs, tmp_path / "run", eval_steps=1, metric_for_best_model="eval_summary/understanding")
    with pytest.raises(ConfigError, match=r"metric_for_best_model: expected one of \d+ held-out scores.*did you mean"):
        plain_grpo.run(config)
    assert rows_of(tmp_path / "run") == []


def test_all_generators_are_put_back() -> None:
    before = random_state()
    with pytest.raises(KeyboardInterrupt), undisturbed():
        random.gauss(0, 1), np.random.standard_normal(), torch.rand(5)
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in random_state().items())


def test_the_main_score_is_the_mean_over_what_is_trained() -> None:
    scores = {
        "qa": {"num_items": 9.0, "score/greedy": 0.2, "score/sampled": 0.4},
        "pure_gen": {"attributes/cnn": 0.9, "all_right/checker": 0.7, "all_right/cnn": 0.6, "score/sampled": 0.8},
        "general_image": {"all_right/cnn": 0.0, "score/sampled": 0.1},
        "rea": {"bleu/greedy": 0.5},
    }
    assert main_score(scores) == pytest.approx(0.5)
    assert main_score(scores, frozenset({"pure_gen", "t2i"})) == 0.6
    assert main_score(scores, frozenset({"absent"})) == pytest.approx(0.5)
    assert main_score({"t2i": {"reward/clip": 31.0}}) == 31.0 and math.isnan(main_score({}))


def test_names_of_scores() -> None:
    known = ["score", "qa/score/greedy", "summary/understanding/greedy"]
    assert metric_of(None, known) == metric_of("eval_score", known) == "score"
    assert metric_of("eval/qa/score/greedy", known) == "qa/score/greedy"
    with pytest.raises(ConfigError, match="did you mean qa/score/greedy"):
        metric_of("qa/score/greddy", known)
    with pytest.raises(ConfigError, match="take score, or a name in scores"):
        metric_of("eval_loss", known)
