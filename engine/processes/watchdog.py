"""Nothing hangs: every rank hears within seconds that another is gone, and one that stalls shows where.

A thread beside the training beats once a second into the process group's store and looks for what others say:

    fault           the first thing that went wrong: an exit code and words; whoever reads it ends with them
    beat/<rank>     how many marks the rank has passed, where it is, and a number that rises while it lives
    life/<rank>     which process it is, so that those of its machine see at once when it is gone
    here/<what>/<rank>  how often it has come to something that all ranks must do together, such as a save

    a rank raises an error           it says so as it leaves
    a rank is killed                 its process is gone, or its beats stand still for SILENCE
    a rank stalls                    no mark for `timeout` seconds: whoever has passed the fewest is named
    a rank saves alone               another one has passed its mark without coming: `gathering`

It begins when the ranks have met (meeting.py), so that joining the process group is watched as well.

A rank that reads a fault prints the stacks of its threads, waits GRACE seconds for the main one to come out by itself,
and ends the process.  A main thread that blocks all others (it holds Python's lock) is ended by `faulthandler`, which
needs no lock.

Source: the store as a side channel as in torchft and NeMo-RL's heartbeats; naming by progress is ours.
"""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from ..errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_STALLED,
    FINAL,
    CheckpointError,
    RankFailed,
    Refused,
    RewardSpecError,
    RunEnded,
)
from .beside import living
from .lifetimes import Lifetime
from .meeting import REFUSED, Meeting

