"""Whether two formulas with roots or unknowns are one and the same, by the library `math-verify` (and sympy below it).

The library only ever sees what `formula_values.latex` writes of a tree that was read here: numbers, letters and a dozen
operations, of a bounded size, which were equal at three points. So it cannot be sent into a computation without end,
and no text of a policy or a table reaches a parser that evaluates. Its own time limits are signals, which work in a
main thread alone; rewards run in others, and it is asked without them.

Source: math-verify (Apache 2.0), https://github.com/huggingface/Math-Verify.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from threading import Lock

from .formula_values import Node, latex, size_of

LARGEST = 60
"""Nodes, powers unfolded."""
_ONE_AT_A_TIME = Lock()
"""The caches of sympy's printers and of the grammar's parser are shared by threads."""


def same_formula(one: Node, other: Node) -> bool:
    """Whether the two are equal wherever they are defined; False where they are too large to tell."""
    if size_of(one) > LARGEST or size_of(other) > LARGEST:
        return False
    return _verified(latex(one), latex(other))


@lru_cache(maxsize=4096)
def _verified(one: str, other: str) -> bool:
    if one == other:
        return True
    with _ONE_AT_A_TIME:
        # Imported here: sympy takes a third of a second, and most runs never ask.
        from math_verify import LatexExtractionConfig, parse, verify

        for name in ("math_verify.parser", "math_verify.grader"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # it warns that there is no time limit
        how = [LatexExtractionConfig()]
        trees = [parse(f"${text}$", how, parsing_timeout=None) for text in (one, other)]
        return bool(trees[0] and trees[1] and verify(*trees, timeout_seconds=None))
