"""Injected errors of the disk: the n-th call that changes it fails on one of two ranks.  As a script:

python tests/support/disk_faults.py FOLDER --faults 100
"""

from __future__ import annotations

import argparse
import errno
import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncr1.engine.checkpoints import sharded as checkpoint
from syncr1.engine.checkpoints.saver import Saver
from syncr1.engine.checkpoints.sharded import everywhere, folders, place, save, verified
from syncr1.engine.errors import CheckpointError

CODES = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
RANKS = 2
SECONDS = 60
"""What one fault may take before the ranks are said to hang."""


class FaultyOS:
    """`os`, whose n-th call that changes the disk fails (0: none does); writes are short, as they may be."""

    def __init__(self, fails_at: int = 0, code: int = 0) -> None:
        self.fails_at, self.code, self.calls = fails_at, code, list[str]()
        self.failed: str | None = None

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self._counted(real, name) if name in ("open", "write", "fsync", "rename", "replace") else real

    def _counted(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) == self.fails_at:
                self.failed = name
                raise OSError(self.code, os.strerror(self.code))
            if name == "write":
                file, data = arguments
                return real(file, data[: max(1, len(data) // 2)])
            return real(*arguments)

        return call


def faults_on_ranks(folder: Path, faults: int, seed: int = 0) -> dict[str, Any]:
    """Saves on two ranks, each time with an error on one of them, and looks at what is left; raises AssertionError
    where the ranks were told different things, hung, or lost a checkpoint.  Returns what failed how often."""
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_be_rank, args=(folder, rank, faults, seed)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + SECONDS * (1 + faults)
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * RANKS, f"exit codes {codes}: -{signal.SIGALRM.value} is a fault that hung"
    told: dict[str, Any] = json.loads((folder / "told.json").read_text())
    return told


def _be_rank(folder: Path, rank: int, faults: int, seed: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=SECONDS)
    )
    told = _fail_often(folder / "checkpoints", faults, random.Random(seed))
    if rank == 0:
        (folder / "told.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def _fail_often(root: Path, faults: int, chance: random.Random) -> dict[str, Any]:
    """Every rank draws the same numbers, so all know whose disk fails, and when."""
    saver, hit = Saver(), Counter[str]()
    _save(saver, root, 1, FaultyOS())
    _save(saver, root, 2, disk := FaultyOS())
    calls = _told(disk.calls)
    newest, step, longest = 2, 3, 0.0
    for _ in range(faults):
        rank = chance.randrange(RANKS)
        kind, code = chance.choice(sorted(set(calls[rank]))), chance.choice(CODES)
        fails_at = chance.choice([n for n, name in enumerate(calls[rank], 1) if name == kind])
        mine = rank == place()[0]
        start = time.monotonic()
        signal.alarm(SECONDS)  # whose default action ends the process
        error, failed = _save(saver, root, step, FaultyOS(fails_at if mine else 0, code))
        longest = max(longest, time.monotonic() - start)
        kinds = [name for name in _told(failed) if name]
        assert kinds == [kind], f"call {fails_at} of rank {rank} did not come"
        assert error is not None and f"rank {rank}: " in error and os.strerror(code) in error, error
        assert f"rank {1 - rank}" not in error and len(set(_told(error))) == 1
        hit[f"{kind} {errno.errorcode[code]} rank {rank}"] += 1
        newest = _check(root, newest, step)
        error, _ = _save(saver, root, step + 1, FaultyOS())
        assert error is None, error
        newest, step = _check(root, step + 1, step + 1), step + 2
        signal.alarm(0)
    return {"faults": faults, "longest_seconds": round(longest, 3), "kinds": dict(sorted(hit.items()))}


def _save(saver: Saver, root: Path, step: int, disk: FaultyOS) -> tuple[str | None, str | None]:
    """Saves in the thread; what went wrong, and which call of this rank's disk failed."""
    real, checkpoint.os = checkpoint.os, disk  # type: ignore[assignment]
    tensors = _tensors(step)
    try:
        saver.start(lambda: save(root, step, tensors, {"step": step}, 2, saver.group))
        saver.wait()
    except CheckpointError as error:
        return str(error), disk.failed
    finally:
        checkpoint.os = real
    return None, disk.failed


def _told(value: Any) -> list[Any]:
    """Of all ranks, in order."""
    return everywhere(lambda: value, "asking")


def _tensors(step: int) -> dict[str, Tensor]:
    rank, _ = place()
    return {
        "a": torch.full((1000,), float(step)),
        "b": torch.full((3, 5), step + rank, dtype=torch.float64),
        "c": torch.tensor(step),
    }


def _check(root: Path, before: int, step: int) -> int:
    """The newest step: whole, with what was saved; no older than the one that was there before."""
    dist.barrier()
    assert before < step or not list(root.glob(".draft-*")), "a save that succeeds leaves and finds none"
    steps = []
    for folder in folders(root):
        found, expected = verified(folder), _tensors(int(folder.name[5:]))
        tensors = found.tensors(place()[0])
        assert tensors.keys() == expected.keys() and all(torch.equal(tensors[n], expected[n]) for n in tensors)
        steps.append(found.step)
    dist.barrier()
    assert steps and before <= steps[0] <= step, (before, steps)
    return steps[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    start = time.monotonic()
    told = faults_on_ranks(asked.folder, asked.faults, asked.seed)
    print({**told, "seconds": round(time.monotonic() - start)})


if __name__ == "__main__":
    main()
