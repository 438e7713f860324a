"""torchrun, which hands SIGUSR1 on to its ranks as well, restarts what restarting helps, and ends with their exit code.

    python -m syncr1.engine.processes.torchrun [--output_dir=FOLDER] [torchrun's flags] PROGRAM [flags]

torchrun ends with 1 whatever happened, and starts again whatever happened, --max-restarts times in a run's life.  Here
75 says that SIGTERM, SIGUSR1 or SIGHUP stopped it, after its ranks had TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds to save,
and another code is that of the first rank that failed; 2 and 75 are final; and --max-restarts counts since the last new
checkpoint in FOLDER (restarts.py).
"""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser
from torch.distributed.run import main as run

from ..errors import EXIT_PREEMPTED, FINAL, shown_end
from .interrupts import PREEMPTING
from .restarts import Restarts

FLAG = "--signals-to-handle"
HANDLED = (*PREEMPTING, signal.SIGINT, signal.SIGQUIT)


OUTPUT_DIR, MOST = "--output_dir=", "--max-restarts="
WITHOUT_END = 1_000_000
"""What torchrun is told; it hands each start a number, which `Restarts`, who is asked before, could not count back."""


def restarting(agent: Any, restarts: Restarts) -> None:
    """From now on agents of this class ask `restarts`, and the exit code, before they start again."""
    monitor = agent._monitor_workers

    def monitored(self: Any, group: Any) -> Any:
        result = monitor(self, group)
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY) and self._remaining_restarts > 0:
            # Those that the agent has ended since are told as well, behind the first one.
            failures = sorted(result.failures.values(), key=lambda failure: int(failure.timestamp))
            told = _told(failures[0]) if failures else "this machine's ranks are unhealthy"
            if (failures and failures[0].exitcode in FINAL) or not restarts.again():
                self._remaining_restarts = 0
            else:
                print(f"syncr1: {told}; starting again, {restarts.words()}", file=sys.stderr, flush=True)
        return result

    agent._monitor_workers = monitored


def _told(failure: Any) -> str:
    return f"local rank {failure.local_rank} ended with {shown_end(int(failure.exitcode))}, first of all here"


def main(arguments: list[str]) -> int:
    output_dir = None
    if arguments and arguments[0].startswith(OUTPUT_DIR):
        output_dir, arguments = Path(arguments[0].removeprefix(OUTPUT_DIR)), arguments[1:]
    for place, argument in enumerate(arguments):
        if not argument.startswith("-"):  # the program, whose flags are its own
            break
        if re.fullmatch(f"{MOST}[1-9][0-9]*", argument):
            restarting(LocalElasticAgent, Restarts(int(argument.removeprefix(MOST)), output_dir))
            arguments = [*arguments[:place], f"{MOST}{WITHOUT_END}", *arguments[place + 1 :]]
    known = any(FLAG in action.option_strings for action in get_args_parser()._actions)
    # What `nohup` has ignored is not to be handed on either.
    signals = ",".join(number.name for number in HANDLED if signal.getsignal(number) is not signal.SIG_IGN)
    try:
        run([f"{FLAG}={signals}", *arguments] if known else arguments)  # torch before 2.9 does not know the flag
    except SignalException as stopped:
        print(f"syncr1: {stopped.sigval.name}: all ranks of this machine have ended", file=sys.stderr)
        return EXIT_PREEMPTED if stopped.sigval in PREEMPTING else 128 + stopped.sigval
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        code = int(first.exitcode)
        print(f"syncr1: {_told(first)}", file=sys.stderr)
        return code if code > 0 else 128 - code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