POLL = 1.0
"""Seconds between beats."""
SILENCE = 60.0
"""Seconds without a beat after which a rank is given up: longer than a machine's hiccup."""
GRACE = 10.0
"""Seconds that a main thread has to come out of a failed collective by itself."""
_MISSED = 4
"""Beats that a rank may miss where something has failed already and the question is who."""
_FAULT = "fault"


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank told last."""

    count: int
    marks: int
    where: str

    @classmethod
    def read(cls, text: bytes) -> Beat:
        count, marks, where = text.decode().split(" ", 2)
        return cls(int(count), int(marks), where)

    def text(self) -> str:
        return f"{self.count} {self.marks} {self.where}"


_LEFT = Beat(-1, 0, "left")


@dataclass(frozen=True, slots=True)
class Fault:
    """What ends a run."""

    code: int
    words: str

    @classmethod
    def read(cls, text: bytes) -> Fault:
        code, words = text.decode().split(" ", 1)
        return cls(int(code), words)


class Watchdog:
    """Watches this rank and, over the store, the others.  A context manager around a run.

    Args:
        timeout: seconds that a stage of a step may take.
        meeting: the ranks of this start; None: a process alone.
        say: takes lines for people; None: stderr, with the rank.
        end: ends the process; tests put something milder in its place.
    """

    def __init__(
        self,
        timeout: float,
        meeting: Meeting | None = None,
        say: Callable[[str], None] | None = None,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._meeting = meeting or Meeting(0, 1)
        self.rank, self.world_size = self._meeting.rank, self._meeting.world_size
        # A client of its own: the main thread's may be waiting for something.
        store = self._meeting.store
        self._store: Any = None if store is None else dist.PrefixStore("watchdog", store.clone())
        self.timeout, self._end = timeout, end
        self._say = say or self._to_stderr
        self._where, self._limit, self._marks, self._marked_at = "starting", math.inf, 0, time.monotonic()
        self._count, self._silence = 0, SILENCE
        self._others = [rank for rank in range(self.world_size) if rank != self.rank]
        self._beside: dict[int, Lifetime | None] = dict.fromkeys(_beside(self.rank, self.world_size))
        self._seen: dict[int, tuple[int, float]] = {}
        self._calls: dict[str, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def mark(self, stage: str, step: int | None = None, within: float = math.inf) -> None:
        """This rank now begins `stage`. Those of a step are limited by `timeout`, others by `within` seconds."""
        where = stage if step is None else f"step {step}, {stage}"
        limit = within if step is None else self.timeout
        self._where, self._limit, self._marked_at = where, limit, time.monotonic()
        self._marks += 1
        if limit == math.inf:
            faulthandler.cancel_dump_traceback_later()
        else:
            # Seconds later than the thread, which says more; for when the thread cannot run.
            faulthandler.dump_traceback_later(limit + 2 * GRACE, exit=True, file=sys.__stderr__ or 2)

    def hurry(self) -> None:
        """This rank was asked to end, perhaps because another is gone: a few missed beats now mean that it is."""
        self._silence = _MISSED * POLL

    def gathering(self, what: str) -> Callable[[], None]:
        """This rank has come to `what`, which all must do together; the result, for any thread, waits for the others.

        It raises CheckpointError, at once and on this rank, when another one has gone on to its next mark instead."""
        if self._store is None:
            return lambda: None
        calls = self._calls[what] = self._calls.get(what, 0) + 1
        marks, where = self._marks, self._where
        self._store.set(f"here/{what}/{self.rank}", str(calls))

        def absent() -> list[int]:
            return [rank for rank in self._others if self._told(f"here/{what}/{rank}") < calls]

        def wait() -> None:
            while missing := absent():
                past = [rank for rank in missing if self._passed(rank) > marks]
                past = sorted({*past} & {*absent()})  # one may have come just now, and gone on
                if past:
                    raise CheckpointError(_alone(self.rank, past, what, where))
                fault = self._fault()
                if fault is not None:
                    raise RankFailed(fault.words, fault.code)
                time.sleep(POLL / 10)

        return wait

    def _told(self, key: str) -> int:
        return int(self._store.get(key)) if self._store.check([key]) else 0

    def _passed(self, rank: int) -> float:
        """Marks that another rank has passed; all of them, once it has left."""
        key = f"beat/{rank}"
        beat = Beat.read(self._store.get(key)) if self._store.check([key]) else Beat(0, 0, "")
        return math.inf if beat == _LEFT else beat.marks

    def __enter__(self) -> Self:
        _watching.append(self)
        if self._store is not None:
            self._store.set(f"life/{self.rank}", Lifetime.own().text())
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tells the others what ended this rank; raises RankFailed where it was another rank's doing."""
        faulthandler.cancel_dump_traceback_later()
        _watching.remove(self)
        try:
            if self._store is not None:
                knows = error is None or (isinstance(error, RunEnded) and error.together)
                self._store.set(f"beat/{self.rank}", _LEFT.text()) if knows else self._tell(error)
        except (dist.DistError, RuntimeError) as unreachable:
            if error is not None and _of_communication(error):
                raise RankFailed(_storeless(unreachable)) from error
        finally:
            self._over.set()
            if self._thread is not threading.current_thread():
                self._thread.join(2 * POLL)

    def _tell(self, error: BaseException | None) -> None:
        """Publishes this rank's error, or raises with what somebody else's fault it is."""
        deadline = time.monotonic() + (_MISSED + 2) * POLL
        while _of_communication(error) and time.monotonic() < deadline:
            fault = self._fault() or self._missing(_MISSED * POLL, self._others)
            if fault is not None:
                raise RankFailed(fault.words, fault.code) from error
            time.sleep(POLL / 4)
        words = f"rank {self.rank} failed at {self._where}: {type(error).__name__}: {str(error)[:500]}"
        fault = self._publish(words, _code(error))
        if fault.code == EXIT_BAD_INPUT:
            self._meeting.keep(REFUSED, fault.words)
        if self.rank == 0 and self._meeting.kept is None:  # the store ends with this process; the others read it first
            time.sleep(2 * POLL)

    def _publish(self, words: str, code: int = EXIT_FAILED) -> Fault:
        """The first fault of all, which is this one if nobody was earlier."""
        return Fault.read(self._store.compare_set(_FAULT, "", f"{code} {words}"))

    def _fault(self) -> Fault | None:
        return Fault.read(self._store.get(_FAULT)) if self._store.check([_FAULT]) else None

    def _missing(self, seconds: float, ranks: Sequence[int]) -> Fault | None:
        """A fault where the process of a rank of this machine is gone, or one of `ranks` is silent for so long."""
        missing = self._gone() or self._silent(seconds, ranks)
        if not missing:
            return None
        named = [f"rank {rank} (last at {beat.where})" for rank, beat in sorted(missing.items())]
        return self._publish(f"{', '.join(named[:8])} gave no sign of life: killed, or its machine is gone")

    def _watch(self) -> None:
        try:
            while not self._over.wait(POLL):
                self._beat()
                if self._store is not None:
                    # Rank 0 looks at all, all at rank 0: a few requests a second each, however many they are.
                    fault = self._fault() or self._missing(self._silence, self._others if self.rank == 0 else [0])
                    if fault is not None:
                        return self._give_up(fault.words, fault.code)
                if self._late() and not self._over.wait(2 * POLL) and self._late():  # the others' beats are new now
                    return self._give_up(self._stalled(), EXIT_STALLED)
        except (dist.DistError, RuntimeError) as error:
            if not self._over.wait(GRACE):  # not the end of the run either
                self._give_up(_storeless(error), EXIT_FAILED)

    def _beat(self) -> None:
        self._count += 1
        if self._store is not None:
            self._store.set(f"beat/{self.rank}", Beat(self._count, self._marks, self._where).text())

    def _beats(self, ranks: Sequence[int]) -> dict[int, Beat]:
        """The last one of each that has begun and not yet left."""
        keys = [f"beat/{rank}" for rank in ranks]
        if not self._store.check(keys):
            keys = [key for key in keys if self._store.check([key])]
        texts = self._store.multi_get(keys) if keys else []
        beats = {int(key.removeprefix("beat/")): Beat.read(text) for key, text in zip(keys, texts, strict=True)}
        return {rank: beat for rank, beat in beats.items() if beat != _LEFT}

    def _silent(self, seconds: float, ranks: Sequence[int]) -> dict[int, Beat]:
        """Those of `ranks` whose beats have stood still for so long, with the last one."""
        if self._store is None:
            return {}
        now, silent = time.monotonic(), {}
        for rank, beat in self._beats(ranks).items():
            count, since = self._seen.get(rank, (-1, now))
            self._seen[rank] = beat.count, (since if count == beat.count else now)
            if now - self._seen[rank][1] >= seconds:
                silent[rank] = beat
        return silent

    def _gone(self) -> dict[int, Beat]:
        """Ranks of this machine whose process has ended without a word, with the last beat."""
        for rank in [rank for rank, life in self._beside.items() if life is None]:
            if self._store.check([f"life/{rank}"]):
                self._beside[rank] = Lifetime.read(self._store.get(f"life/{rank}").decode())
        over = [rank for rank, life in self._beside.items() if life is not None and life.is_over]
        return self._beats(over) if over else {}  # whoever has left in order has no beat

    def _late(self) -> bool:
        return time.monotonic() - self._marked_at > self._limit

    def _stalled(self) -> str:
        """Who holds the others up: those that have passed the fewest marks."""
        of = "stage_timeout = " if self._limit == self.timeout else ""
        own = f"no progress within {of}{self._limit:g} s"
        if self._store is None:
            return f"{own} at {self._where}"
        marks = {self.rank: Beat(self._count, self._marks, self._where), **self._beats(self._others)}
        fewest = min(beat.marks for beat in marks.values())
        behind = [f"rank {rank} at {beat.where}" for rank, beat in sorted(marks.items()) if beat.marks == fewest]
        return self._publish(f"{own}: {'; '.join(behind[:8])}").words

    def _give_up(self, fault: str, code: int) -> None:
        """Says what happened and where this rank is, lets the main thread come out by itself, then ends the process."""
        self._say(fault)
        if self._over.wait(POLL):
            return
        if code not in FINAL:  # what was refused or asked for is not to be looked for in stacks
            self._say(f"is at {self._where}; stacks follow")
            with suppress(OSError, ValueError):
                faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
                for process in living():
                    self._say(f"stacks of {process.what}, process {process.pid}:")
                    process.show_stacks()
        if not self._over.wait(GRACE if code not in FINAL else min(GRACE, 3 * POLL)):
            self._say("ends")
            sys.stdout.flush()
            self._end(code)

    def _to_stderr(self, line: str) -> None:
        name = f" rank {self.rank}:" if self.world_size > 1 else ""
        print(f"syncr1:{name} {line}", file=sys.__stderr__, flush=True)


