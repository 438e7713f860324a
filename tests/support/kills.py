"""SIGKILL at random moments of a save, over and over.  As a script, with real learners and several ranks:

python tests/support/kills.py FOLDER --ranks 2 --zero_stage 3 --kills 200
"""

from __future__ import annotations

import argparse
import gc
import importlib
import multiprocessing
import os
import random
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch

from syncr1.engine.checkpoints.saver import Saver
from syncr1.engine.checkpoints.sharded import LATEST, Checkpoint, folders, newest, save, verified
from syncr1.engine.processes.meeting import free_port

TOLD = struct.Struct("qq")
"""The step whose save has begun, and the last one that is known to be saved."""
SCRIBBLE = -1.0
"""What a training writes over its tensors while they are being saved."""


class Saving(Protocol):
    """One rank's state and how it is saved."""

    def begin(self, step: int) -> None:
        """Saves `step` everywhere in the state, in a thread, once the save before has ended; then spoils the state."""

    def wait(self) -> None:
        """Until nothing is being saved."""


Make = Callable[[Path], Saving]
"""A rank's saving to a folder, in a process of its own."""


def kill_saves(root: Path, make: Make, kills: int, *, ranks: int = 1, seed: int = 0) -> dict[str, int]:
    """Saves in a loop in `ranks` processes that are killed, `kills` times, and looks at the disk each time.  Half of
    the times they wait for each save, half of the times they go on beside it.

    Returns how often a draft was left, so that it is known that saves were hit, and the most saves that a kill undid.
    Raises AssertionError where a whole checkpoint was lost or a broken one has a checkpoint's name."""
    chance, hit, step, lost = random.Random(seed), 0, 1, 0
    for number in range(kills):
        begun, told = _killed_once(root, make, ranks, step, chance, beside=bool(number % 2))
        hit += any(root.glob(".draft-*"))
        found = check(root, told)
        lost = max(lost, begun - found)
        assert lost <= 1, f"kill {number}: step {begun} was begun, {found} is the newest"
        step = found + 1
        if number % 20 == 19:
            print(f"{number + 1} kills, {hit} in a save, step {found}", flush=True)
    return {"kills": kills, "mid_save": hit, "last_step": step - 1, "most_lost": lost}


def check(root: Path, told: int) -> int:
    """Whatever has a checkpoint's name is whole and holds what its step wrote; none that was told of is lost.

    Returns the newest one's step, 0 without one."""
    warnings: list[str] = []
    found = newest(root, warnings.append)
    for folder in folders(root):
        checkpoint = verified(folder)
        for rank in range(checkpoint.world_size):
            for name, tensor in checkpoint.tensors(rank).items():
                assert name.startswith("random/") or bool((tensor == checkpoint.step).all()), (folder, rank, name)
        assert checkpoint.state()["step"] == checkpoint.step
    assert (0 if found is None else found.step) >= told, (found, told)
    # Only the very first one may be in place before anything points to it.
    assert not warnings or not (root / LATEST).exists(), warnings
    return 0 if found is None else found.step


