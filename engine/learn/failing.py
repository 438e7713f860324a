"""Rewards that work for nobody end a run: what is left would be trained on for hours, and the model be of no use.

A reward that fails for everyone, on every rank, in the first step that calls it, or in `PATIENCE` steps one after
another, and `PATIENCE` steps in which no trajectory has any reward.  What fails now and then is counted and lost for
its step alone.  A function that breaks its contract ends the run at once: such a fault does not mend itself.

All ranks come to the same verdict, from what they tell each other with their metrics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..errors import RewardError
from ..rewards.scoring import RewardTable

PATIENCE = 3
"""Steps: a server that starts anew is back by then, as a rule."""
MARK = "failing/"
"""Before the names of what ranks tell each other; no metric begins so."""
ANY, BROKEN = f"{MARK}any", f"{MARK}broken"


class Failing:
    """Follows the rewards of one training, on every rank alike; `names` are theirs."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._in_a_row = dict.fromkeys(names, 0)
        self._has_worked: set[str] = set()
        self._without_any = 0
        self._broken = ""
        self._errors: dict[str, str] = {}

    def broken(self, error: RewardError) -> None:
        """In this step a function broke its contract on this rank."""
        self._broken = str(error)

    def told(self, table: RewardTable, num_shown: int) -> dict[str, float]:
        """What this rank tells the others of a step: 1 for yes, 0 for no, NaN where nothing was called."""
        self._errors = dict(table.errors)
        asked = num_shown > 0 and not self._broken
        flags = {f"{MARK}of/{name}": float(name in table.errors) if asked else math.nan for name in self.names}
        has_any = float(not bool(table.values.isnan().all())) if asked else math.nan
        return flags | {ANY: has_any, BROKEN: float(bool(self._broken))}

    def heard(self, ranks: Sequence[dict[str, float]]) -> str:
        """Takes what ranks told out of their metrics; why the run ends, "" where it goes on."""
        flags = [{name: values.pop(name) for name in list(values) if name.startswith(MARK)} for values in ranks]
        if any(told[BROKEN] for told in flags):
            return self._broken or "a reward on another rank broke its contract; that rank says which"
        ended = [self._verdict(name, _known(flags, f"{MARK}of/{name}")) for name in self.names]
        having = _known(flags, ANY)
        if having:
            self._without_any = 0 if any(having) else self._without_any + 1
        if self._without_any == PATIENCE:
            ended.append(
                f"no trajectory of {PATIENCE} steps in a row has a reward: {', '.join(self.names)} gave None to all, "
                "or to some member of every group; there is nothing to learn from"
            )
        return "; ".join(filter(None, ended))

    def _verdict(self, name: str, failed: Sequence[float]) -> str:
        """Why this reward ends the run; "" where it does not. `failed`: of the ranks that called it."""
        if not failed:
            return ""
        if not all(failed):
            self._has_worked.add(name)
            self._in_a_row[name] = 0
            return ""
        self._in_a_row[name] += 1
        first = name not in self._has_worked
        if not first and self._in_a_row[name] < PATIENCE:
            return ""
        when = "in the first step that called it" if first else f"in {PATIENCE} steps in a row"
        said = self._errors.get(name, "the log says why")
        return f"reward {name!r} failed for everyone {when}: {said}; mend it, or leave it out"


def _known(ranks: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [told[name] for told in ranks if not math.isnan(told[name])]
