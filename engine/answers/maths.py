"""Whether two answers are the same number, quantity, formula, equation, tuple, interval or set.

| what | rule |
|---|---|
| numbers and fractions | equal exactly: `4.0` is `4`, `.33` is not `1/3` |
| a unit, a percent sign | of one kind: converted; left out: forgiven (units.py); `50 %` is `.5` and `50` |
| rational functions | equal exactly at three points; roots, sines, …: nearly, then by math-verify (symbolic.py) |
| `x = 3` | as `3`, and as `x = 3` |
| tuples, intervals | bracket by bracket, in order; `]1, 2[` is `(1, 2)`; `x = 1, y = 2` is `(1, 2)` |
| ranges, scores (`3-1`) | both ends; no difference |
| sets, several solutions (`1, 2`, `1 or 2`, `±1`) | in any order; one of two is not both, and two are not one |

None where one of them is none of these: then texts are compared (same.py).
"""

from __future__ import annotations

import cmath
import re
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction

from .dress import undressed
from .formula import LONGEST, NotAFormulaError, plain_formula, read_formula
from .formula_values import FUNCTIONS, POINTS, Node, approximate, exact, exact_at, unknowns
from .numerals import with_digits
from .plain_texts import NUMBER_WORDS, numbers_as_digits
from .symbolic import same_formula
from .units import UNITS, Unit, split_unit

