"""A saved optimizer's state, cut for this run's ranks and ZeRO stage, whatever those were that saved it.

Each rank reads of every shard the elements that its own optimizer steps on, one shard and one parameter at a time: no
parameter is ever put together whole, and nothing is sent from rank to rank.

    saved on 2 ranks    | a a a a a | a a b b b |        `master/a` has 5 elements in rank 0's file, 2 in rank 1's
    read by 3           | a a a | a a a | a b b b |      rank 1 takes 2 from the first and 1 from the second
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..processes.group import place
from .first_format import check_numbered, load_numbered
from .optimizer_state import (
    MASTER,
    MOMENTS,
    STEP,
    Piece,
    begin,
    masters_of,
    numel_of,
    pieces_of,
    put,
    states_of,
)
from .sharded import Checkpoint

OPTIMIZER = "optimizer/"
"""Before the names of an optimizer's tensors in a checkpoint."""


def check_saved(optimizer: Any, model: nn.Module, checkpoint: Checkpoint) -> None:
    """Looks at what the checkpoint holds of an optimizer, and changes nothing.

    Args:
        optimizer: what `deepspeed.initialize` returned.
        model: whose parameters it trains.
        checkpoint: of any number of ranks and ZeRO stage; in format 1, of these.

    Raises:
        CheckpointError: not the state of these parameters, or one that this ZeRO stage cannot hold.
    """
    if checkpoint.format == 1:
        check_numbered(optimizer, _numbered(checkpoint))
    else:
        _check_shards(optimizer, model, checkpoint)


def load_saved(optimizer: Any, model: nn.Module, checkpoint: Checkpoint) -> None:
    """Puts this rank's part of a state that was checked into the optimizer; `spread` then makes the weights of it.

    Raises:
        CheckpointError: a shard cannot be read.
    """
    if checkpoint.format == 1:
        load_numbered(optimizer, _numbered(checkpoint))
    else:
        _load_shards(optimizer, model, checkpoint)


def _numbered(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What this rank saved in format 1; without ZeRO the first alone did."""
    return checkpoint.tensors(place()[0], OPTIMIZER) or checkpoint.tensors(0, OPTIMIZER)


def _check_shards(optimizer: Any, model: nn.Module, checkpoint: Checkpoint) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    steps: dict[str, set[float]] = defaultdict(set)
    for rank in range(checkpoint.world_size):
        with checkpoint.shard(rank) as shard:
            for key, kind, name in _entries(shard):
                part = shard.get_slice(key)
                shape, dtype = part.get_shape(), part.get_dtype()
                if dtype != "F32" or len(shape) != (kind != STEP):
                    expected = "a number" if kind == STEP else "one dimension"
                    raise CheckpointError(
                        f"the checkpoint's {key} of rank {rank}: expected float32 of {expected}, got {dtype} {shape}; "
                        "start a new run"
                    )
                if kind == STEP:
                    steps[name].add(float(shard.get_tensor(key)))
                else:
                    counts[kind, name] += shape[0]
    wanted = {name: numel_of(p) for name, p in model.named_parameters() if p.requires_grad and numel_of(p)}
    _check_counts(wanted, counts, steps)
    _check_steps(pieces_of(optimizer, model), steps)


def _check_counts(wanted: dict[str, int], counts: Counter[tuple[str, str]], steps: dict[str, set[float]]) -> None:
    """Every trained parameter's weights are there whole, and so are both moments of each that has a count of steps."""
    found = {name for _, name in counts} | steps.keys()
    for name in sorted(wanted.keys() | found):
        for kind in (MASTER, *MOMENTS):
            expected = wanted.get(name, 0) if kind == MASTER or name in steps else 0
            if counts[kind, name] != expected:
                raise CheckpointError(
                    f"the checkpoint's weights are not this run's: {kind} of {name} has {counts[kind, name]} elements "
                    f"there, {expected} here; resume with the model and settings that it was saved with"
                )


def _check_steps(pieces: list[Piece], steps: dict[str, set[float]]) -> None:
    """Ranks agree on a parameter's count of steps, and parameters in one master on each other's."""
    of_master: dict[int, tuple[str, set[float]]] = {}
    for piece in pieces:
        told = steps.get(piece.name, set())
        first, expected = of_master.setdefault(piece.master, (piece.name, told))
        if len(told) > 1 or told != expected:
            raise CheckpointError(
                f"the checkpoint's counts of steps differ: {first} has {sorted(expected)}, {piece.name} has "
                f"{sorted(told)}, and one group has one count; resume with the zero_stage that it was saved with"
            )


@torch.no_grad()
def _load_shards(optimizer: Any, model: nn.Module, checkpoint: Checkpoint) -> None:
    masters, states = masters_of(optimizer), states_of(optimizer)
    mine = {piece.name: piece for piece in pieces_of(optimizer, model)}
    seen: Counter[str] = Counter()
    stepped = False
    for rank in range(checkpoint.world_size):
        with checkpoint.shard(rank) as shard:
            for key, kind, name in _entries(shard):
                piece = mine.get(name)
                if kind != MASTER and not stepped:
                    begin(optimizer)
                    stepped = True
                if kind == STEP:
                    if piece is not None:
                        states[masters[piece.master]][STEP].fill_(float(shard.get_tensor(key)))
                    continue
                part = shard.get_slice(key)
                first, seen[key] = seen[key], seen[key] + part.get_shape()[0]
                if piece is None:
                    continue
                low, high = max(first, piece.start), min(seen[key], piece.start + piece.length)
                if low < high:
                    master = masters[piece.master]
                    target = master if kind == MASTER else states[master][kind]
                    put(target, piece.offset + low - piece.start, part[low - first : high - first])
    if not stepped:
        states.clear()


def _entries(shard: Any) -> Iterator[tuple[str, str, str]]:
    """(key, kind, parameter) of a shard's tensors that are an optimizer's."""
    for key in sorted(shard.keys()):
        if key.startswith(OPTIMIZER):
            kind, _, name = key.removeprefix(OPTIMIZER).partition("/")
            if kind not in (MASTER, STEP, *MOMENTS) or not name:
                raise CheckpointError(f"the checkpoint's optimizer is not this run's: it has {key!r}; start a new run")
            yield key, kind, name
