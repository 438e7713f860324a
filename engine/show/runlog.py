"""A run's folder: settings, environment, metrics, samples, scores and the report, written as the run goes.

    config.yaml        every setting, readable by `--config`; of the last start, where a run was resumed
    environment.json   versions, commit, device: what it takes to repeat the run
    rewards.json       what the reward is the weighted sum of, and who says each part of it
    metrics.jsonl      one JSON object per step
    samples/           step_000020.png (pictures, texts, rewards) and step_000020.jsonl
    data.json          what was found in the data, what is left out and why; data.png: three examples
    scores.json        before and after training; before_after.png and before_after/ beside it
    status.json        whether it goes on or how it ended, the time of its parts, memory
    parts.json         of a run of several trainings: what was made from what, every model's scores
    report.html        all of the above on one page, rewritten while the run goes on

Everything is on disk as soon as it is known, so an interrupted run can be read and reported as well.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError, Preempted
from ..processes.launch import restarted
from ..processes.run_folder import LONG_PATIENCE, PATIENCE, FolderLock
from ..records import Rollout, StepMetrics
from ..settings.yaml_files import to_yaml
from ..whole_files import write_atomically
from . import recent, sheets
from .data_found import DataFound
from .environment import environment
from .examples import Reading, write_examples
from .live_page import LivePage
from .measured import PER_ITEM, dumps
from .run_files import read_jsonl
from .run_status import RunStatus, State
from .scores import Scores, flatten_scores, score_rows
from .sheets import Rewards, as_rewards
from .trackers import Trackers, completions_of, of_row

MAX_FOLDERS = 10_000
MAX_REASON = 500
"""Characters of an error that the report shows; the terminal has all of it."""
CONFIG_HEADING = "# Settings of this run; pass this file with --config to repeat it.\n\n"


class Resumed(Protocol):
    """Where an interrupted run goes on."""

    @property
    def run_folder(self) -> Path: ...

    @property
    def step(self) -> int:
        """Steps that were done."""
        ...


def open_run_log(output_dir: Path, config: Any, resumed: Resumed | None = None) -> RunLog | NullRunLog:
    """The run's log on rank 0, and one that writes nothing elsewhere; all ranks learn the same `folder`."""
    if not (dist.is_available() and dist.is_initialized()):
        first = int(os.environ.get("RANK", "0")) == 0
        return RunLog(output_dir, config, resumed) if first else NullRunLog(output_dir)
    log, box = None, ["", ""]
    if dist.get_rank() == 0:
        try:
            log = RunLog(output_dir, config, resumed)
            box = [str(log.folder), ""]
        except ConfigError as error:  # then no rank begins
            box = ["", str(error)]
    dist.broadcast_object_list(box, src=0)
    folder, refused = box
    if refused:
        raise ConfigError(refused)
    if log is None:
        recent.writes_to(Path(folder))
    return log or NullRunLog(Path(folder))


