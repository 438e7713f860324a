"""Where each benchmark's files are to be had, and which part of them papers report; read without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
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


def source_of(name: str, data: str | None) -> str:
    """What is read: the named data, or the benchmark's own name on the hub.

    Raises:
        DataError: neither; says how to get it.
    """
    known = DATA_SETS[name]
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
