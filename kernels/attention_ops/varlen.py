"""What the two attention calls over shared prefixes look like, worked out once per batch on the host.

A call is variable-length attention: segment i's queries are rows `cu_queries[i]:cu_queries[i+1]` of one axis, its keys
rows `cu_keys[i]:cu_keys[i+1]` of another.  Call `own`: every prefix and response within itself, causal.  Call `cross`:
each group's responses, as one segment, over the group's prefix, not causal.

CUDA kernels take the offsets as they are.  The CPU's takes dense batches; `runs` are those that are views (adjacent
segments of equal lengths), `buckets` the short segments that are copied together, padded at their ends.

Dims: `T` tokens, `Tp` prefix tokens, `P` prefixes, `S` responses, `H` heads, `E` head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

SHORT = 64
"""Segments up to this long cost more to start than to copy (measured: 30 µs alone, 12 µs in a batch, at length 20)."""
ROUND = 16
"""Short segments are padded to a multiple of this: the kernel takes the rest of a row of scores one by one."""
VIEW = 4
"""So many adjacent short segments of equal length are a batch of their own without a copy."""


class Run(NamedTuple):
    """`num_segments` adjacent segments of equal lengths: one dense batch, a view."""

    query: int
    """First query row."""
    key: int
    """First key row."""
    num_segments: int
    query_length: int
    key_length: int

    @property
    def query_end(self) -> int:
        return self.query + self.num_segments * self.query_length

    @property
    def key_end(self) -> int:
        return self.key + self.num_segments * self.key_length


class Bucket(NamedTuple):
    """Short segments of nearly equal length, for a call whose queries and keys are the same rows."""

    num_segments: int
    length: int
    rows: Tensor
    """[num_segments * length] int64; where each place comes from; padding repeats its segment's first row."""
    real: Tensor
    """[n] int64; the places of the batch that are not padding."""
    targets: Tensor
    """[n] int64; the rows they came from."""
    padding: Tensor | None
    """[num_segments * length, 1] bool; None without padding."""


