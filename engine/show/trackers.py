"""TensorBoard, trackio and wandb behind one small protocol; each is imported only when it is asked for.

Nothing leaves the machine unless its owner says so: trackio logs to local files (and a Space that it makes is private),
and wandb runs offline unless `WANDB_MODE` says otherwise.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from ..records import Rollout
from . import sheets

PROJECT = "syncr1"
MAX_ROWS = 32
"""Of a table; a run's own samples/ hold all."""


class Completion(NamedTuple):
    """A trajectory as a row of a table."""

    prompt: str
    text: str
    picture: Image.Image | None
    rewards: Mapping[str, float | None]
    """By name; `reward` is the total."""
    extra: Mapping[str, Any] = {}
    """Further columns by name."""


class Tracker(Protocol):
    """Where scalars, pictures and tables go, beside the run's own files."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends scalars of a step; all of them are finite."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """Sends a picture from the run's folder."""

    def table(self, step: int, name: str, rows: Sequence[Completion]) -> None:
        """Sends trajectories of a step, as TRL's `log_completions` does."""

    def close(self) -> None:
        """Ends the tracker's run."""


class TensorBoard:
    """Event files in `<run>/tensorboard`."""

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        # TensorBoard shows a run by the path to its events.
        below = "" if name == folder.name else re.sub(r"[^\w.-]+", "-", name).lstrip(".")
        self.writer = writer(str(folder / "tensorboard" / below))
        self.writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in settings.items()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        with Image.open(path) as picture:
            self.writer.add_image(name, np.array(picture.convert("RGB")), step, dataformats="HWC")

    def table(self, step: int, name: str, rows: Sequence[Completion]) -> None:
        """A table in Markdown, which has no room for pictures, and those beside it, numbered alike."""
        head = ["#", "prompt", "text", *_rewards(rows), *_extras(rows)]
        lines = [head, ["---"] * len(head)]
        for number, row in enumerate(rows):
            told = [_shown(row.rewards.get(name)) for name in _rewards(rows)]
            told += [_in_a_cell(row.extra.get(name)) for name in _extras(rows)]
            lines.append([str(number), row.prompt, row.text, *told])
        cells = [[" ".join(cell.replace("|", "\\|").split()) for cell in line] for line in lines]
        self.writer.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in cells), step)
        for number, row in enumerate(rows):
            if row.picture is not None:
                self.writer.add_image(
                    f"{name}/{number:02d}", np.array(row.picture.convert("RGB")), step, dataformats="HWC"
                )

    def close(self) -> None:
        self.writer.close()


class Trackio:
    """Hugging Face's trackio: a local database, or the Space that `TRACKIO_SPACE_ID` names."""

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        self.trackio = importlib.import_module("trackio")
        private: dict[str, Any] = {}
        if "private" in inspect.signature(self.trackio.init).parameters:
            private["private"] = True
        elif os.environ.get("TRACKIO_SPACE_ID"):
            # An older trackio would make the Space public.
            raise RuntimeError("report_to trackio: this version cannot make a Space private; pip install -U trackio")
        self.trackio.init(project=PROJECT, name=name, config=dict(settings), **private)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.trackio.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self.trackio.log({name: self.trackio.Image(str(path), caption=f"step {step}")}, step=step)

    def table(self, step: int, name: str, rows: Sequence[Completion]) -> None:
        made = self.trackio.Table(columns=_columns(rows), data=_cells(step, rows, self.trackio.Image))
        self.trackio.log({name: made}, step=step)

    def close(self) -> None:
        self.trackio.finish()


class Wandb:
    """Weights & Biases, offline unless `WANDB_MODE` says otherwise; `wandb sync` uploads later."""

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        self.wandb = importlib.import_module("wandb")
        self.run = self.wandb.init(
            project=PROJECT,
            name=name,
            dir=str(folder),
            config=dict(settings),
            mode=os.environ.get("WANDB_MODE", "offline"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.wandb.Image(str(path))}, step=step)

    def table(self, step: int, name: str, rows: Sequence[Completion]) -> None:
        made = self.wandb.Table(columns=_columns(rows), data=_cells(step, rows, self.wandb.Image))
        self.run.log({name: made}, step=step)

    def close(self) -> None:
        self.run.finish()


def completions_of(
    rollouts: Sequence[Rollout],
    known: Mapping[str, Sequence[float | None]],
    extras: Mapping[str, Sequence[Any]] | None = None,
) -> list[Completion]:
    """Of the first trajectories of a step.

    Args:
        rollouts: its trajectories.
        known: reward name -> one value per trajectory, None where it did not apply.
        extras: column -> one value per trajectory: what rewards logged.
    """
    return [
        Completion(
            prompt=rollout.prompt.text,
            text=rollout.text,
            picture=None if rollout.image is None else sheets.to_picture(rollout.image),
            rewards=of_row(known, index),
            extra=of_row(extras or {}, index),
        )
        for index, rollout in enumerate(rollouts[:MAX_ROWS])
    ]


def of_row(columns: Mapping[str, Sequence[Any]], index: int) -> dict[str, Any]:
    """One trajectory's values, by column."""
    return {name: values[index] for name, values in columns.items()}


def _rewards(rows: Sequence[Completion]) -> list[str]:
    """Names of all rewards, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.rewards))


def _extras(rows: Sequence[Completion]) -> list[str]:
    """Names of all further columns, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.extra))


def _columns(rows: Sequence[Completion]) -> list[str]:
    return ["step", "prompt", "text", "image", *_rewards(rows), *_extras(rows)]


def _cells(step: int, rows: Sequence[Completion], image: Any) -> list[list[Any]]:
    """The rows under `_columns`; `image` makes a tracker's own picture."""
    return [
        [
            *(step, row.prompt, row.text, None if row.picture is None else image(row.picture)),
            *(row.rewards.get(name) for name in _rewards(rows)),
            *(_of_one_kind(row.extra.get(name)) for name in _extras(rows)),
        ]
        for row in rows
    ]


def _of_one_kind(value: Any) -> str | None:
    """A further column's cell: a tracker's table takes one type a column, and a reward may log any."""
    return None if value is None else _in_a_cell(value)


def _in_a_cell(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


TRACKERS: dict[str, type[TensorBoard] | type[Trackio] | type[Wandb]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
}


def wanted(names: Sequence[str]) -> tuple[str, ...]:
    """The trackers that `report_to` names; `all` are those that are installed."""
    if "all" in names:
        return tuple(name for name in TRACKERS if importlib.util.find_spec(name) is not None)
    return tuple(name for name in names if name != "none")


class Trackers:
    """All trackers that `report_to` names, as one.  One that fails to start is an error, since the user asked for it;
    one that fails later is reported on stderr and left out from there on, since the run's own files hold everything."""

    def __init__(
        self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], run_name: str | None = None
    ) -> None:
        name = run_name or folder.name
        self.active: dict[str, Tracker] = {kind: TRACKERS[kind](folder, name, settings) for kind in wanted(names)}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._each("log", step, values)

    def picture(self, step: int, name: str, path: Path) -> None:
        self._each("picture", step, name, path)

    def table(self, step: int, name: str, rows: Sequence[Completion]) -> None:
        self._each("table", step, name, rows[:MAX_ROWS])

    def close(self) -> None:
        self._each("close")
        self.active.clear()

    def _each(self, method: str, *arguments: Any) -> None:
        for name, tracker in list(self.active.items()):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # a tracker's server must not end hours of training
                print(f"{name}: {method} failed ({error}); this tracker is left out from now on", file=sys.stderr)
                del self.active[name]
