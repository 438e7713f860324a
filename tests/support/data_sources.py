"""Real photographs (those that scikit-image ships), and the same rows of data in every form that is read."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from skimage import data

from syncr1.engine.data.opened import broken_pictures
from syncr1.engine.pictures import ImageRef, open_picture
from syncr1.engine.records import Prompt


def broken_in(refs: Sequence[ImageRef]) -> list[str]:
    """What is wrong with those that cannot be read."""
    return [*broken_pictures(refs).values()]


PHOTOS = ("astronaut.png", "chelsea.jpg", "coffee.jpg", "rocket.png")

X2X_ROWS: list[dict[str, Any]] = [
    {
        "prompt": "An astronaut in an orange suit before a flag.",
        "real_image": "astronaut.png",
        "qa_problem": "What is behind her?\nA. a horse\nB. a flag\nC. a car",
        "qa_solution": "<answer>B</answer>",
        "qa_type": "MC",
        "od_problem": "find the helmet",
    },
    {
        "prompt": "A tabby cat looks into the camera.",
        "real_image": "chelsea.jpg",
        "qa_problem": "What animal is this?",
        "qa_solution": "<answer> cat </answer>",
        "qa_type": "OE",
        "od_problem": None,
    },
    {
        "prompt": "A cup of coffee on a wooden table.",
        "real_image": "coffee.jpg",
        "qa_problem": None,
        "qa_solution": None,
        "qa_type": None,
        "od_problem": None,
    },
    {
        "prompt": None,
        "real_image": "rocket.png",
        "qa_problem": "Is it day?",
        "qa_solution": "no",
        "qa_type": "OE",
        "od_problem": None,
    },
]
"""Both halves twice, a drawing alone and a question alone."""


def photograph(name: str) -> Image.Image:
    """96 x 64 pixels; `chelsea` as CMYK and `rocket` with a palette, as they come from the world."""
    stem = name.split(".")[0]
    picture = Image.fromarray({"chelsea": data.cat}.get(stem, getattr(data, stem, None))()).resize((96, 64))
    if stem == "chelsea":
        return picture.convert("CMYK")
    return picture.quantize(64) if stem == "rocket" else picture


def write_photos(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in PHOTOS:
        photograph(name).save(folder / name, **({"quality": 90} if name.endswith("jpg") else {}))


def encoded(name: str) -> bytes:
    buffer = io.BytesIO()
    photograph(name).save(buffer, {"jpg": "JPEG", "png": "PNG"}[name.rsplit(".", 1)[1]])
    return buffer.getvalue()


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def write_forms(folder: Path, rows: Sequence[Mapping[str, Any]], column: str) -> dict[str, Path]:
    """`rows`, whose `column` names a photograph, as every kind of source; all are called `album`."""
    stored = [{**row, column: {"bytes": (folder / row[column]).read_bytes(), "path": row[column]}} for row in rows]
    forms = {name: folder / name / "album" for name in ("jsonl", "parquet", "shards", "binary", "saved", "splits")}
    for name in ("jsonl", "parquet", "shards", "binary"):
        forms[name].mkdir(parents=True)
    for name in PHOTOS:
        (forms["jsonl"] / name).write_bytes((folder / name).read_bytes())
    write_lines(forms["jsonl"] / "train.jsonl", rows)
    table = pa.Table.from_pylist(stored)
    pq.write_table(table, forms["parquet"] / "train.parquet", row_group_size=3)
    (forms["shards"] / "data").mkdir()
    for index in range(2):
        half = table.slice(index * 2, 2 if index == 0 else None)
        pq.write_table(half, forms["shards"] / "data" / f"train-{index:05d}-of-00002.parquet")
    plain = pa.Table.from_pylist([{**row, column: row[column]["bytes"]} for row in stored])
    pq.write_table(plain, forms["binary"] / "train.parquet")
    dataset = datasets.Dataset.from_list(stored).cast_column(column, datasets.Image())
    dataset.save_to_disk(forms["saved"])
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(forms["splits"])
    return forms


def comparable(prompt: Prompt) -> tuple[Prompt, list[np.ndarray]]:
    """A prompt without its pictures, and their pixels."""
    refs = [ref for ref in (*prompt.images, prompt.real_image, *prompt.references) if ref is not None]
    return replace(prompt, images=(), real_image=None, references=()), [np.asarray(open_picture(ref)) for ref in refs]


def assert_same_prompts(first: Sequence[Prompt], second: Sequence[Prompt]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        (bare, pixels), (other_bare, other_pixels) = comparable(one), comparable(other)
        assert bare == other_bare
        assert len(pixels) == len(other_pixels)
        assert all(np.array_equal(a, b) for a, b in zip(pixels, other_pixels, strict=True))
