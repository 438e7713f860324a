"""torchrun, which hands SIGUSR1 on to its ranks as well, and whose exit code tells how they ended.

    python -m syncr1.engine.processes.torchrun [torchrun's flags] PROGRAM [flags]

torchrun ends with 1 whatever happened. Here 75 says that SIGTERM, SIGUSR1 or SIGHUP stopped it, after its ranks had
TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds to save, and another code is that of the first rank that failed.
"""

from __future__ import annotations

import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser
from torch.distributed.run import main as run

from ..errors import EXIT_PREEMPTED, shown_end
from .interrupts import PREEMPTING

FLAG = "--signals-to-handle"
HANDLED = (*PREEMPTING, signal.SIGINT, signal.SIGQUIT)


def main(arguments: list[str]) -> int:
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
        print(f"syncr1: local rank {first.local_rank} ended with {shown_end(code)}, first of all here", file=sys.stderr)
        return code if code > 0 else 128 - code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
