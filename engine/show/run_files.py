"""A run's folder as it was read, whatever is missing, damaged or odd in it: what reports and comparisons show.

Nothing here raises for what files hold, and nothing heavy is imported: a page is made in a second.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

Rows = Sequence[Mapping[str, Any]]
"""Lines of metrics.jsonl, one per step."""
Points = list[tuple[float, float]]
"""(step, value); steps are counted from 1."""
DATA_FILE = "data.json"
"""What a run found in its data: rows of each task, what is left out and why, what is not used."""
DATA_SHEET = "data.png"
"""Three examples of them."""
MAX_FILE_BYTES = 1 << 28
"""A larger file is none that a run writes, and would take the memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run's folder holds; each part is empty where its file is missing or cannot be read."""

    folder: Path
    rows: Rows
    """metrics.jsonl."""
    settings: Mapping[str, Any]
    """config.yaml."""
    environment: Mapping[str, Any]
    """environment.json: versions, commit, device, command."""
    scores: Mapping[str, Any]
    """scores.json: `before` and `after`, each {`task/measure`: score}."""
    rewards: Mapping[str, Any]
    """rewards.json: what it was paid for (in_words.py)."""
    data: Mapping[str, Any]
    """data.json: what was found in the data (data_found.py)."""
    status: Mapping[str, Any]
    """status.json: whether it goes on, since when, how long each part took."""
    parts: Mapping[str, Any]
    """parts.json of a run of several trainings: which, made from what, and every model's scores."""
    examples: Rows
    """before_after/examples.jsonl."""
    sheets: Sequence[Path]
    """samples/step_*.png, in order."""

    @property
    def name(self) -> str:
        """What the run is called, or its folder."""
        called = self.settings.get("run_name")
        return called if isinstance(called, str) and called else self.folder.resolve().name

    @property
    def first_step(self) -> int:
        """What its files call the first step: 1, and 0 in folders of older versions."""
        return 0 if self.rows and self.rows[0].get("step") == 0 else 1

    @property
    def planned(self) -> int | None:
        """Steps that it is to take; None where its settings do not say."""
        steps = self.settings.get("max_steps")
        return steps if isinstance(steps, int) and not isinstance(steps, bool) and steps > 0 else None


def read_run(folder: Path) -> Run:
    """Everything that the page shows, from what is there."""
    folder = Path(folder)
    return Run(
        folder=folder,
        rows=read_jsonl(folder / "metrics.jsonl"),
        settings=read_settings(folder / "config.yaml"),
        environment=read_json(folder / "environment.json"),
        scores=read_json(folder / "scores.json"),
        rewards=read_json(folder / "rewards.json"),
        data=read_json(folder / DATA_FILE),
        status=read_json(folder / "status.json"),
        parts=read_json(folder / "parts.json"),
        examples=read_jsonl(folder / "before_after" / "examples.jsonl"),
        sheets=sorted((folder / "samples").glob("step_*.png")),
    )


def is_run(folder: Path) -> bool:
    """Whether something of a run lies there."""
    return any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl", "parts.json", "scores.json"))


def unreadable(folder: Path) -> tuple[list[str], bool]:
    """The files of a run's folder that hold something and nothing of it can be read, and whether no other is there."""
    run = read_run(folder)
    parts = {
        "config.yaml": run.settings,
        "metrics.jsonl": run.rows,
        "scores.json": run.scores,
        "parts.json": run.parts,
        "status.json": run.status,
        "environment.json": run.environment,
    }
    there = {name: part for name, part in parts.items() if (folder / name).is_file()}
    damaged = [name for name, part in there.items() if not part and (folder / name).stat().st_size]
    return damaged, not any(there[name] for name in there) and bool(damaged)


def trainings_in(folder: Path) -> list[Path]:
    """The folders of trainings directly below a run of several, in order of their making."""
    found = [path.parent for path in folder.glob("*/config.yaml")] if folder.is_dir() else []
    made = [path for path in found if path.name != "before_after" and not path.is_symlink()]
    return sorted(made, key=lambda path: (str(read_json(path / "environment.json").get("started")), path.name))


def whole_run(folder: Path) -> Path | None:
    """The folder of the run that the training in `folder` is a part of; None where it is a run of its own."""
    folder = Path(folder).resolve()
    listed = read_json(folder.parent / "parts.json").get("parts")
    names = [part.get("name") for part in listed if isinstance(part, dict)] if isinstance(listed, list) else []
    return folder.parent if folder.name in names else None


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


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file; {} where there is none."""
    try:
        content = json.loads(_read_text(path) or "{}")
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a YAML file, by name; {} where there is none."""
    try:
        content = yaml.safe_load(_read_text(path))
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError):  # PyYAML's own and others
        return {}
    return {name: value for name, value in content.items() if isinstance(name, str)} if _is_object(content) else {}


def _is_object(content: Any) -> bool:
    return isinstance(content, dict)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.stat().st_size <= MAX_FILE_BYTES else ""
    except (OSError, ValueError):
        return ""


def is_number(value: Any) -> bool:
    """A finite number that fits: not NaN, no bool, no integer of 400 digits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def number_of(table: Any, *names: str) -> float | None:
    """A number in nested objects, None where there is none: `number_of(status, "seconds", "training")`."""
    for name in names:
        table = table.get(name) if isinstance(table, Mapping) else None
    return float(table) if is_number(table) else None


def table_of(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object in an object; {} where there is none."""
    found = content.get(name)
    return found if isinstance(found, Mapping) else {}


def texts_of(values: Any) -> list[str]:
    """The texts of a list; [] where it is none."""
    return [value for value in values if isinstance(value, str)] if isinstance(values, list | tuple) else []


def points(rows: Rows, name: str) -> Points:
    """(step, value) where the metric has a finite value; steps are counted from 1."""
    found: list[tuple[int, Any]] = [(step, row[name]) for step, row in enumerate(rows, 1) if name in row]
    return [(float(step), float(value)) for step, value in found if is_number(value)]


def metrics_in(rows: Rows, prefix: str, suffix: str = "") -> list[str]:
    """Names of metrics that begin and end so, in order of appearance."""
    names = dict.fromkeys(chain.from_iterable(rows))
    return [name for name in names if name.startswith(prefix) and name.endswith(suffix)]


def values_of(rows: Rows, name: str) -> list[float]:
    return [value for _, value in points(rows, name)]


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Means over the first and the last tenth: single steps are noisy. `values` is not empty."""
    count = max(1, len(values) // 10)
    return sum(values[:count]) / count, sum(values[-count:]) / count
