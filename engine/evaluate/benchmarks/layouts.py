"""Files of benchmarks as they are published: parquet folders, the hub, TSV with base64 pictures, JSON, JSON lines.

Other than training tables (`engine.data.table`), a benchmark's columns are known beforehand, and so are cells that look
like a path and are none (MathVista's `image`): nothing is guessed here, each benchmark's reader asks by name.
"""

from __future__ import annotations

import base64
import binascii
import csv
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...data.cells import ArrowCells, Part, arrow_part, confined, parquet_part
from ...errors import DataError, PictureError, one_line, shown
from ...pictures import ImageRef, StoredImage
from .data_sets import HUB_NAME

MAX_CELL = 1 << 28
"""Characters of a TSV's cell; a picture in base64 is a few hundred thousand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What `--benchmark`'s reader is given."""

    name: str
    """File, folder or hub name."""
    split: str
    image_folder: Path | None = None
    """Where pictures lie that the data name; None: beside the data."""
    think: bool = False
    """Ask to think in tags."""

    @property
    def path(self) -> Path:
        return Path(self.name).expanduser()


@dataclass(frozen=True)
class Row:
    """One row, or one object, with the pictures of its cells."""

    values: Mapping[str, Any]
    where: str
    """What errors call it."""
    part: Part | None = None
    """Of a data file with encoded pictures."""
    index: int = 0

    def text(self, *names: str) -> str:
        """The first of these columns that has text.

        Raises:
            DataError: none has.
        """
        for name in names:
            if isinstance(value := self.values.get(name), str) and value.strip():
                return utf8(value, name, self.where)
        got = {name: shown(self.values.get(name)) for name in names}
        raise DataError(f"{self.where}: expected text in {' or '.join(map(repr, names))}, got {got}; correct the row")

    def maybe(self, *names: str) -> str:
        """As `text`; "" where there is none, and for what pandas writes for an empty cell."""
        for name in names:
            value = self.values.get(name)
            if isinstance(value, str) and value.strip() and value.strip().lower() != "nan":
                return utf8(value, name, self.where)
        return ""

    def number(self, name: str) -> int:
        """A whole number; DataError for anything else."""
        value = self.values.get(name)
        if isinstance(value, str) and re.fullmatch(r"\d{1,12}", value.strip()):
            value = int(value)
        if type(value) is not int:
            raise DataError(
                f"{self.where}: column {name!r} must be a whole number, got {shown(value)}; correct the row"
            )
        return value

    def pictures(self, name: str) -> tuple[ImageRef, ...]:
        """The encoded pictures of a cell; none where it has none."""
        if self.part is None or name not in self.part.counts:
            return ()
        found = self.part.pictures(self.index, name)
        return found if isinstance(found, tuple) else () if found is None else (found,)


