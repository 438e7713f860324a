"""A second process of this program beside the first: it is asked, works while the first one goes on, and answers.

    messages    a pipe each way; JSON, and vectors of numbers behind it: nothing is pickled
    weights     memory that both see (`SharedBytes`), written while the second one waits

It ends with the first one, however that ends, and ignores what schedulers send to all processes: the first one decides.
When it is killed, `receive` says so at once; an error there is raised here, in the words that it would have had here.
Python's warnings and what is printed there go to stderr, log records to this process's log.

This is both sides: `Beside` is the first process's, `serve` the second one's.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import logging
import mmap
import os
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import errors
from ..errors import MachineError, RankFailed, RewardError, shown_end
from ..reasons import reason_of

POLL = 0.5
"""Seconds between two looks at whether the other process lives, while nothing comes."""
GRACE = 5.0
"""Seconds that it has to end by itself once its input has ended."""
STACKS = signal.SIGUSR2
"""What makes it print the stacks of its threads."""
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which a launcher makes a process a rank, which the second one is not; and torchrun's own."""
_SIZES = struct.Struct("<QQ")
_PR_SET_PDEATHSIG = 1  # of prctl.h


@dataclass(frozen=True, slots=True)
class Message:
    """What goes one way at a time."""

    about: Mapping[str, Any]
    """Plain values, as JSON has them."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Vectors on the CPU, of any dtype."""


class OtherProcessFailed(RuntimeError):
    """An error of no kind that this program knows, in the other process; its traceback is the cause."""


class _Traceback(Exception):
    """The text of a traceback, for one to be read above this process's own."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class SharedBytes:
    """Memory that this process shares with one that it starts; it is gone when both have ended, however they do.

    Args:
        size: bytes.
        descriptor: of an existing one, in the process that was given it; None makes one.
    """

    def __init__(self, size: int, descriptor: int | None = None) -> None:
        if descriptor is None:
            # Counted as memory, but not bounded as /dev/shm is: a container has 64 MB of that.
            made = os.memfd_create("syncr1") if hasattr(os, "memfd_create") else _unnamed_file()
            os.ftruncate(made, max(1, size))
            descriptor = made
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, max(1, size))

    def vector(self, dtype: torch.dtype, count: int, offset: int) -> Tensor:
        """[count] of the memory from byte `offset` on, which is a multiple of the dtype's size."""
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset)

    def close(self) -> None:
        """Gives the descriptor back; the memory goes when no tensor needs it any more."""
        os.close(self.descriptor)


def _unnamed_file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Beside:
    """The first process's side of a second one.

    Args:
        module: what `python -m` runs there; it calls `serve`.
        what: the process, in words that go on with `ended`.
        descriptors: files that it inherits, under the same numbers.
        variables: of its environment, in place of this one's.
    """

    def __init__(
        self, module: str, what: str, *, descriptors: Sequence[int] = (), variables: Mapping[str, str] | None = None
    ) -> None:
        self.what = what
        rank = {name for name in os.environ if name.startswith("TORCHELASTIC_")} | {*OF_A_RANK}
        kept = {name: value for name, value in os.environ.items() if name not in rank}
        # What can be imported here can be there, too: see rewards/yours/isolated.py.
        command = [sys.executable, "-P", "-m", module, str(os.getpid()), json.dumps(sys.path)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=tuple(descriptors),
            env=kept | dict(variables or {}),
            process_group=0,  # a terminal's Ctrl-C is for the first process, also while this one still loads
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        _living.append(self)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: Message) -> None:
        """Raises RankFailed when the other process has ended."""
        try:
            _send(self._to, message)
        except BrokenPipeError:
            self._ended()

    def receive(self) -> Message:
        """The next answer, which is waited for.

        Raises:
            RankFailed: the other process has ended.
            Exception: what it raised there, of the same class where that is one of errors.py.
        """
        with selectors.DefaultSelector() as selector:
            selector.register(self._from, selectors.EVENT_READ)

            def read(into: memoryview) -> None:
                while into:
                    # A process that it has started may hold the pipe open, so that no end of it would come.
                    if not selector.select(POLL):
                        if self._process.poll() is not None:
                            self._ended()
                        continue
                    count = os.readv(self._from, [into])
                    if not count:
                        self._ended()
                    into = into[count:]

            message = _receive(read)
        for name, level, text in message.about.get("log", ()):
            logging.getLogger(name).log(level, "%s", text)
        if "error" in message.about:
            _raise(message.about["error"], self.what)
        return message

    def show_stacks(self) -> None:
        """Has it print the stacks of its threads to stderr."""
        if self._process.poll() is None:
            self._process.send_signal(STACKS)

    def close(self, grace: float = GRACE) -> None:
        """Ends it: its input ends, and after `grace` seconds it is killed."""
        if self in _living:
            _living.remove(self)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()  # an answer that nobody takes does not keep it
        try:
            self._process.wait(grace)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ended(self) -> NoReturn:
        code = self._process.wait()
        why = ": out of memory, or somebody's kill" if code == -signal.SIGKILL else ""
        raise RankFailed(
            f"{self.what} ended ({shown_end(code)}{why}); the newest checkpoint is whole: go on with "
            "--resume_from_checkpoint latest"
        )


