"""Errors of the system and of libraries whose reason lies outside of this program, in a line that says what to do.

An error counts by its kind (a number of the system, a class of the hub, memory that ran out), never for having been
raised somewhere: a ValueError from deep inside has no reason here and stays our own fault.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ConfigError, Refused, one_line

RESUME = "what was saved before is whole: a training goes on from it by --resume_from_checkpoint latest"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_BROKEN = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO)
_NO_MEMORY = re.compile(r"out of memory|(can't|cannot|could not|unable to) allocate memory|not enough memory", re.I)
_FULL_WORDS = re.compile(r"no space left on device|disk quota exceeded|StorageFull", re.I)
_FORBIDDEN_WORDS = re.compile(r"permission denied|read-only file system|PermissionDenied|ReadOnlyFilesystem", re.I)
_OFFLINE = ("OfflineModeIsEnabled",)
_CUT_OFF = ("RemoteProtocolError", "ReadError", "ProtocolError", "ChunkedEncodingError", "IncompleteRead")
_UNREACHABLE = ("ConnectError", "ConnectTimeout", "ReadTimeout", "ConnectionError", "Timeout", "MaxRetryError")
_OS_ERROR = re.compile(r"os error (\d+)")
_FROM_RUST = ("SafetensorError",)
"""Classes of extensions that tell an error of the system in words alone."""


def reason_of(error: BaseException, doing: str = "") -> str | None:
    """What is wrong outside of this program, and what to do; None where that is not known.

    Args:
        error: what was raised, itself and what it was raised from.
        doing: what the program was at, for the message.
    """
    for link in _links(error):
        for rule in (_memory, _hub, _disk, _network):
            found = rule(link)
            if found is not None:
                what, expected, got, remedy = found
                at = f" ({doing})" if doing else ""
                return f"{what}{at}: expected {expected}, got {got}; {remedy}"
    return None


@contextmanager
def reading(setting: str, name: str | Path) -> Iterator[None]:
    """A block in which libraries alone read a stranger's files, such as transformers' `from_pretrained`: whatever they
    raise is about those, and becomes a ConfigError in a line.  Memory that runs out stays what it is.

    Args:
        setting: that names the files.
        name: of the folder, or on the hub.
    """
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        if any(_memory(link) for link in _links(error)):
            raise
        reason = reason_of(error)
        if reason is None:
            words = one_line(error)[:400]
            reason = (
                f"expected files that its library can read, got {type(error).__name__}: {words}; fetch them again, or "
                "name others"
            )
        raise ConfigError(f"{setting}: {name}: {reason}") from error


Told = tuple[str, str, str, str] | None
"""What, expected, got, remedy."""


def _links(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was said to come from; not what happened to be handled when it was raised."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__


def _is(error: BaseException, *names: str) -> bool:
    """By name, so that nothing is imported for a question."""
    return any(kind.__name__ in names for kind in type(error).__mro__)


def _memory(error: BaseException) -> Told:
    system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    words = isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
    if not (isinstance(error, MemoryError) or _is(error, "OutOfMemoryError") or system or words):
        return None
    remedy = (
        "lower prompts_per_step, num_generations, max_completion_length, max_tokens_per_microbatch or batch_size, or "
        "set gradient_checkpointing, lora_rank or zero_stage 2 on more ranks; --dry_run estimates what a rank takes"
    )
    return "memory", "room for this step", one_line(error)[:300] or type(error).__name__, remedy


def _disk(error: BaseException) -> Told:
    number, text = getattr(error, "errno", None), str(error)
    if _is(error, *_FROM_RUST) and (told := _OS_ERROR.search(text)):
        number = int(told[1])
    in_words = _is(error, *_FROM_RUST) or (isinstance(error, OSError | RuntimeError) and number is None)
    path = getattr(error, "filename2", None) or getattr(error, "filename", None)
    what = str(path) if path else "disk"
    said = os.strerror(number) if isinstance(number, int) and number > 0 else one_line(text)[:300]
    if not (isinstance(error, OSError) or in_words or _is(error, *_FROM_RUST)):
        return None
    if number in _FULL or (in_words and _FULL_WORDS.search(text)):
        return what, "free space", said, f"free some, or write to another disk; {RESUME}"
    if (number in _FORBIDDEN and path) or (in_words and _FORBIDDEN_WORDS.search(text)):
        return what, "what may be read and written here", said, "change its permissions, or name another place"
    if number in (errno.EMFILE, errno.ENFILE):
        return "open files", "one more", said, "raise the limit (`ulimit -n 65536`) and start again"
    if number in _BROKEN and path:
        return what, "a disk that answers", said, f"look at the disk or the network drive; {RESUME}"
    if number == errno.ENAMETOOLONG:
        return what[:80], "a name that the file system takes", said, "choose a shorter one"
    return None


def _network(error: BaseException) -> Told:
    text = str(error)
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return "threads", "one more", text, "raise the limit (`ulimit -u`), or start fewer ranks on this machine"
    in_use = getattr(error, "errno", None) == errno.EADDRINUSE or "EADDRINUSE" in text
    if not in_use or not isinstance(error, OSError | RuntimeError):
        return None
    port = os.environ.get("MASTER_PORT", "?")
    return (
        "MASTER_PORT",
        "a free port",
        f"{port}, on which another process listens",
        "name another one, or leave it out",
    )


def _hub(error: BaseException) -> Told:
    if not type(error).__module__.startswith(("huggingface_hub", "httpx", "requests", "urllib3", "datasets")):
        return None
    said, login = one_line(error)[:300], "`hf auth login`, or HF_TOKEN"
    if _is(error, "GatedRepoError"):
        return "hub", "access to a gated repository", said, f"ask for access on its page, then {login}"
    if _is(error, "RevisionNotFoundError"):
        return "hub", "a branch, tag or commit of the repository", said, "correct the revision"
    if _is(error, "RepositoryNotFoundError"):
        return "hub", "a repository's name", said, f"correct the name; a private one needs {login}"
    if _is(error, *_OFFLINE, "LocalEntryNotFoundError"):
        return (
            "hub",
            "files in the cache or a network",
            said,
            "download them where there is a network, or give a folder",
        )
    if _is(error, "EntryNotFoundError"):
        return "hub", "a file of the repository", said, "take another revision, which has it, or another name"
    if _is(error, *_CUT_OFF) or "Consistency check failed" in said:
        return "hub", "whole files", said, "start again: a download goes on where it was cut off"
    if _is(error, *_UNREACHABLE):
        return "hub", "an answer", said, "check network and proxy (HF_ENDPOINT names a mirror), or give a folder"
    return ("hub", "an answer", said, "try again later, or give a folder") if _is(error, "HfHubHTTPError") else None
