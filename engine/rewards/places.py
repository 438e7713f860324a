"""Where in a user's file something went wrong: `my_rewards.py:12 in judge`."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path
from typing import Any

from ..errors import IsolatedError

_LIBRARIES = [sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib")]
_NOT_YOURS = tuple(
    str(Path(folder).resolve()) + os.sep for folder in (str(Path(__file__).parents[1]), *filter(None, _LIBRARIES))
)
"""This package, Python's own library and what is installed: a fault is looked for in what calls them."""


def raised_at(error: BaseException) -> str:
    """`file:line in function` of the innermost line of a user's own; "" where none took part."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_yours(frame.filename):
            return f"{shown_path(frame.filename)}:{frame.lineno} in {frame.name}"
    return ""


def told(error: BaseException) -> str:
    """`ZeroDivisionError: division by zero, at my_rewards.py:12 in judge`, in one line."""
    said = str(error) if isinstance(error, IsolatedError) else f"{type(error).__name__}: {error}"
    said = " ".join(said.split())
    place = raised_at(error)
    return f"{said}, at {place}" if place else said


def defined_at(function: Any) -> str:
    """`file:line` where a reward function stands; "" where nothing tells. An adapter and an isolated reward say it in
    `defined`."""
    known = getattr(function, "defined", None)
    if isinstance(known, str):
        return known
    method = vars(type(function)).get("__call__")  # of an object; a function has its code itself
    code = getattr(function, "__code__", None) or getattr(method, "__code__", None)
    return "" if code is None else f"{shown_path(code.co_filename)}:{code.co_firstlineno}"


def is_yours(filename: str) -> bool:
    return not str(Path(filename).resolve()).startswith(_NOT_YOURS) and not filename.startswith("<")


def shown_path(filename: str) -> str:
    """Relative to the working directory where it lies below."""
    path, here = Path(filename), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