_living: list[Beside] = []


def living() -> list[Beside]:
    """Those that this process has started and not closed."""
    return list(_living)


Answers = Callable[[Message], Message]


def serve(begin: Callable[[Message], tuple[Message, Answers]]) -> None:
    """The second process: answers until its input ends.

    Args:
        begin: takes the first message; returns its answer, and what answers the others.
    """
    _die_with(int(sys.argv[1]))
    sys.path[:] = json.loads(sys.argv[2])
    for asked in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):  # the first process decides
        signal.signal(asked, signal.SIG_IGN)
    faulthandler.register(STACKS, file=sys.__stderr__ or 2, all_threads=True)
    # What is printed or read here is neither an answer nor a request.
    requests, answers = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    log, answering = _LogTaken(), list[Answers]()

    def read(into: memoryview) -> None:
        while into:
            count = os.readv(requests, [into])
            if not count:
                raise EOFError
            into = into[count:]

    def answer(message: Message) -> Message:
        try:
            if answering:
                return answering[0](message)
            reply, others = begin(message)
        except (Exception, errors.RunEnded) as error:
            return Message({"error": _told(error)})
        answering.append(others)
        return reply

    with suppress(EOFError, BrokenPipeError):
        while True:
            reply = answer(_receive(read))
            _send(answers, Message({**reply.about, "log": log.taken()}, reply.tensors))


class _LogTaken(logging.Handler):
    """Keeps what is logged here until it is sent to the process whose log it belongs into."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._records: list[tuple[str, int, str]] = []
        logging.getLogger().addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append((record.name, record.levelno, record.getMessage()))

    def taken(self) -> list[tuple[str, int, str]]:
        records, self._records = self._records, []
        return records


def _die_with(parent: int) -> None:
    """Has the system kill this process when the one that started it ends; elsewhere its input ends, which it reads
    once it waits."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(errors.EXIT_FAILED)


# Messages ---------------------------------------------------------------------------------------------------------


def _send(descriptor: int, message: Message) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in message.tensors.items()}
    listed = [[name, _dtype(tensor), tensor.numel()] for name, tensor in tensors.items()]
    text = json.dumps({"about": message.about, "tensors": listed}).encode()
    parts = [memoryview(_SIZES.pack(len(text), len(listed))), memoryview(text), *map(_bytes, tensors.values())]
    for part in parts:
        while part:
            part = part[os.write(descriptor, part) :]


def _receive(read: Callable[[memoryview], None]) -> Message:
    """A message from `read`, which fills what it is given, or raises."""
    sizes = bytearray(_SIZES.size)
    read(memoryview(sizes))
    text = bytearray(_SIZES.unpack(sizes)[0])
    read(memoryview(text))
    told = json.loads(text)
    tensors = {name: torch.empty(count, dtype=getattr(torch, dtype)) for name, dtype, count in told["tensors"]}
    for tensor in tensors.values():
        read(_bytes(tensor))
    return Message(told["about"], tensors)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bytes(tensor: Tensor) -> memoryview:
    """Of a contiguous vector, in place."""
    numbers: Any = tensor.view(torch.uint8).numpy() if tensor.numel() else b""
    return memoryview(numbers)


# Errors -----------------------------------------------------------------------------------------------------------


def _told(error: BaseException) -> dict[str, Any]:
    """What the other side needs to raise it again."""
    told: dict[str, Any] = {"kind": type(error).__name__, "words": str(error)}
    if isinstance(error, RewardError):
        told["reward"] = error_fields(error)
    elif getattr(errors, type(error).__name__, None) is not type(error):
        told["reason"] = reason_of(error, "rollout")
        told["trace"] = "".join(traceback.format_exception(error))
    return told


def _raise(told: Mapping[str, Any], what: str) -> NoReturn:
    """The error of the other process, here."""
    if "reward" in told:
        raise reward_error(told["reward"])
    known = getattr(errors, told["kind"], None)
    if "trace" not in told and isinstance(known, type) and issubclass(known, Exception | errors.RunEnded):
        raise known(told["words"])
    if told["reason"] is not None:
        raise MachineError(told["reason"])
    raise OtherProcessFailed(f"{what}: {told['kind']}: {told['words']}") from _Traceback(told["trace"])


def error_fields(error: RewardError) -> dict[str, Any]:
    """A broken contract in plain values, for `reward_error`."""
    return {"function": error.function, "index": error.index, "problem": error.problem, "where": error.where}


def reward_error(fields: Mapping[str, Any]) -> RewardError:
    """The error that `error_fields` told."""
    error = RewardError(fields["function"], fields["index"], fields["problem"])
    error.where = fields["where"]
    return error
