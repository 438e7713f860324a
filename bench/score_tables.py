"""Tables of held-out scores over seeds, as README.md and docs/results.md show them, from bench/results alone.

    python bench/score_tables.py             the tables on stdout
    python bench/score_tables.py --write     puts them between their marks in README.md and docs/results.md

Whole drawings come before their attributes, the classifier that no reward uses before the checker that gives rewards.
A change has Student's 95 % interval over seeds, each of which has its own base; it is marked where it lies below 0, and
a score where guessing lies within its interval or above it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

Run = Mapping[str, float]
"""One seed's scores: `before/task/measure`, `after/task/measure`."""

ANSWERS = {
    "rec": "**recognition**: is the concept in the photo? (balanced accuracy; .5 is chance)",
    "vqa": "questions about a photo of the concept",
    "qa": "questions about the concept, no photo",
    "rea": "what an indirect request means (share of its words)",
    "dense_rea": "what a long indirect request means (share of its words)",
    "general_vqa": "*not trained on:* questions about photos of nobody in particular",
}
DRAWINGS = {
    "pure_gen": "draw the concept",
    "dense_gen": "draw the concept, long requests",
    "rea_gen": "infer what is meant, then draw it",
    "dense_rea_gen": "infer it from a long request, draw it",
    "general_image": "*not trained on:* draw a caption without a concept",
}
CHANCE = {"rec": 0.5}
HOW = {"score/sampled": "sampled answer", "score/greedy": "most likely answer"}
READ = {
    "all_right/cnn": "drawings right, classifier",
    "all_right/checker": "drawings right, checker",
    "attributes/cnn": "attributes right, classifier",
    "attributes/checker": "attributes right, checker",
}
CORL = {
    "t2i/all_right/cnn": "captions: drawings right, classifier",
    "t2i/all_right/checker": "captions: drawings right, checker",
    "t2i/attributes/cnn": "captions: attributes right, classifier",
    "t2i/attributes/checker": "captions: attributes right, checker",
    "mcq/score/sampled": "multiple choice, sampled answer",
    "mcq/score/greedy": "multiple choice, most likely answer",
    "oe/score/sampled": "open questions, sampled answer",
    "oe/score/greedy": "open questions, most likely answer",
}


class Change(NamedTuple):
    """A score before and after, over seeds."""

    before: float
    after: float
    low: float
    """95 % interval of the change's mean."""
    high: float
    worst: float
    """The smallest change of a seed."""
    mark: str
    """fell, at chance, below chance, or nothing."""

    @property
    def change(self) -> float:
        return self.after - self.before

    @property
    def interval(self) -> str:
        return f"[{signed(self.low)}, {signed(self.high)}]" if math.isfinite(self.low) else "(one seed)"


