"""SIGKILL at random moments of a save, over and over.  As a script, with real learners and several ranks:

python tests/kills.py FOLDER --ranks 2 --zero_stage 3 --kills 200
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import random
import signal
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from syncr1.engine.checkpoint import LATEST, Checkpoint, folders, newest, save, verified

Make = Callable[[], Mapping[str, Tensor]]
"""This rank's tensors, in a process of its own."""
NUMBER = struct.Struct("q")


def kill_saves(root: Path, make: Make, kills: int, *, ranks: int = 1, seed: int = 0) -> dict[str, int]:
    """Saves in a loop in `ranks` processes that are killed, `kills` times, and looks at the disk each time.

    Returns how often a draft was left, so that it is known that saves were hit.  Raises AssertionError where a whole
    checkpoint was lost or a broken one has a checkpoint's name."""
    chance, hit, step = random.Random(seed), 0, 1
    for _ in range(kills):
        told = _killed_once(root, make, ranks, step, chance)
        hit += any(root.glob(".draft-*"))
        check(root, told)
        found = newest(root, _no_warning)
        step = step if found is None else found.step + 1
    return {"kills": kills, "mid_save": hit, "last_step": step - 1}


def check(root: Path, told: int) -> None:
    """Whatever has a checkpoint's name is whole and holds what its step wrote; none that was told of is lost."""
    warnings: list[str] = []
    found = newest(root, warnings.append)
    for folder in folders(root):
        checkpoint = verified(folder)
        for rank in range(checkpoint.world_size):
            assert all((t == checkpoint.step).all() for t in checkpoint.tensors(rank).values()), folder
        assert checkpoint.state() == {"step": checkpoint.step}
    assert (0 if found is None else found.step) >= told, (found, told)
    # Only the very first one may be in place before anything points to it.
    assert not warnings or not (root / LATEST).exists(), warnings


def _no_warning(text: str) -> None:
    pass


def _killed_once(root: Path, make: Make, ranks: int, step: int, chance: random.Random) -> int:
    """The last step that rank 0 was told is saved."""
    reader, writer = os.pipe()
    context, port = multiprocessing.get_context("fork"), _free_port()
    processes = [
        context.Process(target=_save_forever, args=(root, make, rank, ranks, port, step, writer), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    os.close(writer)
    ready, told = os.read(reader, NUMBER.size), 0
    assert ready, "the saving processes ended before they began"
    time.sleep(chance.uniform(0, 0.25))
    for process in chance.sample(processes, ranks):
        os.kill(process.pid or 0, signal.SIGKILL)
        time.sleep(chance.choice((0, 0, 0.02)))  # some die while others still write
    for process in processes:
        process.join()
    while data := os.read(reader, NUMBER.size):
        told = NUMBER.unpack(data)[0]
    os.close(reader)
    return told


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _save_forever(root: Path, make: Make, rank: int, ranks: int, port: int, step: int, writer: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))  # fmt: skip
    torch.set_num_threads(1)
    tensors = make()
    if rank == 0:
        os.write(writer, NUMBER.pack(0))
    while True:
        for tensor in tensors.values():
            tensor.data.fill_(step)
        save(root, step, tensors, {"step": step}, keep=2)
        if rank == 0:
            os.write(writer, NUMBER.pack(step))
        step += 1


def plain_tensors() -> Mapping[str, Tensor]:
    """Two MiB: a save takes tens of milliseconds, most of it in fsync."""
    return {"a": torch.empty(1 << 19), "b": torch.empty(3, 5, dtype=torch.bfloat16), "c": torch.empty(())}


def learner_tensors(zero_stage: int) -> Make:
    """A learner's state after a step, every rank its own share."""

    def make() -> Mapping[str, Tensor]:
        from helpers import everything_partitioned, sharp_policy

        from syncr1.engine.learner import Learner, LearnerSettings, init_distributed
        from syncr1.engine.objective import Objective
        from syncr1.engine.optimizer_state import optimizer_tensors

        init_distributed()
        with everything_partitioned():
            settings = LearnerSettings(learning_rate=1e-3, zero_stage=zero_stage)
            learner = Learner(sharp_policy(), Objective(), settings)
        masters = optimizer_tensors(learner.optimizer)
        return {f"{kind}.{name}": value.clone() for name, value in masters.items() for kind in ("w", "m", "v")}

    return make


def show(checkpoint: Checkpoint | None) -> Any:
    return None if checkpoint is None else checkpoint.folder.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--zero_stage", type=int, default=0)
    parser.add_argument("--kills", type=int, default=20)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("syncr1.engine.compat", "helpers", "syncr1.engine.learner"):  # once, not in every child
        importlib.import_module(name)
    importlib.import_module("helpers").sharp_policy()  # the children copy it
    start = time.monotonic()
    told = kill_saves(asked.folder, learner_tensors(asked.zero_stage), asked.kills, ranks=asked.ranks)
    print({**told, "seconds": round(time.monotonic() - start), "newest": show(newest(asked.folder, print))})


if __name__ == "__main__":
    main()
