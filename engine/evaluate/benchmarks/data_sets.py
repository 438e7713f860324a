"""Where each benchmark's files are to be had, and which part of them papers report; read without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ...errors import DataError

HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@:]+))?(:(?P<config>[^@:]+))?")


class DataSet(NamedTuple):
    """The files of one benchmark."""

    get: str
    """The command that fetches them."""
    hub: str | None = None
    """Their name on the hub, which serves where no data are named."""
    split: str = ""
    """The part with answers that papers report; "" where there is but one."""


def _hub(name: str, split: str, folder: str) -> DataSet:
    get = f"hf download --repo-type dataset {name.partition(':')[0]} --local-dir {folder}"
    return DataSet(get, name, split)


DATA_SETS: Mapping[str, DataSet] = {
    "geneval": DataSet("git clone https://github.com/djghosh13/geneval"),
    "dpg": DataSet("git clone https://github.com/TencentQQGYLab/ELLA"),
    "wise": DataSet("git clone https://github.com/PKU-YuanGroup/WISE"),
    "t2i_compbench": DataSet("git clone https://github.com/Karine-Huang/T2I-CompBench"),
    "mmmu": _hub("MMMU/MMMU", "validation", "mmmu"),
    "mmbench": _hub("lmms-lab/MMBench:en", "dev", "mmbench"),
    "pope": _hub("lmms-lab/POPE", "test", "pope"),
    "mathvista": _hub("AI4Math/MathVista", "testmini", "mathvista"),
}
"""By the name that `--benchmark` takes; `unifybench` is a folder like any other."""


def sources_of(names: Sequence[str], data: str | None) -> dict[str, str]:
    """Benchmark -> what is read of it: of several, the data's sub-folder of that name, where it is there.

    Raises:
        DataError: as `source_of`, or there is no such folder.
    """
    if len(names) < 2 or data is None:
        return {name: source_of(name, data) for name in names}
    folder = os.path.expanduser(data)
    if not os.path.isdir(folder):
        raise DataError(
            f"data: expected a folder with a sub-folder for each of {', '.join(names)}, got {data}; name one"
        )
    inside = {name: os.path.join(folder, name) for name in names}
    return {name: source_of(name, path if os.path.exists(path) else None) for name, path in inside.items()}


def source_of(name: str, data: str | None) -> str:
    """What is read: the named data, or the benchmark's own name on the hub.

    Raises:
        DataError: neither; says how to get it.
    """
    known = DATA_SETS.get(name)
    if known is None:  # UnifyBench++'s folder is read as ever; none is the rendered world
        return data or ""
    if data is not None:
        there = os.path.exists(os.path.expanduser(data))
        if there or (known.hub is not None and HUB_NAME.fullmatch(data)):
            return data
        got = f"{data}, which is not there"
    elif known.hub is not None:
        return known.hub
    else:
        got = "none"
    raise DataError(
        f"data: expected {name}'s files for --benchmark {name}, got {got}; get them by `{known.get}` and name the "
        "folder with --data"
    )


def has_splits(name: str, source: str) -> bool:
    """Whether a benchmark's data come in parts: on the hub and in what is downloaded from there, or by their names."""
    path = Path(source).expanduser()
    if not DATA_SETS[name].split or path.is_file():
        return False
    if name == "mathvista" or not path.is_dir():
        return True
    return next(path.rglob("*.parquet"), None) is not None
