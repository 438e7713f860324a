"""A model's scores beside the published ones: of a benchmark, and, before anything is trained, is it the model that is
meant?

What can be compared is said, and what differs from how the published number was measured; where nothing was published
(the rendered world, UnifyBench++, data of one's own) ours stand alone.

    published.md     the table: each number with its items, its 95 % interval, and what others have
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import syncr1.engine.compat  # noqa: F401  # before transformers

from transformers import PreTrainedConfig

from ..checkpoints.deepseek_config import LLAMA, OURS, THEIRS
from ..checkpoints.hub_cache import split
from ..whole_files import write_atomically
from .benchmarks.benchmark_outcome import PER_CENT, Part, mean_part
from .benchmarks.known import benchmark_of
from .manifest import read_manifest
from .published_scores import AUTHORS, SIZES, SOURCES, Published, benchmark_named, published_of
from .score import Result
from .store import Item

TABLE = "published.md"
NEAR = 0.03
"""Share of a published score by which ours may differ before it is said to be another: others' tries of the same model
are off by .01 to .10 of it."""
HOW = {
    "GenEval": ("images_per_prompt 4", "cfg_weight 5", "unconditional pads"),
    "DPG-Bench": ("images_per_prompt 4", "cfg_weight 5", "unconditional pads"),
    "WISE": ("cfg_weight 5", "unconditional pads"),
    "WISE Verified": ("cfg_weight 5", "unconditional pads"),
    "T2I-CompBench": ("images_per_prompt 10", "cfg_weight 5", "unconditional pads"),
}
"""As Janus-Pro's own script draws (guidance 5 against padding, temperature 1), and as these benchmarks count."""
OTHERWISE = "answers are read by rules, and prompts are the table's own; VLMEvalKit has both otherwise"
"""Of a table that is a benchmark by name alone."""


class Line(NamedTuple):
    """One benchmark: ours, and what others have."""

    benchmark: str
    parts: tuple[Part, ...]
    """Ours in the published numbers' unit, the headline first; none where it is scored by another program."""
    how: str
    """Where ours come from, or how to get them."""
    published: list[Published]
    differs: list[str]
    """What was measured otherwise than the published number."""

    @property
    def ours(self) -> float | None:
        """The headline number; None without any."""
        return self.parts[0].value if self.parts else None


def model_of(name: str) -> str | None:
    """The published model whose sizes a folder has, or a hub name in the hub's cache; None: none that is known."""
    sizes = _sizes_of(name)
    return None if sizes is None else SIZES.get(sizes)


def _sizes_of(name: str) -> tuple[int, int] | None:
    """Hidden size and layers of the decoder, 0 where it has none; None: its settings cannot be read here."""
    repository, revision = (name, "") if Path(name).is_dir() else split(name)
    with suppress(OSError, ValueError, TypeError):  # it was loaded to be evaluated, so that nothing need be fetched
        settings, _ = PreTrainedConfig.get_config_dict(repository, revision=revision or None, local_files_only=True)
        text = settings.get("text_config") or settings.get("language_config") or {}
        if settings.get("model_type") in (OURS, THEIRS):  # of the 7B is left out what LlamaConfig has by default
            text = {**LLAMA, **text}
        return int(text.get("hidden_size", 0)), int(text.get("num_hidden_layers", 0))
    return None


def compare(folder: Path, items: Sequence[Item], result: Result, name: str | None = None) -> list[Line]:
    """What of a scored folder has a published counterpart.

    Args:
        folder: of `recipes/evaluate.py`.
        items: its.
        result: their scores.
        name: what the benchmark is called, where the data do not tell (`export_name`).

    Raises:
        EvaluationError: a scorer's own results lie in the folder and cannot be read.
    """
    manifest = read_manifest(folder)
    model, sampling = model_of(str(manifest["model"]["name"])), manifest["sampling"]
    of_task = {item.prompt.task: found for item in items if (found := benchmark_of(item.prompt)) is not None}
    lines = []
    for task in manifest["data"]["items"]:
        outcome = result.outcomes.get(of_task.get(task, ""))
        if outcome is not None:
            title, parts, how = outcome.benchmark, outcome.parts, outcome.how
            differs = [*_settings(title, sampling, items, task), *outcome.remarks]
        else:
            known = benchmark_named(name or Path(str(manifest["data"]["source"])).stem) or benchmark_named(task)
            if known is None:
                continue
            title, (parts, how) = known, _answers(task, result)
            differs = [*_settings(title, sampling, items, task), *([] if title in HOW else [OTHERWISE])]
        lines.append(Line(title, parts, how, published_of(title, model), differs))
    return lines


