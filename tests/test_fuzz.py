"""Whatever people, models and disks hand in, only documented errors come back, and fast.

`HYPOTHESIS_PROFILE=nightly python -m pytest tests/test_fuzz.py` tries 1,000,000 inputs, new ones every time;
`SYNCR1_FUZZ_INPUTS` sets another number. Without either a few hundred fixed ones are tried.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import hypothesis
import pytest
import torch
from fuzz_cases import (
    COLUMNS,
    JSON_PIECES,
    SETTINGS_FILES,
    TAGS,
    YAML_PIECES,
    as_json_text,
    brackets,
    damaged,
    mutated,
    nested,
    scalar,
    text,
    value,
)
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from syncr1.engine import checkpoint
from syncr1.engine.config import SyncR1Config
from syncr1.engine.corl.config import CorlConfig
from syncr1.engine.data.samples import load_prompts, load_samples
from syncr1.engine.evaluate.config import EvaluateConfig
from syncr1.engine.evaluate.graders import KEPT, Kept
from syncr1.engine.evaluate.manifest import MANIFEST, EvaluationError, claim
from syncr1.engine.evaluate.sources import load_geneval
from syncr1.engine.evaluate.store import ITEMS, Store
from syncr1.engine.pictures import PictureError, StoredImage, open_picture
from syncr1.engine.prompts import DataError
from syncr1.engine.report import read_jsonl, write_report
from syncr1.engine.rewards.accuracy import AccuracyReward, soft_jaccard
from syncr1.engine.rewards.base import RewardError
from syncr1.engine.rewards.format import format_reward
from syncr1.engine.rewards.llm_judge import read_scores
from syncr1.engine.rewards.tags import answer_of, parse_tagged
from syncr1.engine.safetensors_stream import INDEX, SINGLE, CheckpointError, MappedCheckpoint
from syncr1.engine.settings import ConfigError, from_yaml, settings_of

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
INPUTS = int(os.environ.get("SYNCR1_FUZZ_INPUTS", "1000000" if NIGHTLY else "900"))
MEAN_SECONDS = 0.05


def share(percent: int) -> Callable[[Any], Any]:
    """Of all inputs; fixed ones by default, so that a run of the suite tells the same every time."""
    everything = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return hypothesis.settings(max_examples=max(20, INPUTS * percent // 100), suppress_health_check=everything)


@dataclass
class Clock:
    seconds: float = 0.0
    calls: int = 0

    @contextmanager
    def __call__(self, *documented: type[Exception]) -> Iterator[None]:
        """Takes the time; lets documented errors pass if their message can be printed."""
        start = time.process_time()  # of this process: other programs' load is not ours
        try:
            yield
        except documented as error:
            assert str(error).encode() and len(str(error)) < 20_000
        self.seconds += time.process_time() - start
        self.calls += 1


@pytest.fixture
def clock() -> Iterator[Clock]:
    made = Clock()
    yield made
    assert made.calls and made.seconds / made.calls < MEAN_SECONDS


# Settings -------------------------------------------------------------------------------------------------------------

CONFIGS: list[type[Any]] = [SyncR1Config, CorlConfig, EvaluateConfig]
NAMES = sorted({setting.name for config in CONFIGS for setting in settings_of(config)})
lines = st.lists(st.tuples(st.sampled_from(NAMES) | text, st.sampled_from(YAML_PIECES) | scalar.map(repr)), max_size=4)
settings_texts = mutated(SETTINGS_FILES, [*YAML_PIECES, *NAMES]) | lines.map(
    lambda rows: "".join(f"{name}: {written}\n" for name, written in rows)
)


@share(20)
@given(config=st.sampled_from(CONFIGS), written=settings_texts)
def test_settings_files(clock: Clock, config: type[Any], written: str) -> None:
    with clock(ConfigError):
        from_yaml(config, written)


@share(10)
@given(config=st.sampled_from(CONFIGS), data=st.data())
def test_settings_from_python(clock: Clock, config: type[Any], data: st.DataObject) -> None:
    known = [setting.name for setting in settings_of(config)]
    given_values = data.draw(st.dictionaries(st.sampled_from(known), value, max_size=4))
    with clock(ConfigError):
        config(**given_values)


@pytest.mark.parametrize("depth", [3, 900, 100_000])
def test_deep_settings(depth: int) -> None:
    """Refused at the fourth bracket, not at the last."""
    with pytest.raises(ConfigError, match="within lists"):
        from_yaml(SyncR1Config, "beta: " + "[" * (depth + 1))


def test_settings_that_grow(tmp_path: Path) -> None:
    """Nine lines that stand for 9^9 items (a `billion laughs`)."""
    rows = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    rows += [f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]" for i in range(8)]
    start = time.perf_counter()
    with pytest.raises(ConfigError, match="aliases"):
        from_yaml(SyncR1Config, "\n".join(rows))
    assert time.perf_counter() - start < 1.0


# Rows of data ---------------------------------------------------------------------------------------------------------

message = st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant", "x"]), "content": value})
GOOD_ROWS = [
    {
        "prompt": "a cat",
        "qa_problem": "What?\nA. a cat\nB. a dog",
        "qa_solution": "<answer>A</answer>",
        "qa_type": "MC",
    },
    {"problem": "What is it?", "solution": "cat"},
    {"prompt": [{"role": "user", "content": "How many?"}], "reward_model": {"ground_truth": "3"}},
    {"prompt": "a cat", "segments": "text+image", "attributes": {"colour": "red"}, "options": ["a", "b"]},
]
rows = st.builds(
    lambda row, changes: {**row, **changes},
    st.sampled_from(GOOD_ROWS),
    st.dictionaries(st.sampled_from(COLUMNS), value | st.lists(message, max_size=3), max_size=3),
)
whole_rows = st.lists(rows, min_size=1, max_size=2).map(lambda found: "\n".join(as_json_text(row) for row in found))
broken_rows = mutated([json.dumps(row) for row in GOOD_ROWS], JSON_PIECES)
deep_rows = st.builds(
    lambda depth, name: f'{{"prompt": "x", "{name}": {brackets(depth)}}}', nested, st.sampled_from(COLUMNS)
)


@share(25)
@given(written=whole_rows | broken_rows | deep_rows, load=st.sampled_from([load_samples, load_prompts]))
def test_rows_of_data(clock: Clock, tmp_path: Path, written: str, load: Callable[[Path], object]) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(written.encode("utf-8", "surrogatepass"))
    with clock(DataError):
        load(path)


@share(2)
@given(written=mutated(['{"prompt": "a cat", "tag": "single", "include": []}'], JSON_PIECES) | deep_rows)
def test_geneval_rows(clock: Clock, tmp_path: Path, written: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(written.encode("utf-8", "surrogatepass"))
    with clock(DataError):
        load_geneval(path)


class Bytes(StoredImage):
    name = "picture"

    def __init__(self, contents: bytes) -> None:
        self.contents = contents

    def read(self) -> bytes:
        return self.contents


def encoded(kind: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (6, 5)).save(buffer, kind)
    return buffer.getvalue()


FILES = [
    encoded("PNG", "P"),
    encoded("PNG", "I;16"),
    encoded("JPEG"),
    encoded("GIF", "P"),
    encoded("BMP"),
    encoded("TIFF"),
]


@pytest.mark.filterwarnings("ignore")
@share(3)
@given(contents=st.sampled_from(FILES).flatmap(damaged))
def test_pictures(clock: Clock, contents: bytes) -> None:
    with clock(PictureError):
        assert open_picture(Bytes(contents)).mode == "RGB"


# Answers --------------------------------------------------------------------------------------------------------------

completions = mutated(["<think> it is </think><answer> B </answer>", "<answer>a red dog</answer>", "twenty one"], TAGS)


@share(15)
@given(said=completions)
def test_tags(clock: Clock, said: str) -> None:
    with clock():
        found, tagged = answer_of(said), parse_tagged(said)
        assert format_reward(completions=[said], segments=[("text",)]) == [float(tagged is not None)]
        assert tagged is None or found == tagged.answer


@share(15)
@given(
    said=completions,
    answer=completions | text,
    options=st.lists(text, max_size=3),
    qa_type=st.sampled_from(["MC", "OE", None, "x"]),
    variant=st.sampled_from(["paper", "released"]),
)
def test_accuracy(clock: Clock, said: str, answer: str, options: list[str], qa_type: str | None, variant: Any) -> None:
    with clock(RewardError):
        (reward,) = AccuracyReward(variant)(
            completions=[said], answer=[answer], segments=[("text",)], options=[options], qa_type=[qa_type]
        )
        assert reward is not None and 0 <= reward <= 1
        assert 0 <= soft_jaccard(said, answer) <= 1


@share(2)
@given(
    reply=mutated(["[1, 2]", '{"scores": [85, 90]}', "85/100"], JSON_PIECES) | nested.map(brackets),
    count=st.integers(1, 3),
)
def test_verdicts(clock: Clock, reply: str, count: int) -> None:
    with clock():
        scores = read_scores(reply, count, 100.0)
        assert scores is None or (len(scores) == count and all(0 <= score <= 100 for score in scores))


# Manifests ------------------------------------------------------------------------------------------------------------

RUN = {"format": 1, "model": {"name": "m", "fingerprint": "f"}, "sampling": {"seed": 1}, "versions": {"torch": "2"}}
WEIGHTS = {"metadata": {"total_size": 4}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
deep = st.builds(lambda depth, name: brackets(depth, name=name), nested, st.sampled_from(["format", "weight_map", "a"]))
deep |= nested.map(
    lambda depth: f'{{"format": 1, "model": {brackets(depth)}, "weight_map": {brackets(depth, name="a")}}}'
)
other = st.dictionaries(st.sampled_from(["format", "weight_map", "model", "step", "files"]), value, max_size=3).map(
    as_json_text
)


def manifests(good: dict[str, Any]) -> st.SearchStrategy[bytes]:
    texts = mutated([json.dumps(good)], JSON_PIECES) | deep | other
    return texts.map(lambda written: written.encode("utf-8", "surrogatepass")) | damaged(json.dumps(good).encode())


@share(2)
@given(written=manifests(RUN))
def test_manifests_of_evaluations(clock: Clock, tmp_path: Path, written: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(written)
    with clock(EvaluationError):
        claim(tmp_path, RUN)


@share(1)
@given(written=manifests({"key": "k", "metric": "m", "grader": "g", "value": 1.0}))
def test_kept_scores(clock: Clock, tmp_path: Path, written: bytes) -> None:
    (tmp_path / KEPT).write_bytes(written + b"\n")
    with clock(EvaluationError):
        Kept(tmp_path)


@share(1)
@given(written=manifests({"task": "qa", "id": "1", "text": "x", "references": [], "member": 0}))
def test_stored_items(clock: Clock, tmp_path: Path, written: bytes) -> None:
    (tmp_path / ITEMS).write_bytes(written + b"\n")
    with clock(EvaluationError):
        Store(tmp_path).read()


@share(1)
@given(written=manifests(WEIGHTS))
def test_indices_of_shards(clock: Clock, tmp_path: Path, written: bytes) -> None:
    (tmp_path / INDEX).write_bytes(written)
    with clock(CheckpointError):
        MappedCheckpoint(tmp_path)


@share(1)
@given(contents=damaged(save({"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.int8)})))
def test_weight_files(clock: Clock, tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / SINGLE
    path.unlink(missing_ok=True)  # a map of the one before may still be open
    path.write_bytes(contents)
    with clock(CheckpointError):
        opened = MappedCheckpoint(tmp_path)
        assert all(opened.flat(name).numel() == info.num_elements for name, info in opened.tensors.items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.save(tmp_path_factory.mktemp("saved"), 3, {"a": torch.ones(2)}, {"config": "seed: 1"})


@share(1)
@given(data=st.data(), name=st.sampled_from([checkpoint.MANIFEST, checkpoint.STATE, checkpoint.shard_name(0)]))
def test_checkpoints_of_runs(clock: Clock, saved: Path, data: st.DataObject, name: str) -> None:
    """Whatever is not as it was written is refused; the manifest's hash covers the manifest too."""
    good = (saved / name).read_bytes()
    bad = data.draw(damaged(good) | deep.map(str.encode) | other.map(str.encode))
    (saved / name).write_bytes(bad)
    try:
        with clock(CheckpointError):
            checkpoint.verified(saved)
            assert bad == good or json.loads(bad) == json.loads(good)
    finally:
        (saved / name).write_bytes(good)


@share(1)
@given(lines=st.lists(manifests({"step": 1, "reward": 0.5, "kl/text": 0.1}), max_size=3), settings_text=settings_texts)
def test_reports_of_damaged_runs(clock: Clock, tmp_path: Path, lines: list[bytes], settings_text: str) -> None:
    """A report shows what can be read, and fails on nothing."""
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "config.yaml").write_bytes(settings_text.encode("utf-8", "surrogatepass"))
    with clock():
        assert all(isinstance(row, dict) for row in read_jsonl(tmp_path / "metrics.jsonl"))


def test_a_report_of_a_damaged_run(tmp_path: Path) -> None:
    """The whole page, once: drawing its curves takes most of the time."""
    odd = {"step": 10**400, "reward": "x", "kl/text": None, "rewards/a/mean": [1], "scores": brackets(5)}
    (tmp_path / "metrics.jsonl").write_text(
        "\n".join([as_json_text(odd), '{"reward": 0.5}', brackets(3000), "9" * 5000])
    )
    (tmp_path / "config.yaml").write_text("seed: 2001-99-99\n")
    assert write_report(tmp_path).read_text().startswith("<!")
