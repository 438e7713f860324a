"""Arrow files (`.arrow`, `.feather`), in the stream's form as `datasets` writes them or in the file's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...errors import DataError, PictureError, one_line
from ..cells import Part, arrow_part

FILE_MAGIC = b"ARROW1"


@dataclass(frozen=True)
class MappedArrow:
    """The table of one file, mapped into memory when it is asked for; keeps no open file, so it can be pickled."""

    path: Path

    @contextmanager
    def table(self) -> Iterator[pa.Table]:
        with pa.memory_map(str(self.path)) as source:
            magic = source.read(len(FILE_MAGIC))
            source.seek(0)
            opener = pa.ipc.open_file if magic == FILE_MAGIC else pa.ipc.open_stream
            with opener(source) as reader:
                yield reader.read_all()

    def value(self, row: int, column: str) -> Any:
        with self.table() as table:
            if row >= len(table):
                raise PictureError(f"{self.path}: has fewer rows than when it was opened; leave data files as they are")
            return table.column(column)[row].as_py()

    def values(self, column: str) -> Iterator[Any]:
        with self.table() as table:
            for chunk in table.column(column).chunks:
                yield from (item.as_py() for item in chunk)


def arrow_file_part(path: Path, root: Path, stamp: str) -> Part:
    """The rows of an arrow file; pictures are not read. Raises DataError where it is not readable as arrow."""
    mapped = MappedArrow(path)
    try:
        with mapped.table() as table:
            return arrow_part(table, path.name, root, stamp, mapped)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        got = f"what is not readable as arrow ({one_line(error)})"
        raise DataError(f"{path}: expected an arrow file, got {got}; write it again") from error
