"""Faults put into one rank of a real run, at any stage of any step.  As a script, over and over:

python tests/support/faults.py FOLDER --injections 100 --zero_stage 2
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import kills
import torch
from helpers import ROOT
from resume_cases import FullDisk
from torch.distributed import TCPStore

from syncr1.engine.checkpoints import sharded as checkpoint
from syncr1.engine.checkpoints.sharded import folders, newest, verified
from syncr1.engine.errors import EXIT_FAILED, EXIT_PREEMPTED, EXIT_STALLED
from syncr1.engine.learn import trainer
from syncr1.engine.learn.learner import Learner
from syncr1.engine.processes.watchdog import Watchdog

STAGES = ("rollout", "reward", "pack", "score", "update")
STEPS = 4
STAGE_TIMEOUT = int(os.environ.get("SYNCR1_STAGE_TIMEOUT", "10"))
BENIGN = ("nan", "reward raises", "reward hangs")
"""After these a run goes on."""
KINDS = ("killed", "exits", "raises", "stalls", "stopped", "holds the lock", "disk full", "SIGTERM", "SIGUSR1", *BENIGN)


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens on one rank, when."""

    kind: str
    rank: int
    step: int
    stage: str


@dataclass(slots=True)
class Ended:
    """How a run with a fault ended."""

    codes: list[int | None]
    """Per rank, negative for signals; None: it had to be killed by the test."""
    seconds: float
    """From the fault to the end of the last rank."""
    said: list[str]
    """Per rank, what it wrote."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of metrics.jsonl."""


# The ranks ------------------------------------------------------------------------------------------------------------


def inject(faults: Sequence[Fault], rank: int, told: Path) -> None:
    """From now on the faults will happen in this process, where it is their rank."""
    mark, left = Watchdog.mark, [fault for fault in faults if fault.rank == rank]

    def mark_and_fail(watchdog: Watchdog, stage: str, step: int | None = None, **more: float) -> None:
        mark(watchdog, stage, step, **more)
        for fault in [fault for fault in left if (fault.stage, fault.step) == (stage, step)]:
            left.remove(fault)
            told.touch()
            ACTS[fault.kind]()

    Watchdog.mark = mark_and_fail  # type: ignore[method-assign]


def _hold_the_lock() -> None:
    re.match(r"(a|aa)+$", "a" * 200 + "b")  # no other thread of Python runs meanwhile, for ages


def _raise() -> None:
    raise RuntimeError("something broke")


def _next_loss_is_nan() -> None:
    """The last hidden state of one token, as an overflow would make it."""
    forward = Learner._step

    def step(learner: Learner, batches: Sequence[Any]) -> dict[str, float]:
        module = learner.engine.module
        hidden = module.hidden
        module.hidden = lambda batch: hidden(batch) * torch.tensor(float("nan"))
        Learner._step = forward  # type: ignore[method-assign]
        try:
            return forward(learner, batches)
        finally:
            del module.hidden

    Learner._step = step  # type: ignore[method-assign]


def _rewards(act: Any) -> None:
    """The first reward function of the next call does `act` instead."""
    score = trainer.score

    def scored(rollouts: Any, functions: Any, **more: Any) -> Any:
        trainer.score = score
        name = next(iter(functions))
        return score(rollouts, {**functions, name: lambda **_: act()}, **more)

    trainer.score = scored


def _fill_the_disk() -> None:
    checkpoint.os = FullDisk()  # type: ignore[assignment]


def _signal_self(number: signal.Signals) -> Any:
    return lambda: os.kill(os.getpid(), number)


ACTS: dict[str, Any] = {
    "killed": _signal_self(signal.SIGKILL),
    "exits": lambda: os._exit(3),
    "raises": _raise,
    "stalls": lambda: time.sleep(10_000),
    "stopped": _signal_self(signal.SIGSTOP),
    "holds the lock": _hold_the_lock,
    "nan": _next_loss_is_nan,
    "reward raises": lambda: _rewards(_raise),
    "reward hangs": lambda: _rewards(lambda: time.sleep(10_000)),
    "disk full": _fill_the_disk,
    "SIGTERM": _signal_self(signal.SIGTERM),
    "SIGUSR1": _signal_self(signal.SIGUSR1),
}


