"""Which benchmarks there are: who reads and who scores each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ...errors import DataError
from ...records import Prompt
from ..graders import Graders, Kept
from ..store import Item
from . import compbench, dpg_bench, geneval_prompts, mathvista, mmbench, mmmu, pope, wise
from .benchmark_outcome import Scored
from .data_sets import DATA_SETS, has_splits, source_of
from .layouts import Source


class Benchmark(NamedTuple):
    """One of them."""

    load: Callable[[Source], list[Prompt]]
    score: Callable[[Sequence[Item], Path, Graders, Kept], Scored]


KNOWN: Mapping[str, Benchmark] = {
    "geneval": Benchmark(geneval_prompts.load, geneval_prompts.score),
    "dpg": Benchmark(dpg_bench.load, dpg_bench.score),
    "wise": Benchmark(wise.load, wise.score),
    "t2i_compbench": Benchmark(compbench.load, compbench.score),
    "mmmu": Benchmark(mmmu.load, mmmu.score),
    "mmbench": Benchmark(mmbench.load, mmbench.score),
    "pope": Benchmark(pope.load, pope.score),
    "mathvista": Benchmark(mathvista.load, mathvista.score),
}
"""By the name that `--benchmark` takes; `unifybench`, read as without it, has no rules of its own."""
OF_COLUMN = {"geneval_metadata": "geneval", "dpg_name": "dpg"}
"""Columns that prompts of these two have always had, by which they are told without a name."""


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
        DataError: what its reader says, there is nothing in it, or it has no splits and one is named.
    """
    found = source_of(name, data)
    if split is not None and not has_splits(name, found):
        raise DataError(f"split: expected none for {name} of {found}, got {split!r}: it has no splits; leave it out")
    source = Source(name=found, split=split or DATA_SETS[name].split, image_folder=image_folder, think=think)
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
