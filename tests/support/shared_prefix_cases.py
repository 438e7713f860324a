"""Groups of prefixes and responses for the attention tests, their layouts and operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor

from syncr1.kernels.attention import SharedPrefixLayout
from syncr1.kernels.attention_ops.varlen import SHORT, offsets_of

Group = tuple[int, list[int]]
"""Length of a prefix, lengths of its responses."""
RAGGED: list[Group] = [(3, [4, 0, 7]), (0, [1, 3]), (5, []), (2, [2, SHORT + 36, 70, 70]), (1, [1]), (20, [17, 31, 24])]
EQUAL: list[Group] = [(6, [5] * 4)] * 3
HOLES: list[Group] = [(5, [3]), (5, []), (5, [3]), (0, [3]), (5, [3]), (5, [2, 1])]
"""Equal groups that are neighbours on one axis and not on the other."""
ONES: list[Group] = [(1, [1, 0]), (1, []), (0, [1]), (1, [1])]
CASES = {"ragged": RAGGED, "equal": EQUAL, "holes": HOLES, "ones": ONES}


def offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor(offsets_of(lengths), dtype=torch.int32)


Whole = tuple[list[int] | None, list[int] | None]
"""Leading tokens of each prefix, and of each response, that see each other whole."""
CAUSAL: Whole = (None, None)


def make_layout(groups: Sequence[Group], whole: Whole = CAUSAL) -> SharedPrefixLayout:
    responses = [length for _, lengths in groups for length in lengths]
    return SharedPrefixLayout(
        offsets([prefix for prefix, _ in groups]),
        offsets(responses),
        offsets([len(lengths) for _, lengths in groups]),
        *(None if sizes is None else torch.tensor(sizes, dtype=torch.int32) for sizes in whole),
    )


def whole_of(groups: Sequence[Group], kind: str) -> Whole:
    """One of `WHOLES` for these groups."""
    prefixes, responses = [prefix for prefix, _ in groups], [n for _, lengths in groups for n in lengths]
    random = Random(str(groups))
    wholes: dict[str, Whole] = {
        "all": (prefixes, responses),
        "responses": (None, responses),
        "prefixes": (prefixes, None),
        "begin": ([p // 2 for p in prefixes], [n // 2 for n in responses]),
        "begin of prefixes": ([max(0, p - 2) for p in prefixes], None),
        "mixed": tuple([random.choice((0, n, random.randint(0, n))) for n in x] for x in (prefixes, responses)),
    }
    return wholes[kind]


WHOLES = ("all", "responses", "prefixes", "begin", "begin of prefixes", "mixed")


def drawn_whole(draw: Callable[[st.SearchStrategy[int]], int], groups: Sequence[Group]) -> Whole:
    """Any number of leading tokens of every prefix and response."""
    prefixes, responses = [prefix for prefix, _ in groups], [n for _, lengths in groups for n in lengths]
    sizes = [[draw(st.one_of(st.just(n), st.integers(0, n))) for n in lengths] for lengths in (prefixes, responses)]
    return sizes[0], sizes[1]


def operands(tokens: int, heads: int = 4, kv_heads: int = 4, size: int = 8, dtype: torch.dtype = torch.float64) -> Any:
    """q, k, v and the gradient of the output; the first three are leaves."""
    random = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, heads, size), *[(tokens, kv_heads, size)] * 2, (tokens, heads, size)]
    made = [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes]
    return *(x.requires_grad_() for x in made[:3]), made[3]


def with_gradients(out: Tensor, inputs: Sequence[Tensor], probe: Tensor, **options: bool) -> list[Tensor]:
    """The output and the gradient of each input."""
    return [out.detach(), *torch.autograd.grad(out, inputs, probe, **options)]


LENGTH = st.one_of(st.integers(0, 3), st.integers(0, 40), st.just(SHORT + 1))
GROUPS = st.lists(st.tuples(LENGTH, st.lists(LENGTH, max_size=4)), max_size=4)


def seen_by(groups: Sequence[Group], whole: Whole = CAUSAL) -> Tensor:
    """[T, T] bool, from (group, response or -1, place) of every token."""
    tokens = [(g, -1, i) for g, (prefix, _) in enumerate(groups) for i in range(prefix)]
    tokens += [(g, s, i) for g, (_, lengths) in enumerate(groups) for s, n in enumerate(lengths) for i in range(n)]
    responses = [(g, s) for g, (_, lengths) in enumerate(groups) for s in range(len(lengths))]
    sizes = dict(zip([(g, -1) for g in range(len(groups))], whole[0] or [0] * len(groups), strict=True))
    sizes |= dict(zip(responses, whole[1] or [0] * len(responses), strict=True))

    def sees(query: tuple[int, int, int], key: tuple[int, int, int]) -> bool:
        together = max(query[2], key[2]) < sizes[query[:2]]
        own = query[:2] == key[:2] and (key[2] <= query[2] or together)
        return own or (query[0] == key[0] and query[1] >= 0 and key[1] == -1)

    size = len(tokens)
    return torch.tensor([sees(a, b) for a in tokens for b in tokens], dtype=torch.bool).reshape(size, size)


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None = None) -> Tensor:
    """The definition, in the dtype of the inputs."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, k) * scale
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def assert_all_close(found: Sequence[Tensor], expected: Sequence[Tensor], forward: float, gradient: float) -> None:
    for index, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=gradient if index else forward)
