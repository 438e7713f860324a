"""Stage 2: scores of a folder of generated items.  It reads that folder alone and needs no policy.

    scores.json    every metric by task, the summary, and which metrics were left out, with the reason
    scores.md      the metrics that papers report, as a table
    scores.jsonl   single values that cost something (graders.py), so that nothing is computed or asked twice

A metric that could not be computed is named as left out; it is never 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..errors import EvaluationError
from ..pictures import open_picture, to_tensor
from ..records import Prompt
from ..rewards.judge.attribute_judge import AttributeScorer
from ..show.intervals import Interval, intervals_of
from ..show.measured import PER_ITEM, Measured, dumps
from ..show.names import ANSWERS, INDEPENDENT, INTERVALS, MEASURES, READ, READERS, TASKS
from ..show.scores import chance_mark, show_interval, show_score
from ..whole_files import write_atomically
from .benchmarks.benchmark_outcome import Outcome, Scored
from .benchmarks.known import benchmark_of, score_benchmarks
from .graders import Graders, grade
from .held_out import Scores, TaskScores, means, score_rollouts, summary, table_of, values_of
from .manifest import read_manifest
from .store import Item, Store
from .tasks import PUBLISHED, needs_text

SCORES, TABLE = "scores.json", "scores.md"

LABELS = {
    **READ,
    "score": "main score",
    "recall": "balanced accuracy",
    "bleu": "character BLEU",
    "accuracy": "accuracy",
    "format": "in the asked form",
    "words": "words in place",
    "judge": "judge (0, .5, 1)",
    "clip_t": "CLIP-T",
    "clip_i": "CLIP-I",
    "clauses": "share of clauses (judge)",
    "identity": "likeness (own tower)",
    "geneval": "right by GenEval's rules",
    "dpg": "DPG-Bench's questions answered yes (judge)",
    "wise": "WiScore (judge)",
    "t2i_compbench": "as T2I-CompBench asks (judge)",
    "mathvista": "answers that rules cannot read (judge)",
}
"""Metrics in words, whole drawings before their attributes; another name is shown as it is."""
EXPLAINED = {
    "recall": "% balanced accuracy",
    "words": "% of words",
    "accuracy": "% of answers",
    "bleu": "character BLEU, 0 to 1",
    "clip_t": "CLIP-T",
    "clip_i": "CLIP-I",
}
"""Metrics that the table explains below, by their names in MEASURES."""


OF_BENCHMARKS = frozenset({"geneval", "dpg", "wise", "t2i_compbench"})
"""Metrics of images by a benchmark's own rules."""
MAIN = ("recall", "words", "accuracy", "bleu")
"""What a text task's main score may be (tasks.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What stage 2 found."""

    tasks: dict[str, TaskScores]
    """task -> metric -> value of each item; text metrics as `bleu/greedy`, `bleu/sampled`."""
    left_out: dict[str, str]
    """`task/metric` or metric -> why it is not there."""
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    """Benchmark, as its task is called -> its own numbers."""

    @property
    def scores(self) -> Scores:
        """task -> metric -> mean over items."""
        return values_of(self.tasks)

    @property
    def summary(self) -> dict[str, float]:
        return means(self.scores, summary(self.scores))


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
    plain = [item for item in items if benchmark_of(item.prompt) is None]
    tasks = score_rollouts(*read_items(plain, folder, with_images=bool(image_scorers)), image_scorers=image_scorers)
    values, left_out = grade(items, folder, graders)
    for task, metrics in values.items():
        for metric, found in metrics.items():
            names, graded = [name for name, _ in found], [value for _, value in found]
            of = tasks.setdefault(task, TaskScores(num_items=len(set(names)), measures={}))
            one = Measured.of(names, graded)
            if one.by_item:
                of.measures[metric] = one
            lost = sum(value is None for value in graded)
            if lost:
                left_out[f"{task}/{metric}"] = f"no verdict for {lost} of {len(found)} items; score again to ask again"
    scored = score_benchmarks(items, folder, graders)
    for name, rules in scored.items():
        _add_benchmark(tasks, rules, [item for item in items if benchmark_of(item.prompt) == name])
        left_out |= rules.left_out
    for of in tasks.values():
        if "clip_i" in of.measures and not any(name.startswith("score/") for name in of.measures):
            of.measures["score/sampled"] = of.measures["clip_i"]
    outcomes = {name: rules.outcome for name, rules in scored.items()}
    result = Result(tasks=tasks, left_out=left_out, outcomes=outcomes)
    write_atomically(folder / SCORES, _as_json(result))
    write_atomically(folder / TABLE, markdown(result))
    return result