def _answers(task: str, result: Result) -> tuple[tuple[Part, ...], str]:
    """A table's questions: the share that is right, in per cent."""
    of = result.tasks.get(task)
    measured = None if of is None else of.measures.get("accuracy/greedy")
    part = None if measured is None else mean_part("accuracy", [measured], PER_CENT)
    if part is None:
        return (), "by lmms-eval or VLMEvalKit from `--export lmms_eval` or `--export vlmevalkit`"
    return (part,), "share of right answers, read from the greedy text here"


def _settings(benchmark: str, sampling: Mapping[str, Any], items: Sequence[Item], task: str) -> list[str]:
    """Settings other than those that the published number has."""
    told = []
    for wanted in HOW.get(benchmark, ()):
        setting, _, value = wanted.partition(" ")
        here = sampling.get(setting, "fixed" if setting == "unconditional" else None)
        if str(here).removesuffix(".0") != value:
            told.append(f"{setting} is {here}, not {value}")
    if any("<think>" in item.prompt.text for item in items if item.prompt.task == task):
        told.append("asked to think first (--no_think asks plainly)")
    return told


def verdict(line: Line) -> str:
    """Whether ours is the published one, in words; "" where they cannot be compared."""
    authors = [row for row in line.published if not row.part and row.by == AUTHORS and row.model in SIZES.values()]
    if line.ours is None or len(authors) != 1:
        return ""
    told = float(authors[0].score)
    gap = line.ours / told - 1
    if abs(gap) <= NEAR:
        return f"within {NEAR:.0%} of the published {authors[0].score}"
    why = "; measured otherwise: " + ", ".join(line.differs) if line.differs else "; look at weights, prompts, guidance"
    return f"{abs(gap):.0%} {'above' if gap > 0 else 'below'} the published {authors[0].score}{why}"


COLUMNS = ("benchmark", "n", "ours", "95 %", "published", "of", "by", "source")


def rows_of(line: Line) -> list[tuple[str, ...]]:
    """The table's rows of one benchmark: the headline, then its parts, each beside what others have of it."""
    rows: list[tuple[str, ...]] = []
    ours = line.parts or (None,)
    for place, part in enumerate(ours):
        name = line.benchmark if place == 0 else f"… {part.name}" if part else ""
        own = ("", "", "") if part is None else (f"{part.num_items:,}", _shown(part, part.value), _interval(part))
        others = [row for row in line.published if row.part == ("" if place == 0 else part and part.name)]
        for number, row in enumerate(others or [Published("", "", "" if place else "none known", "", "")]):
            first = (name, *own) if number == 0 else ("", "", "", "")
            rows.append((*first, row.score, row.model, row.by, row.source))
    return rows


def _shown(part: Part, value: float) -> str:
    return f"{value:.1f}" if part.percent else f"{value:.3f}"


def _interval(part: Part) -> str:
    return "" if part.interval is None else " to ".join(_shown(part, end) for end in part.interval)


def markdown(lines: Sequence[Line], model: str) -> str:
    """The table, with what it says below it."""
    if not lines:
        return "nothing is published of these data: scores.md has ours\n"
    known = model_of(model)
    unknown = "settings cannot be read here" if _sizes_of(model) is None else "sizes are those of no model in the table"
    said = f"{model}, of the sizes of {known}" if known else f"{model}, whose {unknown}"
    told = [f"{said}.", "", f"| {' | '.join(COLUMNS)} |", "|---|--:|--:|--:|--:|---|---|---|"]
    told += [f"| {' | '.join(row)} |" for line in lines for row in rows_of(line)]
    told += [""]
    for line in lines:
        told.append(f"- {line.benchmark}: {'ours by' if line.ours is not None else 'for ours:'} {line.how}")
        said = verdict(line)
        told += [f"  - {words}" for words in (said, *(words for words in line.differs if words not in said)) if words]
    named = {mark for line in lines for row in line.published for mark in re.findall(r"\[(\w+)\]", row.source)}
    told += [f"- [{mark}] {words}" for mark, words in SOURCES.items() if mark in named]
    return "\n".join(told) + "\n"


def write(folder: Path, lines: Sequence[Line]) -> str:
    """Writes the table into the folder and returns it."""
    text = markdown(lines, str(read_manifest(folder)["model"]["name"]))
    write_atomically(folder / TABLE, text)
    return text
