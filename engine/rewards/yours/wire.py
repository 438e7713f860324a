"""What goes between a run and the process of an isolated reward (isolated.py, worker.py).

    to the worker     the columns as JSON, the drawn images and the token ids as plain numbers behind it
    back              a number or None for each trajectory and what was logged, or why there is none

Nothing is pickled.  Columns of anything other than texts, numbers, lists, dicts, and paths are left out: pictures that
lie inside a data file.  Tuples arrive as lists.
"""

from __future__ import annotations

import json
import math
import struct
from array import array
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

_SIZES = struct.Struct("<QQ")
STATE = "syncr1.state"
"""Key of the training's state among the columns."""
_PATH = "syncr1.path"
"""Key of the dict that stands for a path."""


def packed(columns: dict[str, Any]) -> tuple[str, list[memoryview]]:
    """JSON of the columns that it can carry; what lies behind it: images as float32, then token ids as int64."""
    images, ids = columns.get("images") or [], columns.get("completion_ids")
    pixels = [image.detach().float().cpu().contiguous().numpy() for image in images if image is not None]
    behind = [memoryview(values.reshape(-1)).cast("B") for values in pixels if values.size]
    parts = {"images": json.dumps([None if image is None else list(image.shape) for image in images])}
    if ids is not None:
        parts["completion_ids"] = json.dumps([len(row) for row in ids])
        behind.append(memoryview(array("q", chain.from_iterable(ids))).cast("B"))
    for name, column in columns.items():
        if name not in ("images", "completion_ids"):
            try:
                parts[name] = json.dumps(column, default=_plain)
            except (TypeError, ValueError):  # nothing that JSON has a form for
                continue
    return "{" + ", ".join(f"{json.dumps(name)}: {text}" for name, text in parts.items()) + "}", behind


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return {_PATH: str(value)}
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(type(value).__name__)


def unpacked(text: bytes, behind: bytearray) -> dict[str, Any]:
    columns: dict[str, Any] = json.loads(
        text, object_hook=lambda found: Path(found[_PATH]) if set(found) == {_PATH} else found
    )
    images: list[torch.Tensor | None] = []
    at = 0
    for shape in columns["images"]:
        count = 0 if shape is None else math.prod(shape)
        values = torch.frombuffer(behind, dtype=torch.float32, count=count, offset=at) if count else torch.empty(0)
        images.append(None if shape is None else values.view(shape))
        at += 4 * count
    columns["images"] = images
    if "completion_ids" in columns:
        tokens = array("q")
        tokens.frombytes(memoryview(behind)[at:])
        left = iter(tokens.tolist())
        columns["completion_ids"] = [list(islice(left, length)) for length in columns["completion_ids"]]
    return columns


def send(stream: Any, text: str, behind: Sequence[memoryview] = ()) -> None:
    encoded = text.encode()
    stream.write(_SIZES.pack(len(encoded), sum(part.nbytes for part in behind)) + encoded)
    for part in behind:
        stream.write(part)
    stream.flush()


def receive(stream: Any) -> tuple[bytes, bytearray] | None:
    """The next message; None where the other side is gone."""
    sizes = stream.read(_SIZES.size)
    if len(sizes) < _SIZES.size:
        return None
    num_text, num_behind = _SIZES.unpack(sizes)
    text, behind = stream.read(num_text), bytearray(num_behind)
    return (text, behind) if len(text) == num_text and stream.readinto(behind) == num_behind else None
