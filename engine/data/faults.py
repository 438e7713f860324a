"""Faults of data: the first one ends the reading, or all are kept, so that they are told together.

A row, an entry or a file with a fault is left out by who keeps going. Of a row's faults it is known which row's they
are, so that a run may leave out those rows and train on the rest (`--bad_rows skip`); a file or a folder with a fault
ends every run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from ..errors import DataError


class Faults:
    """Where readers hand in what cannot be used.

    Args:
        keep: go on without it.
        without: places of rows that are left out whatever they hold, and of whose faults nothing is said.
    """

    def __init__(self, keep: bool = False, without: Collection[str] = ()) -> None:
        self.keep = keep
        self.without = frozenset(without)
        self.found: list[str] = []
        """What was kept, each a line."""
        self.rows: dict[str, str] = {}
        """Place of a row -> its first fault."""

    def add(self, error: DataError, row: str = "") -> None:
        """Raises the error, or keeps it; `row`: the place of the row that it is of, where it is of one."""
        if not self.keep:
            raise error
        if row in self.without:
            return
        if str(error) not in self.found:  # what both halves of the data read
            self.found.append(str(error))
        if row:
            self.rows.setdefault(row, str(error))

    @contextmanager
    def here(self, row: str = "") -> Iterator[None]:
        """A DataError that is raised inside ends what is inside, and is handed in."""
        try:
            yield
        except DataError as error:
            self.add(error, row)

    def of_no_row(self) -> list[str]:
        """Those that no row can be left out for."""
        of_rows = {*self.rows.values()}
        return [line for line in self.found if line not in of_rows]

    def raise_first(self, data: object, remedy: str = "") -> None:
        """Raises DataError where there are any: the first, and how many more.

        Args:
            data: what a user may check.
            remedy: what else may be done where all are faults of rows.
        """
        if not self.found:
            return
        first = [*self.of_no_row(), *self.found]
        more = len(self.found) - 1
        told = f" (and {more} more: python recipes/check_data.py --data {data} lists them)" if more else ""
        raise DataError(first[0] + (f"; {remedy}" if remedy and not self.of_no_row() else "") + told)


STRICT = Faults()
"""Keeps nothing: the first fault ends the reading."""
