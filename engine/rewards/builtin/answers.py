"""Reading short answers: are two texts the same answer, and which letter does one choose?

Digits stand for number words, articles and outer punctuation do not count, and a mathematical sign does.
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
_BARE_LETTER = re.compile(r"[(\[]?([A-Za-z])[)\].:,]{0,2}")
_LETTER_AND_TEXT = re.compile(r"[(\[]?([A-Za-z])[)\].:,]{1,2}\s*(\S.*)", re.DOTALL)
"""Neither backtracks over more than a few characters."""


def same_answer(said: str, right: str) -> bool:
    """Equal but for case, width, outer punctuation, articles, and digits for number words; an empty text equals none.

    As `normalise`, save that mathematical signs stay: `-5` is not `5`, `.5` is not `5`, and `C++` is not `C`.
    """
    said, right = said.strip(), right.strip()
    if said and said.casefold() == right.casefold():
        return True
    plain = canonical(said)
    return bool(plain) and plain == canonical(right)


def canonical(text: str) -> str:
    """The form in which answers are compared; "" for a text of punctuation alone."""
    plain = unicodedata.normalize("NFKC", text).casefold().replace("−", "-")
    words = [(bare, word) for word in plain.split() if (bare := _bare(word))]
    # `A.` in "A. dog" is a letter; an answer of nothing but articles ("A", as in vitamin A) keeps them.
    kept = [bare for bare, word in words if not (bare in ARTICLES and word.endswith(bare))]
    return " ".join(_numbers_as_digits(kept or [bare for bare, _ in words]))


def _bare(word: str) -> str:
    """`word` without punctuation at its ends, its sign and its mathematical symbols kept; digits without grouping."""
    start, end = 0, len(word)
    while start < end and not (_kept(word[start]) or _is_sign(word, start)):
        start += 1
    while end > start and not _kept(word[end - 1]):
        end -= 1
    bare = word[start:end]
    if bare.startswith((".", "-.")):
        bare = bare.replace(".", "0.", 1)
    return bare.replace(",", "") if _GROUPED_DIGITS.fullmatch(bare) else bare


def _kept(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character) in ("Sm", "Mn", "Mc")


def _is_sign(word: str, at: int) -> bool:
    """A minus or a decimal point right before a digit."""
    following = word[at + 1 : at + 3]
    if word[at] == "-":
        return following[:1].isdigit() or (following[:1] == "." and following[1:].isdigit())
    return word[at] == "." and following[:1].isdigit()


def _numbers_as_digits(words: Sequence[str]) -> list[str]:
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


def true_letter(answer: str, options: Sequence[str]) -> str | None:
    """The ground truth's letter, upper case: `B`, `(B)`, `B.`, or an option's text; None for anything else."""
    found = _BARE_LETTER.fullmatch(answer)
    if found:
        letter = found[1].upper()
        return letter if not options or ord(letter) - ord("A") < len(options) else None
    return next(iter(_named(answer, options)), None)


def chosen_letter(said: str, options: Sequence[str], prefer: str | None = None) -> str | None:
    """The letter, upper case, that an answer names; None where it names none or contradicts itself.

    A letter (`B`, `b`, `(B)`, `B.`), an option's text, or both (`B. text`), read in this order: an option whose text is
    `A` is not meant by `A`. `B. text` with another option's text behind the letter names none, and neither does a list
    of letters.

    Args:
        said: what stands in the tags.
        options: the texts of A, B, C, …; empty: unknown, and any letter will do.
        prefer: taken where several options have the same text.
    """
    said = unicodedata.normalize("NFKC", said).strip()
    found = _BARE_LETTER.fullmatch(said)
    if found:
        return _known(found[1], options)
    named = _named(said, options)
    if named:
        return prefer if prefer in named else named[0]
    found = _LETTER_AND_TEXT.fullmatch(said)
    letter = _known(found[1], options) if found else None
    if not found or letter is None:
        return None
    rest = found[2]
    named = _named(rest, options)
    if named:
        return letter if letter in named else None
    other = _BARE_LETTER.fullmatch(rest) or _LETTER_AND_TEXT.fullmatch(rest)
    return None if other and _known(other[1], options) else letter


def _named(text: str, options: Sequence[str]) -> list[str]:
    """The letters of the options that have this text."""
    plain, folded = canonical(text), text.strip().casefold()
    return [
        _letter(index)
        for index, option in enumerate(options)
        if (folded and folded == option.strip().casefold()) or (plain and plain == canonical(option))
    ]


def _letter(index: int) -> str:
    return chr(ord("A") + index)


def _known(letter: str, options: Sequence[str]) -> str | None:
    letter = letter.upper()
    return letter if not options or ord(letter) - ord("A") < len(options) else None
