"""What a step is trained on as plain values and a vector for each dtype: from one process to another, or in a file.

Both ends have the source of prompts, which is deterministic: prompts go by their place in what it gave.  All else goes
as it is, pictures and embeddings too, so that what comes out is what went in, to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from ..processes.beside import Message, error_fields, reward_error
from ..records import Prompt, Rollout, Segment
from ..rewards.scoring import RewardTable
from ..rollout.sampling import RolloutStats
from .refill import Drawn, Waste
from .trajectories import Gathered

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.int64, torch.int32, torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8)
}


def carried(gathered: Gathered) -> Message:
    """All of it but the prompts, of which the ids go along."""
    bag, places = _Bag(), {id(prompt): place for place, prompt in enumerate(gathered.prompts)}
    drawn, waste, table = gathered.drawn, gathered.waste, gathered.drawn.table
    about = {
        "prompts": [prompt.id for prompt in gathered.prompts],
        "wanted": gathered.wanted,
        "rollouts": [_rollout_out(rollout, places[id(rollout.prompt)], bag) for rollout in drawn.rollouts],
        "stats": asdict(drawn.stats),
        "table": _table_out(table, bag),
        "waste": None if waste is None else {**_fields_out(waste, bag), "totals": [bag.put(t) for t in waste.totals]},
        "broken": None if gathered.broken is None else error_fields(gathered.broken),
        "preview": gathered.preview,
        "seconds": gathered.seconds,
        "staleness": gathered.staleness,
    }
    return Message(about, bag.vectors())


def gathered_of(message: Message, prompts: list[Prompt]) -> Gathered:
    """What `carried` told, of the same prompts.

    Raises:
        ValueError, KeyError, TypeError: it is no such message, or of other prompts.
    """
    about, took = message.about, _Taken(message.tensors)
    ids = [prompt.id for prompt in prompts]
    if ids != list(about["prompts"]):
        raise ValueError(f"expected trajectories of the prompts {ids[:3]} ..., got those of {about['prompts'][:3]} ...")
    told = {"metrics": {}, "extras": {}, **about["table"]}  # a checkpoint of an older version has none
    table = RewardTable(**{**_fields_in(RewardTable, told, took), "names": tuple(told["names"])})
    waste = about["waste"]
    return Gathered(
        drawn=Drawn(
            rollouts=[_rollout_in(told, prompts, took) for told in about["rollouts"]],
            table=table,
            stats=RolloutStats(**about["stats"]),
        ),
        waste=None if waste is None else Waste(**{**waste, "totals": [took.take(ref) for ref in waste["totals"]]}),
        broken=None if about["broken"] is None else reward_error(about["broken"]),
        preview=dict(about["preview"]),
        prompts=prompts,
        wanted=[list(numbers) for numbers in about["wanted"]],
        staleness=int(about["staleness"]),
        seconds=dict(about["seconds"]),
    )


class _Bag:
    """Tensors of many shapes as one vector for each dtype; what several records share goes in once."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}
        self._lengths: dict[str, int] = {}
        self._known: dict[int, tuple[Tensor, list[Any]]] = {}

    def put(self, tensor: Tensor | None) -> list[Any] | None:
        """Its dtype, where it begins and its shape, for `_Taken`."""
        if tensor is None:
            return None
        if id(tensor) not in self._known:
            name = str(tensor.dtype).removeprefix("torch.")
            begin = self._lengths.get(name, 0)
            self._parts.setdefault(name, []).append(tensor.detach().cpu().flatten())
            self._lengths[name] = begin + tensor.numel()
            self._known[id(tensor)] = tensor, [name, begin, list(tensor.shape)]
        return self._known[id(tensor)][1]

    def vectors(self) -> dict[str, Tensor]:
        return {name: torch.cat(parts) for name, parts in self._parts.items()}


class _Taken:
    """The tensors of a `_Bag`, as parts of its vectors; what was shared is so again."""

    def __init__(self, vectors: Mapping[str, Tensor]) -> None:
        self._vectors = vectors
        self._made: dict[tuple[Any, ...], Tensor] = {}

    def take(self, ref: Sequence[Any]) -> Tensor:
        name, begin, shape = ref
        key = (name, begin, *shape)
        if key not in self._made:
            count = torch.Size(shape).numel()
            vector = self._vectors[name] if count else torch.empty(0, dtype=DTYPES[name])
            if begin < 0 or (count and begin + count > vector.numel()):
                raise ValueError(f"expected {begin + count} numbers of {name}, got {vector.numel()}")
            self._made[key] = (vector[begin : begin + count] if count else vector).view(shape)
        return self._made[key]


def _tensors_of(record: type) -> set[str]:
    return {field.name for field in fields(record) if field.type in ("Tensor", "Tensor | None")}


def _fields_out(record: Any, bag: _Bag) -> dict[str, Any]:
    """Every field of a record: tensors as places in the bag, all else as it is."""
    tensors, names = _tensors_of(type(record)), [field.name for field in fields(record)]
    return {name: bag.put(value) if name in tensors else value for name in names for value in [getattr(record, name)]}


def _fields_in(record: type, told: Mapping[str, Any], took: _Taken) -> dict[str, Any]:
    tensors = _tensors_of(record)
    names = [field.name for field in fields(record)]
    return {n: took.take(told[n]) if n in tensors and told[n] is not None else told[n] for n in names}


def _table_out(table: RewardTable, bag: _Bag) -> dict[str, Any]:
    told = _fields_out(table, bag)
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in told.items()}


def _rollout_out(rollout: Rollout, place: int, bag: _Bag) -> dict[str, Any]:
    segments = [_fields_out(segment, bag) for segment in rollout.segments]
    return {**_fields_out(rollout, bag), "prompt": place, "segments": segments}


def _rollout_in(told: Mapping[str, Any], prompts: Sequence[Prompt], took: _Taken) -> Rollout:
    segments = tuple(Segment(**_fields_in(Segment, segment, took)) for segment in told["segments"])
    return Rollout(**{**_fields_in(Rollout, told, took), "prompt": prompts[told["prompt"]], "segments": segments})
