"""Ranks as processes of their own, over a store that outlives them, as torchrun's does."""

from __future__ import annotations

import os
import time
from pathlib import Path

from rank_of import Act
from torch.distributed import TCPStore
from warm import Program, environment

SCRIPT = str(Path(__file__).with_name("rank_of.py"))


class Starts:
    """A launcher's store; every `start` is another one over it."""

    def __init__(self, folder: Path, ranks: int = 2) -> None:
        self.folder, self.ranks, self.count = folder, ranks, 0
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def start(self, act: Act, *, without: tuple[int, ...] = (), seconds: float = 60) -> list[int | None]:
        """The ranks' exit codes, negative for signals; None: it had to be ended. What they say is in `said`.

        `act` is a function of a module: this process has threads, so that ranks are no forks of it.
        """
        ranks = [rank for rank in range(self.ranks) if rank not in without]
        programs = {rank: self._program(act, rank) for rank in ranks}
        deadline = time.monotonic() + seconds
        while any(program.poll() is None for program in programs.values()) and time.monotonic() < deadline:
            time.sleep(0.02)
        codes = [programs[rank].poll() if rank in programs else None for rank in range(self.ranks)]
        for rank, program in programs.items():
            program.kill()
            self._path(rank).write_text("".join(program.communicate(0)))
        self.count += 1
        return codes

    def said(self, rank: int) -> str:
        return self._path(rank).read_text()

    def _path(self, rank: int) -> Path:
        return self.folder / f"said_{rank}"

    def _program(self, act: Act, rank: int) -> Program:
        told = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": self.ranks,
            "LOCAL_WORLD_SIZE": self.ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": self.store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "TORCHELASTIC_RESTART_COUNT": self.count,
        }
        env = environment() | {name: str(value) for name, value in told.items()}
        file = act.__globals__["__file__"]
        return Program(SCRIPT, os.path.abspath(file), act.__name__, str(self.folder), env=env)