def _slices(offsets: Sequence[int], others: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The rows of non-empty segments whose counterpart is empty."""
    pairs = zip(pairwise(offsets), pairwise(others), strict=True)
    return tuple((a, b) for (a, b), (c, d) in pairs if a < b and c == d)


def _runs(cu_queries: Sequence[int], cu_keys: Sequence[int]) -> Iterator[Run]:
    run: Run | None = None
    for (a, b), (c, d) in zip(pairwise(cu_queries), pairwise(cu_keys), strict=True):
        if a == b or c == d:
            continue
        if run is not None:
            query, key, num, query_length, key_length = run
            adjacent = a == query + num * query_length and c == key + num * key_length
            if adjacent and (b - a, d - c) == (query_length, key_length):
                run = run._replace(num_segments=num + 1)
                continue
            yield run
        run = Run(a, c, 1, b - a, d - c)
    if run is not None:
        yield run


def _bucket(starts: Sequence[int], lengths: Sequence[int]) -> Bucket:
    longest = -(-max(lengths) // ROUND) * ROUND
    column = torch.arange(longest, device="cpu")  # whatever the default device is
    start, length = (torch.tensor(x, device="cpu")[:, None] for x in (starts, lengths))
    real = column < length
    rows = (start + column * real).reshape(-1)
    places = real.reshape(-1).nonzero()[:, 0]
    padding = None if bool(real.all()) else ~real.reshape(-1, 1)
    return Bucket(len(starts), longest, rows, places, rows[places], padding)


class VarlenCall:
    """One call of variable-length attention."""

    def __init__(self, cu_queries: Sequence[int], cu_keys: Sequence[int], *, causal: bool) -> None:
        self.causal = causal
        self.num_queries, self.num_keys = cu_queries[-1], cu_keys[-1]
        self.max_queries = max((b - a for a, b in pairwise(cu_queries)), default=0)
        self.max_keys = max((b - a for a, b in pairwise(cu_keys)), default=0)
        self.blind_queries = _slices(cu_queries, cu_keys)
        """Rows [a, b) of queries that see no key: output 0, log-sum-exp -inf."""
        self.blind_keys = _slices(cu_keys, cu_queries)
        """Rows [a, b) of keys that no query sees: gradient 0."""
        self.all_runs = tuple(_runs(cu_queries, cu_keys))
        self._offsets = tuple(cu_queries), tuple(cu_keys)
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def offsets(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`cu_queries` and `cu_keys`, [n+1] int32 each, copied to a device once."""
        found = self._on_device.get(device)
        if found is None:
            with torch.inference_mode(False):  # plans outlive the call, see `shared_plan`
                queries, keys = (torch.tensor(part, dtype=torch.int32, device=device) for part in self._offsets)
            found = self._on_device[device] = (queries, keys)
        return found

    @cached_property
    @torch.inference_mode(False)
    def _split(self) -> tuple[tuple[Run, ...], tuple[Bucket, ...]]:
        if not self.causal:  # padded keys would be seen
            return self.all_runs, ()
        short = [r for r in self.all_runs if r.query_length <= SHORT and r.num_segments < VIEW]
        members: dict[int, list[tuple[int, int, Run]]] = {}
        for run in short:
            starts = range(run.query, run.query + run.num_segments * run.query_length, run.query_length)
            size = -(-run.query_length // ROUND)
            members.setdefault(size, []).extend((start, run.query_length, run) for start in starts)
        gathered = {size: found for size, found in members.items() if len({run for *_, run in found}) > 1}
        copied = {run for found in gathered.values() for *_, run in found}
        buckets = tuple(_bucket([m[0] for m in found], [m[1] for m in found]) for found in gathered.values())
        return tuple(run for run in self.all_runs if run not in copied), buckets

    @property
    def runs(self) -> tuple[Run, ...]:
        """Dense batches that are views."""
        return self._split[0]

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Dense batches that are copied together."""
        return self._split[1]


class Plan:
    """Both calls of one batch, and what else attention needs to know of it."""

    def __init__(self, prefixes: Sequence[int], sequences: Sequence[int], groups: Sequence[int]) -> None:
        self.prefixes, self.sequences, self.groups = tuple(prefixes), tuple(sequences), tuple(groups)
        self.num_prefix_tokens = prefixes[-1]
        self.num_tokens = prefixes[-1] + sequences[-1]
        segments = [*prefixes, *(prefixes[-1] + offset for offset in sequences[1:])]
        self.own = VarlenCall(segments, segments, causal=True)
        self.spans = tuple(sequences[offset] for offset in groups)
        """[P+1]; group p's responses are tokens Tp + spans[p] : Tp + spans[p+1]."""
        cross = VarlenCall(self.spans, prefixes, causal=False)
        self.cross = cross if cross.all_runs else None
        """None where no response has a prefix."""

    def prepare(self, device: torch.device) -> None:
        """Copies to the device now what attention layers on it need."""
        if device.type != "cpu":
            for call in (self.own, self.cross):
                if call is not None:
                    call.offsets(device)


def offsets_of(lengths: Sequence[int]) -> list[int]:
    """Lengths → cumulative counts that begin with 0."""
    return [0, *accumulate(lengths)]


@lru_cache(maxsize=64)
def shared_plan(prefixes: tuple[int, ...], sequences: tuple[int, ...], groups: tuple[int, ...]) -> Plan:
    """One plan for equal offsets: layers, forward and backward find it without the layout."""
    return Plan(prefixes, sequences, groups)


def plan_of(cu_prefixes: Tensor, cu_seqlens: Tensor, group_offsets: Tensor) -> Plan:
    """The plan of three offset tensors on the host; the same object for the same offsets."""
    return shared_plan(tuple(cu_prefixes.tolist()), tuple(cu_seqlens.tolist()), tuple(group_offsets.tolist()))
