"""A reward function in a process of its own: one that never returns is killed, one that crashes takes nothing with it.

A thread cannot be killed, and one that keeps Python's lock (a huge power, a regular expression that backtracks for
ever) stops every other: `isolated@file.py:function` is for functions that read what a policy wrote by such means, or
that call libraries which may crash.  Each rank has one worker for each such function; a new one is started where the
last was lost, and its loading is done by the next step.

    to the worker     the columns as JSON, the drawn images and the token ids as plain numbers behind it
    back              a number or None for each trajectory, or why there is none

Nothing is pickled.  Columns of anything else than texts, numbers, lists, dicts, and paths are left out: pictures that
lie inside a data file.  Tuples arrive as lists.

Math-Verify and verl time out by signals, which work in the main thread alone, or by pools, which lose their workers.

Dims: S trajectories.
"""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import subprocess
import sys
import threading
from array import array
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .base import Outcome, RewardError, RewardFunction, RewardValues, call, checked

STARTUP = 300.0
"""Seconds that a worker has to load its function."""
_SIZES = struct.Struct("<QQ")
_PATH = "syncr1.path"
"""Key of the dict that stands for a path."""


class IsolatedError(RuntimeError):
    """The function raised, or its process ended; the message has the reason."""


class IsolatedReward:
    """The reward function that `spec` names, called in another process. `cancel` ends a call that takes too long.

    Args:
        spec: as `load_reward` takes it.

    Raises:
        IsolatedError: the function cannot be loaded; the message is that of `load_reward`.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self._lock = threading.Lock()
        self._worker, self._is_loaded, self._is_given_up = _start(spec), False, False
        about = self._load()
        self.__name__ = str(about["name"])
        if about["kind"] is not None:
            self.kind = str(about["kind"])

    def __call__(self, **columns: Any) -> RewardValues:
        """Values of the S trajectories.

        Raises:
            RewardError: what the function returned is no list of S numbers or None, or it raised this itself.
            IsolatedError: it raised anything else, or its process ended.
        """
        with self._lock:
            self._is_given_up = False
            if self._worker.poll() is not None:  # between two calls
                self._restart()
            try:
                if not self._is_loaded:
                    self._load()
                if self._is_given_up:
                    raise TimeoutError("loading took too long")
                reply = self._ask(columns)
            except IsolatedError:
                self._restart()
                raise
        if "values" in reply:
            return list(reply["values"])
        if reply["is_contract"]:
            raise RewardError(self.__name__, reply["index"], reply["error"])
        raise IsolatedError(reply["error"])

    def cancel(self) -> None:
        """Kills the worker, in whatever it is; the call under way then fails, and starts another. One that still loads
        goes on, for the next call: where a machine is slow, a new one would not be faster."""
        self._is_given_up = True
        if self._is_loaded:
            self._worker.kill()

    def close(self) -> None:
        """Ends the worker."""
        self._worker.kill()
        self._worker.wait()
        for pipe in (self._worker.stdin, self._worker.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # what it did not read any more
                pipe.close()

    def _restart(self) -> None:
        self.close()
        self._worker, self._is_loaded = _start(self.spec), False

    def _load(self) -> dict[str, Any]:
        """The worker's first word, once it has its function: what that is. IsolatedError where there is none."""
        late = threading.Timer(STARTUP, self._worker.kill)
        late.daemon = True
        late.start()
        try:
            about = _reply(self._worker)
        finally:
            late.cancel()
            late.join()
        if "error" in about:
            raise IsolatedError(about["error"])
        self._is_loaded = True
        return about

    def _ask(self, columns: dict[str, Any]) -> dict[str, Any]:
        worker = self._worker
        assert worker.stdin is not None
        try:
            _send(worker.stdin, *_packed(columns))
        except BrokenPipeError:
            raise _ended(worker) from None
        return _reply(worker)


