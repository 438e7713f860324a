"""Pictures inside arrow data, found without reading them and read one at a time.

A picture column holds encoded files: Hugging Face's `{bytes, path}`, plain binary, or lists of either. Which rows have
one, and how many, is told by the `path` leaves, validity bits and statistics; the bytes stay on disk until somebody
opens the picture. `datasets` would first write a second copy of the data.

What a picture costs: in a folder that `datasets` saved, its own bytes. In parquet, the page that it is in, which
pyarrow makes of up to 1024 rows of a row group whatever they weigh: 0.1 s and 50 MB for half-megabyte pictures in row
groups of 100, as `datasets` writes them, but seconds and gigabytes where somebody wrote them as a single group; such
files are better rewritten with row_group_size=100.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DataError, PictureError, one_line
from ..pictures import ImageRef, StoredImage
from .readers.named import confined

BATCH = 4
"""Rows of a picture column that become arrow arrays at once while one of them is looked for in its row group."""


class Cells(Protocol):
    """Where the pictures of some rows are."""

    def value(self, row: int, column: str) -> Any:
        """The cell as stored, read now: bytes, `{bytes, path}`, a list of these, or None."""

    def values(self, column: str) -> Iterator[Any]:
        """The cells of all rows, in order; far quicker than one by one."""


@dataclass(frozen=True)
class StoredCell(StoredImage):
    """One picture of a data file. Equal when it is the same cell of the same data."""

    name: str
    stamp: str = field(repr=False)
    """Tells apart data that share their name."""
    row: int = field(compare=False, repr=False)
    column: str = field(compare=False, repr=False)
    position: int | None = field(compare=False, repr=False)
    """Index in a list of pictures."""
    cells: Cells = field(compare=False, repr=False)
    root: Path = field(compare=False, repr=False)

    def read(self) -> bytes:
        return self.contents(self.cells.value(self.row, self.column))

    def contents(self, value: Any) -> bytes:
        """The picture's bytes, of its cell as stored."""
        if self.position is not None:
            value = value[self.position]
        stored = value if isinstance(value, dict) else {"bytes": value}
        contents, path = stored.get("bytes"), stored.get("path")
        if isinstance(contents, bytes):
            return contents
        if not path:
            raise PictureError(f"{self.name}: holds neither bytes nor a path; write the picture's bytes into the data")
        return confined(self.root, path, self.name).read_bytes()


@dataclass(frozen=True)
class Part:
    """Rows that come from one file or dataset."""

    label: str
    """What errors call it."""
    stamp: str
    root: Path
    """Folder that paths of pictures are relative to and confined to."""
    columns: tuple[str, ...]
    rows: Sequence[Mapping[str, Any]]
    """Everything but encoded pictures."""
    unit: str = "row"
    numbers: Sequence[int] | None = None
    """What errors call the rows; None: 0, 1, …"""
    counts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Of each column of encoded pictures: how many each row has."""
    lists: frozenset[str] = frozenset()
    """Those of them that hold lists."""
    cells: Cells | None = None
    paths: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Of columns whose cells may hold a path in place of bytes: for each row None, a path, or a list of these."""
    untyped: bool = False
    """All values are texts, as in CSV."""
    broken: Mapping[int, DataError] = field(default_factory=dict)
    """Rows that cannot be read; they are {} among `rows`, so that the others are called as if they could be."""

    def where(self, row: int) -> str:
        return f"{self.label}, {self.unit} {row if self.numbers is None else self.numbers[row]}"

    def pictures(self, row: int, column: str) -> ImageRef | tuple[ImageRef, ...] | None:
        """The encoded pictures of a cell, none of whose bytes are read; a path in place of bytes is a file's.

        Raises:
            DataError: such a path leads out of the folder, or names nothing.
        """
        held = self.paths[column][row] if column in self.paths else None
        if column not in self.lists:
            return self._picture(row, column, None, held) if self.counts[column][row] else None
        paths = held or [None] * self.counts[column][row]
        return tuple(self._picture(row, column, i, path) for i, path in enumerate(paths))

    def _picture(self, row: int, column: str, position: int | None, path: str | None) -> ImageRef:
        assert self.cells is not None
        if path is not None:
            return confined(self.root, path, f"{self.where(row)}, column {column!r}")
        name = f"{self.where(row)}, {column}" + ("" if position is None else f"[{position}]")
        return StoredCell(name, self.stamp, row, column, position, self.cells, self.root)


# Schemas --------------------------------------------------------------------------------------------------------------


