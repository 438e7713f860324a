"""`recipes/sync_r1.py` on machines whose computing takes a fixed time: what the ranks of weak_scaling.py run.

What a rank does alone before it scores and updates (sampling few tokens, rewards, packing) is filled up by sleep to
`SYNCR1_PACE_ROLLOUT` seconds per prompt, and an update begins with a sleep of `SYNCR1_PACE_UPDATE` per prompt: a GPU
would be busy while the host's cores are not.  No collective lies in the time that is filled up.  Everything else is the
run's own and real: prompts, forward, backward, ZeRO's reduction, the agreement to stop, metrics, checkpoints.
Each rank writes what its steps cost to `SYNCR1_PACE_OUT`.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.processes.launch import launch
from syncr1.engine.settings.flags import parse

INTERFACE = "eth0"
SMALL, ROUNDS = 8, 30
"""Bytes of the small all-reduce whose time is a network's latency, and how often it is timed."""
COLLECTIVES = (
    *("allreduce", "allreduce_coalesced", "reduce", "broadcast", "barrier", "gather", "scatter", "send", "recv"),
    *("allgather", "_allgather_base", "all_gather_single", "allgather_coalesced", "allgather_into_tensor_coalesced"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter_tensor_coalesced"),
    *("all_gather_single_coalesced", "reduce_scatter_single_coalesced", "alltoall", "alltoall_base"),
)
"""Of torch's ProcessGroup, by all the names that its versions give them."""


class Counter:
    """What a rank has done since it started: its collectives, the bytes that left its machine, its CPU time.

    Collectives are counted where they enter torch's process group, whoever asks for them: the engine, DeepSpeed, or
    torch itself for objects.  Each is waited for at once, so that its time, which includes waiting for slower ranks,
    counts as its own.  Those of a thread that saves beside the training are left alone."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.bytes = 0
        self.seconds = 0.0

    def watch(self) -> None:
        """Stands in for the process group's methods from now on."""
        from torch.distributed import ProcessGroup

        for name in COLLECTIVES:
            if hasattr(ProcessGroup, name):
                setattr(ProcessGroup, name, self._counted(name, getattr(ProcessGroup, name)))

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return real(*arguments, **more)
            self.calls[name] = self.calls.get(name, 0) + 1
            self.bytes += max((_num_bytes(given) for given in (*arguments[1:], *more.values())), default=0)
            start = time.perf_counter()
            work = real(*arguments, **more)
            if work is not None:
                work.wait()
            self.seconds += time.perf_counter() - start
            return work

        return call

    def now(self) -> dict[str, float]:
        """Totals; the difference of two is what lay between."""
        sent, packets = traffic()
        return {
            "at": time.perf_counter(),
            "cpu_seconds": time.process_time(),
            "sent_bytes": sent,
            "packets": packets,
            "collectives": sum(self.calls.values()),
            "collective_bytes": self.bytes,
            "collective_seconds": self.seconds,
        }


def _num_bytes(given: Any) -> int:
    """Of the tensors in an argument of a collective; the larger side of a gather or a scatter counts."""
    if isinstance(given, list | tuple):
        return sum(_num_bytes(one) for one in given)
    return given.numel() * given.element_size() if hasattr(given, "element_size") else 0


def traffic() -> tuple[int, int]:
    """(bytes, packets) that this machine's interface has sent; zeros where there is none."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == INTERFACE:
            fields = numbers.split()
            return int(fields[8]), int(fields[9])
    return 0, 0


class Pace:
    """Fills up the time before a step's update.

    Args:
        counter: which must see no collective in the time that is filled up.
        rollout: seconds per prompt from the first token to scoring, whatever that takes.
        update: seconds per prompt that come before an update.
    """

    def __init__(self, counter: Counter, rollout: float, update: float) -> None:
        self.counter, self.rollout, self.update = counter, rollout, update
        self.began, self.num_prompts, self.collectives = 0.0, 0, 0
        self.over = 0.0
        """Seconds by which real work was longer than its time, summed over steps."""

    def rollout_begins(self, num_prompts: int) -> None:
        self.began, self.num_prompts = time.perf_counter(), num_prompts
        self.collectives = sum(self.counter.calls.values())

    def before_score(self) -> None:
        assert sum(self.counter.calls.values()) == self.collectives, "a collective would be hidden by the sleep"
        left = self.began + self.rollout * self.num_prompts - time.perf_counter()
        self.over += max(0.0, -left)
        time.sleep(max(0.0, left))

    def before_update(self) -> None:
        time.sleep(self.update * self.num_prompts)


def rates(num_bytes: int) -> dict[str, float]:
    """Seconds of an all-reduce of eight bytes and of one as large as the gradients: what an expectation is made of."""
    import torch
    import torch.distributed as dist

    def seconds_of(tensor: Any, rounds: int) -> float:
        found = []
        for _ in range(rounds):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(tensor)
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    small, large = torch.zeros(SMALL // 4), torch.zeros(num_bytes // 4)
    return {"small_seconds": seconds_of(small, ROUNDS), "large_seconds": seconds_of(large, ROUNDS // 6)}


def install(counter: Counter, pace: Pace, steps: list[dict[str, Any]]) -> None:
    """Notes the counter whenever a step begins, and once when the training has ended; paces what lies between."""
    from syncr1.engine.data.stream import PromptStream
    from syncr1.engine.learn.learner import Learner
    from syncr1.engine.learn.trainer import Trainer
    from syncr1.engine.rollout.sampler import RolloutEngine

    next_step, generate = PromptStream.next_step, RolloutEngine.generate
    score, update, train = Learner.score, Learner.update, Trainer.train

    def note() -> None:
        steps.append(counter.now() | {"over_pace": pace.over, "calls": dict(counter.calls)})

    def watched_next(self: Any) -> Any:
        note()
        return next_step(self)

    def paced_generate(self: Any, prompts: Any, *arguments: Any) -> Any:
        pace.rollout_begins(len(prompts))  # ZeRO-3 has gathered the weights
        return generate(self, prompts, *arguments)

    def paced_score(self: Any, *arguments: Any) -> Any:
        pace.before_score()
        return score(self, *arguments)

    def paced_update(self: Any, *arguments: Any) -> Any:
        pace.before_update()
        return update(self, *arguments)

    def watched_train(self: Any, *arguments: Any) -> Any:
        done = train(self, *arguments)
        note()
        return done

    for owner, name, function in (
        *((PromptStream, "next_step", watched_next), (RolloutEngine, "generate", paced_generate)),
        *((Learner, "score", paced_score), (Learner, "update", paced_update), (Trainer, "train", watched_train)),
    ):
        setattr(owner, name, function)


def main() -> None:
    config = launch(parse(SyncR1Config, description=__doc__), __file__)
    from syncr1.engine.methods.sync_r1 import run
    from syncr1.engine.processes.group import init_distributed

    def given(name: str) -> str:
        return os.environ[f"SYNCR1_PACE_{name}"]

    init_distributed()
    counter = Counter()
    steps: list[dict[str, Any]] = []
    network = rates(int(given("BYTES")))
    counter.watch()
    install(counter, Pace(counter, float(given("ROLLOUT")), float(given("UPDATE"))), steps)
    run(config)
    told = json.dumps({"network": network, "steps": steps})
    (Path(given("OUT")) / f"rank_{os.environ.get('RANK', '0')}.json").write_text(told)


if __name__ == "__main__":
    main()
