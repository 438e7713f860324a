"""Dates and times of day, however they are written: `2024-01-05`, `January 5th, 2024`, `2024年1月5日`, `3:30 pm`.

`01/05/2024` is the fifth of January to some and the first of May to others: it equals only a date written with numbers
in the same order. `25/12/2024` can be read in one way.
"""

from __future__ import annotations

import re

_MONTHS = "january february march april may june july august september october november december".split()  # noqa: SIM905
_MONTH = {name[:length]: at for at, name in enumerate(_MONTHS, 1) for length in (3, len(name))} | {"sept": 9}
_NAME = "|".join(sorted(_MONTH, key=len, reverse=True))
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_YEAR = r"(?P<year>\d{4})"
_WEEKDAY = r"(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day,? )?"
_DATES = tuple(
    re.compile(_WEEKDAY + form)
    for form in (
        rf"{_YEAR}(?P<sep>[-/.])(?P<month>\d{{1,2}})(?P=sep)(?P<day>\d{{1,2}})",
        rf"{_YEAR}\s?年\s?(?P<month>\d{{1,2}})\s?月(?:\s?(?P<day>\d{{1,2}})\s?[日号])?",
        r"(?P<month>\d{1,2})\s?月\s?(?P<day>\d{1,2})\s?[日号]",
        rf"(?P<name>{_NAME})\.? {_DAY}(?:,? {_YEAR})?",
        rf"(?:the )?{_DAY} (?:of )?(?P<name>{_NAME})\.?(?:,? {_YEAR})?",
        rf"(?P<name>{_NAME})\.?,? {_YEAR}",
    )
)
_EITHER = re.compile(rf"(?P<first>\d{{1,2}})(?P<sep>[-/.])(?P<second>\d{{1,2}})(?P=sep){_YEAR}")
_TIME = re.compile(r"(\d{1,2})(?:[:.](\d{2}))?(?::(\d{2}))?\s?(am|pm|a\.m\.?|p\.m\.?|o'clock)?")
Moment = tuple[str, int, int, int]
"""`date` with year, month, day (0: not said), `either` with year and two numbers, `time` with hour, minute, second."""
LONGEST = 40


def moment_of(text: str) -> Moment | None:
    """The date or time that a text, undressed and spelled out, says; None where it says none."""
    text = " ".join(text.casefold().split()).strip(" .,")
    if len(text) > LONGEST:
        return None
    for form in _DATES:
        if found := form.fullmatch(text):
            said = found.groupdict()
            month = _MONTH[said["name"]] if said.get("name") else int(said["month"])
            return _date(int(said.get("year") or 0), month, int(said.get("day") or 0))
    if found := _EITHER.fullmatch(text):
        first, second, year = (int(found[name]) for name in ("first", "second", "year"))
        if first > 12 or second > 12 or first == second:
            return _date(year, min(first, second), max(first, second))
        return ("either", year, first, second)
    return _time(text)


def _date(year: int, month: int, day: int) -> Moment | None:
    return ("date", year, month, day) if 1 <= month <= 12 and 0 <= day <= 31 else None


def _time(text: str) -> Moment | None:
    found = _TIME.fullmatch(text)
    if found is None or not (found[4] or (found[2] and ":" in text)):
        return None
    hour, minute, second = (int(found[at] or 0) for at in (1, 2, 3))
    half = (found[4] or "")[:1]
    if half in ("a", "p"):
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + (12 if half == "p" else 0)
    return ("time", hour, minute, second) if hour < 24 and minute < 60 and second < 60 else None
