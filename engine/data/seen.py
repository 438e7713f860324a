"""What a pass over data has found to be good, kept for the next one: what has not changed is not looked at again.

One file a source, in the cache folder; a line for each thing, the digest of what it was when it was looked at. Lines
are written as things are found, so that a pass that was interrupted goes on where it was. What is bad is never kept: it
is looked at, and told, every time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ..whole_files import cache_dir, write_atomically

FOLDER = "first_pass-1"
"""Below the cache folder; the number goes up when what counts as good changes."""
SPARE = 4096
"""Lines that may be there beside those that were asked for, before the file is written anew without them."""


class Seen:
    """The good things of one source.

    Args:
        source: its name; files are told apart by where they lie.
    """

    def __init__(self, source: object) -> None:
        self._path = cache_dir() / FOLDER / f"{digest(str(Path(str(source)).absolute()))}.txt"
        self._known: set[str] = set()
        self._asked: set[str] = set()
        with suppress(OSError):  # none yet, or none that can be read: all is looked at
            self._known.update(self._path.read_text(encoding="ascii", errors="replace").split("\n"))

    def __contains__(self, key: str) -> bool:
        self._asked.add(key)
        return key in self._known

    def add(self, keys: Iterable[str]) -> None:
        """These are good; where nothing can be written they are looked at again the next time."""
        new = [key for key in keys if key and key not in self._known]
        self._known.update(new)
        self._asked.update(new)
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="ascii") as file:  # a line that a kill cuts off is nobody's digest
                file.write("".join(f"\n{key}" for key in new))

    def tidy(self) -> None:
        """After a whole pass: forgets what was not asked for, once that is much."""
        if len(self._known) > 2 * len(self._asked) + SPARE:
            with suppress(OSError):
                write_atomically(self._path, "\n".join(sorted(self._known & self._asked)))


def digest(*parts: object) -> str:
    """Of what is said of a thing, in 32 letters."""
    told = repr(parts).encode("utf-8", "backslashreplace")
    return hashlib.blake2b(told, digest_size=16).hexdigest()
