"""WebDataset: files in a tar whose names agree up to the first point are one row.

    000.jpg  000.json  000.txt      the picture is `image`, the JSON object's names are columns, the text is `prompt`
    001.left.png  001.right.png     several pictures of a row, in the order in which they lie there, are `images`

Opening reads headers, texts and JSON; a picture stays where it lies until somebody opens it.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError, PictureError
from ..cells import Part
from ..faults import Faults
from ..unifybench_files import PICTURE_SUFFIXES

MOST_TEXT = 1 << 26
"""Bytes of a text or JSON object inside a tar."""
TEXT_SUFFIXES = (".txt", ".text", ".caption")
IMAGE, IMAGES = "image", "images"

Place = tuple[int, int]
"""Where a member's bytes begin, and how many they are."""


@dataclass(frozen=True)
class TarCells:
    """Pictures inside a tar; keeps no open file."""

    path: Path
    places: tuple[tuple[Place, ...], ...]
    """Of each row."""

    def value(self, row: int, column: str) -> Any:
        with self.path.open("rb") as file:
            found = [self._read(file, place) for place in self.places[row]]
        return found if column == IMAGES else found[0] if found else None

    def values(self, column: str) -> Iterator[Any]:
        return (self.value(row, column) for row in range(len(self.places)))

    def _read(self, file: Any, place: Place) -> bytes:
        file.seek(place[0])
        contents = bytes(file.read(place[1]))
        if len(contents) < place[1]:
            raise PictureError(f"{self.path}: is shorter than when it was opened; leave data files as they are")
        return contents


def tar_part(path: Path, root: Path, stamp: str, faults: Faults) -> Part:
    """The rows of a tar.

    Raises:
        DataError: not readable as a tar, or (as a fault) a member that is not what its name says.
    """
    rows: dict[str, dict[str, Any]] = {}
    places: dict[str, list[Place]] = {}
    broken: dict[str, DataError] = {}
    try:
        with tarfile.open(path, "r:") as file:
            for member in file:
                if not member.isfile() or Path(member.name).name.startswith("."):
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                row = rows.setdefault(key, {"__key__": key})
                try:
                    if Path(name).suffix.lower() in PICTURE_SUFFIXES:
                        places.setdefault(key, []).append((member.offset_data, member.size))
                    else:
                        row.update(_columns(file, member, ending, f"{path}, {member.name}", row))
                except DataError as error:
                    if not faults.keep:
                        raise
                    broken[key] = error
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        got = f"what is not readable as a tar ({error})"
        raise DataError(f"{path}: expected a tar that is not compressed, got {got}; write it again") from error
    many = any(len(found) > 1 for found in places.values())
    column, found = IMAGES if many else IMAGE, tuple(tuple(places.get(key, ())) for key in rows)
    names = tuple(dict.fromkeys(name for row in rows.values() for name in row))
    counts = {column: [len(each) for each in found]} if places else {}
    return Part(
        path.name,
        stamp,
        root,
        (*names, *counts),
        [{name: value for name, value in row.items() if name not in counts} for row in rows.values()],
        counts=counts,
        lists=frozenset({IMAGES}) if many else frozenset(),
        cells=TarCells(path, found),
        broken={index: broken[key] for index, key in enumerate(rows) if key in broken},
    )


def _columns(
    file: tarfile.TarFile, member: tarfile.TarInfo, ending: str, where: str, row: dict[str, Any]
) -> dict[str, Any]:
    """What a member that is no picture says of its row."""
    if member.size > MOST_TEXT:
        raise DataError(f"{where}: {member.size} bytes; at most {MOST_TEXT} of text are read; shorten it")
    opened = file.extractfile(member)
    assert opened is not None  # it is a file
    try:
        text = opened.read().decode("utf-8-sig")
        if ending.lower().endswith("json"):
            found = json.loads(text)
            if not isinstance(found, dict):
                raise DataError(f"{where}: expected an object of columns, got {type(found).__name__}")
            return found
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: not readable as UTF-8 text or JSON ({error}); write it again") from error
    if f".{ending.lower()}" in TEXT_SUFFIXES:
        return {} if "prompt" in row else {"prompt": text.strip()}
    return {ending: text.strip()}
