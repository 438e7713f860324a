"""Tables of training data: files of rows (`SUFFIXES`), folders of these, saved `datasets`, and data sets on the hub.

    open_table("album/")                     train.jsonl, train-*.parquet, metadata.jsonl, … and pictures beside them
    open_table("rows.jsonl")                 paths of pictures are relative to the file's folder and stay within it
    open_table("org/name@revision:config")   through `datasets`; no code of the data set is ever run
    open_table("album/#dev")                 the split `dev`, whatever the caller would take otherwise

Opening reads the text of all rows and not one picture: a picture is a `Path`, or a `StoredImage` inside a data file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..errors import DataError, NoSplitError
from ..pictures import ImageRef
from ..settings.source_names import split_named
from .cells import ArrowCells, Part, arrow_part, parquet_part
from .faults import STRICT, Faults
from .forms.choices import list_in
from .forms.dialogue import pictures_in
from .readers.arrow_files import arrow_file_part
from .readers.named import named_picture
from .readers.separated import separated_part
from .readers.tar_shards import tar_part

PICTURE_COLUMNS = ("real_image", "image", "images", "image_path", "file_name", "references")
"""Columns of text that are paths of pictures, or lists of paths."""
LAY = ("image_path", "file_name")
"""Of those, where the picture of the row once lay, in data that have its bytes."""
CHATS = ("prompt", "problem", "question", "messages", "conversations")
"""Columns whose chats may hold pictures in their parts."""
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".tar")
"""Of files of rows."""
SHARDED = (".parquet", ".arrow", ".tar")
"""Of those that a split may be made of several of."""
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@:#]+))?(:(?P<config>[^@:#]+))?")


class Table:
    """Rows of a data source, by index."""

    def __init__(self, source: str, parts: Sequence[Part]) -> None:
        """Raises DataError when there is no row."""
        self.source, self._parts = source, tuple(parts)
        self.columns: tuple[str, ...] = tuple(dict.fromkeys(name for part in parts for name in part.columns))
        self._ends = list(accumulate(len(part.rows) for part in parts))
        self.untyped = any(part.untyped for part in parts)
        """Numbers are texts, as in CSV."""
        self.encoded: tuple[str, ...] = tuple(dict.fromkeys(name for part in parts for name in part.counts))
        """Columns of encoded pictures."""
        if not len(self):
            raise DataError(f"{source}: has no rows; add some")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.row(index) for index in range(len(self)))

    @property
    def broken(self) -> list[DataError]:
        """What is wrong with the rows that cannot be read."""
        return [part.broken[row] for part in self._parts for row in sorted(part.broken)]

    def where(self, index: int) -> str:
        """What errors call a row, e.g. `train.jsonl, line 12`."""
        part, row = self._locate(index)
        return part.where(row)

    def row(self, index: int) -> dict[str, Any]:
        """Column -> value, None where the row lacks it. Pictures are `ImageRef`s, and tuples of them in lists.

        Raises:
            DataError: the row cannot be read; a path of a picture is absolute, leads out of the folder, or names
                nothing.
            IndexError: there is no such row.
        """
        part, row = self._locate(index)
        if row in part.broken:
            raise part.broken[row]
        values = {**dict.fromkeys(self.columns), **part.rows[row]}
        for name in part.counts:
            values[name] = part.pictures(row, name)
        if "decoded_image" in part.counts:  # MathVista's picture; its `image` is where it once lay
            values["image"] = values.pop("decoded_image")
        lay = LAY if any(values[name] for name in part.counts if name in ("image", "images")) else ()
        for name in PICTURE_COLUMNS:
            if (
                name in values
                and name not in part.counts
                and name not in lay
                and (name != "image" or "decoded_image" not in part.counts)
            ):
                values[name] = _files(part.root, values[name], f"{part.where(row)}, column {name!r}")
        if not any(values.get(name) for name in PICTURE_COLUMNS):
            for name in CHATS:
                if shown := pictures_in(values.get(name)):
                    values["images"] = _files(part.root, shown, f"{part.where(row)}, column {name!r}")
        return values

    def _locate(self, index: int) -> tuple[Part, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.source}: row {index} of {len(self)}")
        which = bisect_right(self._ends, index)
        return self._parts[which], index - (self._ends[which - 1] if which else 0)


def _files(root: Path, value: Any, where: str) -> ImageRef | tuple[ImageRef, ...] | None:
    if value is None or value == "":
        return None
    if isinstance(value, str) and value[:1] == "[" and isinstance(written := list_in(value), list):
        value = written  # a table of texts has no other way to name several
    if isinstance(value, list | tuple):
        return tuple(named_picture(root, item, where) for item in value)
    return named_picture(root, value, where)


def open_table(
    source: str | Path, split: str = "train", *, image_folder: Path | None = None, faults: Faults = STRICT
) -> Table:
    """The rows of one split of a source; see above for what a source may be.

    Args:
        source: a file of rows (`SUFFIXES`), which is taken as it is, whatever `split` says; a folder with
            `<split>.jsonl`, `<split>/metadata.jsonl`, `metadata.jsonl` (all of it training data; also `.csv`, `.tsv`)
            or `<split>*.parquet` (also `.arrow`, `.tar`), the last also in `data/` or `<split>/`; a folder that
            `datasets` saved; or a hub name. `#split` behind it names the split.
        split: which part of a folder or data set, where the source does not say.
        image_folder: what paths of pictures are relative to and confined to; None: the folder of the data file.
        faults: where lines that cannot be read are told of.

    Raises:
        NoSplitError: the source is there and lacks the split.
        DataError: there is no such source, or it cannot be read; names the file, the line and the remedy.
    """
    base, told = split_named(source)
    name, path, split = str(source), Path(base).expanduser(), told or split
    if os.path.isfile(path):  # unlike Path's, False for a name that no file could have
        return Table(name, [_file(path, image_folder or path.parent, faults)])
    if os.path.isdir(path):
        if any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
            return Table(name, [_saved(path, split, image_folder or path)])
        return Table(name, [_file(file, image_folder or path, faults) for file in _of_split(path, split)])
    match = HUB_NAME.fullmatch(base)
    if match is None:
        raise DataError(
            f"{name}: there is no such file or folder; expected {', '.join(SUFFIXES)}, a folder of these, "
            f"or a data set's name on the hub, org/name"
        )
    return Table(name, [_from_hub(match, split, image_folder)])


# Files ----------------------------------------------------------------------------------------------------------------


def _file(path: Path, root: Path, faults: Faults) -> Part:
    if path.suffix == ".parquet":
        return parquet_part(path, root, _stamp(path))
    if path.suffix in (".jsonl", ".json"):
        return _json_part(path, root, faults)
    if path.suffix in (".csv", ".tsv"):
        return separated_part(path, root, _stamp(path), faults)
    if path.suffix in (".arrow", ".feather"):
        return arrow_file_part(path, root, _stamp(path))
    if path.suffix == ".tar":
        return tar_part(path, root, _stamp(path), faults)
    raise DataError(f"{path}: the suffix {path.suffix!r} is not understood; expected one of {', '.join(SUFFIXES)}")


def _stamp(path: Path) -> str:
    """Changes when the file does."""
    about = path.stat()
    return hashlib.blake2b(
        f"{path.resolve()}\0{about.st_size}\0{about.st_mtime_ns}".encode(), digest_size=8
    ).hexdigest()


def _of_split(folder: Path, split: str) -> list[Path]:
    """The data files of a split of a folder, in order of their names."""
    texts = [suffix for suffix in SUFFIXES if suffix not in SHARDED]
    named = [f"{split}{suffix}" for suffix in texts] + [f"{split}/metadata{suffix}" for suffix in texts]
    for name in (*named, *([f"metadata{suffix}" for suffix in texts] if split == "train" else ())):
        if (folder / name).is_file():
            return [folder / name]
    told: list[Path] = []
    mine: list[Path] = []
    for suffix in SHARDED:
        shards = [file for place in (folder, folder / "data") for file in sorted(place.glob(f"*{suffix}"))]
        told += (named_so := [file for file in shards if _split_of(file) is not None])
        mine = [file for file in named_so if _split_of(file) == split] or sorted((folder / split).glob(f"*{suffix}"))
        mine = mine or (shards if not named_so and split == "train" else [])
        if mine:
            break
    if not mine:
        written = {file.stem for suffix in texts for file in folder.glob(f"*{suffix}")}
        have = sorted(written | {str(_split_of(file)) for file in told})
        raise NoSplitError(
            f"{folder}: has nothing for the split {split!r}; found {have or 'no data file'}; {_instead(folder, split)}"
        )
    _check_complete(mine)
    return mine


def _instead(folder: Path, split: str) -> str:
    """What may be meant by a folder without a table."""
    here = folder.resolve()
    concepts = (parent / "concept" for parent in here.parents)
    above = next((c.parent for c in concepts if here.is_relative_to(c) and (c / "train").is_dir()), None)
    if above is not None:
        return f"did you mean the UnifyBench++ folder {above}?"
    return (
        f"add {split}.jsonl or {split}.parquet, or lay photos of concepts out as concept/train/<name>/0.png, … "
        "(docs/data.md has an example of each)"
    )


def _split_of(file: Path) -> str | None:
    """`train` for train.parquet and train-00000-of-00012.parquet; None for a name that tells of no split."""
    word = re.split(r"[-_.]", file.stem)[0]
    return word if word in SPLITS else None


def _check_complete(shards: Sequence[Path]) -> None:
    """Half a download is refused rather than trained on."""
    totals = {int(found[1]) for file in shards if (found := re.search(r"-of-(\d+)$", file.stem))}
    if totals and totals != {len(shards)}:
        raise DataError(
            f"{shards[0].parent}: has {len(shards)} shards like {shards[0].name}, whose name says "
            f"{sorted(totals)}; download the missing ones or remove what is left over"
        )


def _json_part(path: Path, root: Path, faults: Faults) -> Part:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as UTF-8 text ({error}); rewrite it in UTF-8") from error
    found: list[tuple[int, Any]] = []
    broken: dict[int, DataError] = {}
    if path.suffix == ".json" and text.lstrip()[:1] == "[":
        unit = "entry"
        found += enumerate(_parsed(text, str(path)))
    else:  # a .json of one object per line is what some tools write
        unit = "line"
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    found.append((number, _parsed(line, f"{path}, line {number}")))
                except DataError as error:
                    broken[number] = error
                    found.append((number, {}))
    for number, row in found:
        if not isinstance(row, dict):
            got = type(row).__name__
            broken[number] = DataError(f"{path}, {unit} {number}: expected an object of columns, got {got}")
    if broken and not faults.keep:
        raise broken[min(broken)]
    rows = [{} if number in broken else row for number, row in found]
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    at = {index: broken[number] for index, (number, _) in enumerate(found) if number in broken}
    return Part(path.name, _stamp(path), root, columns, rows, unit, [number for number, _ in found], broken=at)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        got = f"what is not readable as JSON ({error})"
        raise DataError(f"{where}: expected a JSON object, got {got}; correct it, one object per line") from error


# Through `datasets` ---------------------------------------------------------------------------------------------------


def _saved(folder: Path, split: str, root: Path) -> Part:
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(folder))
    except Exception as error:  # pyarrow's, json's and its own, by what is broken
        raise DataError(f"{folder}: not readable as a saved data set ({error}); save it again") from error
    splits = found if isinstance(found, DatasetDict) else {str(found.split or split): found}
    if split not in splits:
        raise NoSplitError(f"{folder}: has no split {split!r}; it has {sorted(map(str, splits))}")
    return _arrow(splits[split], folder.name, root)


def _from_hub(match: re.Match[str], split: str, image_folder: Path | None) -> Part:
    from datasets import config, load_dataset

    try:
        found = load_dataset(match["name"], match["config"], split=split, revision=match["revision"])
    except Exception as error:  # of the network, the hub, its builder or its files
        if isinstance(error, ValueError) and "nknown split" in str(error):
            raise NoSplitError(f"{match[0]}: has no split {split!r} ({error})") from error
        raise DataError(
            f"{match[0]}: no such file or folder here, and as a data set on the hub, split {split!r}, it could not be "
            f"loaded ({type(error).__name__}: {error}); check the name, or download it where there is a network and "
            f"give its folder"
        ) from error
    return _arrow(found, match[0], image_folder or Path(config.HF_CACHE_HOME))


def _arrow(dataset: Any, label: str, root: Path) -> Part:
    if getattr(dataset, "_indices", None) is not None:  # a selection: its rows lie elsewhere in the data
        dataset = dataset.flatten_indices()
    return arrow_part(dataset.data, label, root, str(dataset._fingerprint), ArrowCells(dataset))
