"""Stage 2: scores of a folder of generated items.  It reads that folder alone and needs no policy.

    scores.json    every metric by task, the summary, and which metrics were left out, with the reason
    scores.md      the metrics that papers report, as a table
    scores.jsonl   single values that cost something (graders.py), so that nothing is computed or asked twice

A metric that could not be computed is named as left out; it is never 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from torch import Tensor

from ..errors import EvaluationError
from ..pictures import open_picture, to_tensor
from ..records import Prompt
from ..rewards.judge.attribute_judge import AttributeScorer
from ..show.scores import TASKS, show_score
from ..whole_files import write_atomically
from .graders import Graders, grade
from .held_out import Scores, score_rollouts, summary
from .manifest import read_manifest
from .measures import mean
from .store import Item, Store
from .tasks import PUBLISHED, needs_text

SCORES, TABLE = "scores.json", "scores.md"

LABELS = {
    "score": "main score",
    "recall": "weighted recall",
    "bleu": "character BLEU",
    "accuracy": "accuracy",
    "format": "in the asked form",
    "words": "words in place",
    "judge": "judge (0, .5, 1)",
    "clip_t": "CLIP-T",
    "clip_i": "CLIP-I",
    "clauses": "share of clauses (judge)",
    "attributes": "attributes right",
}
"""Metrics in words; another name is shown as it is."""
ORDER = (*LABELS, "identity")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What stage 2 found."""

    scores: Scores
    """task -> metric -> value; text metrics as `bleu/greedy`, `bleu/sampled`."""
    left_out: dict[str, str]
    """`task/metric` or metric -> why it is not there."""

    @property
    def summary(self) -> dict[str, float]:
        return summary(self.scores)


def score_folder(
    folder: Path, graders: Graders | None = None, image_scorers: Mapping[str, AttributeScorer] | None = None
) -> Result:
    """Scores everything in the folder, writes scores.json and scores.md, and returns what they hold.

    Args:
        folder: of a complete stage 1.
        graders: CLIP and judge, as far as they are at hand.
        image_scorers: readers of attributes by name, for prompts that name attributes (the rendered world).

    Raises:
        EvaluationError: there is nothing to score, or stage 1 was interrupted.
    """
    graders = graders or Graders()
    items = read_complete(folder)
    scores = score_rollouts(*read_items(items, folder, with_images=bool(image_scorers)), image_scorers=image_scorers)
    values, left_out = grade(items, folder, graders)
    for task, metrics in values.items():
        for metric, found in metrics.items():
            value = mean(found)
            if value is not None:
                scores.setdefault(task, {})[metric] = value
            lost = sum(one is None for one in found)
            if lost:
                left_out[f"{task}/{metric}"] = f"no verdict for {lost} of {len(found)} items; score again to ask again"
    for known in scores.values():
        if "clip_i" in known and not any(name.startswith("score/") for name in known):
            known["score/sampled"] = known["clip_i"]
    result = Result(scores=scores, left_out=left_out)
    write_atomically(folder / SCORES, _as_json(result))
    write_atomically(folder / TABLE, markdown(result))
    return result


def read_complete(folder: Path) -> list[Item]:
    """All items of a folder whose stage 1 is complete; EvaluationError otherwise."""
    manifest = read_manifest(folder)
    items = Store(folder).read()
    members: dict[str, int] = {}
    for item in items:
        members[item.prompt.id] = members.get(item.prompt.id, 0) + 1
    each = manifest["sampling"]["images_per_prompt"]
    whole = {
        item.prompt.id for item in items if members[item.prompt.id] == (each if "image" in item.prompt.segments else 1)
    }
    wanted = sum(manifest["data"]["items"].values())
    if len(whole) < wanted:
        raise EvaluationError(f"{folder}: has {len(whole)} of {wanted} items; run --stage generate again: it goes on")
    return items


@dataclass(frozen=True, slots=True)
class Read:
    """One text of an item, and its image where that is looked at."""

    prompt: Prompt
    text: str
    image: Tensor | None = None


