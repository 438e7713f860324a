"""Every error of the engine, the exit code that a process ends with, and how a message shows what it was given.

  0  done
  1  a fault of this program; crash.txt has the traceback, and what a report of it needs
  2  what was handed in, or the machine (disk, memory, port, hub), cannot work; one line says what, and what to do
 70  another rank failed, or too many updates in a row were not finite; the newest checkpoint is whole
 75  stopped by SIGTERM, SIGUSR1 or SIGHUP, after a checkpoint where training had begun; start again with
     --resume_from_checkpoint latest
124  a stage of a step took longer than --stage_timeout; the stacks of all threads were printed
130  Ctrl-C outside of training
141  nobody reads what is printed (`| head`)
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import NoReturn

EXIT_CRASHED = 1
EXIT_BAD_INPUT = 2
EXIT_FAILED = 70  # EX_SOFTWARE of sysexits.h
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: trying again helps
EXIT_STALLED = 124  # as timeout(1)
EXIT_INTERRUPTED = 130  # as a shell tells it
EXIT_NO_READER = 141  # as a shell tells SIGPIPE

FINAL = (EXIT_BAD_INPUT, EXIT_PREEMPTED)
"""After these a launcher does not start again: it would not help, or is not wanted."""

PYTHON = (3, 11)
if tuple(sys.version_info) < PYTHON:  # this is the first file that a recipe reads: the next ones would be a traceback
    print(f"syncr1: Python: expected 3.11 or 3.12, got {sys.version.split()[0]}; run .venv/bin/python", file=sys.stderr)
    raise SystemExit(EXIT_BAD_INPUT)

MOST_CHARACTERS = 8_000
"""Of a message. It names the place first and the remedy last, so what is left out is in between."""
TAIL = 2_000


# What was handed in cannot be used: exit 2 --------------------------------------------------------------------------


class Refused(ValueError):
    """Something that was handed in cannot be used; the message says what was expected, what came, and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class ConfigError(Refused):
    """Settings that cannot work.  Each line names the field, what was expected, what came, and the remedy."""

    @classmethod
    def of(cls, problems: list[str]) -> ConfigError:
        """One error for all `problems`, so that nobody has to fix them one run at a time."""
        return cls("\n".join(problems))


class DataError(Refused):
    """Something in the data folder cannot be used; the message names the file, the entry and the remedy."""


class NoSplitError(DataError):
    """The source is there, and has no such split."""


class PictureError(Refused):
    """A picture that cannot be used; the message names the file and the reason."""


class CheckpointError(Refused):
    """A checkpoint that cannot be read or used: what was expected, what came, and the remedy."""


class EvaluationError(Refused):
    """An evaluation cannot go on; the message says what was found and what to do."""


class MachineError(Refused):
    """Disk, memory, a port, the hub or a library is not as a run needs it; the message says what to do."""


class RewardSpecError(Refused):
    """A reward that cannot be loaded; the message names the spec, the reason and the remedy."""


# What fails while a run goes on -------------------------------------------------------------------------------------


class RewardError(ValueError):
    """A reward function broke its contract: a wrong number of values, or one that is not a finite number or None."""

    def __init__(self, function: str, index: int | None, problem: str) -> None:
        self.function, self.index, self.problem = function, index, problem
        self.where = ""
        """Rank, step and prompt, once they are known."""
        at = "" if index is None else f" at index {index}"
        super().__init__(printable(f"reward {function!r}{at}: {problem}"))

    def __str__(self) -> str:
        return f"{self.args[0]} ({self.where})" if self.where else self.args[0]


class IsolatedError(RuntimeError):
    """The function raised, or its process ended; the message has the reason."""


class ChatError(RuntimeError):
    """No usable answer. `status` is the HTTP status, None where none came; `again` says whether a retry may help."""

    def __init__(self, problem: str, *, status: int | None = None, again: bool = False, wait: float = 0.0) -> None:
        self.status, self.again, self.wait = status, again, wait
        super().__init__(problem)

    @property
    def permanent(self) -> bool:
        """The server refuses such requests: a retry does not help with a wrong key, address or model."""
        return self.status is not None and 300 <= self.status < 500 and not self.again


class RolloutTooLarge(RuntimeError):
    """The keys and values of a batch do not fit into memory."""


# How a run ends early -----------------------------------------------------------------------------------------------


class RunEnded(BaseException):
    """A run that cannot go on, in words for people; `code` is what the process ends with.

    No `Exception`: what a signal raises while a picture or a plug-in is read passes whatever catches their faults."""

    code = EXIT_FAILED
    together = True
    """All ranks have agreed on it; otherwise the others must be told."""


class Preempted(RunEnded):
    """The scheduler wants the machine back: all is saved, and the run continues once it is started again."""

    code = EXIT_PREEMPTED

    def __init__(self, words: str, *, together: bool = True) -> None:
        super().__init__(words)
        self.together = together


class RankFailed(RunEnded):
    """Another rank is gone or failed, so that this one cannot continue."""

    def __init__(self, words: str, code: int = EXIT_FAILED) -> None:
        super().__init__(words)
        self.code = code


class NotFinite(RunEnded):
    """Update after update came out NaN or infinite."""


class RewardsFailed(RunEnded):
    """A reward that works for nobody: the run would train on what is left of its rewards, or on nothing."""

    code = EXIT_BAD_INPUT


# What messages show -------------------------------------------------------------------------------------------------


def printable(message: str) -> str:
    """`message` without halves of surrogate pairs, which no terminal takes, and without the middle of a long one."""
    message = message.encode("utf-8", "backslashreplace").decode()
    if len(message) <= MOST_CHARACTERS:
        return message
    mark = " … "
    return message[: MOST_CHARACTERS - TAIL - len(mark)] + mark + message[-TAIL:]


def shown(value: object, longest: int = 80) -> str:
    """`repr(value)`, cut at `longest`; also of what Python has no repr for: deep lists, integers of 4300 digits."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        text = f"{type(value).__name__} that is too deep or too long to show"
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def kind_of(path: str | Path) -> str:
    """What lies there, in words that go on with `got PATH, `; `a file` for one that can be read as such."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if os.path.islink(path):
            return "a link to what is not there"
        return "which is not there" if isinstance(error, FileNotFoundError) else f"which {error.strerror or error}"
    except ValueError:  # a name that no file can have
        return "which is not there"
    if stat.S_ISREG(mode):
        return "a file" if os.access(path, os.R_OK) else "a file that may not be read"
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def shown_end(code: int) -> str:
    """How a process ended, in words, by its return code as `subprocess` has it."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def one_line(text: object) -> str:
    """A library's message of several lines as one."""
    return " ".join(str(text).split())


def refuse(error: Refused, *, by_all: bool = False) -> NoReturn:
    """Ends the process with exit code 2, the message on stderr: a line for each thing that is wrong, with the program's
    name; indented lines, commands to paste, as they are.

    Args:
        error: what is wrong.
        by_all: every rank of a machine says it; else one, as all found the same.
    """
    if by_all or os.environ.get("LOCAL_RANK", "0") == "0":
        print(*told(error), sep="\n", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_BAD_INPUT)


def told(error: BaseException) -> list[str]:
    """The lines that `refuse` prints."""
    program = Path(sys.argv[0]).name or "syncr1"
    lines = str(error).splitlines() if isinstance(error, ConfigError) else [one_line(error)]
    if isinstance(error, RewardError):  # it says what a function gave, wherever it ran
        lines[-1] += "; docs/rewards.md says what a reward gives, correct the function"
    return [line if line.startswith(" ") else f"{program}: {line}" for line in lines if line.strip()]