MOST_ITEMS = 12
_CLOSE = 1e-9
_WORDS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
_SIGNS = (
    *((r"\%", "%"), (r"\$", "$"), (r"^{\circ}", "°"), (r"^\circ", "°"), (r"\circ", "°"), (r"\degree", "°")),
    *((r"\lbrace", "⦃"), (r"\rbrace", "⦄"), (r"\{", "⦃"), (r"\}", "⦄"), (r"\cup", "∪"), (r"\pm", "±"), ("+/-", "±")),
    *((r"\leqslant", "≤"), (r"\geqslant", "≥"), (r"\leq", "≤"), (r"\geq", "≥"), (r"\neq", "≠"), (r"\ne", "≠")),
    *(("<=", "≤"), (">=", "≥"), ("!=", "≠"), (r"\lt", "<"), (r"\gt", ">"), ("、", ","), (";", ",")),
)
_LE = re.compile(r"\\(l|g)e(?![a-z])")
_MEMBER = re.compile(r"[A-Za-z]\s*(?:\\in\b|∈)\s*")
_JOINED = re.compile(r"\s+(?:or|and)\s+|\s*,\s*(?:or|and)\s+|[或和]")
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_SPACED = re.compile(r"-?\d{1,3}(?: \d{3})+(?![\d/ ])")
_ABOUT = re.compile(r"\\approx|≈")
_RELATION = re.compile("[=<>≤≥≠]")
_MATHEMATICAL = re.compile(r"[0-9\\+*/^=<>≤≥≠±∪π∞√|-]|(?:" + "|".join(sorted(FUNCTIONS)) + r")\(")
_WORD = re.compile(r"[a-z]+")
_OPEN, _SHUT = "([{⦃", ")]}⦄"
_RANGE = re.compile(r"(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?(?:(\s?)([^\d\s].*))?)")
"""`3-1`, `5-10 cm`: three to one, from 5 to 10; a difference has spaces, letters or more signs."""
_SPACED_RANGE = re.compile(r"(?<=^\d)\s-\s(?=\d+$)|(?<=^\d\d)\s-\s(?=\d+$)")
_SCALED = re.compile(
    r"(?<![\w.])(\d[\d,]*(?:\.\d+)?)\s?(thousand|million|billion|trillion|[万萬]?[亿億]|[万萬])(?![a-z])", re.I
)
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12, "万": 4, "亿": 8, "万亿": 12}
_MINUS = re.compile(r"(?:minus|negative)\s+(?=[\d.])", re.I)
_TURNED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤", "=": "=", "≠": "≠"}


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number or formula, and what it counts."""

    value: Node
    unit: Unit | None = None


@dataclass(frozen=True, slots=True)
class Items:
    """Several: `brackets` is `()`, `[)`, … or `{}`, `∪`, `-` of a range, or empty where there are none."""

    brackets: str
    items: tuple[Reading, ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """`x = 3`, `1 < x < 3`: sides, and the signs between them."""

    signs: tuple[str, ...]
    sides: tuple[Quantity, ...]


Reading = Quantity | Items | Relation


def same_maths(said: str, right: str) -> bool | None:
    """Whether both, spelled out (`plain_texts.spelled_out`), are the same; None where one of them is no mathematics."""
    there = readings(right)
    here = readings(said) if there else []
    if not here or not there or all(map(_is_letter, (*here, *there))):
        return None
    return any(_same(one, other) for one in here for other in there)


def _is_letter(reading: Reading) -> bool:
    """A letter alone says little: whether `A.` and `a` are the same is for texts to say."""
    return isinstance(reading, Quantity) and len(reading.value.name) == 1 and reading.unit is None


def readings(text: str) -> list[Reading]:
    """What a text may be; several where a letter behind a number is a unit or an unknown; nothing if no mathematics."""
    if len(text) > LONGEST or not (text := _prepared(text)) or not _is_mathematical(text):
        return []
    found: list[Reading] = []
    for form in dict.fromkeys((text, _SPACED_RANGE.sub("-", text))):  # `2 - 1` may be a score, and is one
        for units in (True, False):
            with suppress(NotAFormulaError):
                if (reading := _read(form, units)) not in found:
                    found.append(reading)
    return found


def _is_mathematical(text: str) -> bool:
    """A sign, a digit, a function or a single letter: so that `no` is a word and not n·o, which is o·n."""
    return (len(text) == 1 and text.isalpha()) or _MATHEMATICAL.search(text) is not None


def _prepared(text: str) -> str:
    text = _ABOUT.sub("", with_digits(undressed(_WORDS.sub(r" \1 ", text))), count=1).strip()
    for written, sign in _SIGNS:
        text = text.replace(written, sign)
    text = _LE.sub(lambda found: "≤" if found[1] == "l" else "≥", text)
    text = _SCALED.sub(_with_power, text)
    if any(word in NUMBER_WORDS for word in _WORD.findall(text.casefold())):
        text = " ".join(numbers_as_digits(text.casefold().split()))
    if found := _SPACED.match(text):
        text = found[0].replace(" ", "") + text[found.end() :]
    text = _MINUS.sub("-", text, count=1) if _MINUS.match(text) else text
    return _round_ends(_MEMBER.sub("", plain_formula(text)).strip(" \n\t,:").rstrip("."))


def _with_power(found: re.Match[str]) -> str:
    """`3*10^{4}` of `3万`."""
    scale = found[2].casefold().replace("萬", "万").replace("億", "亿")
    return f"{found[1]}*10^{{{_SCALES[scale]}}}"


def _round_ends(text: str) -> str:
    """`(1,2)` of `]1,2[`: a square bracket that looks away is a round one."""
    if not (text.startswith("]") or text.endswith("[")):
        return text
    parts = [part.strip() for part in text.split("∪")]
    if not all(
        len(part) > 2 and part[0] in "[]" and part[-1] in "[]" and not set("[]") & set(part[1:-1]) for part in parts
    ):
        return text
    return "∪".join(("(" if p[0] == "]" else "[") + p[1:-1] + (")" if p[-1] == "[" else "]") for p in parts)


def _read(text: str, units: bool) -> Reading:
    text = text.strip()
    if not text:
        raise NotAFormulaError
    if len(parts := _split(text, "∪")) > 1:
        return _items("∪", parts, units)
    if text[0] in _OPEN and text[-1] in _SHUT and _closes_at_end(text):
        inner = text[1:-1]
        parts = _split(inner, ",")
        if len(parts) > 1:
            brackets = text[0] + text[-1]
            return _items(brackets if brackets not in ("⦃⦄", "{}") else "{}", parts, units)
        if text[0] in "⦃{":
            return _read(inner, units)
    else:
        text = _GROUPED.sub(lambda found: found[0].replace(",", ""), text)
        if len(parts := _split(_JOINED.sub(",", text), ",")) > 1:
            return _items("", parts, units)
    if (found := _RANGE.fullmatch(text)) and _is_unit(found[4], found[3]):
        return _items("-", [found[1], found[2]], units)
    if signs := _RELATION.findall(text):
        sides = [_quantity(part, units) for part in _RELATION.split(text)]
        if len(signs) > 2:
            raise NotAFormulaError
        return Relation(tuple(signs), tuple(sides))
    if "±" in text:
        both = [_quantity(text.replace("±", sign), units) for sign in "+-"]
        return Items("", tuple(both))
    return _quantity(text, units)


def _is_unit(text: str | None, space: str) -> bool:
    """Whether nothing but a unit stands there; a letter that is glued to a number may be an unknown."""
    return text is None or (text in UNITS and bool(space or len(text) > 1 or not text.isalpha()))


def _items(brackets: str, parts: list[str], units: bool) -> Items:
    if len(parts) > MOST_ITEMS:
        raise NotAFormulaError
    return Items(brackets, tuple(_read(part, units) for part in parts))


def _split(text: str, separator: str) -> list[str]:
    """Where no bracket is open."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in _OPEN) - (character in _SHUT)
        if character == separator and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [*parts, text[start:]]


