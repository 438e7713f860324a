"""One page about a run, from the files in its folder: `write_report(run_dir)` makes `report.html`.

The page stands alone: no scripts, nothing loaded from elsewhere, pictures embedded.  Whatever is missing (an
interrupted run) is left out.  Text that comes from data is escaped, and a Content-Security-Policy forbids the rest.
"""

from __future__ import annotations

import base64
import io
import json
import string
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from .charts import line_chart, stacked_chart
from .display import duration
from .scores import SUMMARY, ScoreRow, measures_in, score_rows, show_change, show_score

TEMPLATE = Path(__file__).with_name("report_template.html")
MAX_SHEETS, MAX_PAIRS = 8, 24
MAX_EMBEDDED_BYTES = 400_000
"""A larger picture is embedded as WebP: the page is to be mailed around."""

Rows = Sequence[Mapping[str, Any]]


def write_report(run_dir: Path) -> Path:
    """Writes `run_dir/report.html` from what the folder holds, and returns its path; any file may be missing."""
    run_dir = Path(run_dir)
    rows = read_jsonl(run_dir / "metrics.jsonl")
    settings, environment = _read_settings(run_dir / "config.yaml"), _read_json(run_dir / "environment.json")
    scores = _read_json(run_dir / "scores.json")
    table = score_rows(scores.get("before"), scores.get("after"))
    body = "\n".join(
        [
            _heading(run_dir, rows, settings, environment),
            _tiles(rows, table),
            _warnings(rows),
            _score_table(table),
            _pairs(run_dir),
            _charts(rows),
            _sheets(run_dir),
            _settings(settings, environment),
        ]
    )
    page = string.Template(TEMPLATE.read_text(encoding="utf-8"))
    path = run_dir / "report.html"
    path.write_text(page.substitute(title=escape(f"{run_dir.resolve().name}: report"), body=body), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, without lines that a killed run left unfinished; [] when there is no file."""
    rows = []
    for line in _read_text(path).splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # an integer of 5000 digits is a ValueError
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path) or "{}")
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(_read_text(path))
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError):  # PyYAML's own and others
        return {}
    return content if isinstance(content, dict) else {}


def _points(rows: Rows, name: str) -> list[tuple[float, float]]:
    """(step, value) where the metric has a finite value; steps are counted from 1."""
    found: list[tuple[int, Any]] = [(index + 1, row.get(name)) for index, row in enumerate(rows)]
    return [(float(step), float(value)) for step, value in found if _is_number(value)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # not NaN, no overflow


def _series(rows: Rows, names: Mapping[str, str]) -> dict[str, list[tuple[float, float]]]:
    """Label -> points, for {metric name: label}."""
    return {label: _points(rows, name) for name, label in names.items()}


def _stages(rows: Rows) -> dict[str, list[tuple[float, float]]]:
    """Stage -> seconds per step; `rollout/prefill` and its like are summed as `rollout`."""
    totals: dict[str, dict[float, float]] = {}
    for name in dict.fromkeys(name for row in rows for name in row if name.startswith("seconds/")):
        stage = totals.setdefault(name.split("/")[1], {})
        for step, value in _points(rows, name):
            stage[step] = stage.get(step, 0.0) + value
    return {stage: sorted(points.items()) for stage, points in totals.items()}


def _ends(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Means over the first and the last tenth: single steps are noisy."""
    count = max(1, len(points) // 10)
    values = [value for _, value in points]
    return sum(values[:count]) / count, sum(values[-count:]) / count


def _heading(run_dir: Path, rows: Rows, settings: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    planned = settings.get("max_steps")
    state = f"{len(rows)} step{'' if len(rows) == 1 else 's'}"
    if isinstance(planned, int):
        state = f"all {planned} steps done" if len(rows) >= planned else f"stopped after {len(rows)} of {planned} steps"
    facts = [state, str(environment.get("started", ""))[:16].replace("T", " "), str(environment.get("device", ""))]
    lead = " · ".join(escape(fact) for fact in facts if fact)
    name = str(settings.get("run_name") or run_dir.resolve().name)
    return f'<h1>{escape(name)}</h1>\n<p class="lead">{lead}</p>'


def _tiles(rows: Rows, table: Sequence[ScoreRow]) -> str:
    tiles = []
    reward = _points(rows, "reward")
    if reward:
        first, last = _ends(reward)
        tiles.append(("Mean reward in training", f"{first:.2f} → {last:.2f}"))
    for row in table:
        if row.task == SUMMARY and row.change is not None:
            name = f"Held-out score, {row.measure}" if row.measure else "Held-out score"
            tiles.append((name, f"{show_score(row.before).removesuffix(' %')} → {show_score(row.after)}"))
    seconds = sum(value for _, value in _points(rows, "step_time"))
    if seconds:
        tiles.append(("Time in training steps", duration(seconds)))
    tokens = sum(value for _, value in _points(rows, "num_tokens"))
    if tokens:
        tiles.append(("Tokens sampled", f"{tokens:,.0f}"))
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles)
    return f'<dl class="tiles">{items}</dl>' if items else ""


def _warnings(rows: Rows) -> str:
    """What a practitioner would look at twice, with the remedy."""
    found = []
    failures = sum(value for _, value in _points(rows, "reward_failures"))
    if failures:
        found.append(f"Rewards that failed and were left out: {failures:.0f}. The run's output says why.")
    for name, limit, words in (
        (
            "frac_reward_zero_std",
            0.5,
            "of the groups had equal rewards and taught nothing: raise temperature, or mix in harder prompts.",
        ),
        ("clip_ratio/region_mean", 0.3, "of the tokens were clipped: lower learning_rate or num_iterations."),
        ("completions/clipped_ratio", 0.3, "of the texts ran into their length limit: raise max_completion_length."),
    ):
        points = _points(rows, name)
        if points and _ends(points)[1] > limit:
            found.append(f"Towards the end {100 * _ends(points)[1]:.0f} % {words}")
    replay = [value for _, value in _points(rows, "rollout/replay_logp_max_abs")]
    if replay and max(replay) > 0.5:
        found.append(
            f"The sampler's and the trainer's log-probabilities differed by up to {max(replay):.2f} nats: "
            "expect that in bf16 with guidance; in float32 it is a fault."
        )
    broken = sum(1 for row in rows if "loss" in row and row["loss"] is None)
    if broken:
        found.append(f"The loss was not finite in {broken} steps: lower learning_rate.")
    items = "".join(f"<li>{escape(text)}</li>" for text in found)
    return f'<ul class="warnings" aria-label="Worth a look">{items}</ul>' if items else ""


def _score_table(table: Sequence[ScoreRow]) -> str:
    if not table:
        return ""
    lines, previous = [], None
    for row in table:
        change = row.change or 0.0
        way = "up" if change > 0 else "down" if change < 0 else ""
        cells = f"<td>{escape(row.measure)}</td>"
        if row.task != previous:
            height = sum(1 for other in table if other.task == row.task)
            cells = f'<th scope="rowgroup" rowspan="{height}">{escape(row.label)}</th>{cells}'
        cells += f'<td class="number">{show_score(row.before)}</td><td class="number">{show_score(row.after)}</td>'
        kind = ' class="summary"' if row.task == SUMMARY else ""
        lines.append(f'<tr{kind}>{cells}<td class="number {way}">{show_change(row)}</td></tr>')
        previous = row.task
    head = '<th scope="col">What the model is asked to do</th><th scope="col">Measured by</th>'
    head += "".join(f'<th scope="col" class="number">{name}</th>' for name in ("Before", "After", "Change"))
    notes = "; ".join(f"{name}: {words}" for name, words in measures_in(list(table)).items())
    note = f"On held-out items that training never saw; change in percentage points. {notes[:1].upper()}{notes[1:]}"
    return (
        f'<h2>Before and after training</h2><div class="card"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{"".join(lines)}</tbody></table><p class="note">{escape(note.strip())}</p></div>'
    )


def _pairs(run_dir: Path) -> str:
    cards = []
    for row in read_jsonl(run_dir / "before_after" / "examples.jsonl")[:MAX_PAIRS]:
        sides = "".join(_side(run_dir, row, when) for when in ("before", "after"))
        answer = f'<p class="task">Right answer: {escape(str(row["answer"]))}</p>' if row.get("answer") else ""
        cards.append(
            f'<article class="pair"><p class="task">{escape(str(row.get("task", "")))}</p>'
            f'<p>{escape(str(row.get("prompt", "")))}</p><div class="sides">{sides}</div>{answer}</article>'
        )
    if not cards:
        return ""
    return f'<h2>The same prompts, before and after</h2><div class="pairs">{"".join(cards)}</div>'


def _side(run_dir: Path, row: Mapping[str, Any], when: str) -> str:
    words = escape(str(row.get(f"{when}_text") or ""))
    name = row.get(f"{when}_image")
    alt = f"{when}: {row.get('prompt', '')}"
    picture = _embed(run_dir, run_dir / str(name), alt) if name else ""
    if not picture and (row.get("before_image") or row.get("after_image")):
        picture = '<div class="nothing">no picture</div>'
    return f'<figure><span class="side">{when}</span>{picture}<figcaption>{words}</figcaption></figure>'


def _embed(run_dir: Path, path: Path, alt: str) -> str:
    """An <img> with the picture inside; "" for what is missing, broken, or outside the run's folder."""
    if not path.resolve().is_relative_to(run_dir.resolve()):
        return ""
    try:
        content, kind = path.read_bytes(), "png"
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            small = max(picture.size) < 128
            if len(content) > MAX_EMBEDDED_BYTES:
                shrunk = io.BytesIO()
                picture.convert("RGB").save(shrunk, "WEBP", quality=85)
                content, kind = shrunk.getvalue(), "webp"
            else:
                picture.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return ""
    data = base64.b64encode(content).decode("ascii")
    pixels = ' class="pixels"' if small else ""
    return f'<img{pixels} alt="{escape(alt, quote=True)}" src="data:image/{kind};base64,{data}">'


CLIPPED = {"clip_ratio/region_mean": "all", "clip_ratio/low_mean": "below", "clip_ratio/high_mean": "above"}
SPREAD = {"reward_std": "reward's standard deviation", "frac_reward_zero_std": "share of groups without any"}


def _modalities(rows: Rows) -> dict[str, str]:
    """The kinds of tokens that the run sampled, as far as it says."""
    tokens_of = {name: _points(rows, f"tokens/{name}") for name in ("text", "image")}
    return {name: name for name, points in tokens_of.items() if not points or any(count for _, count in points)}


def _charts(rows: Rows) -> str:
    parts = dict.fromkeys(n for row in rows for n in row if n.startswith("rewards/") and n.endswith("/mean"))
    rewards = {"reward": "total"} | {name: name.split("/")[1] for name in parts}
    tokens = dict(_points(rows, "num_tokens"))
    saved = dict(_points(rows, "dgs/tokens_saved_fraction"))
    trained = [(x, count * (1 - saved.get(x, 0.0))) for x, count in tokens.items()]
    pruned = [(x, count * saved[x]) for x, count in tokens.items() if x in saved]
    modal = _modalities(rows)
    charts = [
        line_chart("Reward", _series(rows, rewards), note="Mean over the step's trajectories; higher is better."),
        line_chart(
            "KL to the starting model (nats)",
            _series(rows, _per_modality(modal, "kl")),
            from_zero=True,
            note="How far training has moved each kind of token.",
        ),
        line_chart(
            "Entropy (nats)",
            _series(rows, _per_modality(modal, "entropy")),
            from_zero=True,
            note="How undecided the model is; a fall to 0 means that it has stopped exploring.",
        ),
        line_chart(
            "Clipped tokens",
            _series(rows, CLIPPED),
            from_zero=True,
            note="Share of tokens whose change was cut off; always 0 with one update per rollout.",
        ),
        line_chart(
            "Spread within groups",
            _series(rows, SPREAD),
            from_zero=True,
            note="Groups learn from differences between their members.",
        ),
        stacked_chart(
            "Sampled tokens",
            {"trained on": trained, "pruned": pruned},
            note="Dynamic group scaling leaves out trajectories that would teach little.",
        ),
        stacked_chart("Seconds per step", _stages(rows)),
        line_chart("Tokens per second", _series(rows, {"tokens_per_second": "sampled and trained"}), from_zero=True),
        line_chart(
            "Previews",
            _series(rows, {"rollout/preview_acceptance": "accepted", "rollout/preview_threshold": "threshold"}),
            from_zero=True,
            note="Early looks at half-drawn pictures; those below the threshold are drawn again.",
        ),
        line_chart("Loss", _series(rows, {"loss": "loss"}), note="Near 0 by construction: no measure of progress."),
        line_chart("Gradient norm", _series(rows, {"grad_norm": "before clipping"}), from_zero=True),
        line_chart(
            "Sampler against trainer (nats)",
            _series(rows, {"rollout/replay_logp_max_abs": "largest"}),
            from_zero=True,
            note="The same tokens' log-probabilities, computed twice; near 0 is right.",
        ),
    ]
    drawn = "".join(charts)
    return f'<h2>How training went</h2><div class="charts">{drawn}</div>' if drawn else ""


def _per_modality(modalities: Mapping[str, str], metric: str) -> dict[str, str]:
    return {f"{metric}/{name}": label for name, label in modalities.items()}


def _sheets(run_dir: Path) -> str:
    paths = sorted((run_dir / "samples").glob("step_*.png"))
    count = min(MAX_SHEETS, len(paths))
    # Evenly spread, first and last included.
    chosen = sorted({round(i * (len(paths) - 1) / max(1, count - 1)) for i in range(count)})
    blocks = []
    for position, index in enumerate(chosen):
        step = int(paths[index].stem.removeprefix("step_")) if paths[index].stem[5:].isdigit() else index
        picture = _embed(run_dir, paths[index], f"Samples of step {step}, with prompts, texts and rewards")
        is_open = " open" if position == len(chosen) - 1 else ""
        if picture:
            blocks.append(
                f'<details{is_open}><summary>Step {step}</summary><div class="scroll">{picture}</div></details>'
            )
    left = len(paths) - len(blocks)
    note = f'<p class="note">{left} more in samples/.</p>' if left and blocks else ""
    return f"<h2>Samples over time</h2>{''.join(blocks)}{note}" if blocks else ""


def _settings(settings: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    flat = {name: value for name, value in environment.items() if not isinstance(value, Mapping)}
    packages = environment.get("packages")
    flat |= packages if isinstance(packages, Mapping) else {}
    blocks = []
    for title, table in (("Settings", settings), ("Environment", flat)):
        lines = "".join(
            f"<tr><td>{escape(str(name))}</td><td>{escape(_shown(value))}</td></tr>" for name, value in table.items()
        )
        if lines:
            blocks.append(f'<details><summary>{title}</summary><table class="settings">{lines}</table></details>')
    return f"<h2>To repeat this run</h2>{''.join(blocks)}" if blocks else ""


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "–"
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
