"""The story of a run in plain sentences: what was trained, what got better, what got worse, what is worth a look."""

from __future__ import annotations

from collections.abc import Sequence

from .markup import section, words
from .names import SUMMARY
from .outcome import outcome_of
from .pulse import duration
from .report_cost import dgs_words, total_seconds
from .report_heading import data_of, method_of, model_of
from .report_scores import direction, rows_of_run
from .run_files import Rows, Run, ends, number_of, values_of
from .scores import ScoreRow, measures_in, show_change, show_interval, show_score
from .warnings import LEAST, Watch, of_scores, warnings_of

BETTER_WORSE = ("What got better", "What got worse")
NEWEST = 500
"""Steps that are looked at for warnings while a run goes on."""
MAX_LINES = 12
"""Of better or worse; the table has all."""


def story(run: Run, trained: str = "", compared: str = "", warned: Sequence[str] = ()) -> str:
    """The first thing to read.

    Args:
        run: whose story.
        trained: sentences on what was trained, where the settings alone do not tell it.
        compared: which two models the scores before and after are of, where that is not plain.
        warned: what its trainings are to be warned of, where it has several.
    """
    rows = [row for row in rows_of_run(run) if row.task != SUMMARY]
    parts = [f"<p>{words(trained or what_was_trained(run))} {words(_reward(run.rows))}</p>"]
    parts.append(changes(rows, compared))
    found = [*warnings_in(run, rows), *warned]
    if found:
        items = "".join(f"<li>{words(line)}</li>" for line in found)
        parts.append(f'<h3>Worth a look</h3><ul class="warnings">{items}</ul>')
    parts.append(f"<p>{words(' '.join([_cost(run), *dgs_words(run.rows)]))}</p>")
    return section("In short", "".join(parts), "story")


def warnings_in(run: Run, table: Sequence[ScoreRow] = ()) -> list[str]:
    """What is to be warned of. While a long run goes on its beginning and its newest steps are looked at: all of them
    would take seconds, for a page that is soon written anew."""
    count = len(run.rows)
    if count <= NEWEST or outcome_of(run).kind != "running":
        return [one.text for one in warnings_of(run.rows, table)]
    watch = Watch()
    for index in (*range(LEAST), *range(max(LEAST, count - NEWEST), count)):
        watch.see(run.rows[index], index + 1)
    return [one.text for one in (*watch.found.values(), *of_scores(table))]


def what_was_trained(run: Run) -> str:
    """`The tiny base … was trained by Sync-R1 on …: 100 steps, each of 16 requests with 8 tries.`"""
    prompts, tries = (number_of(run.settings, name) for name in ("prompts_per_step", "num_generations"))
    count, planned = len(run.rows), run.planned
    steps = f"{count} steps" if planned is None or planned <= count else f"{count} of {planned} steps"
    shape = f", each of {prompts:.0f} requests with {tries:.0f} tries of each" if prompts and tries else ""
    verb = "is being trained" if outcome_of(run).kind == "running" else "was trained"
    model = model_of(run)
    return f"{model[:1].upper()}{model[1:]} {verb} by {method_of(run)} on {data_of(run)}: {steps}{shape}."


def _reward(rows: Rows) -> str:
    values = values_of(rows, "reward")
    if len(values) < 2:
        return ""
    first, last = ends(values)
    way = "rose" if last > first else "fell"
    moved = f"{way} from {first:.2f} to {last:.2f}" if f"{first:.2f}" != f"{last:.2f}" else f"stayed at {last:.2f}"
    where = "step" if len(values) < 20 else "tenth of the steps"
    return f"The mean reward in training {moved} (first and last {where}, which had other requests)."


def changes(rows: Sequence[ScoreRow], compared: str = "", heads: tuple[str, str] = BETTER_WORSE) -> str:
    """Lists of what got better, worse, and neither, by each task's first measure.

    Args:
        rows: of tasks, without the summary.
        compared: a sentence ahead of them, on what is compared.
        heads: of the lists of what is better and worse.
    """
    firsts: dict[str, ScoreRow] = {}
    for row in rows:
        if row.change is not None:
            firsts.setdefault(row.task, row)
    if not firsts:
        return "<p>Nothing is scored before and after yet.</p>" if not rows else ""
    sorted_in: dict[str, list[ScoreRow]] = {"better": [], "worse": [], "unclear": []}
    for row in firsts.values():
        sorted_in[direction(row)].append(row)
    sure = any(row.change_interval for row in firsts.values())
    parts = [f"<p>{words(compared)}</p>" if compared else ""]
    nothing = "Nothing, as far as the intervals tell." if sure else "Nothing."
    for kind, sign, head in (("better", "↑", heads[0]), ("worse", "↓", heads[1])):
        found = sorted(sorted_in[kind], key=lambda row: -abs(row.change or 0.0))
        lines = "".join(f"<li>{words(in_words(row))}</li>" for row in found[:MAX_LINES])
        body = f"<ul>{lines}</ul>" if lines else f"<p>{nothing}</p>"
        parts.append(f'<div class="{kind}"><h3>{sign} {words(head)}</h3>{body}</div>')
    unclear = "; ".join(f"{row.label} ({show_change(row)})" for row in sorted_in["unclear"])
    if unclear:
        why = "the interval of the change holds 0" if sure else "the same score"
        parts.append(f'<p class="unclear">No clear change ({why}): {words(unclear)}.</p>')
    plain = [row._replace(marks=()) for row in firsts.values()]  # the table explains marks
    explained = "; ".join(f"{name}: {said}" for name, said in measures_in(plain).items())
    parts.append(f'<p class="note">{words(explained[:1].upper() + explained[1:])}</p>' if explained else "")
    return f'<div class="changes">{"".join(parts)}</div>'


def in_words(row: ScoreRow) -> str:
    """`Draw the concept: 11.1 % → 48.6 % (+37.5, 95 % interval [+25, +50]), drawings right, classifier, 72 items`."""
    interval = show_interval(row.change_interval, row.unit, signed=True)
    change = show_change(row) + (f", 95 % interval {interval}" if interval else "")
    tail = f", {row.measure}" if row.measure else ""
    tail += f", {row.unit}" if row.unit and row.family != "drawings" else ""
    tail += f", {row.num_items} items" if row.num_items else ""
    return f"{row.label}: {show_score(row.before, row.unit)} → {show_score(row.after, row.unit)} ({change}){tail}"


def _cost(run: Run) -> str:
    seconds, tokens = sum(values_of(run.rows, "step_time")), sum(values_of(run.rows, "num_tokens"))
    whole = total_seconds(run)
    parts = []
    if whole:
        parts.append(
            f"It took {duration(whole)}" + (f", {duration(seconds)} of them in training steps" if seconds else "")
        )
    elif seconds:
        parts.append(f"Its training steps took {duration(seconds)}")
    if tokens:
        parts.append(f"{tokens:,.0f} tokens were sampled")
    return "; ".join(parts) + "." if parts else ""
