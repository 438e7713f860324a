"""The process of an isolated reward (isolated.py): `python -m syncr1.engine.rewards.yours.worker SPEC SYS_PATH`."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from ...errors import RewardError, RewardSpecError, refuse, shown
from ..calling import Outcome, call
from ..hooks import Logged, TrainerState
from ..places import defined_at, told
from ..reward import RewardFunction
from .custom import load_reward
from .wire import STATE, receive, send, unpacked


def serve(spec: str) -> None:
    """The worker: answers until its input ends."""
    for asked_to_end in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGUSR1,
        signal.SIGHUP,
    ):  # the run finishes its step, and needs this
        signal.signal(asked_to_end, signal.SIG_IGN)
    # What the function prints or reads is neither a reply nor a request.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    try:
        function = load_reward(spec)
    except RewardSpecError as error:
        send(replies, json.dumps({"error": str(error)}))
        return
    name = getattr(function, "__name__", type(function).__name__)
    about = {"name": name, "kind": getattr(function, "kind", None), "defined": defined_at(function)}
    send(replies, json.dumps(about))
    while (request := receive(requests)) is not None:
        _die_with_the_run(requests.fileno(), True)
        reply = _answer(name, function, unpacked(*request))
        _die_with_the_run(requests.fileno(), False)
        send(replies, json.dumps(reply))


def _answer(name: str, function: RewardFunction, columns: dict[str, Any]) -> dict[str, Any]:
    state = TrainerState(**columns.pop(STATE))
    outcome = Outcome(logged=Logged(name, len(columns["images"])))
    call(name, function, columns, outcome, state=state)
    error, logged = outcome.error, outcome.logged
    if error is None:
        return {"values": outcome.values, "metrics": logged.metrics, "extras": logged.extras}
    if isinstance(error, RewardError):
        return {"is_contract": True, "index": error.index, "error": error.problem}
    return {"is_contract": False, "error": told(error)}


def _die_with_the_run(descriptor: int, on: bool) -> None:
    """While a call runs, the end of the run's side of the pipe kills this process, even where Python cannot act."""
    if sys.platform == "linux":
        import fcntl

        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(descriptor, 10, signal.SIGKILL)  # F_SETSIG, which the module does not name
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC if on else flags & ~os.O_ASYNC)


def main() -> None:
    try:
        spec, path = sys.argv[1], json.loads(sys.argv[2])
    except (IndexError, ValueError):
        refuse(
            RewardSpecError(
                f"worker: expected a reward and Python's path in JSON, as isolated.py gives them, got "
                f"{shown(sys.argv[1:])}; name the reward as isolated@FILE:FUNCTION in reward_funcs instead"
            )
        )
    sys.path[:] = path
    serve(spec)


if __name__ == "__main__":
    main()