def read_items(items: Sequence[Item], folder: Path, *, with_images: bool) -> tuple[list[Read], list[Read]]:
    """The greedy and the sampled trajectories; images are read where attributes are known of them."""
    greedy, sampled = [], []
    for item in items:
        if item.greedy is not None and needs_text(item.prompt):
            greedy.append(Read(item.prompt, item.greedy))
        if item.sampled is not None or item.drawn is not None:
            read = item.drawn is not None and with_images and bool(item.prompt.attributes)
            picture = open_picture(folder / str(item.drawn)) if read else None
            image = None if picture is None else to_tensor(picture, picture.width)
            sampled.append(Read(item.prompt, item.sampled or "", image))
    return greedy, sampled


def _as_json(result: Result) -> str:
    finite = {
        task: {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        for task, metrics in result.scores.items()
    }
    contents = {"scores": finite, "summary": result.summary, "left_out": result.left_out}
    return json.dumps(contents, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


# Tables ---------------------------------------------------------------------------------------------------------------

Row = tuple[str, str, str, str, str]
"""Task, number of items, metric, greedy, sampled."""


def rows_of(result: Result) -> list[Row]:
    """Every task's main score and published metrics; a metric that is left out says so."""
    rows = []
    for task, metrics in result.scores.items():
        names = {name.partition("/")[0] for name in metrics}
        told = names | {name.removeprefix(f"{task}/") for name in result.left_out}
        published = [name for name in PUBLISHED.get(task, ()) if name in told]
        shown = [name for name in ORDER if name in published or name in ("score", "attributes", *names & _ALWAYS)]
        for name in shown:
            for head, greedy, sampled in _values(name, metrics):
                rows.append((task, f"{metrics.get('num_items', 0):.0f}", _label(head), greedy, sampled))
            if name in published and name not in names:
                rows.append((task, f"{metrics.get('num_items', 0):.0f}", _label(name), "left out", "left out"))
    return rows


_ALWAYS = {"clip_t", "clip_i", "clauses", "judge", "identity"}


def _values(name: str, metrics: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """(label, greedy, sampled) of a metric; attributes by each of their readers."""
    if name == "attributes":
        return [(key, "", _show(key, metrics)) for key in metrics if key.startswith("attributes/")]
    if name == "judge" and any(
        key.endswith("/greedy") for key in metrics
    ):  # it reads the greedy text where there is one
        return [(name, _show(name, metrics), "")] if name in metrics else []
    if name in metrics:
        return [(name, "", _show(name, metrics))]
    pair = [_show(f"{name}/{how}", metrics) for how in ("greedy", "sampled")]
    return [(name, pair[0], pair[1])] if any(pair) else []


def _show(name: str, metrics: Mapping[str, float]) -> str:
    """A share in per cent, a cosine as it is; "" for what is not there."""
    if name not in metrics:
        return ""
    value = metrics[name]
    if not math.isfinite(value):
        return show_score(None)
    return f"{value:.3f}" if name in ("clip_t", "clip_i") else show_score(value)


def _label(name: str) -> str:
    head, _, reader = name.partition("/")
    return LABELS.get(head, head) + (f", by {reader}" if reader else "")


def markdown(result: Result) -> str:
    """The table, the summary and what was left out, as Markdown."""
    lines = ["| task | items | metric | greedy | sampled |", "|---|---:|---|---:|---:|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows_of(result)]
    lines += ["", "| mean over tasks | |", "|---|---:|"]
    lines += [f"| {name} | {show_score(value)} |" for name, value in result.summary.items()]
    if result.left_out:
        lines += ["", "Left out:", ""] + [f"- {name}: {reason}" for name, reason in result.left_out.items()]
    return "\n".join(lines) + "\n"


def rich_table(result: Result) -> Table:
    """The same rows for a terminal."""
    table = Table(
        title="scores", caption="\n".join(f"left out: {name}: {why}" for name, why in result.left_out.items())
    )
    for column in ("task", "items", "metric", "greedy", "sampled"):
        table.add_column(column, justify="right" if column in ("items", "greedy", "sampled") else "left")
    before = ""
    for task, count, metric, greedy, sampled in rows_of(result):
        label = TASKS.get(task, task.replace("_", " "))
        table.add_row(label if task != before else "", count if task != before else "", metric, greedy, sampled)
        before = task
    return table