def _start(spec: str) -> subprocess.Popen[bytes]:
    # What can be imported here can be there. Not by PYTHONPATH, which goes before the standard library, nor by the
    # working directory (-P): a stray `random.py` beside a recipe would be taken for Python's own.
    command = [sys.executable, "-P", "-m", "syncr1.engine.rewards.isolated", spec, json.dumps(sys.path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _reply(worker: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert worker.stdout is not None
    received = _receive(worker.stdout)
    if received is None:
        raise _ended(worker)
    reply: dict[str, Any] = json.loads(received[0])
    return reply


def _ended(worker: subprocess.Popen[bytes]) -> IsolatedError:
    code = worker.wait()
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return IsolatedError(f"its process {how}")


def _packed(columns: dict[str, Any]) -> tuple[str, list[memoryview]]:
    """JSON of the columns that it can carry; what lies behind it: images as float32, then token ids as int64."""
    images, ids = columns.get("images") or [], columns.get("completion_ids")
    pixels = [image.detach().float().cpu().contiguous().numpy() for image in images if image is not None]
    behind = [memoryview(values.reshape(-1)).cast("B") for values in pixels if values.size]
    parts = {"images": json.dumps([None if image is None else list(image.shape) for image in images])}
    if ids is not None:
        parts["completion_ids"] = json.dumps([len(row) for row in ids])
        behind.append(memoryview(array("q", chain.from_iterable(ids))).cast("B"))
    for name, column in columns.items():
        if name not in ("images", "completion_ids"):
            try:
                parts[name] = json.dumps(column, default=_plain)
            except (TypeError, ValueError):  # nothing that JSON has a form for
                continue
    return "{" + ", ".join(f"{json.dumps(name)}: {text}" for name, text in parts.items()) + "}", behind


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return {_PATH: str(value)}
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(type(value).__name__)


def _unpacked(text: bytes, behind: bytearray) -> dict[str, Any]:
    columns: dict[str, Any] = json.loads(
        text, object_hook=lambda found: Path(found[_PATH]) if set(found) == {_PATH} else found
    )
    images: list[torch.Tensor | None] = []
    at = 0
    for shape in columns["images"]:
        count = 0 if shape is None else math.prod(shape)
        values = torch.frombuffer(behind, dtype=torch.float32, count=count, offset=at) if count else torch.empty(0)
        images.append(None if shape is None else values.view(shape))
        at += 4 * count
    columns["images"] = images
    if "completion_ids" in columns:
        tokens = array("q")
        tokens.frombytes(memoryview(behind)[at:])
        left = iter(tokens.tolist())
        columns["completion_ids"] = [list(islice(left, length)) for length in columns["completion_ids"]]
    return columns


def _send(stream: Any, text: str, behind: Sequence[memoryview] = ()) -> None:
    encoded = text.encode()
    stream.write(_SIZES.pack(len(encoded), sum(part.nbytes for part in behind)) + encoded)
    for part in behind:
        stream.write(part)
    stream.flush()


def _receive(stream: Any) -> tuple[bytes, bytearray] | None:
    """The next message; None where the other side is gone."""
    sizes = stream.read(_SIZES.size)
    if len(sizes) < _SIZES.size:
        return None
    num_text, num_behind = _SIZES.unpack(sizes)
    text, behind = stream.read(num_text), bytearray(num_behind)
    return (text, behind) if len(text) == num_text and stream.readinto(behind) == num_behind else None


def _serve(spec: str) -> None:
    """The worker: answers until its input ends."""
    from .custom import RewardSpecError, load_reward

    for asked_to_end in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the run finishes its step, and needs this
        signal.signal(asked_to_end, signal.SIG_IGN)
    # What the function prints or reads is neither a reply nor a request.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    try:
        function = load_reward(spec)
    except RewardSpecError as error:
        _send(replies, json.dumps({"error": str(error)}))
        return
    name = getattr(function, "__name__", type(function).__name__)
    _send(replies, json.dumps({"name": name, "kind": getattr(function, "kind", None)}))
    while (request := _receive(requests)) is not None:
        _die_with_the_run(requests.fileno(), True)
        reply = _answer(name, function, _unpacked(*request))
        _die_with_the_run(requests.fileno(), False)
        _send(replies, json.dumps(reply))


def _answer(name: str, function: RewardFunction, columns: dict[str, Any]) -> dict[str, Any]:
    outcome = Outcome()
    call(function, columns, outcome)
    error = outcome.error
    if error is None:
        try:
            values = checked(name, outcome.value, len(columns["images"]))
            return {"values": [None if value is None else float(value) for value in values]}
        except RewardError as broken:
            error = broken
    if isinstance(error, RewardError):
        return {"is_contract": True, "index": error.index, "error": error.problem}
    return {"is_contract": False, "error": f"{type(error).__name__}: {error}"}


def _die_with_the_run(descriptor: int, on: bool) -> None:
    """While a call runs, the end of the run's side of the pipe kills this process, even where Python cannot act."""
    if sys.platform == "linux":
        import fcntl

        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(descriptor, 10, signal.SIGKILL)  # F_SETSIG, which the module does not name
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC if on else flags & ~os.O_ASYNC)


if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[2])
    _serve(sys.argv[1])
