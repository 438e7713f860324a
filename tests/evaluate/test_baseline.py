"""baseline.py: ours beside what was published, what differs, and data of which nothing was."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
from benchmark_files import geneval
from evaluate_cases import few_items, generated
from made import cache_folder, short_base
from rich.console import Console

from syncr1.engine.errors import EvaluationError
from syncr1.engine.evaluate.baseline import compare, markdown, model_of, verdict, write
from syncr1.engine.evaluate.benchmarks.geneval_prompts import results_of
from syncr1.engine.evaluate.export import GENEVAL_RESULTS
from syncr1.engine.evaluate.manifest import MANIFEST, Settings
from syncr1.engine.evaluate.published_scores import (
    AUTHORS,
    JANUS_1B,
    JANUS_7B,
    PUBLISHED,
    SOURCES,
    TRAINED,
    benchmark_named,
    published_of,
)
from syncr1.engine.evaluate.score import read_complete, score_folder
from syncr1.engine.evaluate.sources import load_items
from syncr1.engine.methods.evaluation import run_evaluation
from syncr1.engine.methods.evaluation_config import EvaluateConfig
from syncr1.engine.records import Prompt


def sizes(folder: Path, hidden: int, layers: int, key: str = "text_config") -> Path:
    folder.mkdir()
    kind = "janus" if key == "text_config" else "multi_modality"
    config = {"model_type": kind, key: {"hidden_size": hidden, "num_hidden_layers": layers}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def renamed(folder: Path, model: Path, **sampling: Any) -> None:
    """The same items, as if that model had made them."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["model"]["name"] = str(model)
    manifest["sampling"] |= sampling
    (folder / MANIFEST).write_text(json.dumps(manifest))


# The table ------------------------------------------------------------------------------------------------------------


def test_every_number_has_its_source() -> None:
    for row in PUBLISHED:
        marks = re.findall(r"\[(\w+)\]", row.source)
        assert marks and set(marks) <= SOURCES.keys(), row
        assert re.search(r"\d", row.score), row
    used = {mark for row in PUBLISHED for mark in re.findall(r"\[(\w+)\]", row.source)}
    assert used == SOURCES.keys()
    untouched = [row for row in PUBLISHED if row.by == AUTHORS and row.model not in TRAINED]
    assert len({row[:2] + row[5:] for row in untouched}) == len(untouched), "one from a model's authors"
    assert all(float(row.score) for row in untouched)


def test_gains_that_the_paper_tells_are_those_of_the_table() -> None:
    """CoRL's own column of gains, where it is a plain difference."""
    score = {(row.benchmark, row.model): row for row in PUBLISHED if row.by == AUTHORS and not row.part}
    gains = {"MMMU": 6.0, "WeMath": 15.2, "LogicVista": 10.6, "MathVerse": 11.9, "MMVet": 4.1, "POPE": 2.7}
    for benchmark, gain in gains.items():
        after, before = (float(score[benchmark, model].score) for model in ("ULM-R1", JANUS_1B))
        assert after - before == pytest.approx(gain, abs=0.01), benchmark


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("MMMU_DEV_VAL", "MMMU"),
        ("mmbench_en_dev", "MMBench"),
        ("SEEDBench_IMG", "SEED"),
        ("MathVerse_MINI", "MathVerse"),
        ("dpg", "DPG-Bench"),
        ("mine", None),
    ],
)
def test_benchmarks_by_their_names(name: str, known: str | None) -> None:
    assert benchmark_named(name) == known


def test_a_model_by_its_sizes(tmp_path: Path) -> None:
    assert model_of(str(sizes(tmp_path / "a", 2048, 24))) == JANUS_1B
    assert model_of(str(sizes(tmp_path / "b", 4096, 30, "language_config"))) == JANUS_7B
    theirs = sizes(tmp_path / "as_published", 4096, 30, "language_config") / "config.json"
    theirs.write_text(json.dumps({"model_type": "multi_modality", "language_config": {"num_hidden_layers": 30}}))
    assert model_of(str(theirs.parent)) == JANUS_7B, "its hidden size is LlamaConfig's own"
    assert model_of(str(sizes(tmp_path / "c", 128, 4))) is None and model_of(str(tmp_path / "none")) is None
    theirs = sizes(tmp_path / "d", 4096, 30, "language_config") / "config.json"
    left_out = {"model_type": "multi_modality", "language_config": {"model_type": "llama", "num_hidden_layers": 30}}
    theirs.write_text(json.dumps(left_out))
    assert model_of(str(theirs.parent)) == JANUS_7B, "as DeepSeek publishes it, without the hidden size"
    assert {row.model for row in published_of("GenEval", JANUS_1B)} == {JANUS_1B, "ULM-R1"}
    assert {row.model for row in published_of("GenEval", JANUS_7B)} == {JANUS_7B}
    assert len(published_of("GenEval", None)) > 3


