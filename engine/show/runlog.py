"""A run's folder: settings, environment, metrics, samples, scores and the report, written as the run goes.

    config.yaml        every setting, readable by `--config`; of the last start, where a run was resumed
    environment.json   versions, commit, device: what it takes to repeat the run
    metrics.jsonl      one JSON object per step
    samples/           step_000020.png (pictures, texts, rewards) and step_000020.jsonl
    scores.json        before and after training; before_after.png and before_after/ beside it
    report.html        all of the above on one page

Everything is on disk as soon as it is known, so an interrupted run can be read and reported as well.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from syncr1.kernels.api import attention_provider
from syncr1.kernels.dispatch import available

from ..errors import ConfigError
from ..processes.launch import restarted
from ..processes.run_folder import LONG_PATIENCE, PATIENCE, FolderLock
from ..records import Rollout, StepMetrics
from ..settings.schema import to_yaml
from ..whole_files import write_atomically
from . import report, sheets
from .scores import Scores, flatten_scores
from .sheets import Rewards, as_rewards
from .trackers import Trackers

PACKAGES = ("syncr1", "torch", "transformers", "deepspeed", "triton", "tokenizers", "safetensors", "numpy", "pillow")
MAX_FOLDERS = 10_000
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
        self._metrics: TextIO | None = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._logging_steps = max(1, getattr(config, "logging_steps", 1))
        settings = {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
        self._trackers = Trackers(getattr(config, "report_to", ()), self.folder, settings)

    def metrics(self, metrics: StepMetrics) -> None:
        """Appends one line to metrics.jsonl: `step`, the values, and `seconds/<stage>`; NaN and infinities as null."""
        if self._metrics is None:
            raise RuntimeError("RunLog.metrics: the log is closed; open another run's log to write on")
        values = {name: float(value) for name, value in metrics.values.items()}
        values |= {f"seconds/{stage}": float(value) for stage, value in metrics.seconds.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        row = {"step": metrics.step, **{name: finite.get(name) for name in values}}
        self._metrics.write(json.dumps(row, allow_nan=False) + "\n")
        self._metrics.flush()
        if metrics.step % self._logging_steps == 0:
            self._trackers.log(metrics.step, finite)

    def cut(self, num_steps: int) -> None:
        """Removes metrics and samples of steps from `num_steps` on, which come again, and a line that a crash cut.

        Metrics of which nothing would be left are renamed."""
        path = self.folder / "metrics.jsonl"
        rows = [row for row in report.read_jsonl(path) if row.get("step", num_steps) < num_steps]
        if self._metrics is not None:
            self._metrics.close()
        if not rows and path.exists() and path.stat().st_size:  # it begins again: what was stays to be read
            names = (path.with_name(f"aside_{number}-{path.name}") for number in itertools.count(1))
            path.rename(next(name for name in names if not name.exists()))
        write_atomically(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        self._metrics = path.open("a", encoding="utf-8")
        for sample in (self.folder / "samples").glob("step_*"):
            number = sample.stem.removeprefix("step_")
            if number.isdecimal() and int(number) >= num_steps:
                sample.unlink()

    def sync(self) -> None:
        """Metrics so far are on the disk, not only on their way, when this returns: a checkpoint counts on them."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())

    def samples(self, step: int, rollouts: Sequence[Rollout], rewards: Rewards | Tensor) -> None:
        """Writes a step's trajectories as a picture to look at and a JSONL file to search in.

        Args:
            step: step that they come from.
            rollouts: whole groups look best; at most 24 prompts and 8 members each are drawn, all are written.
            rewards: reward name -> one value per rollout, None or NaN where it did not apply; `reward` is the total.
                A tensor [S] is the total alone.
        """
        known = as_rewards(rewards, len(rollouts))
        if not rollouts:
            return
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        picture = folder / f"step_{step:06d}.png"
        sheets.sample_sheet(step, rollouts, known).save(picture)
        rows = [
            _sample_row(step, rollout, {name: values[index] for name, values in known.items()})
            for index, rollout in enumerate(rollouts)
        ]
        _write_jsonl(folder / f"step_{step:06d}.jsonl", rows)
        self._trackers.picture(step, "samples", picture)

    def scores(
        self,
        *,
        before: Scores | None = None,
        after: Scores | None = None,
        examples_before: Sequence[Rollout] = (),
        examples_after: Sequence[Rollout] = (),
    ) -> None:
        """Writes scores.json and, for examples of the same prompts, before/after pictures.

        May be called twice: with `before` alone ahead of training, so that an interrupted run has it, and with both."""
        flat = {"before": flatten_scores(before), "after": flatten_scores(after)}
        _write_json(self.folder / "scores.json", flat)
        finite = {
            f"{when}/{name}": value
            for when, scores in flat.items()
            for name, value in scores.items()
            if value is not None
        }
        if after is not None:
            self._trackers.log(self._last_step(), finite)
        if examples_before and examples_after:
            self._examples(examples_before, examples_after)

    def _examples(self, before: Sequence[Rollout], after: Sequence[Rollout]) -> None:
        if [rollout.prompt.id for rollout in before] != [rollout.prompt.id for rollout in after]:
            raise ValueError("RunLog.scores: examples_before and examples_after must be of the same prompts in order")
        path = self.folder / "before_after.png"
        sheets.before_after_sheet(before, after).save(path)
        folder = self.folder / "before_after"
        folder.mkdir(exist_ok=True)
        rows = []
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            row: dict[str, Any] = {"task": old.prompt.task, "prompt": old.prompt.text, "answer": old.prompt.answer}
            for when, rollout in (("before", old), ("after", new)):
                row[f"{when}_text"] = rollout.text
                row[f"{when}_image"] = None
                if rollout.image is not None:
                    row[f"{when}_image"] = f"before_after/{index:02d}_{when}.png"
                    sheets.to_picture(rollout.image).save(self.folder / row[f"{when}_image"])
            rows.append(row)
        _write_jsonl(folder / "examples.jsonl", rows)
        self._trackers.picture(self._last_step(), "before_after", path)

    def _last_step(self) -> int:
        rows = report.read_jsonl(self.folder / "metrics.jsonl")
        return int(rows[-1].get("step", 0)) if rows else 0

    def close(self) -> None:
        """Ends the trackers and writes report.html; a second call does nothing."""
        if self._metrics is None:
            return
        self._metrics.close()
        self._metrics = None
        self._trackers.close()
        try:
            report.write_report(self.folder)
        finally:
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class NullRunLog:
    """`RunLog` for the other ranks: the same methods, and nothing is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def metrics(self, metrics: StepMetrics) -> None:
        """Does nothing."""

    def cut(self, num_steps: int) -> None:
        """Does nothing."""

    def sync(self) -> None:
        """Does nothing."""

    def samples(self, step: int, rollouts: Sequence[Rollout], rewards: Rewards | Tensor) -> None:
        """Does nothing."""

    def scores(
        self,
        *,
        before: Scores | None = None,
        after: Scores | None = None,
        examples_before: Sequence[Rollout] = (),
        examples_after: Sequence[Rollout] = (),
    ) -> None:
        """Does nothing."""

    def close(self) -> None:
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
    raise RuntimeError(f"RunLog: expected a free name near {wanted}, got {MAX_FOLDERS} runs; choose another output_dir")


def environment() -> dict[str, Any]:
    """Versions, commit, device and command of this process; no environment variables, which may hold secrets."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    cuda = torch.cuda.is_available()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores",
        "backends": available(),
        "attention": attention_provider("cuda" if cuda else "cpu"),
        "ranks": dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1,
    }


def _commit() -> str | None:
    """The commit of the checkout that this file is in, `-dirty` with changes; None without one (an installed wheel)."""
    folder = Path(__file__).resolve().parent
    if not (folder.parent / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or no commit yet
    return done.stdout.strip()


def _sample_row(step: int, rollout: Rollout, rewards: Mapping[str, float | None]) -> dict[str, Any]:
    prompt = rollout.prompt
    return {
        "step": step,
        "id": prompt.id,
        "task": prompt.task,
        "prompt": prompt.text,
        "member": rollout.member,
        "text": rollout.text,
        "answer": prompt.answer,
        "has_image": rollout.image is not None,
        "attempts": rollout.attempts,
        "rewards": dict(rewards),
    }


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def _write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows), "utf-8")
