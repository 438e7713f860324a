"""Runs a phase to its end: eagerly on a CPU, as CUDA graphs on a GPU.

On a CPU a sequence that ended leaves the batch at once.  On a GPU reading how many are left would stall the loop, so
the count travels to the host while the loop runs on, and the batch shrinks to the next smaller bucket when it has
arrived: there is one graph per phase and bucket, and no synchronisation between a phase's first token and its last.

Dims: B sequences of the batch, b sequences still under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..policies.base import Policy
from ..policies.cache import CacheShape, Rows, Store
from .decode import Linear, Phase, Samples, State, Tables, TokenStep, Trunk
from .few_rows import FewRows

POLL_STEPS = 8
"""Steps between two looks at how many sequences are left."""
WARM_UP_STEPS = 2
"""Steps before a graph is captured, which let libraries make their workspaces."""


def bucket_of(size: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, … that is at least `size`: at most a third of the rows is padding."""
    power = 1
    while power < size:
        power *= 2
    return 3 * power // 4 if power >= 4 and 3 * power // 4 >= size else power


class Stepper:
    """Owns what outlives a call of `generate`: on a GPU the caches, the sample tables and the graphs.

    Args:
        policy: whose tokens are sampled.
        trunk: its trunk, or a compiled one.
        cuda_graphs: None: where the policy is on a GPU.
        few_rows: how heads multiply on a CPU; None: as everywhere.
    """

    def __init__(self, policy: Policy, trunk: Trunk, cuda_graphs: bool | None, few_rows: FewRows | None = None) -> None:
        on_gpu = policy.cache_shape().device.type == "cuda"
        if cuda_graphs and not on_gpu:
            raise ValueError("RolloutEngine: cuda_graphs=True needs a policy on a GPU; move it there or leave it None")
        self.policy, self.trunk = policy, trunk
        self.linear: Linear = F.linear if few_rows is None else few_rows.linear
        self.static = on_gpu if cuda_graphs is None else cuda_graphs
        self._stores: dict[str, Store] = {}
        self._samples: dict[str, Samples] = {}
        self._graphs: dict[tuple[object, ...], GraphedStep] = {}
        # One pool for all: no two graphs run at once, and what they hand on lies outside of it.
        self.pool = torch.cuda.graph_pool_handle() if self.static else None

    def store(self, name: str, shape: CacheShape, lengths: Sequence[int]) -> Store:
        """A cache with spans of these lengths; where graphs hold its address, the one from before if it is large
        enough."""
        kept = self._stores.pop(name, None)
        if kept is None or not kept.fits(lengths):
            self._forget(kept)
            kept = None  # what is replaced is freed first
            kept = Store(shape, lengths)
        kept.divide(lengths)
        if self.static:
            self._stores[name] = kept
        return kept

    def samples(self, name: str, num_sequences: int, max_tokens: int, words: int) -> Samples:
        """An empty table; the same as before where graphs hold its address and it is large enough. See `Samples`."""
        kept = self._samples.get(name)
        fits = kept is not None and kept.length.numel() > num_sequences and kept.token.shape[1] >= max_tokens
        if kept is None or not fits or kept.support.shape[2] != words:
            self._forget(kept)
            kept = Samples(num_sequences, max_tokens, self.policy.cache_shape().device, words)
        kept.length.zero_()
        if self.static:
            self._samples[name] = kept
        return kept

    @property
    def held_bytes(self) -> int:
        """What the caches take between calls."""
        return sum(2 * store.keys.nbytes for store in self._stores.values())

    def release(self) -> None:
        """Gives everything back; the next call allocates and captures again."""
        self._graphs.clear()
        self._stores.clear()
        self._samples.clear()

    def _forget(self, replaced: Store | Samples | None) -> None:
        """Drops the graphs that hold addresses of what is about to be replaced."""
        self._graphs = {key: graph for key, graph in self._graphs.items() if id(replaced) not in key}

    def run(
        self, phase: Phase, state: State, samples: Samples, tables: Tables, *, num_steps: int, feed_last: bool
    ) -> None:
        """Samples up to `num_steps` tokens per sequence.

        Args:
            phase: what is sampled.
            state: where the sequences stand; used up.
            samples: written.
            tables: where they stand in the end is written there, by `state.slot`.
            num_steps: tokens at most.
            feed_last: run the last token through the trunk too, because something follows it.
        """
        if self.static:
            self._run_static(phase, state, samples, tables, num_steps, feed_last)
            return
        step = self._eager(phase, state, samples, tables)
        for left in reversed(range(num_steps)):
            step(feed=feed_last or left > 0)
            if phase.ends:
                alive = step.state.alive.nonzero().squeeze(1)
                if alive.numel() < len(step.state):
                    step.state.save(tables)
                    if not alive.numel():
                        return
                    step = self._eager(phase, step.state.take(alive), samples, tables)
        step.state.save(tables)

    def _eager(self, phase: Phase, state: State, samples: Samples, tables: Tables) -> TokenStep:
        policy, trunk, linear = self.policy, self.trunk, self.linear
        return TokenStep(policy, trunk, tables.prompts, tables.own, phase, state, samples, linear=linear)

    def _run_static(
        self, phase: Phase, state: State, samples: Samples, tables: Tables, num_steps: int, feed_last: bool
    ) -> None:
        nobody = samples.length.numel() - 1
        step = self._graph(phase, _padded(state, bucket_of(len(state)), nobody), samples, tables)
        count = LateCount(state.slot.device)
        for done in range(1, num_steps + 1):
            if done == num_steps and not feed_last:
                step.eager(feed=False)
            else:
                step.replay()
            if phase.ends and done % POLL_STEPS == 0:
                left = count.latest()
                if left == 0:
                    break
                if left is not None and bucket_of(left) < len(step.state):
                    save(step.state, tables, nobody)
                    # Those under way first; the bucket holds them all, because their number only falls.
                    order = step.state.alive.int().argsort(descending=True, stable=True)
                    step = self._graph(phase, step.state.take(order[: bucket_of(left)]), samples, tables)
                count.ask(step.state.alive)
        save(step.state, tables, nobody)

    def _graph(self, phase: Phase, state: State, samples: Samples, tables: Tables) -> GraphedStep:
        """The graph of this phase and size, started from `state`."""
        prompts, own = tables.prompts, tables.own
        key = (phase, len(state), state.guided, id(samples), id(prompts), id(own))
        if key not in self._graphs:
            step = TokenStep(self.policy, self.trunk, prompts, own, phase, state, samples, padded=True)
            self._graphs[key] = GraphedStep(step, self.pool)
        else:
            self._graphs[key].state.copy_(state)
        return self._graphs[key]