def _beside(rank: int, world_size: int) -> list[int]:
    """The other ranks of this machine, where the launcher tells: they have numbers one after the other."""
    local, place = (int(os.environ.get(name, "0")) for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK"))
    first = rank - place
    return [other for other in range(max(0, first), min(world_size, first + local)) if other != rank]


def _code(error: BaseException | None) -> int:
    """What an error ends all ranks with."""
    if isinstance(error, RunEnded):
        return error.code
    return EXIT_BAD_INPUT if isinstance(error, Refused | RewardSpecError) else EXIT_FAILED


def gathering(what: str) -> Callable[[], None]:
    """`Watchdog.gathering` of the one that watches this process; outside of one nothing is known of other ranks."""
    return _watching[-1].gathering(what) if _watching else lambda: None


_watching: list[Watchdog] = []


def _alone(rank: int, past: Sequence[int], what: str, where: str) -> str:
    named = f"rank{'s' * (len(past) > 1)} {', '.join(map(str, past[:8]))}{', …' * (len(past) > 8)}"
    return (
        f"rank {rank} came to {what} at {where}, and {named} went on without; all ranks must do it together, at the "
        "same place: call it on every rank (the right ones write)"
    )


def _storeless(error: BaseException) -> str:
    return f"rank 0 (or its machine, which keeps the run's store) is gone: {str(error)[:200]}"


def _of_communication(error: BaseException | None) -> bool:
    """Whether an error says no more than that another rank did not answer."""
    words = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in words for word in ("gloo", "nccl", "by peer"))
