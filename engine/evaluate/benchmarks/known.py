"""Which benchmarks there are, where each is to be had, and who reads and scores it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import DataError
from ...records import Prompt
from ..graders import Graders, Kept
from ..store import Item
from . import compbench, dpg_bench, geneval_prompts, mathvista, mmbench, mmmu, pope, wise
from .layouts import HUB_NAME, Source
from .outcome import Scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One of them."""

    load: Callable[[Source], list[Prompt]]
    score: Callable[[Sequence[Item], Path, Graders, Kept], Scored]
    hub: str | None = None
    """Its name on the hub, which serves where no data are named."""
    get: str = ""
    """How to get it, where it is not there."""
    split: str = ""
    """The part with answers that papers report; "" where it has but one."""


KNOWN: Mapping[str, Benchmark] = {
    "geneval": Benchmark(
        load=geneval_prompts.load, score=geneval_prompts.score, get="git clone https://github.com/djghosh13/geneval"
    ),
    "dpg": Benchmark(
        load=dpg_bench.load, score=dpg_bench.score, get="git clone https://github.com/TencentQQGYLab/ELLA"
    ),
    "wise": Benchmark(load=wise.load, score=wise.score, get="git clone https://github.com/PKU-YuanGroup/WISE"),
    "t2i_compbench": Benchmark(
        load=compbench.load, score=compbench.score, get="git clone https://github.com/Karine-Huang/T2I-CompBench"
    ),
    "mmmu": Benchmark(load=mmmu.load, score=mmmu.score, hub="MMMU/MMMU", split="validation"),
    "mmbench": Benchmark(load=mmbench.load, score=mmbench.score, hub="lmms-lab/MMBench:en", split="dev"),
    "pope": Benchmark(load=pope.load, score=pope.score, hub="lmms-lab/POPE", split="test"),
    "mathvista": Benchmark(load=mathvista.load, score=mathvista.score, hub="AI4Math/MathVista", split="testmini"),
}
"""By the name that `--benchmark` takes; `unifybench`, read as without it, has no rules of its own."""
OF_COLUMN = {"geneval_metadata": "geneval", "dpg_name": "dpg"}
"""Columns that prompts of these two have always had, by which they are told without a name."""


def source_of(name: str, data: str | None) -> str:
    """What is read: the named data, or the benchmark's own name on the hub.

    Raises:
        DataError: neither; says how to get it.
    """
    benchmark = KNOWN[name]
    if data is not None:
        there = os.path.exists(os.path.expanduser(data))
        if there or (benchmark.hub is not None and HUB_NAME.fullmatch(data)):
            return data
        missing = f"{data}, which is not there"
    elif benchmark.hub is not None:
        return benchmark.hub
    else:
        missing = "none"
    repository = str(benchmark.hub).partition(":")[0]
    get = benchmark.get or f"hf download --repo-type dataset {repository} --local-dir {name}"
    raise DataError(
        f"data: expected {name}'s files for --benchmark {name}, got {missing}; get them by `{get}` and name the folder "
        "with --data"
    )


def load_benchmark_prompts(
    name: str, data: str | None, split: str | None, *, image_folder: Path | None = None, think: bool = False
) -> dict[str, list[Prompt]]:
    """The prompts of a benchmark, under its name.

    Args:
        name: of KNOWN.
        data: file, folder or hub name; None: the published hub name.
        split: None: the one that papers report.
        image_folder: where pictures lie that the data name.
        think: questions ask to think in tags, as CoRL's training does.

    Raises:
        DataError: what its reader says, or there is nothing in it.
    """
    found = source_of(name, data)
    source = Source(name=found, split=split or KNOWN[name].split, image_folder=image_folder, think=think)
    prompts = KNOWN[name].load(source)
    if not prompts:
        raise DataError(f"{found}: has nothing of {name}; get it again")
    return {name: prompts}


def benchmark_of(prompt: Prompt) -> str | None:
    """The benchmark that a prompt is of; None for any other prompt."""
    name = prompt.extra.get("benchmark")
    if isinstance(name, str) and name in KNOWN:
        return name
    return next((known for column, known in OF_COLUMN.items() if column in prompt.extra), None)


def score_benchmarks(items: Sequence[Item], folder: Path, graders: Graders) -> dict[str, Scored]:
    """Benchmark -> what its rules say of the items that are of it; {} where there is none."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        if (name := benchmark_of(item.prompt)) is not None:
            groups.setdefault(name, []).append(item)
    kept = Kept(folder) if groups else None
    return {name: KNOWN[name].score(group, folder, graders, kept) for name, group in groups.items() if kept is not None}
