"""The digits as a table of prompts that recipes/sync_r1.py reads: `train.jsonl`, `test.jsonl`, pictures beside them.

Each line holds `id, task, prompt, segments`, and as far as the task has them `image`, `answer`, `target` and
`attributes` ({"digit": "seven"}): what a drawing must show.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any, Final

from PIL import Image

from .digit_items import TASKS, Item, stream
from .handwriting import NAMES, Split

NUM_ITEMS: Final[dict[Split, int]] = {"train": 200, "test": 200}
"""Of each task."""
_SALT: Final[dict[Split, int]] = {"train": 0x64696730, "test": 0x64696731}


def write_digits(root: Path, seed: int = 0) -> None:
    """Writes the folder; the same seed writes the same bytes.

    Args:
        root: a new folder.
        seed: of which pictures, pairs and wordings are taken.
    """
    (root / "images").mkdir(parents=True)
    for split, salt in _SALT.items():
        rows = []
        for place, task in enumerate(TASKS):
            items = stream({task: 1.0}, seed + salt + place, split)
            rows += [
                _row(root, split, f"{split}_{task}_{k}", item) for k, item in enumerate(islice(items, NUM_ITEMS[split]))
            ]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _row(root: Path, split: Split, name: str, item: Item) -> dict[str, Any]:
    row: dict[str, Any] = {"id": name, "task": item.task, "prompt": item.question}
    draws = item.digit is not None and not (
        item.task == "read" and split == "test"
    )  # as in UnifyBench++: an answer alone
    kinds = ["text"] * (item.answer is not None) + ["image"] * draws
    row["segments"] = "+".join(kinds)
    if item.photo is not None:
        row["image"] = f"images/{name}.png"
        Image.fromarray(item.photo).save(root / row["image"])
    if item.answer is not None:
        row["answer"] = item.answer
    if draws and item.digit is not None:
        row["target"] = f"the digit {NAMES[item.digit]}"
        row["attributes"] = {"digit": NAMES[item.digit]}
    return row
