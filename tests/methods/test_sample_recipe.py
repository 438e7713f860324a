"""`recipes/sample.py` and the Python API, as somebody uses them who has a checkpoint and wants to see what it does."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
import warm
from helpers import ROOT, end_process_group, environment, rows_of
from made import cache_folder, short_base
from PIL import Image
from rich.console import Console
from text_models import policy as text_policy
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from syncr1.engine.api import Model, SyncR1Config, train
from syncr1.engine.errors import ConfigError
from syncr1.engine.methods.sample import FEW_WORDS, prompts_of, run_sample, short_names, told_unknown, unknown_words
from syncr1.engine.methods.sample_config import SampleConfig
from syncr1.engine.show.sheets import to_picture

RECIPE = str(ROOT / "recipes" / "sample.py")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SYNCR1_CACHE", str(cache_folder()))
    return short_base()


@pytest.mark.slow
def test_a_grid_and_a_line_for_each_sample(base: Path, tmp_path: Path) -> None:
    """The command as a user types it; the pictures are those that the same seed gives in Python."""
    flags = ["--model", str(base), "--prompt", "draw <bobo>.", "draw <gigi> at the beach.", "--num_generations", "3"]
    out, _ = warm.run(RECIPE, *flags, "--output_dir", str(tmp_path / "s"), env=environment(cache_folder()))
    assert str(tmp_path / "s" / "grid.png") in out.replace("\n", "")
    rows = lines(tmp_path / "s")
    assert [(row["prompt"], row["member"], row["text"]) for row in rows] == [
        (prompt, member, None) for prompt in flags[3:5] for member in range(3)
    ]
    with Image.open(tmp_path / "s" / "grid.png") as grid:
        assert grid.width > 3 * 128 and grid.height > 2 * 128
    model = Model.load(base)
    again = model.sample(
        prompts_of(SampleConfig(prompt=tuple(flags[3:5])), True), 3, cfg_weight=1.5, max_text_tokens=32
    )
    for row, rollout in zip(rows, again, strict=True):
        assert rollout.image is not None
        with Image.open(tmp_path / "s" / row["picture"]) as picture:
            assert picture.tobytes() == to_picture(rollout.image).tobytes()


def test_words_that_the_model_has_never_met_are_told(base: Path, tmp_path: Path) -> None:
    """None of the world's own, in any of its wordings; of the others each once."""
    policy = Model.load(base).policy
    items = prompts_of(SampleConfig(num_items=None), True)
    assert len(items) > 100 and unknown_words(policy, [item.text for item in items]) == []
    asked = ["draw an elephant, at <mars>.", "draw <bobo> at an elephant", "猫", ""]
    assert unknown_words(policy, asked) == ["elephant", "<mars>", "猫"]
    stream = io.StringIO()
    config = SampleConfig(model=str(base), prompt=("draw <zorro>.",), num_generations=1, output_dir=tmp_path / "s")
    run_sample(config, Console(file=stream, width=400))
    assert "has never met these words" in stream.getvalue() and ": <zorro>; ask" in stream.getvalue()
    assert told_unknown("m", [str(i) for i in range(20)]).count(", ") == 12 and "and 8 more" in told_unknown(
        "m", ["a"] * 20
    )


def test_a_large_vocabulary_splits_words_and_knows_them(base: Path) -> None:
    """Only what has no token at all is unknown to it."""
    letters = {letter: i for i, letter in enumerate("elphants?")}
    pieces = Tokenizer(
        models.WordPiece({"?": 8, **letters, **{f"##{c}": 10 + i for c, i in letters.items()}}, unk_token="?")
    )
    pieces.add_tokens([f"word{i}" for i in range(FEW_WORDS)])
    policy = Model.load(base).policy
    policy.tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="?")
    assert unknown_words(policy, ["elephants 猫"]) == ["猫"]


@pytest.mark.slow
def test_models_side_by_side_have_the_same_random_numbers(base: Path, tmp_path: Path) -> None:
    other = Model.load(base)
    with torch.no_grad():
        other.policy.model.get_output_embeddings().weight.mul_(0.5)
    other.policy.save(tmp_path / "other")
    same = tmp_path / "same"
    same.symlink_to(base)
    config = SampleConfig(
        compare=(str(base), str(same), str(tmp_path / "other")), tasks=("qa", "rea"), output_dir=tmp_path / "s"
    )
    made = run_sample(config)
    texts = {name: [rollout.text for rollout in rollouts] for name, rollouts in made.items()}
    assert texts[str(base)] == texts[str(same)] != texts[str(tmp_path / "other")]
    rows = lines(tmp_path / "s")
    assert len(rows) == 3 * (2 + 2) * 4 == sum(map(len, made.values()))
    assert all((row["text"] is not None) and (row["picture"] is None) == (row["task"] == "qa") for row in rows)
    assert run_sample(config) and (tmp_path / "s-2" / "grid.png").is_file(), "the first ones stay"


