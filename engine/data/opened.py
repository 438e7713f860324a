"""Every picture of the data opened and decoded once, before anything is trained: a broken one is found at the start,
not at step 400.

What was good and has not changed since is not opened again (seen.py). Pictures inside data files are read in the order
in which they lie there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from PIL import __version__ as pillow

from ..errors import DataError, PictureError
from ..pictures import ImageRef, version_of
from ..records import Prompt
from .cells import StoredCell
from .decode_worker import problem_of
from .decoders import Task, decode_all
from .seen import Seen, digest

MOST_NAMED = 5

Moved = Callable[[int], None]
"""Told how many pictures are done."""


def pictures_of(prompts: Iterable[Prompt]) -> list[ImageRef]:
    """Every picture that prompts show or are compared with, each once."""
    return list(dict.fromkeys(ref for prompt in prompts for ref in shown_by(prompt)))


def shown_by(prompt: Prompt) -> list[ImageRef]:
    """The pictures that a prompt shows or is compared with."""
    return [ref for ref in (*prompt.images, prompt.real_image, *prompt.references) if ref is not None]


def broken_pictures(
    refs: Sequence[ImageRef], moved: Moved = lambda done: None, seen: Seen | None = None
) -> dict[ImageRef, str]:
    """Each picture that cannot be read, and what is wrong with it.

    Args:
        refs: all of them, each once.
        moved: told of progress.
        seen: those that were good before; it is told of others. None: all are opened.
    """
    keys = {ref: _key(ref) for ref in refs}
    pending = [ref for ref in refs if seen is None or keys[ref] not in seen]
    broken: dict[ImageRef, str] = {}
    num_done = len(refs) - len(pending)

    def found(tasks: Sequence[Task], problems: Sequence[str]) -> None:
        nonlocal num_done
        broken.update({task.ref: problem for task, problem in zip(tasks, problems, strict=True) if problem})
        if seen is not None:
            seen.add(keys[task.ref] for task in tasks if task.ref not in broken)
        num_done += len(tasks)
        moved(num_done)

    if pending:
        decode_all(_tasks(pending), len(pending), found)
    return {ref: broken[ref] for ref in pending if ref in broken}


def pictures_error(broken: Sequence[str], num_pictures: int, remedy: str = "") -> PictureError:
    """One line that counts and names the pictures that cannot be read, and what else may be done about them."""
    more = f"; and {len(broken) - MOST_NAMED} more" if len(broken) > MOST_NAMED else ""
    return PictureError(
        f"{len(broken)} of {num_pictures} pictures of the data cannot be read: {'; '.join(broken[:MOST_NAMED])}{more}; "
        f"replace them or drop what names them (recipes/check_data.py lists all){remedy and '; '}{remedy}"
    )


def _key(ref: ImageRef) -> str:
    """Of a picture as it is now: a file by its size and times, a cell by its file's; "" for one in memory."""
    if isinstance(ref, Path):
        version = version_of(ref)
        return digest(pillow, str(ref), version) if version else ""
    return digest(pillow, ref.name, ref.stamp, ref.row, ref.position) if isinstance(ref, StoredCell) else ""


def _tasks(refs: Sequence[ImageRef]) -> Iterator[Task]:
    """Files and pictures in memory first, then those of data files, column by column and row by row."""
    cells: list[StoredCell] = []
    for ref in refs:
        if isinstance(ref, StoredCell):
            cells.append(ref)
        elif isinstance(ref, Path):
            yield Task(ref)
        else:
            yield _in_memory(ref)
    cells.sort(key=lambda cell: (id(cell.cells), cell.column, cell.row))
    for _, column in groupby(cells, key=lambda cell: (id(cell.cells), cell.column)):
        wanted = list(column)
        values = enumerate(wanted[0].cells.values(wanted[0].column))
        row, value = next(values)
        for cell in wanted:
            while row < cell.row:
                row, value = next(values)
            try:
                task = Task(cell, cell.contents(value))
            except (PictureError, DataError) as error:
                task = Task(cell, problem=str(error))
            yield task


def _in_memory(ref: ImageRef) -> Task:
    """Its bytes; one that is drawn, or whose bytes cannot be had, is looked at here."""
    try:
        contents = ref.read() if not isinstance(ref, Path) else b""
    except Exception:  # of whatever it is kept in; said in the words of a picture that cannot be opened
        return Task(ref, problem=problem_of(ref))
    return Task(ref, contents if isinstance(contents, bytes) else None)