def _add_benchmark(tasks: dict[str, TaskScores], scored: Scored, items: Sequence[Item]) -> None:
    """A benchmark's metrics under its task; those of answers under how these came about."""
    task = items[0].prompt.task
    of = tasks.setdefault(task, TaskScores(num_items=len({item.prompt.id for item in items}), measures={}))
    how = "sampled" if items[0].greedy is None else "greedy"
    for metric, measured in scored.measures.items():
        of.measures[metric if metric in OF_BENCHMARKS else f"{metric}/{how}"] = measured
        of.measures[f"score/{'sampled' if metric in OF_BENCHMARKS else how}"] = measured


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
    scores, names = result.scores, _shown_names(result)
    finite = {
        task: {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        for task, metrics in scores.items()
    }
    intervals = {name: interval for name, interval in _intervals(result, names).items() if interval is not None}
    contents: dict[str, object] = {
        "scores": finite,
        "summary": result.summary,
        "left_out": result.left_out,
        "intervals": intervals,
        PER_ITEM: table_of(result.tasks)[PER_ITEM],
    }
    if result.outcomes:
        contents["benchmarks"] = {name: _outcome_json(outcome) for name, outcome in result.outcomes.items()}
    return dumps(contents)


def _outcome_json(outcome: Outcome) -> dict[str, object]:
    parts = [{**part._asdict(), "interval": part.interval and list(part.interval)} for part in outcome.parts]
    return {"of": outcome.benchmark, "parts": parts, "how": outcome.how, "remarks": list(outcome.remarks)}


# Tables ---------------------------------------------------------------------------------------------------------------

Row = tuple[str, str, str, str, str]
"""Task, number of items, metric, greedy, sampled."""


def rows_of(result: Result) -> list[Row]:
    """Every task's main score and published metrics; a metric that is left out says so."""
    rows = []
    intervals = _intervals(result, _shown_names(result))
    for task, of in result.tasks.items():
        for label, greedy, sampled in _metrics(task, of.measures, result.left_out):
            cells = [_cell(task, name, of.measures, intervals) for name in (greedy, sampled)]
            marks = {_mark(of.measures[name], intervals.get(f"{task}/{name}")) for name in (greedy, sampled) if name}
            if not (greedy or sampled):
                cells, marks = ["left out", "left out"], set()
            told = "".join(f" ({mark})" for mark in sorted(marks - {""}))
            rows.append((task, str(of.num_items), label + told, cells[0], cells[1]))
    return rows


def _metrics(
    task: str, measures: Mapping[str, Measured], left_out: Mapping[str, str]
) -> Iterator[tuple[str, str, str]]:
    """(label, greedy metric, sampled metric) of what a table shows of a task; neither of what is left out."""
    names = {name.partition("/")[0] for name in measures}
    told = names | {name.removeprefix(f"{task}/") for name in left_out}
    published = [name for name in PUBLISHED.get(task, ()) if name in told]
    repeats = bool(names & {*OF_BENCHMARKS, "all_right", "identity", "clip_i"})  # a drawing's main score is one of them
    main = _main(measures)
    always = names & {*OF_BENCHMARKS, "all_right", "attributes", "clip_t", "clip_i", "clauses", "judge", "identity"}
    for name in LABELS:
        pair = [key if (key := f"{name}/{how}") in measures else "" for how in ("greedy", "sampled")]
        if name == "score" and name in names and not repeats:
            yield (f"{_label(name)}: {_label(main)}" if main else _label(name)), pair[0], pair[1]
        elif name == main:
            continue
        elif name in ("all_right", "attributes"):
            readers = sorted(measures, key=lambda key: not key.endswith(INDEPENDENT))
            yield from ((_label(key), "", key) for key in readers if key.startswith(f"{name}/"))
        elif name in published or name in always:
            if name in measures:
                # The judge reads the greedy text where there is one.
                asked = name == "judge" and any(key.endswith("/greedy") for key in measures)
                pair = [name, ""] if asked else ["", name]
            yield _label(name), pair[0], pair[1]


def _main(measures: Mapping[str, Measured]) -> str:
    """The metric that a text task's main score is; "" where it is none of them."""
    of = {how: measures[f"score/{how}"] for how in ("greedy", "sampled") if f"score/{how}" in measures}
    same = (name for name in MAIN if of and all(measures.get(f"{name}/{how}") == one for how, one in of.items()))
    return next(same, "")


def _shown_names(result: Result) -> list[str]:
    """`task/metric` of every score that the table shows."""
    return [
        f"{task}/{name}"
        for task, of in result.tasks.items()
        for _, *pair in _metrics(task, of.measures, result.left_out)
        for name in pair
        if name
    ]


def _intervals(result: Result, names: Sequence[str]) -> dict[str, Interval | None]:
    """95 % of each."""
    measured = [result.tasks[task].measures[metric] for task, _, metric in (name.partition("/") for name in names)]
    pairs: list[tuple[list[Measured], list[Measured]]] = [([], [one]) for one in measured]
    return {name: found.after for name, found in zip(names, intervals_of(pairs), strict=True)}


def _cell(task: str, name: str, measures: Mapping[str, Measured], intervals: Mapping[str, Interval | None]) -> str:
    """A share in per cent, a cosine as it is, with its interval; "" for what is not there."""
    if not name:
        return ""
    value, unit = measures[name].value, "cosine" if name in ("clip_t", "clip_i") else "%"
    if not math.isfinite(value):
        return show_score(None)
    shown = f"{value:.3f}" if unit == "cosine" else show_score(value, unit)
    return f"{shown} {show_interval(intervals.get(f'{task}/{name}'), unit)}".strip()


def _mark(measured: Measured, interval: Interval | None) -> str:
    return chance_mark(measured.chance, interval) or ""


def _label(name: str) -> str:
    head, _, reader = name.partition("/")
    return LABELS.get(head, head) + (f", {READERS.get(reader, reader)}" if reader else "")


def legend(result: Result) -> list[str]:
    """What the table's columns, and the measures that it has, mean."""
    shown = [row[2] for row in rows_of(result)]
    drawn = any(READ[name] in label for name in READ for label in shown)
    named = [name for name in (*READ.values(), *READERS.values()) if any(name in label for label in shown)]
    notes = [f"{name}: {MEASURES[name]}" for name in (*ANSWERS.values(), *named)]
    plain = [label.removeprefix(f"{LABELS['score']}: ") for label in shown]
    for name, known in EXPLAINED.items():
        if any(label.startswith(LABELS[name]) for label in plain):
            notes.append(f"{LABELS[name]}: {MEASURES[known]}")
    notes += ["drawings are sampled, so that theirs stand in the last column"] if drawn else []
    return [*notes, INTERVALS]


def markdown(result: Result) -> str:
    """The table, the summary and what was left out, as Markdown."""
    lines = [f"| task | items | measure | {' | '.join(ANSWERS.values())} |", "|---|---:|---|---:|---:|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows_of(result)]
    lines += ["", "| mean over tasks | |", "|---|---:|"]
    lines += [f"| {name} | {show_score(value)} |" for name, value in result.summary.items()]
    lines += ["", *(f"- {note}" for note in legend(result))]
    if result.left_out:
        lines += ["", "Left out:", ""] + [
            f"- {LABELS.get(name, name)}: {reason}" for name, reason in result.left_out.items()
        ]
    return "\n".join(lines) + "\n"


WIDTHS = (42, 18, 18)
"""Of the terminal's columns: with the gaps between them, 80 characters."""


def rich_table(result: Result) -> Group:
    """The same rows for a terminal, the metrics of each task below its name; 80 characters wide."""
    under = _lines()
    under.add_row(*(Text(name, "dim") for name in ("measure", *ANSWERS.values())))
    lines: list[Text | Table] = [Text("Scores", "bold"), under]
    before = ""
    for task, count, *cells in rows_of(result):
        if task != before:
            under = _lines()
            lines += [Text(f"{TASKS.get(task, task.replace('_', ' '))} ({count} items)", "bold"), under]
        under.add_row(Text(f"  {cells[0]}"), *map(Text, cells[1:]))
        before = task
    left_out = (f"left out: {LABELS.get(name, name)}: {why}" for name, why in result.left_out.items())
    notes = [*legend(result), *left_out]
    return Group(*lines, *(Text(note, "dim") for note in notes))


def _lines() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0), width=sum(WIDTHS) + 2)
    for place, width in enumerate(WIDTHS):
        table.add_column(justify="right" if place else "left", width=width, no_wrap=bool(place))
    return table