def test_a_model_by_its_revision_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`org/name@revision`, as --model takes it, from the hub's cache."""
    home = tmp_path / "hub" / "models--org--name"
    (home / "snapshots").mkdir(parents=True)
    (home / "refs").mkdir()
    sizes(home / "snapshots" / ("a" * 40), 2048, 24)
    (home / "refs" / "tuned").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert model_of("org/name@tuned") == JANUS_1B


# A folder -------------------------------------------------------------------------------------------------------------


def test_geneval_as_its_own_scorer_counts(tmp_path: Path) -> None:
    """Without its results a line says how to get them; with them ours stands there, and what differs."""
    items = load_items(geneval(tmp_path / "evaluation_metadata.jsonl"))
    folder = generated(items, tmp_path / "out", Settings(max_text_tokens=4, images_per_prompt=4, batch_size=2))
    renamed(folder, sizes(tmp_path / "janus", 2048, 24))
    result = score_folder(folder)
    (line,) = compare(folder, read_complete(folder), result)
    assert line.ours is None and "--export geneval" in line.how and GENEVAL_RESULTS in line.how
    assert line.differs == ["cfg_weight is 1.5, not 5", "unconditional is fixed, not pads"] and verdict(line) == ""

    rows = [{"tag": "single_object", "correct": True}] * 3 + [{"tag": "single_object", "correct": False}]
    rows += [{"tag": "color_attr", "correct": right} for right in (True, False)]
    (folder / GENEVAL_RESULTS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = score_folder(folder)
    text = write(folder, compare(folder, read_complete(folder), result))
    assert (folder / "published.md").read_text() == text
    assert "of the sizes of Janus-Pro-1B" in text
    assert "| GenEval | 6 | 0.625 | 0.322 to 0.852 | 0.73 | Janus-Pro-1B | authors | [J] by [C], [237] |" in text
    assert "| … single_object | 4 | 0.750 | 0.301 to 0.954 |  |  |  |  |" in text
    assert "| … color_attr | 2 | 0.500 | 0.095 to 0.905 | 0.56 | Janus-Pro-1B | authors | [J] by [C] |" in text
    assert (
        f"(geneval_results.jsonl, which has 6 of the folder's {4 * len(items['geneval'])} images: run it again)" in text
    )
    assert "14% below the published 0.73; measured otherwise: cfg_weight is 1.5" in text
    assert "- [210] https://github.com/deepseek-ai/Janus/issues/210" in text and "[V794]" not in text

    renamed(folder, tmp_path / "janus", cfg_weight=5.0, unconditional="pads")
    (line,) = compare(folder, read_complete(folder), result)
    assert line.differs == [] and "look at weights, prompts, guidance" in verdict(line)
    near = line.parts[0]._replace(value=0.72)
    assert verdict(line._replace(parts=(near,))) == "within 3% of the published 0.73"


@pytest.mark.parametrize("text", ["", "{}\n", "no json\n", '{"tag": "colors"}\n', "[1]\n"])
def test_results_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=r"results\.jsonl.*evaluate_images\.py"):
        list(results_of(path))


def test_questions_are_compared_as_shares_of_hundred(tmp_path: Path) -> None:
    asked = [
        Prompt(
            id=f"mcq/{n}", task="mcq", text="A or B?", segments=("text",), answer="A", options=("x", "y"), qa_type="MC"
        )
        for n in range(2)
    ]
    folder = generated({"mcq": asked}, tmp_path / "out")
    renamed(folder, sizes(tmp_path / "janus", 2048, 24))
    result = score_folder(folder)
    (line,) = compare(folder, read_complete(folder), result, "POPE")
    assert line.benchmark == "POPE" and line.ours == pytest.approx(100 * result.scores["mcq"]["accuracy/greedy"])
    assert "VLMEvalKit has both otherwise" in line.differs[0]
    assert [row.score for row in line.published] == ["86.2", "84.11", "88.9"]


def test_data_of_one_s_own_have_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the recipe's own function; the rendered world's tasks are named in no benchmark either."""
    monkeypatch.setenv("SYNCR1_CACHE", str(cache_folder()))
    out, console = tmp_path / "out", Console(record=True, width=200)
    assert not any(benchmark_named(name) for name in ("world", *few_items()))
    generated({"qa": few_items()["qa"]}, out)
    run_evaluation(EvaluateConfig(model=str(short_base()), output_dir=out, stage="score", baseline=True), console)
    text = console.export_text()
    assert "nothing is published of these data" in text and "published.md" in text
    assert markdown([], "tiny") == (out / "published.md").read_text()
