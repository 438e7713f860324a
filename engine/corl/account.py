"""What a CoRL run makes from what, as far as it has come: `parts.json`, from which its page is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..evaluate.held_out import Evaluation
from ..show.runlog import NullRunLog, RunLog
from ..show.scores import score_rows
from .config import CorlConfig

TITLES = {
    "base": "starting model",
    "unified": "drawing and answering together",
    "generation": "drawing alone",
    "understanding": "answering alone",
    "merged_first": "both merged",
    "t2i": "refined for drawing",
    "mcq": "refined for multiple choice",
    "oe": "refined for open questions",
    "merged": "both answering models merged",
}
"""Models, and the trainings and merges that make them, in words."""
MERGES = ("merged_first", "merged")
State = Literal["planned", "running", "done", "stopped"]


class Account:
    """Written into the run's folder whenever something begins or ends.

    Args:
        log: of the whole run.
        planned: names of the trainings and merges to come, in order.
    """

    def __init__(self, log: RunLog | NullRunLog, planned: Sequence[str]) -> None:
        self._log = log
        self._parts: dict[str, dict[str, Any]] = {name: self._entry(name, "planned") for name in planned}
        self._models: dict[str, dict[str, Any]] = {}
        self._compared: dict[str, Any] = {}
        self._write()

    @staticmethod
    def _entry(name: str, state: State, sources: Sequence[str] = ()) -> dict[str, Any]:
        kind = "merge" if name in MERGES else "training"
        return {"name": name, "title": TITLES.get(name, name), "kind": kind, "from": list(sources), "state": state}

    def begins(self, name: str, sources: Sequence[str]) -> None:
        """A training or a merge begins, from these models: names of this run's, or folders."""
        self._parts[name] = self._entry(name, "running", [TITLES.get(source, source) for source in sources])
        self._write()

    def made(self, name: str, scores: Evaluation | None, *, finished: bool = True) -> None:
        """A model is there, with its scores where it has any; a training that Ctrl-C ended is not finished."""
        if name in self._parts:
            self._parts[name]["state"] = "done" if finished else "stopped"
        rows = [] if scores is None else score_rows(None, scores.table)
        self._models[name] = {"title": TITLES.get(name, name), "table": [row._asdict() for row in rows]}
        self._write(finished=TITLES.get(name, name))

    def compares(self, before: str, after: Mapping[str, str]) -> None:
        """Which models the scores before and after are of: {`drawings`: name, `answers`: name}."""
        self._compared = {"before": before, "after": dict(after)}
        self._write()

    def _write(self, finished: str = "") -> None:
        parts, models = list(self._parts.values()), self._models
        self._log.parts({"parts": parts, "models": models, **self._compared}, finished)


def planned_parts(config: CorlConfig, refined: Sequence[str]) -> list[str]:
    """The trainings and merges that the settings ask for, in order; `refined`: those of the second stage."""
    first: list[str] = []
    if config.stage in ("all", "unified"):
        together = config.strategy in ("unified", "alternating")
        first = ["unified"] if together else ["generation", "understanding"]
        first += ["merged_first"] if config.strategy == "separate_merged" else []
    merges = config.stage == "merge" or ("mcq" in refined and "oe" in refined)
    return [*first, *refined, *(["merged"] if merges else [])]