def _killed_once(
    root: Path, make: Make, ranks: int, step: int, chance: random.Random, *, beside: bool
) -> tuple[int, int]:
    """The last step that rank 0 began to save, and the last that it knew to be saved."""
    reader, writer = os.pipe()
    context, port = multiprocessing.get_context("fork"), free_port()
    processes = [
        context.Process(target=_save_forever, args=(root, make, rank, ranks, port, step, writer, beside), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    os.close(writer)
    # However fast the machine is just now: some saves are awaited, and the end comes within about one more.
    told, took = (step - 1, step - 1), 0.1
    for _ in range(chance.randint(1, 6)):
        start, news = time.monotonic(), os.read(reader, TOLD.size)
        assert news, "the saving processes ended before they began"
        took, told = (took if told[0] < step else time.monotonic() - start), TOLD.unpack(news)
    time.sleep(chance.uniform(0, 1.5 * took))
    for process in chance.sample(processes, ranks):
        os.kill(process.pid or 0, signal.SIGKILL)
        time.sleep(chance.choice((0, 0, 0.02)))  # some die while others still write
    for process in processes:
        process.join()
    while data := os.read(reader, TOLD.size):
        told = TOLD.unpack(data)
    os.close(reader)
    return told


def be_rank(rank: int, ranks: int, port: int) -> None:
    """What a launcher tells a process."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)


def _save_forever(
    root: Path, make: Make, rank: int, ranks: int, port: int, step: int, writer: int, beside: bool
) -> None:
    be_rank(rank, ranks, port)
    saving = make(root)

    def tell(begun: int, known: int) -> None:
        if rank == 0:
            os.write(writer, TOLD.pack(begun, known))

    tell(step - 1, step - 1)
    while True:
        # Begins when the save before has ended, so that one is known; a kill in between finds the older news true.
        saving.begin(step)
        tell(step, step - 1)
        if not beside:
            saving.wait()
            tell(step, step)
        step += 1


@dataclass
class PlainSaving:
    """Two MiB: a save takes tens of milliseconds, most of it in fsync."""

    root: Path
    saver: Saver = field(default_factory=Saver)

    def __post_init__(self) -> None:
        self.tensors = {"a": torch.empty(1 << 19), "b": torch.empty(3, 5, dtype=torch.bfloat16), "c": torch.empty(())}

    def begin(self, step: int) -> None:
        for tensor in self.tensors.values():
            tensor.fill_(step)
        copies = {name: tensor.clone() for name, tensor in self.tensors.items()}
        self.saver.start(lambda: save(self.root, step, copies, {"step": step}, 2, self.saver.group))
        for tensor in self.tensors.values():
            tensor.fill_(SCRIBBLE)

    def wait(self) -> None:
        self.saver.wait()


@dataclass
class Position:
    """As much of a trainer and of its prompts as a checkpoint tells."""

    step: int = 0
    preview: None = None

    def next_step(self) -> list[Any]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: Any) -> None:
        self.step = state["step"]


class LearnerSaving:
    """A training's own checkpoints: weights and moments of a real learner, every rank its own share."""

    def __init__(self, root: Path, zero_stage: Literal[0, 1, 2, 3]) -> None:
        from helpers import everything_partitioned, sharp_policy

        from syncr1.engine.checkpoints.optimizer_state import begin, masters_of, optimizer_tensors
        from syncr1.engine.forward.objective import Objective
        from syncr1.engine.learn.learner import Learner
        from syncr1.engine.learn.optimizer import LearnerSettings
        from syncr1.engine.methods.resume import Checkpoints
        from syncr1.engine.methods.sync_r1_config import SyncR1Config
        from syncr1.engine.processes.group import init_distributed

        init_distributed()
        with everything_partitioned():
            settings = LearnerSettings(learning_rate=1e-3, zero_stage=zero_stage)
            learner = Learner(sharp_policy(), Objective(), settings)
        begin(learner.optimizer)
        config = SyncR1Config(zero_stage=zero_stage, save_total_limit=2)
        self.position = Position()
        self.checkpoints = Checkpoints(config, root, learner, self.position)
        self.state = optimizer_tensors(learner.optimizer, learner.policy)
        assert len(self.state) >= 4 * len(masters_of(learner.optimizer))

    def _fill(self, value: float) -> None:
        for tensor in self.state.values():
            tensor.data.fill_(value)

    def begin(self, step: int) -> None:
        self._fill(step)
        self.position.step = step
        self.checkpoints.save(cast(Any, self.position))
        self._fill(SCRIBBLE)

    def wait(self) -> None:
        self.checkpoints.wait()


def learner_saving(zero_stage: Literal[0, 1, 2, 3]) -> Make:
    return lambda root: LearnerSaving(root, zero_stage)


def preload() -> None:
    """Everything that takes long to import or to make, once: the children copy it, and start in a tenth of the time."""
    late = (
        "runtime.zero.muon.muon_optimizer",
        "runtime.superoffload.superoffload_stage3",
        "ops.op_builder.all_ops",
        "module_inject.auto_ep_layer",
    )
    for name in ("syncr1.engine.compat", "helpers", "syncr1.engine.learn.learner", "syncr1.engine.methods.resume"):
        importlib.import_module(name)
    for name in late:  # what DeepSpeed imports when it starts
        importlib.import_module(f"deepspeed.{name}")
    importlib.import_module("helpers").sharp_policy()
    torch.nn.Parameter.__repr__ = object.__repr__  # type: ignore[method-assign]  # ZeRO-3 formats all for its debug log
    gc.collect()
    gc.freeze()  # ZeRO-3 collects often; what is shared with the parent is not looked at


def show(checkpoint: Checkpoint | None) -> Any:
    return None if checkpoint is None else checkpoint.folder.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--zero_stage", type=int, default=0, choices=(0, 1, 2, 3))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if folders(asked.folder):
        parser.error(f"{asked.folder} has checkpoints already: each run needs a folder of its own")
    preload()
    start, make = time.monotonic(), learner_saving(asked.zero_stage)
    told = kill_saves(asked.folder, make, asked.kills, ranks=asked.ranks, seed=asked.seed)
    print({**told, "seconds": round(time.monotonic() - start), "newest": show(newest(asked.folder, print))})


if __name__ == "__main__":
    main()