def _closes_at_end(text: str) -> bool:
    depth = 0
    for at, character in enumerate(text):
        depth += (character in _OPEN) - (character in _SHUT)
        if depth == 0:
            return at == len(text) - 1
    return False


def _quantity(text: str, units: bool) -> Quantity:
    number, unit = split_unit(text.strip()) if units else (text.strip(), None)
    return Quantity(read_formula(number), unit)


# Comparing ------------------------------------------------------------------------------------------------------------


def _same(one: Reading, other: Reading) -> bool:
    if isinstance(one, Relation) and isinstance(other, Relation):
        return _same_relation(one, other)
    if isinstance(one, Relation):
        return (value := _assigned(one)) is not None and _same(value, other)
    if isinstance(other, Relation):
        return (value := _assigned(other)) is not None and _same(one, value)
    if isinstance(one, Items) and isinstance(other, Items):
        return _same_items(one, other)
    if isinstance(one, Quantity) and isinstance(other, Quantity):
        return _same_quantity(one, other)
    return False


def _assigned(relation: Relation) -> Quantity | None:
    """3 of `x = 3`."""
    left = relation.sides[0].value
    return relation.sides[1] if relation.signs == ("=",) and left.op == "name" and unknowns(left) else None


def _same_relation(one: Relation, other: Relation) -> bool:
    turned = Relation(tuple(_TURNED[sign] for sign in reversed(other.signs)), other.sides[::-1])
    return any(one.signs == form.signs and all(map(_same_quantity, one.sides, form.sides)) for form in (other, turned))


def _same_items(one: Items, other: Items) -> bool:
    if len(one.items) != len(other.items):
        return False
    named = _by_names(one), _by_names(other)
    if (named[0] is None) != (named[1] is None):
        brackets = other.brackets if named[1] is None else one.brackets
        return brackets in ("", "()", "[]") and all(map(_same, named[0] or one.items, named[1] or other.items))
    unordered = ("", "{}", "∪")
    if one.brackets in unordered and other.brackets in unordered:
        if "∪" in (one.brackets, other.brackets) and one.brackets != other.brackets:
            return False
        left = list(other.items)
        for item in one.items:
            match = next((at for at, candidate in enumerate(left) if _same(item, candidate)), None)
            if match is None:
                return False
            left.pop(match)
        return True
    kinds = {one.brackets, other.brackets}
    if len(kinds) == 2 and kinds not in ({"", "()"}, {"", "[]"}):
        return False
    return all(map(_same, one.items, other.items))


def _by_names(items: Items) -> list[Quantity] | None:
    """1 and 2 of `y = 2, x = 1`; None where they are not all values of different unknowns."""
    found = {item.sides[0].value.name: _assigned(item) for item in items.items if isinstance(item, Relation)}
    values = [value for _, value in sorted(found.items()) if value is not None]
    return values if len(values) == len(items.items) else None


def _same_quantity(one: Quantity, other: Quantity) -> bool:
    if one.unit is None and other.unit is None:
        return _equal(one.value, other.value)
    if one.unit is not None and other.unit is not None:
        if one.unit.kind != other.unit.kind:
            return False
        return _equal(_scaled(one), _scaled(other))
    unit = one.unit or other.unit
    assert unit is not None
    if unit.kind == "percent" and _equal(_scaled(one), _scaled(other)):
        return True
    return unit.loose and _equal(one.value, other.value)


def _scaled(quantity: Quantity) -> Node:
    if quantity.unit is None or quantity.unit.worth == 1:
        return quantity.value
    return Node("*", (quantity.value, Node("number", number=Fraction(quantity.unit.worth))))


def _equal(one: Node, other: Node) -> bool:
    here, there = exact(one), exact(other)
    if here is not None and there is not None:
        return here == there
    pairs = [(exact_at(one, point), exact_at(other, point)) for point in range(len(POINTS))]
    if all(value is not None for pair in pairs for value in pair):
        return all(left == right for left, right in pairs)
    for point in range(len(POINTS)):
        values = approximate(one, point), approximate(other, point)
        if not cmath.isclose(*values, rel_tol=_CLOSE, abs_tol=_CLOSE**2):
            return False
    return cmath.isinf(approximate(one, 0)) or same_formula(one, other)