def students(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean; all numbers of a single one."""
    from scipy.stats import t

    if len(values) < 2:
        return -math.inf, math.inf
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values) - half, statistics.mean(values) + half


def change_of(before: Sequence[float], after: Sequence[float], chance: float | None = None) -> Change:
    """Of one score's values, a seed each."""
    changes = [b - a for a, b in zip(before, after, strict=True)]
    low, high = students(changes)
    mark = "fell" if high < 0 else ""
    if chance is not None and students(after)[0] <= chance:
        mark = "at chance" if chance <= students(after)[1] else "below chance"
    return Change(statistics.mean(before), statistics.mean(after), low, high, min(changes), mark)


def of_runs(runs: Sequence[Run], name: str) -> Change | None:
    """Of `task/measure`; None where a run did not keep it."""
    sides = [[run.get(f"{when}/{name}") for run in runs] for when in ("before", "after")]
    before, after = ([value for value in side if value is not None] for side in sides)
    if not len(before) == len(after) == len(runs):
        return None
    return change_of(before, after, CHANCE.get(name.partition("/")[0]))


def mean_of(runs: Sequence[Run], tasks: Sequence[str], measure: str) -> list[dict[str, float]]:
    """Each run's mean over tasks, as a score of its own."""
    return [
        {
            f"{when}/mean/{measure}": statistics.mean(run[f"{when}/{task}/{measure}"] for task in tasks)
            for when in ("before", "after")
        }
        for run in runs
    ]


def share(value: float, digits: int = 3) -> str:
    """`.651`, as a score of at most 1 is written here."""
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if text.startswith("0.") else text


def signed(value: float, digits: int = 3) -> str:
    """`+.133`, `−.041`."""
    return ("−" if round(value, digits) < 0 else "+") + share(abs(value), digits)


# Tables ---------------------------------------------------------------------------------------------------------------


def readme_table(runs: Sequence[Run]) -> Iterator[str]:
    """README's: a row per task."""
    yield from ("| answers that are right | items | sampled answer | most likely answer |", "|---|--:|--:|--:|")
    for task, words in ANSWERS.items():
        yield _readme_row(runs, task, words, HOW)
    yield ""
    yield "| drawings that show what was asked | items | drawings right | attributes right |"
    yield "|---|--:|--:|--:|"
    for task, words in DRAWINGS.items():
        yield _readme_row(runs, task, words, ("all_right/cnn", "attributes/cnn"))


def _readme_row(runs: Sequence[Run], task: str, words: str, measures: Sequence[str] | Mapping[str, str]) -> str:
    found = [change for measure in measures if (change := of_runs(runs, f"{task}/{measure}")) is not None]
    cells = [f"{share(c.before)} → {share(c.after)} {c.interval}" + (f" **{c.mark}**" if c.mark else "") for c in found]
    return f"| {words} | {runs[0][f'before/{task}/num_items']:.0f} | {' | '.join(cells)} |"


VARIANT_ROWS = (
    ("sampled answers", ANSWERS, "score/sampled"),
    ("most likely answers", ANSWERS, "score/greedy"),
    ("drawings right, classifier", DRAWINGS, "all_right/cnn"),
    ("drawings right, checker", DRAWINGS, "all_right/checker"),
    ("attributes right, classifier", DRAWINGS, "attributes/cnn"),
    ("attributes right, checker", DRAWINGS, "attributes/checker"),
    ("recognition, sampled answer (.5 is chance)", ("rec",), "score/sampled"),
    ("recognition, most likely answer", ("rec",), "score/greedy"),
    ("not trained on: questions, most likely answer", ("general_vqa",), "score/greedy"),
    ("not trained on: captions, drawings right, classifier", ("general_image",), "all_right/cnn"),
    ("not trained on: captions, attributes right, classifier", ("general_image",), "attributes/cnn"),
)
"""What variants of a run are compared by: in words, tasks (of several those that are trained), measure."""


def variants_table(results: Mapping[str, Sequence[Run]]) -> Iterator[str]:
    """A row per score, a column per variant: the change with its 95 % interval over seeds."""
    yield f"| change after training | {' | '.join(results)} |"
    yield "|---|" + "---|" * len(results)
    for words, tasks, measure in VARIANT_ROWS:
        chosen = [task for task in tasks if len(tasks) == 1 or not task.startswith("general")]
        means = [of_runs(mean_of(runs, chosen, measure), f"mean/{measure}") for runs in results.values()]
        cells = [
            "not kept" if c is None else f"{signed(c.change)} {c.interval}" + f" {c.mark}" * bool(c.mark) for c in means
        ]
        yield f"| {words} | {' | '.join(cells)} |"


HEAD = (
    "| held-out task | measured by | items | before | after | change [95 %] | worst seed | |",
    "|---|---|--:|--:|--:|--:|--:|---|",
)


def task_table(runs: Sequence[Run]) -> Iterator[str]:
    """Every task and measure of Sync-R1, then means over the tasks that are trained."""
    yield from HEAD
    for tasks, measures in ((ANSWERS, HOW), (DRAWINGS, READ)):
        for task, words in tasks.items():
            for measure, how in measures.items():
                items = f"{runs[0][f'before/{task}/num_items']:.0f}"
                yield _row(of_runs(runs, f"{task}/{measure}"), words, how, items)
                words = ""
        trained = [task for task in tasks if not task.startswith("general")]
        words = f"**mean over the {len(trained)} tasks that are trained**"
        for measure, how in measures.items():
            yield _row(of_runs(mean_of(runs, trained, measure), f"mean/{measure}"), words, how, "")
            words = ""


def corl_table(results: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]], items: int) -> Iterator[str]:
    """CoRL's: a row per run and measure that was kept."""
    yield from HEAD
    for name, runs in results.items():
        flat = [{f"{when}/{key}": v for when, of in run.items() for key, v in of.items()} for run in runs]
        words = name
        for measure, how in CORL.items():
            change = of_runs(flat, measure)
            if change is not None:
                yield _row(change, words, how, str(items))
                words = ""


def _row(change: Change | None, words: str, how: str, items: str) -> str:
    if change is None:
        return f"| {words} | {how} | {items} | not kept | | | | |"
    cells = (share(change.before), share(change.after), f"{signed(change.change)} {change.interval}")
    return f"| {words} | {how} | {items} | {' | '.join(cells)} | {signed(change.worst)} | {change.mark} |"


def tables() -> dict[tuple[str, str], str]:
    """(Page, mark) -> what stands there."""
    runs = json.loads((RESULTS / "ablations.json").read_text())["default"]
    corl = json.loads((RESULTS / "corl.json").read_text())
    made = {
        ("README.md", "results"): readme_table(runs),
        ("docs/results.md", "sync_r1"): task_table(runs),
        ("docs/results.md", "corl"): corl_table(corl, 100),
    }
    return {place: "\n".join(lines) + "\n" for place, lines in made.items()}


def between(text: str, mark: str) -> re.Match[str]:
    """What stands between a mark and its end."""
    found = re.search(rf"(?<=<!-- {mark} -->\n)(.*)(?=<!-- /{mark} -->)", text, re.DOTALL)
    if found is None:
        raise ValueError(f"expected <!-- {mark} --> … <!-- /{mark} -->, each on a line of its own")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into their pages")
    write = parser.parse_args().write
    for (page, mark), table in tables().items():
        if not write:
            print(f"{page}, {mark}:\n\n{table}\n")
            continue
        text = (ROOT / page).read_text()
        found = between(text, mark)
        (ROOT / page).write_text(text[: found.start()] + table + text[found.end() :])


if __name__ == "__main__":
    main()
