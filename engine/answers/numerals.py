"""Chinese numerals: `十二` is 12, `三分之一` 1/3, `百分之五十` 50 %, `负三点一四` -3.14. Anything else is no number."""

from __future__ import annotations

import re
from fractions import Fraction

_DIGITS = {
    character: value
    for value, row in enumerate(("零〇", "一壹", "二贰两", "三叁", "四肆", "五伍", "六陆"))
    for character in row
} | {"七": 7, "柒": 7, "八": 8, "捌": 8, "九": 9, "玖": 9}
_PLACES = {"十": 10, "拾": 10, "百": 100, "佰": 100, "千": 1000, "仟": 1000}
_MYRIADS = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
CHARACTERS = "".join([*_DIGITS, *_PLACES, *_MYRIADS])
LONGEST = 30
"""Characters; a longer run is no number."""
_RUN = re.compile(f"(?:百分之|负)?(?:负|百分之)?[{CHARACTERS}]+(?:点[{CHARACTERS}]+)?(?:分之[{CHARACTERS}]+)?")


def with_digits(text: str) -> str:
    """`text` with digits for the numeral that it begins with, where nothing but a unit can follow; else as it is."""
    found = _RUN.match(text)
    return text if found is None or (said := _spelled(found[0])) is None else said + text[found.end() :]


def _spelled(run: str) -> str | None:
    if len(run) > LONGEST:
        return None
    percent, run = "百分之" in run, run.replace("百分之", "", 1)
    sign, run = ("-" if "负" in run else ""), run.replace("负", "", 1)
    below, has_parts, above = run.partition("分之")
    value, low = _decimal(above if has_parts else below), _decimal(below) if has_parts else Fraction(1)
    if value is None or not low:
        return None
    value /= low
    written = str(value) if value.denominator == 1 else f"{value.numerator}/{value.denominator}"
    return sign + written + ("%" if percent else "")


def _decimal(run: str) -> Fraction | None:
    whole, has_point, behind = run.partition("点")
    value = _integer(whole)
    if value is None or (has_point and not all(character in _DIGITS for character in behind)):
        return None
    return Fraction(value) + sum(Fraction(_DIGITS[c], 10 ** (i + 1)) for i, c in enumerate(behind))


def _integer(run: str) -> int | None:
    if run and all(character in _DIGITS for character in run):
        return int("".join(str(_DIGITS[character]) for character in run))  # 二〇二四
    total = part = digit = 0
    place = 10**4
    for at, character in enumerate(run):
        if character in _DIGITS:
            if digit:
                return None
            digit = _DIGITS[character]
        elif character in _PLACES:
            if _PLACES[character] >= place or not (digit or (at == 0 and _PLACES[character] == 10) or part):
                return None
            place = _PLACES[character]
            part, digit = part + (digit or 1) * place, 0
        else:
            if not (total or part or digit):
                return None
            total, part, digit, place = (total + part + digit) * _MYRIADS[character], 0, 0, 10**4
    return total + part + digit if run else None
