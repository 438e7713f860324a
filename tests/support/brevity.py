"""A reward as a user writes one: short texts are better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def brevity(*, completions: Sequence[str], segments: Sequence[tuple[str, ...]], **_: Any) -> list[float | None]:
    return [-float(len(text)) if "text" in kinds else None for text, kinds in zip(completions, segments, strict=True)]


brevity.kind = "text"  # type: ignore[attr-defined]