def run_rank(rank: int, ranks: int, port: int, folder: Path, flags: Sequence[str], faults: Sequence[Fault]) -> None:
    """The recipe itself, as a rank that torchrun has started."""
    os.setpgrp()
    with (folder / f"rank_{rank}.log").open("wb", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout = sys.__stdout__ = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        COLUMNS="100",
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    torch.set_num_threads(1)
    logging.getLogger().handlers.clear()  # pytest's; a run has none
    inject(faults, rank, folder / "struck")
    sys.argv = ["sync_r1.py", *flags]
    code = 0
    try:
        _recipe().main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    os._exit(code)


def _recipe() -> Any:
    spec = importlib.util.spec_from_file_location("sync_r1", ROOT / "recipes" / "sync_r1.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The test's side ------------------------------------------------------------------------------------------------------


def flags_of(base: Path, world: Path, folder: Path, *more: str) -> list[str]:
    """A short run; a checkpoint after every step."""
    return [
        *("--model", str(base), "--data", str(world), "--output_dir", str(folder / "run"), "--seed", "3"),
        *("--prompts_per_step", "2", "--num_generations", "4", "--max_steps", str(STEPS), "--warmup_steps", "1"),
        *("--checkpointing_steps", "1", "--eval_samples", "0", "--sample_steps", "0", "--anchor_fraction", "0"),
        *("--max_completion_length", "8", "--stage_timeout", str(STAGE_TIMEOUT), "--reward_timeout", "2", *more),
    ]


def run(folder: Path, flags: Sequence[str], faults: Sequence[Fault] = (), *, ranks: int = 2) -> Ended:
    """Runs to the end, or to that of the fault; never longer than the stage's timeout and a minute after it."""
    folder.mkdir(parents=True, exist_ok=True)
    context, start = multiprocessing.get_context("fork"), time.monotonic()
    store = TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )  # torchrun's stands outside of the ranks, too
    processes = [
        context.Process(target=run_rank, args=(rank, ranks, store.port, folder, flags, faults), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    struck, stopped = start, [fault.rank for fault in faults if fault.kind == "stopped"]
    deadline = start + 240
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if struck == start and (folder / "struck").exists():
            struck = time.monotonic()
            deadline = min(deadline, struck + STAGE_TIMEOUT + 60)
        # A stopped process cannot end by itself; its launcher kills it when the others have ended.
        if stopped and not any(process.is_alive() for rank, process in enumerate(processes) if rank not in stopped):
            processes[stopped[0]].kill()
        time.sleep(0.05)
    seconds = time.monotonic() - struck
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    said = [(folder / f"rank_{rank}.log").read_text(errors="replace") for rank in range(ranks)]
    path = folder / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return Ended(codes, seconds, said, rows)


def check(faults: Sequence[Fault], ended: Ended, folder: Path) -> None:
    """The documented ends: in time, with their codes, the culprit and the step named, and nothing saved is lost."""
    fatal = [fault for fault in faults if fault.kind not in BENIGN]
    if fatal:
        _check_fatal(fatal[0], ended)
    else:
        _check_benign(faults, ended)
    asked = any(fault.kind in ("SIGTERM", "SIGUSR1") for fault in fatal)
    # Saves are asynchronous: that of the step before may not have ended when a rank dies.
    last = fatal[0].step + (1 if asked else -1) if fatal else STEPS
    root = folder / "run" / "checkpoints"
    found = newest(root, lambda text: None)
    assert (0 if found is None else found.step) >= last, (found, last)
    for saved in folders(root):
        verified(saved)


def _check_fatal(fault: Fault, ended: Ended) -> None:
    at = f"step {fault.step}, {fault.stage}"
    own, other, told = ended.codes[fault.rank], ended.codes[1 - fault.rank], ended.said[1 - fault.rank]
    if fault.kind in ("killed", "exits"):
        assert own == (-9 if fault.kind == "killed" else 3) and other == EXIT_FAILED, ended.codes
        # A beat tells a mark within a second; death may be quicker.
        assert re.search(rf"rank {fault.rank} \(last at [\w ,]+\) gave no sign of life", told), told[-1500:]
    elif fault.kind == "raises":
        assert own == 1 and "something broke" in ended.said[fault.rank] and other == EXIT_FAILED, ended.codes
        assert f"rank {fault.rank} failed at {at}: RuntimeError: something broke" in told
    elif fault.kind in ("stalls", "stopped", "holds the lock"):
        ends = {EXIT_STALLED, EXIT_FAILED} | ({1} if fault.kind == "holds the lock" else set())
        assert (own == -9 if fault.kind == "stopped" else own in ends) and other in ends, ended.codes
        seen = at if fault.kind == "stalls" else ""
        assert f"rank {fault.rank} at {seen}" in told, told[-1500:]
        if fault.kind != "stopped":
            assert "most recent call first" in ended.said[fault.rank] and "faults.py" in ended.said[fault.rank]
    elif fault.kind == "disk full":
        assert ended.codes == [2, 2] and all(f"rank {fault.rank}: " in text for text in ended.said), ended.codes
        # This step's checkpoint, or the one before, which is still being written.
        saving = f"step_00000[{fault.step}{fault.step + 1}]: .*No space left on device"
        assert all(re.search(saving, text, re.DOTALL) for text in ended.said), ended.said[0][-1500:]
    else:
        assert ended.codes == [EXIT_PREEMPTED] * 2, ended.codes
        assert all(f"stopped after {fault.step + 1} steps" in text for text in ended.said)


def _check_benign(faults: Sequence[Fault], ended: Ended) -> None:
    assert ended.codes == [0, 0] and [row["step"] for row in ended.rows] == list(range(1, STEPS + 1)), ended.codes
    assert "Traceback" not in "".join(ended.said)
    skipped = {fault.step: fault.rank for fault in faults if fault.kind == "nan"}
    assert [row["updates_skipped"] for row in ended.rows] == [float(step in skipped) for step in range(STEPS)]
    for rank in skipped.values():
        # Without an advantage in its groups a rank's loss is 0 whatever its hidden states are.
        assert re.search(rf"(the loss of rank {rank}|a gradient, but no loss,) is NaN", ended.said[0])
    for fault in faults:
        if fault.kind.startswith("reward"):
            assert "failed" in ended.said[fault.rank], ended.said[fault.rank][-1500:]


def some_fault(chance: random.Random, kind: str) -> Fault:
    stage = "rollout" if kind in ("nan", "disk full", "SIGTERM", "SIGUSR1") else chance.choice(STAGES)
    stage = "reward" if kind.startswith("reward") else stage
    return Fault(kind, chance.randrange(2), chance.randrange(STEPS), stage)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--cases", help="JSON: [[folder, flags, faults], ...] instead of random ones")
    parser.add_argument("--injections", type=int, default=len(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=KINDS)
    asked = parser.parse_args()
    preload()
    if asked.cases is None:
        inject_at_random(asked)
        return
    for name, more, listed in json.loads(asked.cases):
        faults, folder = [Fault(*fault) for fault in listed], asked.folder / name
        ended = run(folder, flags_of(asked.base, asked.world, folder, *more), faults)
        check(faults, ended, folder)
        print(json.dumps([name, ended.codes, ended.seconds]), flush=True)


def inject_at_random(asked: argparse.Namespace) -> None:
    chance, slowest, bad = random.Random(asked.seed), dict.fromkeys(asked.kinds, 0.0), 0
    for number in range(asked.injections):
        fault, folder = some_fault(chance, asked.kinds[number % len(asked.kinds)]), asked.folder / f"{number:03d}"
        flags = flags_of(asked.base, asked.world, folder, "--zero_stage", str(chance.choice((0, 2, 3))))
        ended = run(folder, flags, [fault])
        slowest[fault.kind] = max(slowest[fault.kind], ended.seconds)
        try:
            check([fault], ended, folder)
        except AssertionError as error:
            bad += 1
            print(f"{number}: NOT AS DOCUMENTED {fault}: {error}", flush=True)
        print(f"{number}: {fault} -> {ended.codes} in {ended.seconds:.1f} s", flush=True)
    print({"injections": asked.injections, "not as documented": bad, "slowest, s": slowest})


def preload() -> None:
    """Once, not in every child. In a fresh process: the threads and the group of one that trained die in a fork."""
    torch.set_num_threads(1)
    for name in ("syncr1.engine.methods.sync_r1", "syncr1.engine.data.samples", "deepspeed.runtime.zero.stage3"):
        importlib.import_module(name)
    kills.preload()


if __name__ == "__main__":
    main()
