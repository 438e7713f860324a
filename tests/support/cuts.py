"""SIGKILL in the middle of a step; what resumes from the newest checkpoint ends like what never stopped.  As a script:

python tests/support/cuts.py FOLDER --ranks 2 --zero_stage 2 --cuts 20
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import torch
from helpers import everything_partitioned, sharp_policy
from kills import be_rank, preload
from resume_cases import Training, config_of
from safetensors.torch import load_file, save_file

from syncr1.engine.checkpoints import sharded as checkpoint
from syncr1.engine.checkpoints.sharded import newest
from syncr1.engine.data.prompts import load_training_prompts
from syncr1.engine.learn import trainer
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.methods.sync_r1_parts import build_reward_set
from syncr1.engine.processes.group import init_distributed
from syncr1.engine.processes.meeting import free_port
from syncr1.engine.rewards.ensemble import RewardSet
from syncr1.engine.rollout import decode

STEPS = 5
"""Of a training: more than two epochs of nine prompts."""
PLACES = ("rollout", "reward", "backward", "update", "save")
TIMEOUT = 900


@dataclass(frozen=True, slots=True)
class Cut:
    """Where one rank dies.

    Args:
        place: after the n-th decoding step, before the rewards, after the n-th micro-batch's backward, after the first
            of the step's two updates, at the n-th write of the save that follows the step.
        step: steps that were done before.
        n: of what is counted, from 1.
        rank: that dies; the others are killed after it, as a launcher does.
    """

    place: str
    step: int
    n: int
    rank: int


def cuts_of(number: int, ranks: int, seed: int = 0) -> list[Cut]:
    """The first `number` of twenty: every place in every step but the first, in an order that mixes both."""
    chance = random.Random(seed)
    most = {"rollout": 24, "reward": 1, "backward": 3, "update": 1, "save": 1200}  # of 26, 1, 4, 2 and more
    cuts = [
        Cut(where, step, chance.randint(1, most[where]), chance.randrange(ranks))
        for step in range(1, STEPS)
        for where in PLACES
    ]
    return [cuts[7 * i % 20] for i in range(number)]


@dataclass(frozen=True, slots=True)
class Setup:
    """What all trainings share."""

    folder: Path
    world: Path
    config: SyncR1Config
    rewards: RewardSet
    ranks: int


def cut_and_resume(folder: Path, world: Path, cuts: Sequence[Cut], *, ranks: int = 1, **changes: Any) -> list[str]:
    """Runs a training whole, and cut and resumed at each place; a line for each that was the same to the last bit.

    Raises AssertionError where one was not, or where more than one interval was lost."""
    config = config_of(max_steps=STEPS, num_iterations=2, max_tokens_per_microbatch=600, **changes)
    rewards = build_reward_set(config, sharp_policy(), load_training_prompts(world))
    setup = Setup(folder, world, config, rewards, ranks)
    _run(setup, "whole")
    told = []
    for number, cut in enumerate(cuts):
        name = f"cut_{number:02d}"
        _run(setup, name, cut)
        _run(setup, name, resumed=True)
        told.append(f"{cut.place:8} {cut.n:3} of step {cut.step} on rank {cut.rank}: {_compare(setup, name, cut)}")
        print(told[-1], flush=True)
    return told


def _compare(setup: Setup, name: str, cut: Cut) -> str:
    """Raises AssertionError where the resumed training is not the whole one."""
    for rank in range(setup.ranks):
        mine, whole = (setup.folder / f"{of}_{rank}" for of in (name, "whole"))
        record, expected = (json.loads(path.with_suffix(".json").read_text()) for path in (mine, whole))
        begun = record.pop("resumed at")
        assert cut.step - begun <= 1, f"{cut}: went on from step {begun}"
        assert list(record) == [str(step) for step in range(begun, STEPS)]
        assert all(expected[step] == told for step, told in record.items()), cut
        a, b = (load_file(path.with_suffix(".safetensors")) for path in (mine, whole))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), cut
    return f"resumed at {begun}, the same {STEPS - begun} steps and {len(a)} tensors"


def _run(setup: Setup, name: str, cut: Cut | None = None, *, resumed: bool = False) -> None:
    """One training in processes of its own, to its end or to the cut."""
    context, port = multiprocessing.get_context("fork"), free_port()
    processes = [
        context.Process(target=_be_rank, args=(setup, name, cut, resumed, rank, port)) for rank in range(setup.ranks)
    ]
    for process in processes:
        process.start()
    dying = [processes[cut.rank]] if cut else processes
    for process in dying:
        process.join(TIMEOUT)
    codes = [process.exitcode for process in dying]
    for process in processes:
        process.kill()
        process.join()
    assert codes == [-signal.SIGKILL.value] if cut else [0] * setup.ranks, f"{name}, {cut}: exit codes {codes}"


def _be_rank(setup: Setup, name: str, cut: Cut | None, resumed: bool, rank: int, port: int) -> None:
    be_rank(rank, setup.ranks, port)
    init_distributed()
    with everything_partitioned():
        training = Training(setup.config, setup.world, setup.folder / name, setup.rewards)
    random.seed(rank), torch.manual_seed(99 + resumed)  # so that what is not put back shows
    begun = 0
    if resumed:
        found = newest(setup.folder / name, lambda text: None)
        if found is not None:
            begun = training.resume(found.step).trainer.step
    if cut is not None and cut.rank == rank:
        arm(training, cut)
    training.to(STEPS, saving=cut is not None)
    record = {str(step): told for step, told in training.record().items()}
    path = setup.folder / f"{name}_{rank}"
    path.with_suffix(".json").write_text(json.dumps(({"resumed at": begun} if resumed else {}) | record))
    save_file({key: t.contiguous() for key, t in training.state().items()}, path.with_suffix(".safetensors"))


def arm(training: Training, cut: Cut) -> None:
    """Makes this process kill itself there."""
    left = cut.n

    def strike() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            result = real(*arguments, **more)
            if training.trainer.step == cut.step:
                strike()
            return result

        return call

    engine: Any = training.learner.engine
    where: dict[str, tuple[Any, str]] = {
        "rollout": (decode.TokenStep, "__call__"),
        "reward": (trainer, "score"),
        "backward": (engine, "backward"),
        "update": (engine, "step"),
    }
    if cut.place == "save":
        training.checkpoints.save = _save_that_dies(training.checkpoints, cut.step + 1, strike)  # type: ignore[method-assign]
    else:
        owner, name = where[cut.place]
        setattr(owner, name, counted(getattr(owner, name)))


def _save_that_dies(checkpoints: Any, step: int, strike: Callable[[], None]) -> Callable[[Any], None]:
    """Its n-th write of a few bytes is the end; the saves before are whole."""
    real = checkpoints.save

    class Disk:
        def __getattr__(self, name: str) -> Any:
            return self.write if name == "write" else getattr(os, name)

        def write(self, file: int, data: memoryview) -> int:
            strike()
            return os.write(file, data[:4096])

    def save(trainer: Any) -> None:
        if trainer.step == step:
            checkpoints.wait()
            checkpoint.os = Disk()  # type: ignore[assignment]
        real(trainer)

    return save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--zero_stage", type=int, default=0, choices=(0, 1, 2, 3))
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--cuts", type=int, default=20)
    parser.add_argument("--world", type=Path, help="a rendered world; without one it is made")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.folder.mkdir(parents=True)
    preload()
    world = asked.world
    if world is None:
        from syncr1.engine.world.disk import write_world
        from syncr1.engine.world.general import write_general

        world = asked.folder / "world"
        write_general(write_world(world))
    start = time.monotonic()
    told = cut_and_resume(
        asked.folder,
        world,
        cuts_of(asked.cuts, asked.ranks),
        ranks=asked.ranks,
        zero_stage=asked.zero_stage,
        bf16=asked.bf16,
    )
    print(f"{len(told)} of {asked.cuts} cuts the same, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
