"""Where data are said to be, looked at before torch is loaded: there, of a known form, readable, enough for a step.

What stands in the rows is looked at when they are read for good; whether they are JSON or parquet at all, here.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from ..errors import DataError, kind_of
from ..settings.rules import may_be_hub_name
from ..settings.source_names import split_named

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".tar")
FORMS = f"a UnifyBench++ folder (with concept/), {', '.join(SUFFIXES)}, a folder of these, or a hub name"
SETTINGS = ("data", "data_t2i", "data_mcq", "data_oe", "eval_data")
COUNTED = 1 << 28
"""Bytes of a file whose lines are counted."""
TRIED = 1 << 24
"""Bytes of a file that is read once before torch is loaded: a tenth of a second."""
EMBEDDED = {"rendered": (3636, 1024), "digits": (800, 0)}
"""Training prompts of each embedded world, and anchors; a test compares them."""


def data_problems(config: Any) -> list[str]:
    """What is wrong with the data that settings name, in words."""
    if getattr(config, "benchmark", ()):  # whose reader says what is wrong with its files
        return []
    found = []
    for setting in SETTINGS:
        source = getattr(config, setting, None)
        if source is not None:
            found += [f"{setting}: {problem}" for problem in [_problem(split_named(source)[0])] if problem]
    folder = getattr(config, "image_folder", None)
    if folder is not None and not os.path.isdir(os.path.expanduser(folder)):
        found.append(f"image_folder: expected a folder of pictures, got {folder}, {kind_of(folder)}; correct it")
    return found or _unreadable(config) or _too_few(config)


def _problem(source: str) -> str:
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder_problem(path)
    if not os.path.exists(path):
        if "/" in source and may_be_hub_name(source.partition(":")[0].partition("@")[0]):
            return ""
        near = difflib.get_close_matches(path.name, os.listdir(path.parent) if path.parent.is_dir() else [], n=1)
        remedy = f"did you mean {path.with_name(near[0])}?" if near else "correct the path"
        return f"expected {FORMS}, got {source}, which is not there; {remedy}"
    if path.suffix not in SUFFIXES:
        return f"expected {FORMS}, got {source} with the suffix {path.suffix!r}; rewrite it as .jsonl"
    if not path.is_file():
        return f"expected {FORMS}, got {source}, {kind_of(path)}; write what it holds into a file"
    try:
        with path.open("rb") as file:
            head = file.read(100)
    except OSError as error:
        return f"expected {FORMS}, got {source}, which cannot be read ({error.strerror}); change its permissions"
    if head.startswith(b"version https://git-lfs"):
        return f"expected {FORMS}, got {source}, a pointer of git-lfs; `git lfs pull` fetches the file"
    return "" if head.strip() else f"expected rows in {source}, got an empty file; add one JSON object per line"


def _folder_problem(folder: Path) -> str:
    if (folder / "concept").is_dir() or _has_tables(folder):
        return ""
    inside = [child for child in sorted(folder.iterdir())[:200] if child.is_dir()]
    meant = next((child for child in inside if (child / "concept").is_dir()), None)
    if meant is None and folder.name in ("concept", "train", "test"):
        meant = next((above for above in folder.parents[:2] if (above / "concept").is_dir()), None)
    remedy = f"did you mean {meant}?" if meant else "docs/data.md shows how each looks"
    return f"expected {FORMS}, got {folder}, a folder without any of these; {remedy}"


def _has_tables(folder: Path) -> bool:
    """Something that a table or the evaluation's own forms are read from; pictures alone are none."""
    kinds = ["*.txt", *(f"{place}*{suffix}" for suffix in SUFFIXES for place in ("", "*/"))]
    return any(next(folder.glob(kind), None) is not None for kind in kinds)


def _unreadable(config: Any) -> list[str]:
    """Files of rows that are not what their suffix says; of a recipe that trains, the others read them at once."""
    if not hasattr(config, "prompts_per_step"):
        return []
    return [
        f"{setting}: {problem}"
        for setting in SETTINGS
        for path in [Path(getattr(config, setting, None) or "").expanduser()]
        if path.is_file()
        and path.stat().st_size <= TRIED
        and (problem := _fault(path, getattr(config, "bad_rows", "refuse") == "skip"))
    ]


def _fault(path: Path, skip: bool) -> str:
    """The first fault of a file, and how many more there are; `skip`: rows that cannot be read are none."""
    from ..data.faults import Faults
    from ..data.table import open_table

    faults = Faults(keep=True)
    try:
        with faults.here():
            table = open_table(path, faults=faults)
            for error in () if skip else table.broken:
                faults.add(error)
        faults.raise_first(path)
    except DataError as error:
        return str(error)
    return ""


def _too_few(config: Any) -> list[str]:
    """Fewer rows than a step takes; of a file, as a folder's splits are told apart by reading it."""
    wanted, source = getattr(config, "prompts_per_step", None), getattr(config, "data", None)
    if wanted is None or getattr(config, "stage", "all") not in ("all", "unified"):
        return []
    if source is None:
        return _more_than_the_world(
            wanted, getattr(config, "anchor_fraction", None), getattr(config, "world", "rendered")
        )
    count = _rows(Path(source).expanduser())
    if count is None or count >= wanted:
        return []
    return [f"prompts_per_step: expected at most {count}, the rows of {source}, got {wanted}; lower it, or add rows"]


def _more_than_the_world(wanted: int, anchor_fraction: float | None, world: str) -> list[str]:
    """Sync-R1's steps are of different prompts of a world; CoRL's samples are numbered by its settings."""
    if anchor_fraction is None:
        return []
    prompts, most_anchors = EMBEDDED[world]
    anchors = round(wanted * anchor_fraction) if most_anchors else 0
    if wanted - anchors <= prompts and anchors <= most_anchors:
        return []
    there = f"{prompts} prompts and {most_anchors} anchors"
    return [
        f"prompts_per_step: expected a step of at most {there}, those of the {world} world, got {wanted - anchors} "
        f"prompts and {anchors} anchors; lower prompts_per_step"
    ]


def _rows(path: Path) -> int | None:
    """Rows of a file; None where counting them takes more than a moment."""
    if not path.is_file() or path.stat().st_size > COUNTED:
        return None
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            return sum(1 for line in file if line.strip())
    if path.suffix != ".parquet":
        return None
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    try:
        return int(read_metadata(path).num_rows)
    except (ArrowException, OSError):  # reading the rows says it better
        return None
