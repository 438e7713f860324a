"""What a step of `bench/gpu.py` has found so far, on disk at every moment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Skipped(Exception):
    """There is nothing to do here; the message says why."""


class Report:
    """What a step has found so far, on disk at every moment.

    Args:
        path: the file; None: nowhere.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.found = path, {}  # type: Path | None, dict[str, Any]

    def write(self, **found: Any) -> None:
        """Adds to what is known, and replaces the file."""
        self.found |= found
        if self.path is not None:
            fresh = self.path.with_suffix(".new")
            fresh.write_text(json.dumps(self.found, default=str))
            os.replace(fresh, self.path)

    def line(self, **fields: Any) -> None:
        """One more result of a check: at least `name`, `ok` and `detail`."""
        self.write(lines=[*self.found.get("lines", []), fields])
