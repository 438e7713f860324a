"""General material beside the concepts: `general/{train,test}/` in the world's folder.

train/  anchors: unrewarded prompts that the KL term holds in place while the concepts are trained
test/   the check that general skill has stayed: held-out looks, held-out wordings

Each holds pictures, vqa.json [{image, query, answer}], captions.json [{image, caption}] and
attributes.json {images: {image: {attribute: value}}}.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from .items import generic_t2i, generic_vqa
from .render import render
from .texts import Split

VERSION: Final = 1
"""Raise whenever what is written changes."""
STAMP: Final = "general.json"
_SALT: Final[dict[Split, int]] = {"train": 0x67656E30, "test": 0x67656E31}
"""Keeps these draws apart from every other use of the same seed, and the splits apart from each other."""


def write_general(root: Path, *, seed: int = 0, num_items: int = 512) -> Path:
    """Write `root/general`, unless the same one lies there; the same arguments write the same bytes.

    Args:
        root: the world's folder; made when missing.
        seed: of the draws.
        num_items: questions, and as many captions, per split.

    Returns:
        `root/general`.
    """
    folder = root / "general"
    stamp = {"version": VERSION, "seed": seed, "num_items": num_items}
    if (folder / STAMP).is_file() and json.loads((folder / STAMP).read_text()) == stamp:
        return folder
    for split in _SALT:
        _write_split(folder / split, split, seed, num_items)
    _write_json(folder / STAMP, stamp)  # last, so that an incomplete folder is written again
    return folder


def _write_split(folder: Path, split: Split, seed: int, num_items: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, _SALT[split]])
    questions: list[dict[str, str]] = []
    captions: list[dict[str, str]] = []
    attributes: dict[str, dict[str, str]] = {}
    for index in range(num_items):
        asked, drawn = generic_vqa(rng, split), generic_t2i(rng, split)
        assert asked.photo is not None and drawn.look is not None
        photo, picture = f"vqa_{index}.png", f"caption_{index}.png"
        Image.fromarray(asked.photo).save(folder / photo, compress_level=1)
        Image.fromarray(render(drawn.look)).save(folder / picture, compress_level=1)
        questions.append({"image": photo, "query": asked.question, "answer": asked.answer})
        captions.append({"image": picture, "caption": drawn.question})
        attributes[picture] = drawn.look.to_dict()
    for file, contents in (("vqa", questions), ("captions", captions), ("attributes", {"images": attributes})):
        _write_json(folder / f"{file}.json", contents)


def _write_json(path: Path, contents: Any) -> None:
    path.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
