"""Faults of data: the first one ends the reading, or all are kept, so that they are told together.

A row, an entry or a file with a fault is left out by who keeps going; nobody trains on the rest of such data.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import DataError


class Faults:
    """Where readers hand in what cannot be used; `keep`: go on without it."""

    def __init__(self, keep: bool = False) -> None:
        self.keep = keep
        self.found: list[str] = []
        """What was kept, each a line."""

    def add(self, error: DataError) -> None:
        """Raises the error, or keeps it."""
        if not self.keep:
            raise error
        if str(error) not in self.found:  # what both halves of the data read
            self.found.append(str(error))

    @contextmanager
    def here(self) -> Iterator[None]:
        """A DataError that is raised inside ends what is inside, and is handed in."""
        try:
            yield
        except DataError as error:
            self.add(error)

    def raise_first(self, data: object) -> None:
        """Raises DataError where there are any: the first, and how many more; `data` is what a user may check."""
        if not self.found:
            return
        more = len(self.found) - 1
        told = f" (and {more} more: python recipes/check_data.py --data {data} lists them)" if more else ""
        raise DataError(self.found[0] + told)


STRICT = Faults()
"""Keeps nothing: the first fault ends the reading."""
