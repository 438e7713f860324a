"""One rank of a test: calls a function of a file with the rank's number and a folder for what it has to tell.

rank_of.py FILE FUNCTION FOLDER
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

from syncr1.engine.errors import EXIT_BAD_INPUT, Refused, RunEnded
from syncr1.engine.processes import watchdog

Act = Callable[[int, Path], None]
"""What a rank does, in a process of its own."""
GRACE = 0.5
"""Seconds: ranks of tests are in haste to end."""


def main(file: str, function: str, folder: str) -> int:
    watchdog.GRACE = GRACE
    act: Act = runpy.run_path(file)[function]
    try:
        act(int(os.environ["RANK"]), Path(folder))
    except RunEnded as ended:
        print(ended, file=sys.stderr)
        return ended.code
    except Refused as refused:
        print(refused, file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
