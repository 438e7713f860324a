"""The normal form in which texts are compared: digits for number words, no articles, no outer punctuation.

A mathematical sign counts: `-5` is not `5`, `.5` is not `5`, `C++` and `C#` are not `C`, and `A-` is not `A`.
Superscripts, subscripts and fractions of one character are spelled out before Unicode's compatibility forms would glue
them to what stands beside: `10²` is `10^2` and not `102`, `1½` is `1 1/2` and not `11/2`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

ARTICLES = frozenset({"a", "an", "the"})
# fmt: off
_ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]
_TENS_IN_ORDER = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
# fmt: on
_UNITS = {word: value for value, word in enumerate(_ONES)}
_TENS = {word: 10 * value for value, word in enumerate(_TENS_IN_ORDER, start=2)}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
NUMBER_WORDS = _UNITS | _TENS | {"hundred": 100} | _SCALES

_GROUPED_DIGITS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣ", "0123456789+-()nix")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣ]+")
_SUBSCRIPTS = re.compile("(?<=[0-9])[₀₁₂₃₄₅₆₇₈₉]+")
_DASH = re.compile(r"[‐‒–](?=\s?\.?\d)")
_ONE_CHARACTER_FRACTION = re.compile("([0-9]?)([¼½¾⅐-⅞])")


def spelled_out(text: str) -> str:
    """`text` in Unicode's compatibility form (NFKC), with `^2` for superscripts, `_2` for a number's subscripts and
    `1 1/2` for mixed numbers; minus signs and dashes before digits are `-`."""
    text = _SUPERSCRIPTS.sub(_power, text)
    text = _SUBSCRIPTS.sub(lambda found: "_" + found[0].translate(_LOWERED), text)
    text = _ONE_CHARACTER_FRACTION.sub(lambda found: (found[1] and found[1] + " ") + found[2], text)
    return _DASH.sub("-", unicodedata.normalize("NFKC", text).replace("⁄", "/").replace("−", "-"))


def _power(found: re.Match[str]) -> str:
    power = found[0].translate(_RAISED)
    return f"^{power}" if len(power) == 1 else f"^{{{power}}}"


def canonical(text: str) -> str:
    """The form in which answers are compared; "" for a text of punctuation alone."""
    plain = spelled_out(text).casefold()
    words = [(bare, word) for word in plain.split() if (bare := _bare(word))]
    # `A.` in "A. dog" is a letter; an answer of nothing but articles ("A", as in vitamin A) keeps them.
    kept = [bare for bare, word in words if not (bare in ARTICLES and word.endswith(bare))]
    return " ".join(numbers_as_digits(kept or [bare for bare, _ in words]))


def _bare(word: str) -> str:
    """`word` without punctuation at its ends, its sign and its mathematical symbols kept; digits without grouping."""
    start, end = 0, len(word)
    while start < end and not (_kept(word[start]) or _is_sign(word, start)):
        start += 1
    while end > start and not (_kept(word[end - 1]) or _is_charge(word[:end])):
        end -= 1
    bare = word[start:end]
    if bare.startswith((".", "-.")):
        bare = bare.replace(".", "0.", 1)
    return bare.replace(",", "") if _GROUPED_DIGITS.fullmatch(bare) else bare


def _kept(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character) in ("Sm", "Mn", "Mc")


def _is_charge(word: str) -> bool:
    """A sign right behind a letter: `Cl-`, `A-`, `C#`, `b♭`."""
    return word[-1] in "-#♭" and (word[-2:-1].isalnum() or word[-2:-1] == "^")


def _is_sign(word: str, at: int) -> bool:
    """A minus or a decimal point right before a digit."""
    following = word[at + 1 : at + 3]
    if word[at] == "-":
        return following[:1].isdigit() or (following[:1] == "." and following[1:].isdigit())
    return word[at] == "." and following[:1].isdigit()


def numbers_as_digits(words: Sequence[str]) -> list[str]:
    """Every run of number words as one number: `twenty-one`, `one hundred and five`; `two three` stays two numbers."""
    parts: list[str] = []
    for word in words:
        pieces = word.split("-")
        parts += pieces if len(pieces) > 1 and all(piece in NUMBER_WORDS for piece in pieces) else [word]
    out: list[str] = []
    at = 0
    while at < len(parts):
        if parts[at] not in NUMBER_WORDS:
            out.append(parts[at])
            at += 1
            continue
        value, at = _read_number(parts, at)
        out.append(str(value))
    return out


def _read_number(words: Sequence[str], at: int) -> tuple[int, int]:
    """The number whose words begin at `at`, and where they end."""
    total = group = 0
    floor = 10**12  # the next word must be worth less than what the last one left open
    scale = 10**12
    start = at
    while at < len(words):
        word = words[at]
        if word == "and" and at > start and words[at - 1] in ("hundred", *_SCALES) and at + 1 < len(words):
            follows = words[at + 1]
            if follows not in _UNITS and follows not in _TENS:
                break
            at += 1
            continue
        if word in _SCALES and _SCALES[word] < scale and (group or at == start):
            total, group, scale, floor = total + max(group, 1) * _SCALES[word], 0, _SCALES[word], 10**12
        elif word == "hundred" and group < 10 and (group or at == start):
            group, floor = max(group, 1) * 100, 100
        elif word in _TENS and floor > 10:
            group, floor = group + _TENS[word], 10
        elif word in _UNITS and (at == start or 0 < _UNITS[word] < floor):
            group, floor = group + _UNITS[word], 1
        else:
            break
        at += 1
    return total + group, at
