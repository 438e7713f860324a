"""GenEval's and DPG-Bench's files, small."""

from __future__ import annotations

import json
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "color_attr",
        "include": [{"class": "cup", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}],
        "prompt": "a photo of a red cup and a blue dog",
    },
]


def geneval(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in GENEVAL))
    return path


def dpg(folder: Path) -> Path:
    folder.mkdir()
    for name, text in (("1", "A red truck."), ("COCOval2014000000019", "Two\r\nlines.\n"), ("10", "é")):
        (folder / f"{name}.txt").write_bytes(text.encode())
    return folder
