"""What the attention calls over shared prefixes look like, worked out once per batch on the host.

A call is variable-length attention: segment i's queries are rows `cu_queries[i]:cu_queries[i+1]` of one axis, its keys
rows `cu_keys[i]:cu_keys[i+1]` of another.  `own`: every prefix and response within itself, causal.  Call `cross`: each
group's responses, as one segment, over the group's prefix, not causal.

Where segments begin with tokens that see each other whole, `own` is up to three calls: what is causal, what is whole,
and what is causal over the whole part before it.  Rows that have no part in a call are blind in it.

CUDA kernels take the offsets as they are.  The CPU's takes dense batches; `runs` are those that are views (adjacent
segments of equal lengths), `buckets` the short segments that are copied together, padded at their ends.

Dims: `T` tokens, `Tp` prefix tokens, `P` prefixes, `S` responses, `H` heads, `E` head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple
from weakref import WeakValueDictionary

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


class Part(NamedTuple):
    """A call, and the stretches of the axis that its queries and its keys are."""

    call: VarlenCall
    queries: slice
    keys: slice


class Own(NamedTuple):
    """Attention of adjacent segments within themselves."""

    disjoint: tuple[Part, ...]
    """Every row of the axis sees keys in exactly one of these."""
    further: tuple[Part, ...]
    """Other keys that some of the rows see."""


Stretch = tuple[int, int]
"""Rows [a, b)."""


def _part(pairs: Sequence[tuple[Stretch, Stretch]], *, causal: bool) -> tuple[Part, ...]:
    """The call of (queries, keys), in order and not empty; rows between them are segments without a counterpart."""
    if not pairs:
        return ()
    (first_query, _), (first_key, _) = pairs[0]
    (_, query_end), (_, key_end) = pairs[-1]
    cu_queries, cu_keys = [0], [0]
    for (a, b), (c, d) in pairs:
        if a - first_query > cu_queries[-1]:
            cu_queries.append(a - first_query)
            cu_keys.append(cu_keys[-1])
        if c - first_key > cu_keys[-1]:
            cu_queries.append(cu_queries[-1])
            cu_keys.append(c - first_key)
        cu_queries.append(b - first_query)
        cu_keys.append(d - first_key)
    call = VarlenCall(cu_queries, cu_keys, causal=causal)
    return (Part(call, slice(first_query, query_end), slice(first_key, key_end)),)


def _own(offsets: Sequence[int], whole: Sequence[int]) -> Own:
    """`whole`: leading tokens of each segment that see each other whole; empty = none of any."""
    if not any(whole):
        everything = slice(0, offsets[-1])
        return Own((Part(VarlenCall(offsets, offsets, causal=True), everything, everything),), ())
    cut = [((a, a + size), (a + size, b)) for (a, b), size in zip(pairwise(offsets), whole, strict=True)]
    heads = [head for head, _ in cut if head[0] < head[1]]
    rests = [rest for _, rest in cut if rest[0] < rest[1]]
    both = [(rest, head) for head, rest in cut if head[0] < head[1] and rest[0] < rest[1]]
    causal = _part(list(zip(rests, rests, strict=True)), causal=True)
    return Own(causal + _part(list(zip(heads, heads, strict=True)), causal=False), _part(both, causal=False))


class Plan:
    """All calls of one batch, and what else attention needs to know of it.

    `whole_prefixes` [P] and `whole_responses` [S] are both empty where everything is causal.
    """

    def __init__(
        self,
        prefixes: Sequence[int],
        sequences: Sequence[int],
        groups: Sequence[int],
        whole_prefixes: Sequence[int] = (),
        whole_responses: Sequence[int] = (),
    ) -> None:
        self.prefixes, self.sequences, self.groups = tuple(prefixes), tuple(sequences), tuple(groups)
        self.whole_prefixes, self.whole_responses = tuple(whole_prefixes), tuple(whole_responses)
        self.num_prefix_tokens = prefixes[-1]
        self.num_tokens = prefixes[-1] + sequences[-1]
        segments = [*prefixes, *(prefixes[-1] + offset for offset in sequences[1:])]
        self.own = _own(segments, self.whole_prefixes + self.whole_responses)
        """Of prefixes and responses, on their common axis."""
        self.spans = tuple(sequences[offset] for offset in groups)
        """[P+1]; group p's responses are tokens Tp + spans[p] : Tp + spans[p+1]."""
        cross = VarlenCall(self.spans, prefixes, causal=False)
        self.cross = cross if cross.all_runs else None
        """None where no response has a prefix."""

    @cached_property
    def responses(self) -> Own:
        """`own` of the responses alone, on an axis [Tr]."""
        return _own(self.sequences, self.whole_responses)

    def prepare(self, device: torch.device) -> None:
        """Copies to the device now what attention layers on it need."""
        if device.type != "cpu":
            calls = [part.call for own in (self.own, self.responses) for parts in own for part in parts]
            for call in (*calls, *([self.cross] if self.cross else [])):
                call.offsets(device)


def offsets_of(lengths: Sequence[int]) -> list[int]:
    """Lengths → cumulative counts that begin with 0."""
    return [0, *accumulate(lengths)]


_alive: WeakValueDictionary[tuple[tuple[int, ...], ...], Plan] = WeakValueDictionary()
"""Plans that a layout holds outlive the cache: a CUDA graph has the addresses of their offsets."""


@lru_cache(maxsize=64)
def shared_plan(
    prefixes: tuple[int, ...],
    sequences: tuple[int, ...],
    groups: tuple[int, ...],
    whole_prefixes: tuple[int, ...] = (),
    whole_responses: tuple[int, ...] = (),
) -> Plan:
    """One plan for equal offsets: layers, forward and backward find it without the layout."""
    key = (prefixes, sequences, groups, whole_prefixes, whole_responses)
    found = _alive.get(key)
    if found is None:
        found = _alive[key] = Plan(*key)
    return found


def plan_of(
    cu_prefixes: Tensor,
    cu_seqlens: Tensor,
    group_offsets: Tensor,
    whole_prefixes: Tensor | None,
    whole_responses: Tensor | None,
) -> Plan:
    """The plan of offsets and whole parts on the host; the same object for what means the same."""
    offsets = [tuple(x.tolist()) for x in (cu_prefixes, cu_seqlens, group_offsets)]
    if whole_prefixes is None and whole_responses is None:
        return shared_plan(*offsets)
    counts = (len(offsets[0]) - 1, len(offsets[1]) - 1)
    given = zip((whole_prefixes, whole_responses), counts, strict=True)
    # One token sees itself either way.
    whole = [(0,) * n if x is None else tuple(w if w > 1 else 0 for w in x.tolist()) for x, n in given]
    return shared_plan(*offsets, *whole) if any(map(any, whole)) else shared_plan(*offsets)
