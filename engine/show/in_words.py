"""What a run says of its rewards and of gradient clipping, in sentences: the terminal and the report alike.

`rewards.json` holds what a training is paid for:

    {"rewards": [{"name": "judge", "weight": 0.39, "kind": "image", "who": "…", "range": [0, 1], "own": false}, …],
     "shared": false}

`own` is of a user's: what its name means is not known, also where a reward of ours is called so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .names import REWARDS
from .run_files import is_number

KINDS = {"text": "a text", "image": "a drawing"}


def reward_lines(content: Mapping[str, Any]) -> list[str]:
    """What the total is the sum of, between what it lies, and who says each part of it; [] of a damaged file."""
    listed = content.get("rewards")
    parts = [part for part in listed if isinstance(part, Mapping)] if isinstance(listed, list) else []
    parts = [part for part in parts if isinstance(part.get("name"), str) and is_number(part.get("weight"))]
    if not parts:
        return []
    total = " + ".join(f"{part['weight']:.3g} {part['name']}" for part in parts)
    return [f"reward = {total}{_total_range(parts, content.get('shared') is True)}", *map(_line, parts)]


def own_names(content: Mapping[str, Any]) -> frozenset[str]:
    """Names of the rewards that are a user's."""
    listed = content.get("rewards")
    parts = [part for part in listed if isinstance(part, Mapping)] if isinstance(listed, list) else []
    return frozenset(str(part.get("name")) for part in parts if part.get("own") is True)


def _total_range(parts: Sequence[Mapping[str, Any]], shared: bool) -> str:
    """What the total can be, which is less where not every part applies."""
    ranges = [_range(part) for part in parts]
    if any(known is None for known in ranges):
        return ""
    ends = [sum(part["weight"] * known[i] for part, known in zip(parts, ranges, strict=True) if known) for i in (0, 1)]
    said = f", from {ends[0]:.3g} to {ends[1]:.3g}"
    most = {kind: sum(part["weight"] for part in parts if part.get("kind") == kind) for kind in KINDS}
    if shared or not all(most.values()) or ends[0]:
        return said
    alone = ", ".join(f"{words} alone earns at most {most[kind]:.3g}" for kind, words in KINDS.items())
    return f"{said}; what a request does not ask for earns nothing: {alone}"


def _range(part: Mapping[str, Any]) -> tuple[float, float] | None:
    ends = part.get("range")
    whole = isinstance(ends, list | tuple) and len(ends) == 2 and all(map(is_number, ends))
    return (float(ends[0]), float(ends[1])) if whole and ends else None


def _line(part: Mapping[str, Any]) -> str:
    """`judge, 0 to 1: shows what was asked; said by …`"""
    name, who = part["name"], part.get("who")
    known = _range(part)
    head = f"{name}, {known[0]:g} to {known[1]:g}" if known else name
    own = part.get("own") is True or name not in REWARDS
    said = ["a function of yours" if own else REWARDS[name], f"said by {who}" if isinstance(who, str) and who else ""]
    return f"{head}: {'; '.join(word for word in said if word)}"


def clipping_words(norms: Sequence[float], largest: Any) -> str:
    """How long gradients were before they were cut to `max_grad_norm`, and how many were; "" where nothing is known."""
    if not norms:
        return ""
    said = f"gradient norm before clipping: {sum(norms) / len(norms):.3g} on average, {max(norms):.3g} at most"
    if not is_number(largest) or largest <= 0:
        return f"{said}; none was cut (max_grad_norm 0)"
    share = sum(norm > largest for norm in norms) / len(norms)
    return f"{said}; {100 * share:.0f} % of the steps were cut to max_grad_norm {largest:g}"