def save(state: State, tables: Tables, nobody: int) -> None:
    """`State.save` of a padded state, without asking which sequences are padding: those have slot `nobody`, and go
    to one more row that the tables are given for the moment."""
    slot = torch.where(state.slot == nobody, len(tables.sides[0]), state.slot)
    for table, side in zip(tables.sides, state.sides(), strict=False):
        widened = Rows.cat([table, table.part(slice(-1, None))])
        widened.put(slot, side)
        table.copy_(widened.part(slice(0, -1)))


def _padded(state: State, size: int, nobody: int) -> State:
    """The state with sequences that are not alive added, up to `size`; they repeat the first one's rows."""
    missing = size - len(state)
    if not missing:
        return state
    index = torch.arange(size, device=state.slot.device)
    grown = state.take(torch.where(index < len(state), index, 0))
    grown.alive[len(state) :] = False
    grown.slot[len(state) :] = nobody
    return grown


class GraphedStep:
    """A `TokenStep` captured once and replayed.

    Args:
        step: its state and its samples are the graph's own from now on.
        pool: memory that graphs share.
    """

    def __init__(self, step: TokenStep, pool: Any = None) -> None:
        self.eager, self.state = step, step.state
        start = step.state.take(torch.arange(len(step.state), device=step.state.slot.device))
        length = step.samples.length.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                step()
                # What it sampled is written over later; where it stands must be as before.
                step.state.copy_(start)
                step.samples.length.copy_(length)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            step()

    def replay(self) -> None:
        """One token per sequence, fed."""
        self._graph.replay()


class LateCount:
    """How many sequences are alive, as the host learns it without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._on_host = torch.zeros((), dtype=torch.long, pin_memory=device.type == "cuda")
        self._arrived: torch.cuda.Event | None = None

    def ask(self, alive: Tensor) -> None:
        """Sends the number on its way."""
        self._on_host.copy_(alive.sum(), non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def latest(self) -> int | None:
        """The number that was asked for last; None where nothing was, or it is still on its way."""
        if self._arrived is None or not self._arrived.query():
            return None
        return int(self._on_host)
