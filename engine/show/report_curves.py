"""How training went: the curves of one run, or of two over each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .charts import SMOOTH_FROM, line_chart, stacked_chart
from .in_words import clipping_words, own_names, reward_lines
from .markup import section, words
from .names import STAGES, reward_words, task_words
from .run_files import Points, Rows, Run, metrics_in, points

SHARE = "share"
MAX_LINES = 6
"""Of one chart: as many as it has colours."""


class Curve(NamedTuple):
    """A chart of lines: what is drawn, under which names."""

    title: str
    metrics: Mapping[str, str]
    """Metric -> name of its line."""
    unit: str
    note: str = ""
    from_zero: bool = True


KINDS = {"text": "text", "image": "picture"}
"""Kinds of tokens."""
CURVES = (
    Curve(
        "How far training has moved the model (KL)",
        {"kl/text": "text", "kl/image": "picture"},
        "nats per token",
        "From the starting model, of each kind of token.",
    ),
    Curve(
        "How undecided the model is (entropy)",
        {"entropy/text": "text", "entropy/image": "picture"},
        "nats per token",
        "A fall to 0 means that it has stopped exploring.",
    ),
    Curve(
        "Tokens whose change was cut off (clipping)",
        {"clip_ratio/region_mean": "all", "clip_ratio/low_mean": "below", "clip_ratio/high_mean": "above"},
        SHARE,
        "Share of tokens whose probability changed by more than epsilon allows; always 0 with one update per rollout.",
    ),
    Curve(
        "Differences within groups",
        {"reward_std": "standard deviation of the reward", "frac_reward_zero_std": "share of groups without any"},
        "reward; share",
        "Groups learn from differences between their members.",
    ),
    Curve(
        "Groups drawn anew (refill)",
        {"refill/tokens_wasted_fraction": "share of the step's tokens that was given up"},
        SHARE,
        "Groups without any difference, replaced by other prompts; the reward above is of what was left.",
    ),
    Curve("Speed", {"tokens_per_second": "sampled and trained"}, "tokens per second"),
    Curve(
        "Early looks at half-drawn pictures (preview)",
        {"rollout/preview_acceptance": "share accepted", "rollout/preview_threshold": "score asked for"},
        SHARE,
        "Those below the threshold are drawn again.",
    ),
    Curve(
        "How far training has moved the model on anchors (KL)",
        {"kl_anchors/text": "text", "kl_anchors/image": "picture"},
        "nats per token",
        "On requests that earn nothing and hold in place what is not trained on; part of the KL above.",
    ),
    Curve("Loss", {"loss": "loss"}, "", "No measure of progress.", False),
    Curve("Gradient norm", {"grad_norm": "before clipping"}, "", "A spike is a step that would have gone far."),
    Curve(
        "Sampler against trainer",
        {"rollout/replay_logp_max_abs": "largest difference"},
        "nats",
        "The same tokens' log-probabilities, computed twice; near 0 is right.",
    ),
    Curve(
        "Correction for the sampler",
        {f"sampling/importance_sampling_ratio/{kind}": kind for kind in ("mean", "min", "max")},
        "weight of a token's loss",
        "1 where sampler and trainer agree (importance_correction).",
    ),
)
HOW_TO_READ = (
    "Beside each name: the mean of the first tenth of the steps → that of the last. Hover over a chart, touch it, or "
    "use the arrow keys, for the values of a step."
)
SMOOTHED = f" Curves of {SMOOTH_FROM} steps and more are smoothed, over a faint line of every step."


def curves(run: Run) -> str:
    """Every curve that the run has values for."""
    rows = run.rows
    drawn = reward_chart(run) + held_out_chart(rows) + "".join(line_of(curve, rows) for curve in CURVES[:2])
    drawn += sampled_chart(rows) + stacked_chart("Time of a step", stages(rows), unit="seconds")
    drawn += "".join(line_of(noted(curve, run), rows) for curve in CURVES[2:])
    lead = HOW_TO_READ + (SMOOTHED if len(rows) >= SMOOTH_FROM else "")
    body = rewards_said(run) + f'<div class="charts">{drawn}</div>' if drawn else ""
    return section("How training went", body, "curves", lead)


def rewards_said(run: Run) -> str:
    """What the total reward is made of, and who says each part."""
    lines = reward_lines(run.rewards)
    items = "".join(f"<li>{words(line)}</li>" for line in lines[1:])
    return f'<p><b>{words(lines[0][:1].upper() + lines[0][1:])}</b></p><ul class="note">{items}</ul>' if lines else ""


def noted(curve: Curve, run: Run) -> Curve:
    """With what the run's own settings say of it."""
    if curve.title == "Loss":
        return curve._replace(note=f"{loss_words(run.settings)} {curve.note}")
    if curve.title == "Gradient norm":
        norms = [value for _, value in points(run.rows, "grad_norm")]
        said = clipping_words(norms, run.settings.get("max_grad_norm"))
        return curve._replace(note=f"{said[:1].upper()}{said[1:]}. {curve.note}")
    return curve