def picture_columns(schema: pa.Schema) -> dict[str, bool]:
    """Columns that hold encoded pictures; True for lists of them."""
    found = {}
    for item in schema:
        many = _is_list(item.type)
        if _is_picture(item.type.value_type if many else item.type):
            found[item.name] = many
    return found


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_picture(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(child.name == "bytes" and _is_bytes(child.type) for child in kind.fields)
    return _is_bytes(kind)


def _has_path(kind: pa.DataType) -> bool:
    kind = getattr(kind, "value_type", kind)
    return pa.types.is_struct(kind) and any(child.name == "path" for child in kind.fields)


def _count(value: Any, many: bool) -> int:
    """Pictures in a cell, whose bytes may have been left out."""
    return 0 if value is None else len(value) if many else 1


# Parquet --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParquetCells:
    """One parquet file. Keeps its footer and no open file, so it can be pickled, forked and used by several threads."""

    path: Path
    metadata: pq.FileMetaData

    def batches(self, group: int, column: str) -> Iterator[pa.Array]:
        """A column of a row group, `BATCH` rows at a time."""
        with pq.ParquetFile(self.path, metadata=self.metadata, pre_buffer=False) as file:
            for batch in file.iter_batches(BATCH, row_groups=[group], columns=[column], use_threads=False):
                yield batch.column(0)

    def value(self, row: int, column: str) -> Any:
        group = 0
        while row >= self.metadata.row_group(group).num_rows:
            row -= self.metadata.row_group(group).num_rows
            group += 1
        for batch in self.batches(group, column):
            if row < len(batch):
                return batch[row].as_py()
            row -= len(batch)
        raise PictureError(f"{self.path}: has fewer rows than when it was opened; leave data files as they are")

    def values(self, column: str) -> Iterator[Any]:
        for group in range(self.metadata.num_row_groups):
            for batch in self.batches(group, column):
                yield from (item.as_py() for item in batch)

    def counts(self, column: str, many: bool) -> list[int]:
        """Pictures per row where no `path` tells: by the statistics of a row group, else by going through its bytes."""
        counts = []
        for index in range(self.metadata.num_row_groups):
            group = self.metadata.row_group(index)
            parts = [group.column(i) for i in range(group.num_columns)]
            leaf = next(part for part in parts if _within(part.path_in_schema, column))
            nulls = leaf.statistics.null_count if leaf.statistics is not None and not many else None
            if nulls in (0, group.num_rows):
                counts += [int(nulls == 0)] * group.num_rows
            else:
                counts += [_count(value, many) for batch in self.batches(index, column) for value in batch.to_pylist()]
        return counts


def parquet_part(path: Path, root: Path, stamp: str) -> Part:
    """The rows of a parquet file. Of picture columns, only the paths inside them are read.

    Raises:
        DataError: the file is not readable as parquet.
    """
    try:
        with pq.ParquetFile(path) as file:
            schema, cells = file.schema_arrow, ParquetCells(path, file.metadata)
            leaves = [file.schema.column(i).path for i in range(len(file.schema))]
            pictures = picture_columns(schema)
            with_path = {name for name in pictures if _has_path(schema.field(name).type)}
            wanted = [leaf for leaf in leaves if _wanted(leaf, pictures, with_path)]
            read = file.read(columns=wanted, use_threads=False).to_pylist()
        counts = {
            name: [_count(row[name], many) for row in read] if name in with_path else cells.counts(name, many)
            for name, many in pictures.items()
        }
        paths = {
            name: found
            for name in with_path
            if (found := _paths_of(cells, name, [row[name] for row in read], counts[name], pictures[name]))
        }
    except (pa.ArrowException, OSError, ValueError) as error:
        got = f"what is not readable as parquet ({one_line(error)})"
        raise DataError(f"{path}: expected a parquet file, got {got}; write it again") from error
    rows = [{name: value for name, value in row.items() if name not in pictures} for row in read]
    rows = [{name: value for name, value in row.items() if name not in pictures} for row in read]
    lists = frozenset(name for name, many in pictures.items() if many)
    names = tuple(schema.names)
    return Part(path.name, stamp, root, names, rows, counts=counts, lists=lists, cells=cells, paths=paths)


def _paths_of(
    cells: ParquetCells, column: str, read: Sequence[Any], counts: Sequence[int], many: bool
) -> list[Any] | None:
    """See `Part.paths`; None where all pictures have bytes.

    Statistics tell it of a row group whose pictures all have bytes, or none; others are gone through.
    """
    found: list[Any] = []
    for index in range(cells.metadata.num_row_groups):
        group = cells.metadata.row_group(index)
        rows = slice(len(found), len(found) + group.num_rows)
        leaves = [group.column(i) for i in range(group.num_columns)]
        leaf = next(part for part in leaves if part.path_in_schema == _bytes_leaf(part.path_in_schema, column))
        empty = counts[rows].count(0)
        nulls = leaf.statistics.null_count if leaf.statistics is not None else empty
        if nulls == empty:
            found += [None] * group.num_rows
        elif nulls == leaf.num_values:
            found += [_path_in(value, many) for value in read[rows]]
        else:
            found += [_path_in(v, many) for batch in cells.batches(index, column) for v in batch.to_pylist()]
    return found if any(item is not None for item in found) else None


def _bytes_leaf(path: str, column: str) -> str | None:
    """`path` where it is that of the bytes in a column."""
    return path if _within(path, column) and path.endswith(".bytes") else None


def _path_in(value: Any, many: bool) -> Any:
    """What stands for the bytes of a cell: None, a path, or a list of these."""
    if many:
        return None if not value else [_path_in(item, False) for item in value]
    if not isinstance(value, Mapping) or value.get("bytes") is not None:
        return None
    return value.get("path") or None


def _within(leaf: str, column: str) -> bool:
    return leaf == column or leaf.startswith(f"{column}.")


def _wanted(leaf: str, pictures: Mapping[str, bool], with_path: set[str]) -> bool:
    """Whether a leaf of the schema is read when the table is opened: all but pictures, of which only the paths."""
    owner = next((name for name in pictures if _within(leaf, name)), None)
    return owner is None or (owner in with_path and leaf.endswith(".path"))


# Arrow ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArrowCells:
    """A `datasets.Dataset`: memory-mapped arrow, so any row is at hand."""

    dataset: Any

    def value(self, row: int, column: str) -> Any:
        return self.dataset.data.column(column)[row].as_py()

    def values(self, column: str) -> Iterator[Any]:
        for chunk in self.dataset.data.column(column).chunks:
            yield from (item.as_py() for item in chunk)


def arrow_part(data: Any, label: str, root: Path, stamp: str, cells: Cells) -> Part:
    """The rows of an arrow table, or of a `datasets.Dataset`'s. Pictures are neither decoded nor read."""
    pictures = picture_columns(data.schema)
    texts = [name for name in data.schema.names if name not in pictures]
    rows = data.select(texts).to_pylist() if texts else [{} for _ in range(data.num_rows)]
    counts = {
        name: [count for chunk in data.column(name).chunks for count in _counts(chunk, many)]
        for name, many in pictures.items()
    }
    paths = {
        name: found
        for name, many in pictures.items()
        if _has_path(data.schema.field(name).type)
        and any(found := [path for chunk in data.column(name).chunks for path in _paths(chunk, many)])
    }
    lists = frozenset(name for name, many in pictures.items() if many)
    names = tuple(data.schema.names)
    return Part(label, stamp, root, names, rows, counts=counts, lists=lists, cells=cells, paths=paths)


def _paths(chunk: pa.Array, many: bool) -> list[Any]:
    """See `Part.paths`, of the rows of a chunk: what stands for bytes that are null."""
    if many:
        lengths = [length or 0 for length in chunk.value_lengths().to_pylist()]
        inner = _paths(chunk.flatten(), False)
        ends = list(accumulate(lengths))
        lists = [inner[end - length : end] for length, end in zip(lengths, ends, strict=True)]
        return [found if any(found) else None for found in lists]
    held, paths = chunk.field("bytes").is_valid().to_pylist(), chunk.field("path")
    if all(held):
        return [None] * len(chunk)
    whole = zip(chunk.is_valid().to_pylist(), held, paths.to_pylist(), strict=True)
    return [path or None if valid and not has else None for valid, has, path in whole]


def _counts(chunk: pa.Array, many: bool) -> list[int]:
    """Pictures per row, by offsets and validity bits alone."""
    if many:
        return [length or 0 for length in chunk.value_lengths().to_pylist()]
    valid = chunk.is_valid().to_pylist()
    if pa.types.is_struct(chunk.type):
        parts = [chunk.field(i).is_valid().to_pylist() for i in range(chunk.type.num_fields)]
        return [int(whole and any(rest)) for whole, *rest in zip(valid, *parts, strict=True)]
    return [int(item) for item in valid]