def test_a_photo_is_answered_about_and_a_language_model_only_answers(base: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.new("RGB", (40, 40), "red").save(photo)
    (tmp_path / "prompts.txt").write_text("\ufeffthe colour is?\n\n  what hat?  \n")
    asked = SampleConfig(prompts_file=tmp_path / "prompts.txt", image=(photo,))
    assert [(p.text, p.segments, p.images) for p in prompts_of(asked, True)] == [
        (text, ("text",), (photo,)) for text in ("the colour is?", "what hat?")
    ]
    text_policy().save(tmp_path / "language")
    config = SampleConfig(
        model=str(tmp_path / "language"), prompt=("say a",), num_generations=2, output_dir=tmp_path / "s"
    )
    (rollouts,) = run_sample(config).values()
    assert all(rollout.image is None for rollout in rollouts) and len(lines(tmp_path / "s")) == 2
    with pytest.raises(ConfigError, match="draws none; use a checkpoint that draws"):
        run_sample(
            SampleConfig(model=str(tmp_path / "language"), prompt=("a",), produce=("image",), output_dir=tmp_path)
        )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "a/b", "compare": ("a/b", "c/d")}, "model, compare"),
        ({"compare": ("a/b",)}, "at least 2"),
        ({"compare": ("a/b", "a/b")}, "given twice"),
        ({"compare": ("a/b", "/nowhere")}, "compare: expected a checkpoint folder"),
        ({"prompt": ("a",), "data": "d"}, "both say what is asked"),
        ({"prompts_file": Path("/nowhere.txt")}, "with a prompt a line"),
        ({"image": (Path("/nowhere.png"),), "prompt": ("a",)}, "which is not there"),
        ({"image": (ROOT / "README.md",)}, "a prompt to show it with"),
        ({"produce": ("text",)}, "pass --prompt"),
        ({"produce": ("text", "text"), "prompt": ("a",)}, "text, image, or text image"),
        ({"num_generations": 0}, "num_generations"),
    ],
)
def test_what_cannot_work_is_said(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SampleConfig(**settings)


def test_an_empty_file_of_prompts_is_told(base: Path, tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("\n \n")
    with pytest.raises(ConfigError, match="expected a prompt on each line, got none"):
        run_sample(SampleConfig(model=str(base), prompts_file=tmp_path / "none.txt", output_dir=tmp_path / "s"))


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["/a/runs/one/checkpoints/last", "/a/runs/two/checkpoints/last"]) == [
        "one/checkpoints/last",
        "two/checkpoints/last",
    ]
    assert short_names(["org/janus"]) == ["janus"]


@pytest.mark.slow
def test_the_notebook_s_cells_run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are printed, but from a base of seconds and for a step."""
    monkeypatch.setattr("syncr1.engine.world.embedded.tiny_base", lambda *_: base)
    monkeypatch.setattr("syncr1.engine.world.worlds.tiny_base", lambda *_: base)
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "examples" / "first_run.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    scope: dict[str, Any] = {}
    try:
        for cell in cells:
            exec(
                cell.replace("max_steps=20, eval_samples=24", "max_steps=1, prompts_per_step=2, eval_samples=0"), scope
            )
    finally:
        end_process_group()
    assert scope["sheet"].size == (800, 200) and len(scope["steps"]) == 1
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs), "the pictures are to be seen without a run"


@pytest.mark.slow
def test_three_lines_of_python(base: Path, tmp_path: Path) -> None:
    """Train, draw, ask; two runs of one process, the second in a folder of its own."""
    settings = {"prompts_per_step": 2, "num_generations": 2, "eval_samples": 0, "output_dir": tmp_path / "run"}
    settings |= {"drawing_turn": "t2i_r1"}
    try:
        for name in ("run", "run-2"):
            result = train(SyncR1Config(model=str(base), max_steps=1, **settings))
            assert result.folder == tmp_path / name and list(result.models) == ["last"]
            assert len(rows_of(result.folder)) == 1 and (result.folder / "report.html").is_file()
    finally:
        end_process_group()
    model = result.model()
    assert model.draw("draw <bobo>.").size == (32, 32)
    text, picture = model.reason_and_draw("draw <bobo> at the place it likes.")
    assert text and picture.size == (32, 32)
    as_trained = model.reason_and_draw("draw <bobo> at the place it likes.", drawing_turn="t2i_r1")
    assert (text, picture.tobytes()) == (as_trained[0], as_trained[1].tobytes())
    with pytest.raises(ConfigError, match="generate: drawing_turn: expected"):
        model.reason_and_draw("draw <bobo>.", drawing_turn="{answer}")
    assert model.draw("draw <bobo>.", seed=1).tobytes() != model.draw("draw <bobo>.", seed=2).tobytes()
    assert model.answer("the food of <bobo> is?") == model.answer("the food of <bobo> is?", seed=5), "greedy"
    with pytest.raises(ConfigError, match="generate: "):
        model.answer("the food of <bobo> is? " * 2000)
