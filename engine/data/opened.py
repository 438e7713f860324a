"""Every picture of the data opened once, before anything is trained: a broken one is found in seconds, not at step 400.

Up to `MOST_DECODED` pictures are decoded whole, so that one which was cut off is found; of further files the header is
read.  Pictures inside data files are read in the order in which they lie there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby

from ..errors import DataError, PictureError
from ..pictures import ImageRef, check_picture
from ..records import Prompt
from .cells import StoredCell

MOST_DECODED = 4096
"""A JPEG of a megapixel takes about 5 ms of a core; the pool below Pillow lets go of Python's lock."""
MOST_NAMED = 5
EVERY = 4.0
"""Seconds between two words of progress."""

Say = Callable[[str], None]


def pictures_of(prompts: Iterable[Prompt]) -> list[ImageRef]:
    """Every picture that prompts show or are compared with, each once."""
    return list(dict.fromkeys(ref for prompt in prompts for ref in shown_by(prompt)))


def shown_by(prompt: Prompt) -> list[ImageRef]:
    """The pictures that a prompt shows or is compared with."""
    return [ref for ref in (*prompt.images, prompt.real_image, *prompt.references) if ref is not None]


def broken_pictures(refs: Sequence[ImageRef], say: Say = lambda line: None) -> dict[ImageRef, str]:
    """Each picture that cannot be read, and what is wrong with it; progress is said where it takes long."""
    cells = sorted(
        (ref for ref in refs if isinstance(ref, StoredCell)), key=lambda cell: (id(cell.cells), cell.column, cell.row)
    )[:MOST_DECODED]
    files = [ref for ref in refs if not isinstance(ref, StoredCell)]
    decoded = files[:MOST_DECODED]
    headers = files[len(decoded) :]
    broken: dict[ImageRef, str] = {}
    began = said = time.monotonic()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="pictures") as pool:
        whole = pool.map(_problem, decoded)
        rest = pool.map(lambda ref: _problem(ref, whole=False), headers)
        problems = zip([*files, *cells], chain(whole, rest, _of_cells(cells)), strict=True)
        for number, (ref, problem) in enumerate(problems, start=1):
            if problem:
                broken[ref] = problem
            if time.monotonic() > said + EVERY:
                said = time.monotonic()
                say(f"opened {number} of {len(refs)} pictures")
    if said > began:
        say(f"opened {len(refs)} pictures in {time.monotonic() - began:.0f} s")
    return broken


def pictures_error(broken: Sequence[str], num_pictures: int, remedy: str = "") -> PictureError:
    """One line that counts and names the pictures that cannot be read, and what else may be done about them."""
    more = f"; and {len(broken) - MOST_NAMED} more" if len(broken) > MOST_NAMED else ""
    return PictureError(
        f"{len(broken)} of {num_pictures} pictures of the data cannot be read: {'; '.join(broken[:MOST_NAMED])}{more}; "
        f"replace them or drop what names them (recipes/check_data.py lists all){remedy and '; '}{remedy}"
    )


def _problem(ref: ImageRef, *, whole: bool = True) -> str:
    try:
        check_picture(ref, whole=whole)
    except PictureError as error:
        return _short(error)
    return ""


def _of_cells(cells: Sequence[StoredCell]) -> Iterator[str]:
    """The same of pictures inside data files, which come by column and row."""
    for _, column in groupby(cells, key=lambda cell: (id(cell.cells), cell.column)):
        wanted = list(column)
        values = enumerate(wanted[0].cells.values(wanted[0].column))
        row, value = next(values)
        for cell in wanted:
            while row < cell.row:
                row, value = next(values)
            try:
                check_picture(cell, contents=cell.contents(value))
            except (PictureError, DataError) as error:
                yield _short(error)
            else:
                yield ""


def _short(error: Exception) -> str:
    """Without the list of formats, which would be said once for each picture."""
    return str(error).partition("; expected one of")[0]
