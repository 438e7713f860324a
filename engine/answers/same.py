"""Whether two answers say the same: the same text, the same date, the same mathematics, or the same normal form.

In this order, and mathematics decides where both are some: `(1, 2)` is not `[1, 2]`, although a normal form drops
brackets. `docs/answers.md` has the whole table.
"""

from __future__ import annotations

from .dates import moment_of
from .dress import undressed
from .maths import same_maths
from .plain_texts import canonical, spelled_out

LONGEST = 5000
"""Characters; longer texts are only compared in normal form."""


def same_answer(said: str, right: str) -> bool:
    """Whether what is said is the right answer; an empty text equals none, and two answers at once are not one."""
    said, right = said.strip(), right.strip()
    if not said or not right:
        return False
    if said.casefold() == right.casefold():
        return True
    if max(len(said), len(right)) > LONGEST:
        return canonical(said) == canonical(right) != ""
    said, right = undressed(spelled_out(said)), undressed(spelled_out(right))
    if said.casefold() == right.casefold():
        return bool(said)
    moments = moment_of(said), moment_of(right)
    if any(moments):
        return moments[0] == moments[1]
    same = same_maths(said, right)
    if same is not None:
        return same
    plain = canonical(said)
    return bool(plain) and plain == canonical(right)