def utf8(value: str, name: str, where: str) -> str:
    """A cell's text without outer white space; DataError for half of a surrogate pair, which no file can hold."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: column {name!r} is not UTF-8 ({error}); download it again") from error
    return value.strip()


@dataclass(frozen=True)
class EncodedImage(StoredImage):
    """A picture in base64, as a cell of a TSV or of JSON has it."""

    name: str
    text: str = field(repr=False)

    def read(self) -> bytes:
        try:
            return base64.b64decode(self.text.partition("base64,")[2] or self.text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise PictureError(f"{self.name}: is no base64 ({error}); download the file again") from error


# Tables ---------------------------------------------------------------------------------------------------------------


def table_rows(source: Source, *folders: str) -> Iterator[Row]:
    """The rows of a data set as the hub has it: by name, or downloaded.

    Args:
        source: `org/name@revision:config`, a parquet file, or a folder with `<split>*.parquet` in it, in `data/`, or in
            one of `folders`.
        folders: configurations: sub-folders of a downloaded set.

    Raises:
        DataError: nothing of the split is there, or it cannot be read; says what is.
    """
    path = source.path
    if path.is_file():
        parts = [_parquet(path, path.parent)]
    elif path.is_dir():
        parts = [_parquet(file, path) for file in _shards(path, source.split, folders)]
    else:
        parts = [_from_hub(source)]
    for part in parts:
        for index, values in enumerate(part.rows):
            yield Row(values, part.where(index), part, index)


def _parquet(path: Path, root: Path) -> Part:
    about = path.stat()
    return parquet_part(path, root, f"{path.resolve()}|{about.st_size}|{about.st_mtime_ns}")


def _shards(folder: Path, split: str, folders: Sequence[str]) -> list[Path]:
    places = [folder / name for name in ("", "data", *folders)]
    found = [file for place in places for file in sorted(place.glob(f"{split}*.parquet"))]
    if not found:
        have = sorted({file.name for place in places for file in place.glob("*.parquet")})[:8]
        raise DataError(
            f"{folder}: has no {split}*.parquet, in it or in data/; found {have or 'no parquet file'}; name the split "
            "that it has with --split, or download it again"
        )
    totals = {int(told[1]) for file in found if (told := re.search(r"-of-(\d+)$", file.stem))}
    by_folder = {file.parent for file in found}
    if len(by_folder) == 1 and totals and totals != {len(found)}:
        raise DataError(
            f"{found[0].parent}: has {len(found)} shards like {found[0].name}, whose name says {sorted(totals)}; "
            "download the missing ones"
        )
    return found


def _from_hub(source: Source) -> Part:
    from datasets import config, load_dataset

    match = HUB_NAME.fullmatch(source.name)
    if match is None:
        raise DataError(f"{source.name}: there is no such file or folder, and it is no name on the hub, org/name")
    try:
        found = load_dataset(match["name"], match["config"], split=source.split, revision=match["revision"])
    except Exception as error:  # of the network, the hub, its builder or its files
        raise DataError(
            f"{source.name}: no such file or folder here, and as a data set on the hub, split {source.split!r}, it "
            f"could not be loaded ({type(error).__name__}: {one_line(error)}); check name and split, or download it "
            "where there is a network and give its folder"
        ) from error
    if getattr(found, "_indices", None) is not None:
        found = found.flatten_indices()
    root, stamp = Path(config.HF_CACHE_HOME), str(found._fingerprint)
    return arrow_part(found.data, source.name, root, stamp, ArrowCells(found))


def tsv_rows(path: Path) -> Iterator[Row]:
    """The rows of VLMEvalKit's TSV, every cell a text.

    Raises:
        DataError: it is not readable, or has no header.
    """
    limit = csv.field_size_limit(MAX_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            if not reader.fieldnames:
                raise DataError(f"{path}: is empty; download it again")
            for values in reader:
                if None in values:
                    raise DataError(
                        f"{path}, line {reader.line_num}: has more cells than the header; download it again"
                    )
                yield Row(values, f"{path}, line {reader.line_num}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not readable as a TSV ({error}); download it again") from error
    finally:
        csv.field_size_limit(limit)


# JSON -----------------------------------------------------------------------------------------------------------------


def json_rows(path: Path) -> list[Row]:
    """The objects of a JSON list, of a JSON object of objects, or of JSON lines, whatever the file is called.

    Raises:
        DataError: it holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as UTF-8 ({error}); download it again") from error
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        rows = [
            _line(line, f"{path}, line {number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()
        ]
        if not rows:
            raise DataError(f"{path}: is empty; download it again") from None
        return rows
    if isinstance(whole, dict) and whole and all(isinstance(value, dict) for value in whole.values()):
        return [Row(value, f"{path}, {name!r}") for name, value in whole.items()]
    entries = whole if isinstance(whole, list) else [whole]
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{path}: expected objects, got {shown(whole)}; download it again")
    return [Row(entry, f"{path}, entry {number}") for number, entry in enumerate(entries)]


def _line(line: str, where: str) -> Row:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); expected one object per line") from error
    if not isinstance(found, dict):
        raise DataError(f"{where}: expected an object, got {shown(found)}")
    return Row(found, where)


# Pictures -------------------------------------------------------------------------------------------------------------


def picture_file(source: Source, name: str, where: str, *folders: str) -> ImageRef:
    """The picture of this name in `image_folder`, or beside the data, or in one of these sub-folders of either.

    Raises:
        DataError: it is in none of them; says where was looked.
    """
    beside = source.path if source.path.is_dir() else source.path.parent
    roots = [source.image_folder] if source.image_folder is not None else [beside]
    places = [root / folder for root in roots for folder in ("", *folders)]
    for place in places:
        if os.path.isfile(place / name):  # unlike Path's, False for a name that no file could have
            return confined(place, name, where)
    looked = ", ".join(str(place) for place in places)
    raise DataError(
        f"{where}: there is no picture {name!r} in {looked}; name the folder that has it with --image_folder"
    )