def loss_words(settings: Mapping[str, object]) -> str:
    """What the loss is the sum of."""
    parts = ["minus the advantages, token by token, which is about 0 only where no trajectory is left out"]
    for name, what in (("beta", "the KL"), ("anchor_beta", "the KL on anchors")):
        weight = settings.get(name)
        if isinstance(weight, int | float) and weight:
            parts.append(f"{name} = {weight:g} times {what}")
    return f"The sum of {'; '.join(parts)}."


def reward_chart(run: Run, title: str = "Reward") -> str:
    """The total and each reward, by their names in words."""
    rows, own = run.rows, own_names(run.rewards)
    parts = metrics_in(rows, "rewards/", "/mean")
    metrics = {"reward": "total"} | {name: _reward_of(name, own) for name in parts}
    note = "Mean over the step's trajectories; higher is better."
    return line_chart(title, _lines(rows, metrics), unit="reward", note=note)


def held_out_chart(rows: Rows) -> str:
    """Scores that were made on the way: the mean of the main ones, or what there is of them."""
    shown = [
        name
        for name in metrics_in(rows, "eval/")
        if name == "eval/score" or "/score/" in name or "/all_right/cnn" in name
    ]
    metrics = {name: _eval_words(name.removeprefix("eval/")) for name in shown[:MAX_LINES]}
    note = "Held-out items, scored every eval_steps steps; training never sees them."
    return line_chart("Held-out scores on the way", _lines(rows, metrics), unit="share right", note=note)


def _eval_words(name: str) -> str:
    task, _, measure = name.partition("/")
    return "mean of main scores" if name == "score" else f"{task_words(task)}, {measure.replace('/', ' ')}"


def line_of(curve: Curve, rows: Rows) -> str:
    lines = _lines(rows, {name: words for name, words in curve.metrics.items() if _sampled(rows, name)})
    return line_chart(curve.title, lines, unit=curve.unit, from_zero=curve.from_zero, note=curve.note)


def _lines(rows: Rows, metrics: Mapping[str, str]) -> dict[str, Points]:
    return {words: points(rows, name) for name, words in metrics.items()}


def _sampled(rows: Rows, metric: str) -> bool:
    """False for a metric of a kind of tokens that the run never sampled."""
    kind = metric.partition("/")[2]
    if kind not in KINDS:
        return True
    counts = points(rows, f"tokens/{kind}")
    return not counts or any(count for _, count in counts)


def sampled_chart(rows: Rows) -> str:
    """What was sampled, and how much of it dynamic group scaling left out."""
    tokens = dict(points(rows, "num_tokens"))
    saved = dict(points(rows, "dgs/tokens_saved_fraction"))
    trained = [(x, count * (1 - saved.get(x, 0.0))) for x, count in tokens.items()]
    pruned = [(x, count * saved[x]) for x, count in tokens.items() if x in saved]
    return stacked_chart(
        "Sampled tokens",
        {"trained on": trained, "left out": pruned},
        unit="tokens per step",
        note="Dynamic group scaling leaves out trajectories that would teach little.",
    )


def stages(rows: Rows) -> dict[str, Points]:
    """Stage of a step -> its seconds; `rollout/prefill` and its like are summed as `rollout`."""
    totals: dict[str, dict[float, float]] = {}
    for name in metrics_in(rows, "seconds/"):
        code = name.split("/")[1]
        stage = totals.setdefault(STAGES.get(code, code), {})
        for step, value in points(rows, name):
            stage[step] = stage.get(step, 0.0) + value
    return {stage: sorted(seconds.items()) for stage, seconds in totals.items()}


def overlaid(runs: Sequence[tuple[str, Run]], title: str = "Curves of both", anchor: str = "curves") -> str:
    """The same curves of several runs over each other, a chart for each metric.

    Args:
        runs: name -> run; the names are those of the lines.
        title, anchor: of the section.
    """
    metrics = dict.fromkeys(
        ["reward", *(name for _, run in runs for name in metrics_in(run.rows, "rewards/", "/mean"))]
    )
    own = frozenset[str]().union(*(own_names(run.rewards) for _, run in runs))
    charts = [
        Curve("Reward, total" if m == "reward" else f"Reward: {_reward_of(m, own)}", {m: ""}, "reward", "", False)
        for m in metrics
    ]
    for curve in CURVES:
        charts += [
            Curve(
                f"{curve.title}: {words}" if len(curve.metrics) > 1 else curve.title, {name: ""}, curve.unit, curve.note
            )
            for name, words in curve.metrics.items()
            if any(_sampled(run.rows, name) for _, run in runs)
        ]
    charts.append(Curve("Time of a step", {"step_time": ""}, "seconds"))
    drawn = "".join(
        line_chart(
            chart.title,
            {name: points(run.rows, metric) for name, run in runs},
            unit=chart.unit,
            from_zero=chart.from_zero,
            note=chart.note,
        )
        for chart in charts
        for metric in chart.metrics
    )
    return section(title, f'<div class="charts">{drawn}</div>' if drawn else "", anchor, HOW_TO_READ + SMOOTHED)


def _reward_of(metric: str, own: frozenset[str]) -> str:
    """A reward in words; one of a user's own by its name alone, beside ours of that name or the total in quotes."""
    name = metric.split("/")[1]
    return reward_words(name) if name not in own else f"“{name}”" if name == "reward" else name
