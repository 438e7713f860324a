"""Ranks as forks of a test, over a store that outlives them, as torchrun's does."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path

from torch.distributed import TCPStore

from syncr1.engine.errors import Refused, RunEnded

BEGINS_WITHIN = 10.0
"""Seconds. A test's process has threads of other libraries, whose locks a fork may catch closed: such a child stands
still before it has run a line, and another is forked in its place."""

Act = Callable[[int, Path], None]
"""What a rank does, in a process of its own: its number, and a folder for what it has to tell."""


class Starts:
    """A launcher's store; every `start` is another one over it."""

    def __init__(self, folder: Path, ranks: int = 2) -> None:
        self.folder, self.ranks, self.count = folder, ranks, 0
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def start(self, act: Act, *, without: tuple[int, ...] = (), seconds: float = 60) -> list[int | None]:
        """The ranks' exit codes, negative for signals; None: it had to be ended. What they say is in `said`."""
        processes = {rank: self._begun(act, rank) for rank in range(self.ranks) if rank not in without}
        for process in processes.values():
            process.join(seconds)
        codes = [processes[rank].exitcode if rank in processes else None for rank in range(self.ranks)]
        for process in processes.values():
            process.kill()
            process.join()
        self.count += 1
        return codes

    def _begun(self, act: Act, rank: int) -> ForkProcess:
        """A rank that runs."""
        context = multiprocessing.get_context("fork")
        for _ in range(3):
            heard, tells = context.Pipe(duplex=False)
            process = context.Process(target=self._rank, args=(act, rank, tells))
            process.start()
            if heard.poll(BEGINS_WITHIN):
                return process
            process.kill()
            process.join()
        raise AssertionError(f"rank {rank}: three forks one after the other did not begin")

    def said(self, rank: int) -> str:
        return (self.folder / f"said_{rank}").read_text(errors="replace")

    def _rank(self, act: Act, rank: int, tells: Connection) -> None:
        tells.send(os.getpid())
        log = os.open(self.folder / f"said_{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(self.ranks),
            LOCAL_WORLD_SIZE=str(self.ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(self.store.port),
            TORCHELASTIC_USE_AGENT_STORE="True",
            TORCHELASTIC_RESTART_COUNT=str(self.count),
        )
        code = 0
        try:
            act(rank, self.folder)
        except RunEnded as ended:
            os.write(2, f"{ended}\n".encode())
            code = ended.code
        except Refused as refused:
            os.write(2, f"{refused}\n".encode())
            code = 2
        except BaseException:
            os.write(2, traceback.format_exc().encode())
            code = 1
        os._exit(code)