class RunLog:
    """Writes a run's folder.  Use it as a context manager, or call `close()`: that writes the report."""

    def __init__(self, output_dir: Path, config: Any, resumed: Resumed | None = None) -> None:
        """Makes the folder: `output_dir`, or `output_dir-2`, `-3`, … where a run is already; none is overwritten.

        Args:
            output_dir: where the run should go.
            config: the recipe's settings, a dataclass of the kind that `settings/schema.py` reads.
            resumed: go on in this run's folder instead; `cut` is then to be called before the first step.

        Raises:
            ConfigError: another process writes to the folder that is to be gone on in.
        """
        if getattr(config, "resume_from_checkpoint", None) is not None:
            config = dataclasses.replace(config, resume_from_checkpoint=None)  # config.yaml repeats the run
        if resumed is None:
            self.folder = _claim_folder(Path(output_dir), to_yaml(config))
            self._lock = FolderLock(self.folder)
            _write_json(self.folder / "environment.json", environment())
        else:
            self.folder = resumed.run_folder
            self._lock = FolderLock(self.folder, LONG_PATIENCE if restarted() else PATIENCE)
            write_atomically(self.folder / "config.yaml", CONFIG_HEADING + to_yaml(config))
            _write_json(self.folder / "environment.json", environment() | {"resumed_at_step": resumed.step})
        recent.writes_to(self.folder)
        self._metrics: TextIO | None = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._logging_steps = max(1, getattr(config, "logging_steps", 1))
        settings = {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
        self._log_completions = getattr(config, "log_completions", False)
        run_name = getattr(config, "run_name", None)
        self._trackers = Trackers(getattr(config, "report_to", ()), self.folder, settings, run_name)
        self._status = RunStatus(self.folder, resumed is not None)
        self._page = LivePage(self.folder, self._status, getattr(config, "report_steps", 1))
        self._page.write()

    def metrics(self, metrics: StepMetrics) -> None:
        """Appends one line to metrics.jsonl: `step`, counted from 1 as on the terminal, the values, and
        `seconds/<stage>`; NaN and infinities as null."""
        if self._metrics is None:
            raise RuntimeError("RunLog.metrics: the log is closed; open another run's log to write on")
        values = {name: float(value) for name, value in metrics.values.items()}
        values |= {f"seconds/{stage}": float(value) for stage, value in metrics.seconds.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        step = metrics.step + 1
        row = {"step": step, **{name: finite.get(name) for name in values}}
        self._metrics.write(json.dumps(row, allow_nan=False) + "\n")
        self._metrics.flush()
        self._status.lap("training")
        self._page.step()
        if step > 1 and step % self._logging_steps:
            finite = {name: value for name, value in finite.items() if name.startswith("eval/")}  # as rare as they are
        if finite:
            self._trackers.log(step, finite)

    def rewards(self, content: Mapping[str, Any]) -> None:
        """Writes rewards.json: what the training is paid for (in_words.py)."""
        _write_json(self.folder / "rewards.json", content)

    def data(self, found: DataFound | None) -> None:
        """Writes data.json and data.png: what the run found in its data."""
        if found is not None:
            found.write(self.folder)

    def cut(self, num_steps: int) -> None:
        """Removes metrics and samples of steps after the first `num_steps`, which come again, and a line that a crash
        cut; metrics of which nothing would be left are renamed.

        A folder of an older version, which counted from 0, is counted from 1 from then on."""
        path = self.folder / "metrics.jsonl"
        known = [row for row in read_jsonl(path) if isinstance(row.get("step"), int)]
        older = int(min((row["step"] for row in known), default=1) == 0)
        rows = [row | {"step": row["step"] + older} for row in known]
        rows = [row for row in rows if row["step"] <= num_steps]
        if self._metrics is not None:
            self._metrics.close()
        if not rows and path.exists() and path.stat().st_size:  # it begins again: what was stays to be read
            names = (path.with_name(f"aside_{number}-{path.name}") for number in itertools.count(1))
            path.rename(next(name for name in names if not name.exists()))
        write_atomically(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        self._metrics = path.open("a", encoding="utf-8")
        for sample in sorted((self.folder / "samples").glob("step_*"), reverse=True):
            number = sample.stem.removeprefix("step_")
            if number.isdecimal() and int(number) + older > num_steps:
                sample.unlink()
            elif number.isdecimal() and older:
                sample.rename(sample.with_stem(f"step_{int(number) + older:06d}"))

    def sync(self) -> None:
        """Metrics so far are on the disk, not only on their way, when this returns: a checkpoint counts on them."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())

    def samples(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        rewards: Rewards | Tensor,
        extras: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """Writes a step's trajectories as a picture to look at and a JSONL file to search in.

        Args:
            step: that they come from, counted from 0; files and the sheet say one more, as metrics.jsonl does.
            rollouts: whole groups look best; at most 24 prompts and 8 members each are drawn, all are written.
            rewards: reward name -> one value per rollout, None or NaN where it did not apply; `reward` is the total.
                A tensor [S] is the total alone.
            extras: further columns, one plain value per rollout: what rewards logged.
        """
        known, step, extras = as_rewards(rewards, len(rollouts)), step + 1, extras or {}
        if not rollouts:
            return
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        picture = folder / f"step_{step:06d}.png"
        sheets.sample_sheet(step, rollouts, known).save(picture)
        rows = [
            _sample_row(step, rollout, of_row(known, index), of_row(extras, index))
            for index, rollout in enumerate(rollouts)
        ]
        _write_jsonl(folder / f"step_{step:06d}.jsonl", rows)
        self._trackers.picture(step, "samples", picture)
        if self._log_completions and self._trackers.active:
            self._trackers.table(step, "completions", completions_of(rollouts, known, extras))

    def scores(
        self,
        *,
        before: Scores | None = None,
        after: Scores | None = None,
        examples_before: Sequence[Rollout] = (),
        examples_after: Sequence[Rollout] = (),
        read_before: Sequence[Reading] = (),
        read_after: Sequence[Reading] = (),
    ) -> None:
        """Writes scores.json and, for examples of the same prompts, before/after pictures.

        May be called twice: with `before` alone ahead of training, so that an interrupted run has it, and with both.
        The file holds the flat scores of each, with the values of single items that `score_rows` makes intervals from,
        and `table`, the rows themselves."""
        flat = {"before": flatten_scores(before), "after": flatten_scores(after)}
        kept = {
            when: flat[when] | ({PER_ITEM: scores[PER_ITEM]} if scores and PER_ITEM in scores else {})
            for when, scores in (("before", before), ("after", after))
        }
        table = [row._asdict() | {"label": row.label, "change": row.change} for row in score_rows(before, after)]
        write_atomically(self.folder / "scores.json", dumps({**kept, "table": table}))
        finite = {
            f"{when}/{name}": value
            for when, scores in flat.items()
            for name, value in scores.items()
            if value is not None
        }
        if after is not None:
            self._trackers.log(self._last_step(), finite)
        if examples_before and examples_after:
            path = write_examples(self.folder, examples_before, examples_after, read_before, read_after)
            self._trackers.picture(self._last_step(), "before_after", path)
        self._status.lap("before training" if after is None else "after training")
        self._page.write()

    def parts(self, content: Mapping[str, Any], finished: str = "") -> None:
        """Writes parts.json of a run of several trainings (`report_parts.py` says what it holds).

        Args:
            content: the whole of it.
            finished: what has just been done, for the time that each part took; "" for nothing.
        """
        if finished:
            self._status.lap(finished)
        _write_json(self.folder / "parts.json", content)
        self._page.write()

    def _last_step(self) -> int:
        rows = read_jsonl(self.folder / "metrics.jsonl")
        return int(rows[-1].get("step", 0)) if rows else 0

    def close(self, state: State = "done", reason: str = "") -> None:
        """Ends the trackers, writes how the run ended and the last report.html; a second call does nothing."""
        if self._metrics is None:
            return
        self._metrics.close()
        self._metrics = None
        self._trackers.close()
        try:
            self._page.close(state, reason)
        finally:
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif isinstance(error, Preempted):
            self.close("preempted")
        elif isinstance(error, KeyboardInterrupt):
            self.close("interrupted")
        else:
            self.close("failed", f"{type(error).__name__}: {error}"[:MAX_REASON])


class NullRunLog:
    """`RunLog` for the other ranks: the same methods, and nothing is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def metrics(self, metrics: StepMetrics) -> None:
        """Does nothing."""

    def rewards(self, content: Mapping[str, Any]) -> None:
        """Does nothing."""

    def data(self, found: DataFound | None) -> None:
        """Does nothing."""

    def cut(self, num_steps: int) -> None:
        """Does nothing."""

    def sync(self) -> None:
        """Does nothing."""

    def samples(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        rewards: Rewards | Tensor,
        extras: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """Does nothing."""

    def scores(
        self,
        *,
        before: Scores | None = None,
        after: Scores | None = None,
        examples_before: Sequence[Rollout] = (),
        examples_after: Sequence[Rollout] = (),
        read_before: Sequence[Reading] = (),
        read_after: Sequence[Reading] = (),
    ) -> None:
        """Does nothing."""

    def parts(self, content: Mapping[str, Any], finished: str = "") -> None:
        """Does nothing."""

    def close(self, state: State = "done", reason: str = "") -> None:
        """Does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Does nothing."""


def _claim_folder(wanted: Path, config_yaml: str) -> Path:
    """Makes config.yaml exclusively, which claims the folder: two runs that start at once get different ones."""
    for number in range(1, MAX_FOLDERS):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        folder.mkdir(parents=True, exist_ok=True)
        if any((folder / name).exists() for name in ("metrics.jsonl", "report.html", "checkpoints")):
            continue
        try:
            with (folder / "config.yaml").open("x", encoding="utf-8") as file:
                file.write(CONFIG_HEADING + config_yaml)
        except FileExistsError:
            continue
        return folder
    raise ConfigError(f"output_dir: expected a free name near {wanted}, got {MAX_FOLDERS} runs; choose another one")


def _sample_row(
    step: int, rollout: Rollout, rewards: Mapping[str, float | None], extra: Mapping[str, Any]
) -> dict[str, Any]:
    prompt = rollout.prompt
    asked = {"id": prompt.id, "task": prompt.task, "prompt": prompt.text}
    return {
        "step": step,
        **asked,
        "member": rollout.member,
        "text": rollout.text,
        "answer": prompt.answer,
        "has_image": rollout.image is not None,
        "attempts": rollout.attempts,
        "rewards": dict(rewards),
        **({"extra": dict(extra)} if extra else {}),
    }


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def _write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows), "utf-8")
