"""R_format: is the completion exactly `<think> … </think><answer> … </answer>`?  Binary, as in the paper.

Source: CoRL, eq. 5; the released code also lets full stops stand between the blocks, which the paper does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...records import SegmentKind
from .tags import parse_tagged


def format_reward(
    *, completions: Sequence[str], segments: Sequence[tuple[SegmentKind, ...]], **_: Any
) -> list[float | None]:
    """1 where `parse_tagged` takes the whole text, else 0; None without a text segment."""
    rows = zip(completions, segments, strict=True)
    return [float(parse_tagged(text) is not None) if "text" in kinds else None for text, kinds in rows]
