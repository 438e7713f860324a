"""What a saved state knows of the rows that it is of: whether those that were used still say what they said.

A row that has not been used yet may be mended while the run is interrupted; what was trained on is not to change behind
the model's back. Where pictures lie is no part of it, for a folder may have moved.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..records import Prompt

SIZE = 4
"""Bytes of a row's digest: one change in four billion is not seen, and 100,000 rows are half a megabyte of a state."""
MOST_NAMED = 3


class RowDigests:
    """Of the samples of an order, in their order.

    Args:
        samples: each with its prompts.
        places: of each sample, what its place among the others depends on: of other places nothing can go on.
    """

    def __init__(self, samples: Sequence[Sequence[Prompt]], places: Sequence[object]) -> None:
        self._names = [" and ".join(prompt.id for prompt in sample) for sample in samples]
        self._digests = [_digest([_said(prompt) for prompt in sample], SIZE) for sample in samples]
        self._places = _digest(list(places), 8).hex()

    def state_dict(self) -> dict[str, Any]:
        return {
            "count": len(self._names),
            "places": self._places,
            "digests": base64.b64encode(b"".join(self._digests)).decode("ascii"),
        }

    def check_places(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where the rows are others, or there are more or fewer."""
        if (state["count"], state["places"]) != (len(self._names), self._places):
            raise ValueError(
                f"PromptStream: the saved state is of other prompts ({state['count']} rows then, {len(self._names)} "
                "now); rows that were not used yet may be mended, none added or taken out: resume with the data that "
                "the run began with"
            )

    def check_used(self, state: Mapping[str, Any], used: Collection[int]) -> None:
        """Raises ValueError, which names them, where rows that have been used are others now."""
        before = base64.b64decode(state["digests"])
        if len(before) != SIZE * len(self._names):
            got = len(before) // SIZE
            raise ValueError(f"PromptStream: the saved state has {got} digests of {len(self._names)} rows")
        changed = [i for i in sorted(used) if before[SIZE * i : SIZE * (i + 1)] != self._digests[i]]
        if changed:
            named = ", ".join(self._names[i] for i in changed[:MOST_NAMED])
            more = f" and {len(changed) - MOST_NAMED} more" if len(changed) > MOST_NAMED else ""
            raise ValueError(
                f"PromptStream: {named}{more} has been trained on and is another row now; put it back as it was, or "
                "start a new run: only rows that were not used yet may be mended"
            )


def _said(prompt: Prompt) -> tuple[object, ...]:
    """What a prompt asks and what is right."""
    looks = None if prompt.attributes is None else sorted(prompt.attributes.items())
    asked = prompt.id, prompt.task, prompt.text, prompt.request, prompt.info, prompt.segments, prompt.follow_up
    right = prompt.answer, prompt.right_answers, prompt.options, prompt.qa_type, prompt.follow_up_answer, prompt.target
    return (*asked, *right, looks, prompt.concept, prompt.rewarded)


def _digest(told: object, size: int) -> bytes:
    return hashlib.blake2b(repr(told).encode("utf-8", "backslashreplace"), digest_size=size).digest()
