"""What a run cost, and what dynamic group scaling saved of it."""

from __future__ import annotations

from collections.abc import Mapping

from .markup import cell, facts, section, table, words
from .pulse import duration
from .report_curves import stages
from .run_files import Rows, Run, number_of, points, table_of, values_of

GIB = 1 << 30


def cost(run: Run, trainings: str = "") -> str:
    """Time by part of the run and by stage of a step, speed, memory, and what was sampled and left out.

    Args:
        run: whose.
        trainings: a table of what each of its trainings cost, where it has several.
    """
    body = facts(cost_facts(run)) + dgs_sentences(run) + trainings + _times(run)
    return section("What it cost", body, "cost")


COST_COLUMNS = (
    "Steps",
    "Seconds a step",
    "Tokens sampled",
    "Tokens/s, median",
    "Left out by group scaling",
    "Given up",
)


def cost_line(run: Run) -> list[str]:
    """The same of one training in a line, in the order of COST_COLUMNS."""
    rows = run.rows
    seconds, tokens = sum(values_of(rows, "step_time")), sum(values_of(rows, "num_tokens"))
    speed = sorted(values_of(rows, "tokens_per_second"))
    counts, given_up = dict(points(rows, "num_tokens")), values_of(rows, "rollout/dropped_fraction")
    left_out = sum(counts.get(step, 0.0) * share for step, share in points(rows, "dgs/tokens_saved_fraction"))
    return [
        str(len(rows)),
        f"{seconds / len(rows):.3g}" if seconds else "–",
        f"{tokens:,.0f}" if tokens else "–",
        f"{speed[len(speed) // 2]:,.0f}" if speed else "–",
        f"{100 * left_out / tokens:.0f} % of tokens" if tokens else "–",
        f"{100 * sum(given_up) / len(given_up):.1f} % of trajectories" if given_up else "–",
    ]


def cost_facts(run: Run) -> list[tuple[str, str]]:
    """Names and values; "" where the run does not say."""
    rows = run.rows
    seconds, tokens = sum(values_of(rows, "step_time")), sum(values_of(rows, "num_tokens"))
    speed = sorted(values_of(rows, "tokens_per_second"))
    memory, gpu = (number_of(run.status, "peak_bytes", name) for name in ("memory", "gpu"))
    cache = values_of(rows, "rollout/kv_mib")
    return [
        ("In all", duration(total_seconds(run)) if total_seconds(run) else ""),
        ("In training steps", duration(seconds) if seconds else ""),
        ("A step", f"{seconds / len(rows):.3g} s, mean" if seconds else ""),
        ("Tokens sampled", f"{tokens:,.0f}" if tokens else ""),
        ("Speed", f"{speed[len(speed) // 2]:,.0f} tokens/s, median" if speed else ""),
        ("Memory, at most", f"{memory / GIB:.2f} GiB" if memory else ""),
        ("GPU memory, at most", f"{gpu / GIB:.2f} GiB" if gpu else ""),
        ("Of it keys and values", f"{max(cache):,.0f} MiB" if cache else ""),
    ]


def total_seconds(run: Run) -> float:
    """From the run's folder being made to its end, without what lay between an interruption and going on."""
    clocked = table_of(run.status, "seconds")
    return sum(number_of(clocked, name) or 0.0 for name in clocked)


def dgs_words(rows: Rows) -> list[str]:
    """What dynamic group scaling did, in sentences; [] where it did nothing."""
    tokens = dict(points(rows, "num_tokens"))
    saved = points(rows, "dgs/tokens_saved_fraction")
    kept = values_of(rows, "dgs/keep_fraction")
    total = sum(tokens.get(step, 0.0) for step, _ in saved)
    left_out = sum(tokens.get(step, 0.0) * share for step, share in saved)
    said = []
    if kept and total and left_out > 0:
        said.append(
            f"It trained on {100 * sum(kept) / len(kept):.0f} % of the trajectories and left out "
            f"{left_out:,.0f} of {total:,.0f} sampled tokens ({100 * left_out / total:.0f} %), "
            "those that would have taught little."
        )
    given_up = values_of(rows, "rollout/dropped_fraction")
    if given_up and any(given_up):
        said.append(f"{100 * sum(given_up) / len(given_up):.1f} % of the trajectories were given up half-drawn.")
    steps = values_of(rows, "dgs/decode_steps_saved_fraction")
    if steps and any(steps):
        said.append(
            f"Early looks saved {100 * sum(steps) / len(steps):.0f} % of the drawing steps, against drawing every try "
            "to its end."
        )
    tries = values_of(rows, "rollout/attempts_mean")
    if tries and any(value > 1 for value in tries):
        said.append(f"A trajectory took {sum(tries) / len(tries):.2f} tries on average.")
    return said


def dgs_sentences(run: Run) -> str:
    said = dgs_words(run.rows)
    return f"<p><b>Dynamic group scaling.</b> {words(' '.join(said))}</p>" if said else ""


def _times(run: Run) -> str:
    """Two tables in one: parts of the run, stages of its steps."""
    clocked = table_of(run.status, "seconds")
    whole = {str(name): number_of(clocked, name) or 0.0 for name in clocked}
    steps = {name: sum(seconds for _, seconds in found) for name, found in stages(run.rows).items()}
    bodies = [_shares("Of the run", whole), _shares("Of the training steps", steps)]
    return table(("Time", "Seconds", "Share"), [body for body in bodies if body]) if any(bodies) else ""


def _shares(title: str, seconds: Mapping[str, float]) -> str:
    total = sum(seconds.values())
    if total <= 0:
        return ""
    lines = "".join(
        f"<tr>{cell('Time', words(name), '', 'th')}{cell('Seconds', f'{value:,.1f}')}"
        f"{cell('Share', f'{100 * value / total:.0f} %')}</tr>"
        for name, value in seconds.items()
    )
    return f'<tbody><tr class="group"><th colspan="3" scope="rowgroup">{words(title)}</th></tr>{lines}</tbody>'
