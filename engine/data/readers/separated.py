"""Tables of text: CSV and TSV, all of whose values are texts.

An empty cell is None. A picture may stand in a cell as base64; MMBench, which shows a picture in several rows, writes
it once and elsewhere the `index` of that row.
"""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from typing import Any

from ...errors import DataError, shown
from ..cells import Part
from ..faults import Faults
from .named import is_encoded

SEPARATORS = {".csv": ",", ".tsv": "\t"}


def separated_part(path: Path, root: Path, stamp: str, faults: Faults) -> Part:
    """The rows of a CSV or TSV file with a line of column names.

    Raises:
        DataError: not UTF-8, no column names, or (as a fault) a row of another length.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as UTF-8 text ({error}); rewrite it in UTF-8") from error
    limit = csv.field_size_limit(sys.maxsize)  # a cell may hold a picture
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=SEPARATORS[path.suffix], strict=True)
        columns = [name.strip() for name in next(reader, [])]
        _check_columns(path, columns)
        rows: list[dict[str, Any]] = []
        numbers: list[int] = []
        broken: dict[int, DataError] = {}
        for cells in reader:
            if not any(cells):
                continue
            numbers.append(reader.line_num)
            if len(cells) == len(columns):
                rows.append({name: cell if cell != "" else None for name, cell in zip(columns, cells, strict=True)})
                continue
            broken[len(rows)] = DataError(
                f"{path}, line {reader.line_num}: expected {len(columns)} cells, got {len(cells)}; put texts with "
                "separators into quotes"
            )
            if not faults.keep:
                raise broken[len(rows)]
            rows.append({})
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: not readable as a table ({error}); quote its texts"
        ) from error
    finally:
        csv.field_size_limit(limit)
    _follow(rows)
    return Part(path.name, stamp, root, tuple(columns), rows, "line", numbers, untyped=True, broken=broken)


def _check_columns(path: Path, columns: list[str]) -> None:
    if not columns:
        raise DataError(f"{path}: has no rows; the first line names the columns")
    other = next((mark for mark in ";\t,|" if len(columns) == 1 and mark in columns[0]), None)
    if other is not None:
        expected = {",": "commas", "\t": "tabs"}[SEPARATORS[path.suffix]]
        remedy = "save it with those" + (
            ", or call it .tsv" if other == "\t" else ", or call it .csv" if other == "," else ""
        )
        raise DataError(f"{path}, line 1: expected columns separated by {expected}, got {shown(columns[0])}; {remedy}")
    if len(set(columns)) < len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise DataError(f"{path}, line 1: expected a name of its own for each column, got {twice!r} twice; rename one")


def _follow(rows: list[dict[str, Any]]) -> None:
    """Pictures in place of the `index` of the row that has them."""
    pictures = {row["index"]: row["image"] for row in rows if row.get("index") and is_encoded(row.get("image") or "")}
    for row in rows:
        if pictures and row.get("image") in pictures:
            row["image"] = pictures[row["image"]]
