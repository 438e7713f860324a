"""An untouched model's scores beside the published ones, before anything is trained: is it the model that is meant?

What can be compared is said, and what differs from how the published number was measured; where nothing was published
(the rendered world, UnifyBench++, data of one's own) ours stand alone.

    baseline.md     the table
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import syncr1.engine.compat  # noqa: F401  # before transformers

from transformers import PreTrainedConfig

from ..checkpoints.deepseek_config import LLAMA, OURS, THEIRS
from ..checkpoints.hub_cache import split
from ..errors import EvaluationError
from ..whole_files import write_atomically
from .export import GENEVAL_RESULTS
from .manifest import read_manifest
from .published_scores import AUTHORS, SIZES, SOURCES, Published, benchmark_named, published_of
from .score import Result
from .store import Item

TABLE = "baseline.md"
NEAR = 0.03
"""Share of a published score by which ours may differ before it is said to be another: others' tries of the same model
are off by .01 to .10 of it."""
HOW = {
    "GenEval": ("images_per_prompt 4", "cfg_weight 5", "unconditional pads"),
    "DPG-Bench": ("images_per_prompt 4", "cfg_weight 5", "unconditional pads"),
    "WISE": ("cfg_weight 5", "unconditional pads"),
}
"""As Janus-Pro's own script draws (guidance 5 against padding, temperature 1), and as these benchmarks count."""


class Line(NamedTuple):
    """One benchmark: ours, and what others have."""

    benchmark: str
    ours: float | None
    """In the published number's unit; None where it is scored by another program."""
    how: str
    """Where ours comes from, or how to get it."""
    published: list[Published]
    differs: list[str]
    """What was measured otherwise than the published number."""


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
    found = []
    for task in manifest["data"]["items"]:
        benchmark = _benchmark(items, task, name or Path(str(manifest["data"]["source"])).stem)
        if benchmark is None:
            continue
        images = int(manifest["data"]["items"][task]) * int(sampling.get("images_per_prompt", 1))
        ours, how = _ours(benchmark, folder, task, result, images)
        found.append(
            Line(benchmark, ours, how, published_of(benchmark, model), _differs(benchmark, sampling, items, task))
        )
    return found


def _benchmark(items: Sequence[Item], task: str, source: str) -> str | None:
    extra = next((item.prompt.extra for item in items if item.prompt.task == task), {})
    if "geneval_metadata" in extra:
        return "GenEval"
    if "dpg_name" in extra:
        return "DPG-Bench"
    return benchmark_named(source) or benchmark_named(task)


def _ours(benchmark: str, folder: Path, task: str, result: Result, images: int) -> tuple[float | None, str]:
    if benchmark == "GenEval":
        path = folder / GENEVAL_RESULTS
        if path.is_file():
            score, scored = geneval_score(path), len(path.read_text(encoding="utf-8").splitlines())
            some = "" if scored == images else f", which has {scored} of the folder's {images} images: run it again"
            return score, f"GenEval's own scorer ({GENEVAL_RESULTS}{some})"
        return None, f"`--export geneval`, its scorer's `--outfile {path}`, then `--stage score --baseline` once more"
    if benchmark == "DPG-Bench":
        return None, "`--export dpg`, then its own scorer, which prints it"
    accuracy = result.scores.get(task, {}).get("accuracy/greedy", math.nan)
    if math.isnan(accuracy):
        return None, "by lmms-eval or VLMEvalKit from `--export lmms_eval` or `--export vlmevalkit`"
    return 100 * accuracy, "share of right answers, read from the greedy text here"


def geneval_score(path: Path) -> float:
    """The overall score, a mean over tasks of the share of right images, as GenEval's summary_scores.py makes it.

    Raises:
        EvaluationError: no lines with `tag` and `correct`, which its evaluate_images.py writes.
    """
    tasks: dict[str, list[bool]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            tasks.setdefault(str(row["tag"]), []).append(bool(row["correct"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EvaluationError(
            f"{path}: expected what GenEval's evaluate_images.py writes, a line with `tag` and `correct` per image "
            f"({type(error).__name__}: {error}); run it again with --outfile {path}, or remove the file"
        ) from error
    if not tasks:
        raise EvaluationError(f"{path}: is empty; run GenEval's evaluate_images.py again, or remove the file")
    return sum(sum(right) / len(right) for right in tasks.values()) / len(tasks)


def _differs(benchmark: str, sampling: Mapping[str, Any], items: Sequence[Item], task: str) -> list[str]:
    told = []
    for wanted in HOW.get(benchmark, ()):
        setting, _, value = wanted.partition(" ")
        here = sampling.get(setting, "fixed" if setting == "unconditional" else None)
        if str(here).removesuffix(".0") != value:
            told.append(f"{setting} is {here}, not {value}")
    if benchmark not in HOW:
        if any("<think>" in item.prompt.text for item in items if item.prompt.task == task):
            told.append("asked to think first (--no_think asks plainly)")
        told.append("answers are read by rules, and prompts are the table's own; VLMEvalKit has both otherwise")
    return told


def verdict(line: Line) -> str:
    """Whether ours is the published one, in words; "" where they cannot be compared."""
    authors = [row for row in line.published if row.by == AUTHORS and row.model in SIZES.values()]
    if line.ours is None or len(authors) != 1:
        return ""
    told = float(authors[0].score)
    gap = line.ours / told - 1
    if abs(gap) <= NEAR:
        return f"within {NEAR:.0%} of the published {authors[0].score}"
    why = "; measured otherwise: " + ", ".join(line.differs) if line.differs else "; look at weights, prompts, guidance"
    return f"{abs(gap):.0%} {'above' if gap > 0 else 'below'} the published {authors[0].score}{why}"


def markdown(lines: Sequence[Line], model: str) -> str:
    """The table, with what it says below it."""
    if not lines:
        return "nothing is published of these data: scores.md has ours\n"
    known = model_of(model)
    unknown = "settings cannot be read here" if _sizes_of(model) is None else "sizes are those of no model in the table"
    said = f"{model}, of the sizes of {known}" if known else f"{model}, whose {unknown}"
    told = [f"{said}.", "", "| benchmark | ours | published | of | by | source |", "|---|--:|--:|---|---|---|"]
    for line in lines:
        ours = "" if line.ours is None else f"{line.ours:.3g}" if line.ours < 1.5 else f"{line.ours:.1f}"
        for number, row in enumerate(line.published or [Published(line.benchmark, "", "none known", "", "")]):
            name, own = (line.benchmark, ours) if number == 0 else ("", "")
            told.append(f"| {name} | {own} | {row.score} | {row.model} | {row.by} | {row.source} |")
    told.append("")
    for line in lines:
        told.append(f"- {line.benchmark}: {'ours by' if line.ours is not None else 'for ours:'} {line.how}")
        told += [f"  - {words}" for words in (verdict(line), *(line.differs if line.ours is None else ())) if words]
    named = {mark for line in lines for row in line.published for mark in re.findall(r"\[(\w+)\]", row.source)}
    told += [f"- [{mark}] {words}" for mark, words in SOURCES.items() if mark in named]
    return "\n".join(told) + "\n"


def write(folder: Path, lines: Sequence[Line]) -> str:
    """Writes the table into the folder and returns it."""
    text = markdown(lines, str(read_manifest(folder)["model"]["name"]))
    write_atomically(folder / TABLE, text)
    return text
