"""The layout of a batch and of its classifier-free branch on one axis."""

from __future__ import annotations

import pytest
from shared_prefix_cases import CAUSAL, Whole, make_layout

from syncr1.engine.forward.free_branch import joined

FIRST, SECOND = [(3, [2, 0]), (0, [4])], [(2, [2, 4])]


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        (CAUSAL, CAUSAL, CAUSAL),
        ((None, [2, 0, 4]), (None, [2, 3]), (None, [2, 0, 4, 2, 3])),
        (CAUSAL, ([1], [2, 4]), ([0, 0, 1], [0, 0, 0, 2, 4])),
        (([3, 0], None), (None, [2, 0]), ([3, 0, 0], [0, 0, 0, 2, 0])),
    ],
)
def test_whole_parts_are_carried(first: Whole, second: Whole, both: Whole) -> None:
    found = joined(make_layout(FIRST, first), make_layout(SECOND, second))
    expected = make_layout([*FIRST, *SECOND], both)
    assert [None if x is None else x.tolist() for x in found.host_offsets] == [
        None if x is None else x.tolist() for x in expected.host_offsets
    ]
    assert found.plan is expected.plan
