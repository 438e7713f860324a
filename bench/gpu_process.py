"""Runs the steps of a part, each in a process of its own that is killed, with all its children, at its limit.

A step that is measured has the GPU to itself.  While it runs the next one starts and imports what it needs, and waits
for its turn, so that an interpreter and its imports cost nothing; where a part's steps only check, several run at once.
What a step has found lies in a file that it replaces whenever it knows more: killing it loses what it had not told yet.
Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.05
KILLED_SECONDS = 10.0
LOG_BYTES = 60_000
"""Of a step's output that are kept: its beginning and its end."""


@dataclass(frozen=True, slots=True)
class Step:
    """One process.

    `command` ends with what the step is; `--report FILE` is added, and the step writes what it found to that file. One
    that `waits` gets `--wait` too and starts its work when it reads a line.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    """Its limit, from the moment that it has its turn."""
    environment: Mapping[str, str] = field(default_factory=dict)
    waits: bool = True
    also_prepares: float = 60.0
    """Seconds that starting and importing may take before its turn is counted."""


@dataclass(frozen=True, slots=True)
class Part:
    """Steps that belong together.

    Args:
        name: in results.
        title: on the page.
        steps: in the order in which they run.
        seconds: at most, all of them together.
        least: seconds that the parts before leave for this one.
        together: steps that may run at once; 1 where time is measured.
    """

    name: str
    title: str
    steps: tuple[Step, ...]
    seconds: float
    least: float = 0.0
    together: int = 1


@dataclass(slots=True)
class Outcome:
    """How a step ended, and what it told."""

    part: str
    step: str
    status: str
    """ok, failed (it raised, or a check was wrong), killed (its limit), skipped (it says why) or not started."""
    why: str = ""
    seconds: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)
    log: str = ""

    @property
    def reported(self) -> bool:
        """It came to its end and nothing was wrong."""
        return self.status in ("ok", "skipped")


class Running:
    """A step's process, in a group of its own."""

    def __init__(self, part: str, step: Step, folder: Path, environment: Mapping[str, str]) -> None:
        self.part, self.step = part, step
        stem = f"{part}-{step.name}".replace("/", "_").replace(" ", "_")
        self.report, self.log = folder / f"{stem}.json", folder / f"{stem}.log"
        command = [*step.command, "--report", str(self.report), *(["--wait"] if step.waits else [])]
        self.start = self.turn = time.monotonic()
        self.has_turn = False
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**environment, **step.environment},
            )

    def go(self) -> None:
        """Its turn: what it imports by now does not count."""
        self.has_turn, self.turn = True, time.monotonic()
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):  # it is gone already: its exit code says so
                self.process.stdin.write(b"go\n")
                self.process.stdin.close()

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def allowed(self) -> float:
        """Seconds from its turn to its end; importing after its turn came is not held against its limit."""
        told = self._told()
        slack = 0.0
        if self.step.waits:
            began = told.get("began")
            slack = self.step.also_prepares if began is None else max(0.0, began - self.turn)
        return self.step.seconds + slack

    def kill(self) -> None:
        """The process and all that it started; what left the group is not ours to find."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver that hangs may hold it: the others go on
            self.process.wait(KILLED_SECONDS)

    def outcome(self, killed: str = "") -> Outcome:
        """After its end."""
        self.kill()  # children that it left behind
        found, code = self._told(), self.process.returncode
        log = shortened(self.log.read_bytes().decode(errors="replace"))
        seconds = time.monotonic() - self.turn
        status, why = str(found.pop("status", "")), str(found.pop("why", ""))
        found.pop("began", None)
        if killed:
            status, why = "killed", killed
        elif code or status not in ("ok", "failed", "skipped"):
            status, why = "failed", why or ended_how(code, log)
        return Outcome(self.part, self.step.name, status, why, seconds, found, log)

    def _told(self) -> dict[str, Any]:
        try:
            found = json.loads(self.report.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def ended_how(code: int | None, log: str) -> str:
    """An exit code and the last thing that was said."""
    lines = [line for line in log.splitlines() if line.strip()]
    last = lines[-1].strip()[:300] if lines else "it said nothing"
    how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    return f"{how}: {last}"


def shortened(text: str) -> str:
    """Beginning and end of what is long."""
    if len(text) <= LOG_BYTES:
        return text
    half = LOG_BYTES // 2
    return f"{text[:half]}\n… {len(text) - 2 * half} characters left out …\n{text[-half:]}"


class Runner:
    """Runs parts one after another within one time.

    Args:
        seconds: for everything.
        folder: for reports and logs of steps; emptied by whoever made it.
        environment: of every step.
        told: called with each outcome as it comes.
    """

    def __init__(
        self, seconds: float, folder: Path, environment: Mapping[str, str], told: Callable[[Outcome], None]
    ) -> None:
        self.end = time.monotonic() + seconds
        self.folder, self.environment, self.told = folder, environment, told
        self.ready: Running | None = None
        self.running: list[Running] = []

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self, parts: Sequence[Part]) -> list[Outcome]:
        """Every step of every part has an outcome, whatever happens to the others."""
        outcomes: list[Outcome] = []
        try:
            for index, part in enumerate(parts):
                later = parts[index + 1 :]
                seconds = min(part.seconds, self.left - sum(other.least for other in later))
                following = next((other for other in later if other.steps), None)
                outcomes += self._run_part(part, seconds, following)
        except BaseException:
            for running in self.running:
                self.told(running.outcome("the run was told to end"))
            raise
        finally:
            self.stop()
        return outcomes

    def stop(self) -> None:
        """Kills what still runs."""
        for running in [*self.running, *([self.ready] if self.ready else [])]:
            running.kill()
        self.running, self.ready = [], None

    def _run_part(self, part: Part, seconds: float, following: Part | None) -> list[Outcome]:
        end, queue, outcomes = time.monotonic() + seconds, list(part.steps), []
        while queue or self.running:
            while queue and len(self.running) < part.together and time.monotonic() < end:
                self.running.append(self._start(part.name, queue.pop(0)))
                self._prepare(part, queue, following)
            if not self.running:
                break
            time.sleep(POLL_SECONDS)
            for running in list(self.running):
                outcome = self._look_at(running, end)
                if outcome is not None:
                    self.running.remove(running)
                    outcomes.append(outcome)
                    self.told(outcome)
        for step in queue:
            outcome = Outcome(part.name, step.name, "not started", "no time was left for it")
            outcomes.append(outcome)
            self.told(outcome)
        return outcomes

    def _start(self, part: str, step: Step) -> Running:
        running = self.ready
        if running is not None and (running.part, running.step) == (part, step):
            self.ready = None
        else:
            running = Running(part, step, self.folder, self.environment)
        running.go()
        return running

    def _prepare(self, part: Part, queue: Sequence[Step], following: Part | None) -> None:
        """Starts the process that has its turn next; its work waits."""
        if queue and part.together > 1:
            return
        name, step = (
            (part.name, queue[0]) if queue else (following.name, following.steps[0]) if following else ("", None)
        )
        if step is None or not step.waits:
            return
        if self.ready is not None:
            if (self.ready.part, self.ready.step) == (name, step):
                return
            self.ready.kill()
        self.ready = Running(name, step, self.folder, self.environment)

    @staticmethod
    def _look_at(running: Running, end: float) -> Outcome | None:
        now = time.monotonic()
        if running.ended:
            return running.outcome()
        if now > end:
            return running.outcome(f"the part's time was over after {now - running.turn:.0f} s of the step")
        if now - running.turn > running.allowed():
            return running.outcome(f"its limit of {running.step.seconds:.0f} s was over")
        return None
