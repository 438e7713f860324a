"""Groups of prefixes and responses for the attention tests, their layouts and operands."""

from __future__ import annotations

from collections.abc import Sequence
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


def make_layout(groups: Sequence[Group]) -> SharedPrefixLayout:
    responses = [length for _, lengths in groups for length in lengths]
    return SharedPrefixLayout(
        offsets([prefix for prefix, _ in groups]), offsets(responses), offsets([len(lengths) for _, lengths in groups])
    )


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
