"""The folder between the two stages: what was generated, one JSON line per trajectory, images beside it.

    items.jsonl            appended while a run generates (other ranks: items.rank1.jsonl, …), then sorted
    images/<id>.png        a line is written only after its image
    references/<hash>.png  the held-out photos that images are compared with, so that scoring needs nothing else

Dims: n items.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import EvaluationError
from ..pictures import ImageRef, open_picture
from ..records import Prompt
from ..whole_files import write_atomically
from .manifest import picture_name, picture_names

ITEMS, IMAGES, REFERENCES = "items.jsonl", "images", "references"
Key = tuple[str, int]
"""A trajectory: its prompt's id and its member number."""

_PICTURES = ("images", "real_image", "references")
_OWN = ("member", "greedy", "sampled", "follow_up_text", "drawn", "digest", "shown")
_TUPLES = ("segments", "options", "right_answers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One trajectory as the folder holds it."""

    prompt: Prompt
    """`references` are the folder's copies; `image` and `real_image` are not kept, and None."""
    member: int = 0
    greedy: str | None = None
    """The greedy text; None where none was asked for (and for all members but the first)."""
    sampled: str | None = None
    """The sampled text; None where none was asked for."""
    follow_up_text: str = ""
    """The sampled text behind the image."""
    drawn: str | None = None
    """The image's file, relative to the folder."""
    digest: str | None = None
    """Of the image's pixels: the key under which its scores are kept."""

    shown: str | None = None
    """The name of the photo that the user showed."""

    @property
    def key(self) -> Key:
        return self.prompt.id, self.member

    @property
    def text(self) -> str | None:
        """What a judge reads: the greedy text where there is one."""
        return self.sampled if self.greedy is None else self.greedy


class Store:
    """Reads and writes a folder of items.

    Args:
        folder: the evaluation's folder.
        rank: of this process; every rank appends to a file of its own.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self._path = folder / (ITEMS if rank == 0 else f"items.rank{rank}.jsonl")
        self._file: TextIO | None = None
        self._copies: dict[ImageRef, str] = {}

    # Reading --------------------------------------------------------------------------------------------------------

    def read(self) -> list[Item]:
        """Every complete item of every rank's file, each once, in the order of the files.

        A last line that was cut off is passed over, and so is an item whose image is missing: both are made again.

        Raises:
            EvaluationError: a line before the last one cannot be read: something else wrote into the file.
        """
        found: dict[Key, Item] = {}
        for path in self._files():
            for item in _lines(path):
                if item.drawn is None or os.path.isfile(self.folder / item.drawn):
                    found.setdefault(item.key, item)
        return list(found.values())

    def _files(self) -> list[Path]:
        return [path for path in sorted(self.folder.glob("items*.jsonl")) if path.is_file()]

    def settle(self, order: Sequence[Key]) -> list[Item]:
        """One items.jsonl with all that is complete, in the order of `order`; for one rank, while none writes.

        Items that `order` does not name are left out.
        """
        rank_of = {key: place for place, key in enumerate(order)}
        items = sorted((item for item in self.read() if item.key in rank_of), key=lambda item: rank_of[item.key])
        write_atomically(self.folder / ITEMS, "".join(_to_line(item) for item in items))
        for path in self._files():
            if path.name != ITEMS:
                path.unlink()
        return items

    # Writing --------------------------------------------------------------------------------------------------------

    def append(self, item: Item, image: Tensor | None) -> Item:
        """Writes an item: its reference photos, then its image ([3, H, W] in [0, 1]), then its line."""
        prompt = replace(item.prompt, references=tuple(Path(self._reference(ref)) for ref in item.prompt.references))
        item = replace(item, prompt=prompt, shown=picture_names(item.prompt.images))
        if image is not None:
            contents, digest = encode_png(image)
            item = replace(item, drawn=f"{IMAGES}/{file_name(item.key)}.png", digest=digest)
            _write_new(self.folder / str(item.drawn), contents)
        if self._file is None:
            self._file = self._path.open("a", encoding="utf-8")
        self._file.write(_to_line(item))
        return item

    def commit(self) -> None:
        """What was appended is on disk when this returns."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self.commit()
            self._file.close()
            self._file = None

    def _reference(self, ref: ImageRef) -> str:
        """The name of the folder's copy of a reference photo."""
        if ref not in self._copies:
            buffer = io.BytesIO()
            picture = open_picture(ref)
            picture.save(buffer, format="PNG")
            name = f"{REFERENCES}/{hashlib.blake2b(picture.tobytes(), digest_size=10).hexdigest()}.png"
            if not (self.folder / name).is_file():
                _write_new(self.folder / name, buffer.getvalue())
            self._copies[ref] = name
        return self._copies[ref]


def file_name(key: Key) -> str:
    """A file name for any id: its readable part, and a hash that keeps two ids apart."""
    readable = re.sub(r"[^A-Za-z0-9-]+", "_", key[0])[:80].strip("_")
    return f"{readable}-{hashlib.blake2b(key[0].encode(), digest_size=4).hexdigest()}-{key[1]}"


def encode_png(image: Tensor) -> tuple[bytes, str]:
    """[3, H, W] in [0, 1] -> a PNG file's bytes, and a digest of its pixels."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG")
    return buffer.getvalue(), hashlib.blake2b(pixels.tobytes(), digest_size=10).hexdigest()


def _write_new(path: Path, contents: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, contents)


# Lines ----------------------------------------------------------------------------------------------------------------


def _to_line(item: Item) -> str:
    prompt = item.prompt
    row: dict[str, Any] = {
        "id": prompt.id,
        "task": prompt.task,
        **{name: getattr(item, name) for name in _OWN},
        "references": [str(ref) if isinstance(ref, Path) else picture_name(ref) for ref in prompt.references],
    }
    row |= {f.name: _plain(getattr(prompt, f.name)) for f in fields(Prompt) if f.name not in (*_PICTURES, *row)}
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _from_row(row: Mapping[str, Any]) -> Item:
    known = {f.name for f in fields(Prompt)} - set(_PICTURES)
    columns = {name: value for name, value in row.items() if name in known}
    columns |= {name: tuple(columns[name]) for name in _TUPLES if name in columns}
    prompt = Prompt(**columns, references=tuple(Path(name) for name in row["references"]))
    own = {name: row[name] for name in _OWN}
    told = [value for name, value in own.items() if name != "member" and value is not None]
    if type(own["member"]) is not int or not all(
        isinstance(value, str) for value in (prompt.id, prompt.task, prompt.text, *told)
    ):
        raise TypeError("expected texts, and a number as member")
    return Item(prompt=prompt, **own)


def _lines(path: Path) -> Iterator[Item]:
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if number == len(lines):  # empty when the file ends as it should; else its last line was cut off
            return
        try:
            yield _from_row(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise EvaluationError(
                f"{path}, line {number}: is not an item ({type(error).__name__}: {error}); restore the file, or delete "
                "it to generate its items again"
            ) from error
