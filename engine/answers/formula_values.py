"""What a formula is: a small tree, its exact value, its values at a few points, and its LaTeX.

Everything is bounded before it is computed: numbers of at most `MOST_BITS`, so that `9^{9^{9}}` costs nothing.
"""

from __future__ import annotations

import cmath
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

MOST_BITS = 4000
MOST_FACTORIAL = 100
CONSTANTS = {"pi": math.pi, "e": math.e, "infty": math.inf, "i": 1j}
POINTS = (0.7390851, -1.3247179, 2.2360679)
"""Where unknowns are put to tell formulas apart: of both signs, so that x and |x| differ."""
_RATIONAL = ("neg", "+", "*", "/", "^")
_FUNCTIONS: Mapping[str, Callable[[complex], complex]] = {
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "ln": cmath.log,
    "log": cmath.log10,
    "exp": cmath.exp,
    "abs": abs,
    "sqrt": cmath.sqrt,
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
}
FUNCTIONS = frozenset(_FUNCTIONS)


@dataclass(frozen=True, slots=True)
class Node:
    """A number, a name (an unknown or a constant), or an operator with its arguments."""

    op: str
    """number, name, neg, +, *, /, ^, !, or a function's name."""
    args: tuple[Node, ...] = ()
    number: Fraction = Fraction(0)
    name: str = ""


def exact(node: Node) -> Fraction | None:
    """The value where it is rational and of a decent size; None else."""
    return _exact(node, None)


def exact_at(node: Node, point: int) -> Fraction | None:
    """A rational function's value with the unknowns at large whole numbers; None where it is none, or not defined.

    Two such functions that are equal there are one and the same, save with a chance of about their degree in 2^61
    (Schwartz and Zippel).
    """
    return _exact(node, point)


def _exact(node: Node, point: int | None) -> Fraction | None:
    if node.op == "number":
        return node.number
    if node.op == "name":
        if point is None or node.name in CONSTANTS:
            return None
        digest = hashlib.blake2b(f"{point} {node.name}".encode(), digest_size=8).digest()
        return Fraction(int.from_bytes(digest) >> 3)
    if point is not None and node.op not in _RATIONAL:
        return _exact(node, None)
    values = [_exact(part, point) for part in node.args]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    if point is not None and node.op == "^" and known[1].denominator != 1:
        return None  # a root, although this number has one
    value = _applied(node.op, known)
    if value is None or value.numerator.bit_length() + value.denominator.bit_length() > 2 * MOST_BITS:
        return None
    return value


def _applied(op: str, known: list[Fraction]) -> Fraction | None:
    first = known[0]
    if op == "neg":
        return -first
    if op == "+":
        return first + known[1]
    if op == "*":
        return first * known[1]
    if op == "/":
        return first / known[1] if known[1] else None
    if op == "^":
        return _power(first, known[1])
    if op == "abs":
        return abs(first)
    if op == "sqrt":
        return _root(first)
    if op == "!" and first.denominator == 1 and 0 <= first <= MOST_FACTORIAL:
        return Fraction(math.factorial(first.numerator))
    return None


def _power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator == 2 and (root := _root(base)) is not None:
        base, exponent = root, 2 * exponent
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if exponent.denominator != 1 or abs(exponent) > MOST_BITS or size * abs(exponent.numerator) > MOST_BITS:
        return None
    return None if not base and exponent <= 0 else base**exponent.numerator


def _root(value: Fraction) -> Fraction | None:
    if value < 0:
        return None
    root = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
    return root if root * root == value else None


def approximate(node: Node, point: int) -> complex:
    """The value with the unknowns at the point of that index; NaN where there is none.

    Each unknown has a value of its own; which one follows from its name.
    """
    try:
        return _approximate(node, point)
    except (ArithmeticError, ValueError, TypeError):
        return complex(math.nan)


def _approximate(node: Node, point: int) -> complex:
    if node.op == "number":
        return complex(float(node.number))
    if node.op == "name":
        if node.name in CONSTANTS:
            return complex(CONSTANTS[node.name])
        spread = sum((at + 1) * ord(character) for at, character in enumerate(node.name))
        return complex(POINTS[point] * (1 + (spread % 997) / 997))
    values = [_approximate(part, point) for part in node.args]
    if node.op == "neg":
        return -values[0]
    if node.op == "+":
        return values[0] + values[1]
    if node.op == "*":
        return values[0] * values[1]
    if node.op == "/":
        return values[0] / values[1]
    if node.op == "^":
        return values[0] ** values[1]
    if node.op == "!":
        return complex(math.gamma(values[0].real + 1)) if abs(values[0]) < MOST_FACTORIAL else complex(math.nan)
    return complex(_FUNCTIONS[node.op](values[0]))


def unknowns(node: Node) -> frozenset[str]:
    """The names that are no constants."""
    if node.op == "name":
        return frozenset() if node.name in CONSTANTS else frozenset({node.name})
    return frozenset().union(*(unknowns(part) for part in node.args))


def size_of(node: Node) -> int:
    """Its nodes, and what its powers would unfold to: what a simplifier has to fear."""
    inner = sum(size_of(part) for part in node.args)
    if node.op == "^":
        power = exact(node.args[1])
        return inner * (1 if power is None else max(1, math.ceil(abs(power)))) + 1
    return inner + 1


def latex(node: Node) -> str:
    """The formula in LaTeX, every part in brackets; made of this tree alone, whatever a text may have held."""
    if node.op == "number":
        number = node.number
        whole = str(abs(number.numerator))
        text = whole if number.denominator == 1 else rf"\frac{{{whole}}}{{{number.denominator}}}"
        return f"(-{text})" if number < 0 else text
    if node.op == "name":
        return node.name if len(node.name) == 1 else rf"\{node.name} "
    parts = [latex(part) for part in node.args]
    if node.op == "/":
        return rf"\frac{{{parts[0]}}}{{{parts[1]}}}"
    if node.op == "sqrt":
        return rf"\sqrt{{{parts[0]}}}"
    if node.op == "abs":
        return rf"\left|{parts[0]}\right|"
    if node.op == "^":
        return rf"({parts[0]})^{{{parts[1]}}}"
    forms = {"neg": "(-{0})", "+": "({0}+{1})", "*": r"({0}\cdot {1})", "!": "({0})!", "exp": "e^{{{0}}}"}
    if node.op == "log":
        return rf"\log_{{10}}({parts[0]})"
    return forms.get(node.op, "\\" + node.op + "({0})").format(*parts)
