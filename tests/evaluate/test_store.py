"""The folder between the stages: items survive the round trip, torn lines do not count, names never clash."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import numpy as np
import pytest
import torch
from evaluate_cases import plain
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from syncr1.engine.errors import EvaluationError
from syncr1.engine.evaluate.store import ITEMS, Item, Store, encode_png, file_name
from syncr1.engine.pictures import MemoryImage
from syncr1.engine.records import Prompt

RED = plain((1.0, 0.0, 0.0))


def item(name: str = "a/b", **more: Any) -> Item:
    return Item(prompt=Prompt(id=name, task="qa", text="?", segments=("text",)), greedy="yes", **more)


def test_an_item_comes_back_as_it_was(tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    Image.new("L", (5, 3), 90).save(photo)
    prompt = Prompt(
        id="ü/1 ",
        task="rea",
        text='say "ja"\nnow',
        images=(photo,),
        segments=("text", "image", "text"),
        answer="\u2028",
        options=("a", "b"),
        qa_type="MC",
        concept="bobo",
        references=(photo, MemoryImage("drawn", RED), photo),
        attributes={"hat": "crown"},
        follow_up="which?",
        extra={"list": [1, {"deep": None}], "path": Path("x")},
    )
    store = Store(tmp_path)
    given_ = Item(prompt=prompt, member=2, greedy=None, sampled="", follow_up_text="x")
    written = store.append(given_, torch.rand(3, 6, 6))
    store.close()
    (found,) = Store(tmp_path).read()
    assert found == replace(
        written, prompt=replace(written.prompt, images=(), extra={"list": [1, {"deep": None}], "path": "x"})
    )
    assert found.shown == "photo.jpg" and found.sampled == "" and found.greedy is None
    first, second, third = found.prompt.references
    assert first == third != second
    assert Image.open(tmp_path / first).size == (5, 3) and Image.open(tmp_path / second).getpixel((0, 0)) == (255, 0, 0)


def test_the_image_lies_there_as_drawn(tmp_path: Path) -> None:
    image = torch.rand(3, 5, 5)
    store = Store(tmp_path)
    written = store.append(item(), image)
    store.close()
    pixels = np.asarray(Image.open(tmp_path / str(written.drawn)))
    assert np.array_equal(pixels, (image * 255).round().byte().permute(1, 2, 0).numpy())
    assert written.digest == encode_png(image)[1] != encode_png(1 - image)[1]
    outside = encode_png(torch.full((3, 2, 2), 1.7))[0]
    assert outside == encode_png(torch.ones(3, 2, 2))[0], "values are clamped, never wrapped"


def test_an_item_without_its_image_is_not_there(tmp_path: Path) -> None:
    store = Store(tmp_path)
    written = store.append(item(), RED)
    store.append(item("c"), None)
    store.close()
    (tmp_path / str(written.drawn)).unlink()
    assert [found.prompt.id for found in Store(tmp_path).read()] == ["c"]


@given(cut=st.integers(0, 10_000))
def test_any_prefix_of_the_file_can_be_read(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("prefix")
    store = Store(folder)
    for name in ("a", "é", "\U0001f600"):
        store.append(item(name), None)
    store.close()
    contents = (folder / ITEMS).read_bytes()
    cut %= len(contents) + 1
    (folder / ITEMS).write_bytes(contents[:cut])
    names = [found.prompt.id for found in Store(folder).read()]
    assert names == ["a", "é", "\U0001f600"][: contents[:cut].count(b"\n")]
    again = Store(folder)
    again.settle([(name, 0) for name in names])
    assert (folder / ITEMS).read_bytes() == b"".join(contents[:cut].splitlines(keepends=True)[: len(names)])


@pytest.mark.parametrize("line", ["{}", "nothing", '{"id": "a"}', "[]", "\xff"])
def test_a_broken_line_inside_is_an_error(line: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append(item(), None)
    store.close()
    good = (tmp_path / ITEMS).read_bytes()
    (tmp_path / ITEMS).write_bytes(good + line.encode("latin-1") + b"\n" + good)
    with pytest.raises(EvaluationError, match=r"items.jsonl, line 2"):
        Store(tmp_path).read()


def test_ranks_write_apart_and_are_joined(tmp_path: Path) -> None:
    for rank, names in ((0, ("d", "b")), (1, ("a", "b")), (2, ("c",))):
        store = Store(tmp_path, rank)
        for name in names:
            store.append(item(name), None)
        store.close()
    assert len(list(tmp_path.glob("items*.jsonl"))) == 3
    joined = Store(tmp_path).settle([(name, 0) for name in "abc"])
    assert [found.prompt.id for found in joined] == ["a", "b", "c"], "what was not planned is left out"
    assert [path.name for path in tmp_path.glob("items*.jsonl")] == [ITEMS]
    assert Store(tmp_path).read() == joined


def test_lines_are_json_for_others_to_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append(item(), RED)
    store.close()
    row = json.loads((tmp_path / ITEMS).read_text())
    assert row["id"] == "a/b" and row["greedy"] == "yes" and row["sampled"] is None and row["segments"] == ["text"]


@given(st.lists(st.tuples(st.text(max_size=120), st.integers(0, 3)), min_size=2, max_size=6, unique=True))
def test_every_key_has_a_file_name_of_its_own(keys: list[tuple[str, int]]) -> None:
    names = [file_name(key) for key in keys]
    assert len({name.casefold() for name in names}) == len(names)
    assert all(name.isascii() and len(name) < 120 and "/" not in name and not name.startswith(".") for name in names)
