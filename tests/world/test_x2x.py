"""The rendered world in x2x_rft_22k's columns: right answers, held-out looks and wordings, the same bytes again."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from syncr1.engine.data.samples import load_samples
from syncr1.engine.world.attributes import ATTRIBUTES, HELD_OUT_LOOKS, LOOKS, VALUES, Look
from syncr1.engine.world.items import TEST_LOOKS
from syncr1.engine.world.x2x import LETTERS, NUM_ROWS, STAMP, ask, caption_of, write_x2x, x2x_rows


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_x2x(tmp_path_factory.mktemp("x2x") / "data")


def lines(root: Path, split: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (root / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def digest(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from(LOOKS), st.sampled_from(("train", "test")), st.sampled_from(ATTRIBUTES)
)
def test_the_solution_is_right_and_only_one_option_is(seed: int, look: Look, split: str, name: str) -> None:
    rng = np.random.default_rng(seed)
    open_ended = ask(rng, look, split, "OE", name)
    assert open_ended.solution == getattr(look, name) and not open_ended.options and "\n" not in open_ended.text
    choice = ask(rng, look, split, "MC", name)
    asked, *offered = choice.text.split("\n")
    assert offered == [f"{letter}. {value}" for letter, value in zip(LETTERS, choice.options, strict=False)]
    assert len(set(choice.options)) == len(choice.options) == min(4, len(VALUES[name]))
    assert list(choice.options) == [value for value in VALUES[name] if value in choice.options] and asked.endswith(
        ("?", ".")
    )
    assert choice.options[LETTERS.index(choice.solution)] == getattr(look, name)


def test_no_letter_is_favoured() -> None:
    """Over looks, each letter is right about equally often."""
    rng = np.random.default_rng(0)
    found = Counter(ask(rng, look, "train", "MC", "place").solution for look in LOOKS)
    assert set(found.values()) == {len(LOOKS) // 4}


def test_rows_are_what_the_format_says(root: Path) -> None:
    """All columns, types in turn, every attribute asked about as often, and pictures that are the look's photos."""
    for split, number in NUM_ROWS.items():
        rows, found = x2x_rows(split), lines(root, split)
        assert len(rows) == len(found) == number
        for index, (row, line) in enumerate(zip(rows, found, strict=True)):
            assert set(line) == {"prompt", "real_image", "qa_problem", "qa_solution", "qa_type", "attributes"}
            assert line["qa_type"] == ("OE" if index % 2 else "MC") and line["attributes"] == row.look.to_dict()
            assert line["qa_solution"] == f"<answer>{row.question.solution}</answer>"
            with Image.open(root / str(line["real_image"])) as picture:
                assert np.array_equal(np.asarray(picture), row.photo)
        asked = Counter((row.qa_type, row.question.attribute) for row in rows)
        assert set(asked.values()) == {number // 10}
        assert max(Counter(row.look for row in rows).values()) <= -(-number // len({row.look for row in rows})) + 1


def test_test_rows_show_held_out_looks_in_held_out_words(root: Path) -> None:
    looks = {s: {Look.from_dict(line["attributes"]) for line in lines(root, s)} for s in NUM_ROWS}  # type: ignore[arg-type]
    assert looks["train"].isdisjoint(HELD_OUT_LOOKS) and looks["test"] == set(TEST_LOOKS)
    questions = {s: {str(line["qa_problem"]).split("\n")[0] for line in lines(root, s)} for s in NUM_ROWS}
    assert questions["train"].isdisjoint(questions["test"]) and len(questions["test"]) == 10
    rng = np.random.default_rng(1)
    wordings = {s: {caption_of(rng, LOOKS[0], s) for _ in range(200)} for s in NUM_ROWS}
    assert wordings["train"].isdisjoint(wordings["test"]) and len(wordings["train"]) == 6


def test_the_same_seed_writes_the_same_bytes(root: Path, tmp_path: Path) -> None:
    other = write_x2x(tmp_path / "other")
    assert digest(other) == digest(root)
    (other / "images" / "train_0.png").unlink()
    assert write_x2x(other) == other and not (other / "images" / "train_0.png").exists(), "a stamped folder is left be"
    assert digest(write_x2x(other, seed=1)) != digest(root), "another seed writes it again"
    assert len(list((other / "images").iterdir())) == sum(NUM_ROWS.values())


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=STAMP):
        write_x2x(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_engine_reads_both_halves_of_every_row(root: Path) -> None:
    """The reader of real x2x data takes this folder: captions, letters, options and photos arrive as they were made."""
    samples = load_samples(root, "test", instruction=None)
    rows = x2x_rows("test")
    assert len(samples) == len(rows)
    for row, (draw, asks) in zip(rows, samples, strict=True):
        assert (draw.text, draw.target, draw.segments) == (row.caption, row.caption, ("image",))
        assert (draw.real_image,) == asks.images and draw.sample == asks.sample
        assert (asks.text, asks.answer, asks.qa_type) == (row.question.text, row.question.solution, row.qa_type)
        assert asks.options == row.question.options and asks.segments == ("text",)
