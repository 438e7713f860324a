"""Units behind a number, and what they are worth: `30 mm` is `3 cm`, `50 %` is `.5`.

A unit that one side leaves out is forgiven (`3` for `3 cm`); a single letter right behind the number may also be a
variable (`5m`), and then it is not. Of two units both must be of one kind.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Unit:
    """What a number counts."""

    kind: str
    worth: Fraction
    """In the kind's first unit."""
    loose: bool = True
    """Whether it is surely a unit, and may be left out."""


_METRE = "m metre metres meter meters 米"
_KINDS: dict[str, tuple[tuple[str, str], ...]] = {
    "percent": (("1/100", "% percent pct per-cent 个百分点"),),
    "length": (
        *(("1", _METRE), ("1/1000", "mm millimetre millimetres millimeter millimeters 毫米")),
        *(("1/100", "cm centimetre centimetres centimeter centimeters 厘米"), ("1/10", "dm decimetre decimeter 分米")),
        *(("1000", "km kilometre kilometres kilometer kilometers 千米 公里"), ("0.3048", "ft feet foot")),
        *(("0.0254", "in inch inches"), ("0.9144", "yd yard yards"), ("1609.344", "mi mile miles")),
    ),
    "mass": (
        *(
            ("1", "g gram grams 克"),
            ("1000", "kg kilogram kilograms 千克 公斤"),
            ("1/1000", "mg milligram milligrams 毫克"),
        ),
        *(("1000000", "t tonne tonnes 吨"), ("453.59237", "lb lbs pound pounds")),
    ),
    "time": (
        *(
            ("1", "s sec secs second seconds 秒"),
            ("60", "min mins minute minutes 分钟"),
            ("1/1000", "ms millisecond milliseconds"),
        ),
        *(("3600", "h hr hrs hour hours 小时"), ("86400", "day days 天")),
    ),
    "week": (("1", "week weeks 周 星期"),),
    "month": (("1", "month months 个月 月"),),
    "year": (("1", "year years yr yrs 年 岁"),),
    "area": (
        *(
            ("1", "m^2 sqm square-metres square-meters 平方米"),
            ("1/10000", "cm^2 square-centimetres square-centimeters 平方厘米"),
        ),
        *(("1/1000000", "mm^2 平方毫米"), ("1000000", "km^2 square-kilometres square-kilometers 平方千米 平方公里")),
        *(("0.09290304", "ft^2 square-feet"), ("10000", "ha hectare hectares 公顷")),
    ),
    "volume": (
        *(
            ("1", "m^3 cubic-metres cubic-meters 立方米"),
            ("1/1000000", "cm^3 mL ml millilitre millilitres milliliter milliliters cc 毫升 立方厘米"),
        ),
        *(("1/1000", "L l dm^3 litre litres liter liters 升"), ("0.028316846592", "ft^3 cubic-feet")),
    ),
    "speed": (("1", "m/s mps 米/秒"), ("5/18", "km/h kmh kph 千米/时 公里/小时"), ("0.44704", "mph")),
    "acceleration": (("1", "m/s^2"),),
    "angle": (("1", "° deg degree degrees 度"),),
    "celsius": (("1", "°C ℃ 摄氏度"),),
    "fahrenheit": (("1", "°F ℉"),),
    "kelvin": (("1", "K"),),
    "force": (("1", "N newton newtons 牛"),),
    "energy": (("1", "J joule joules 焦"), ("1000", "kJ"), ("3600000", "kWh")),
    "power": (("1", "W watt watts 瓦"), ("1000", "kW")),
    "voltage": (("1", "V volt volts 伏"),),
    "current": (("1", "A ampere amperes amp amps 安"),),
    "resistance": (("1", "Ω ohm ohms 欧"),),
    "pressure": (("1", "Pa pascal"), ("1000", "kPa")),
    "frequency": (("1", "Hz hertz"), ("1000", "kHz"), ("1000000", "MHz")),
    "amount": (("1", "mol mole moles 摩尔"),),
    "dollar": (("1", "$ USD dollar dollars 美元"), ("1/100", "¢ cent cents")),
    "euro": (("1", "€ EUR euro euros 欧元"),),
    "sterling": (("1", "£ GBP"),),
    "yuan": (("1", "¥ CNY RMB yuan 元 块 人民币"),),
    "rupee": (("1", "₹ INR rupee rupees"),),
    "count": (("1", "个 只 条 张 本 位 名 人 units unit square-units square-unit sq-units cubic-units 次 支 件"),),
}
UNITS = {
    name.replace("-", " "): Unit(kind, Fraction(worth))
    for kind, rows in _KINDS.items()
    for worth, names in rows
    for name in names.split()
}
_BY_FOLDED = {name.casefold(): unit for name, unit in UNITS.items() if len(name) > 3}
_LONGEST_FIRST = sorted(UNITS, key=len, reverse=True)
_AT_END = re.compile(
    r"(?<=[0-9})\]πi/. ])(\s?)(" + "|".join(map(re.escape, _LONGEST_FIRST)) + r")\.?$",
)
_AT_END_FOLDED = re.compile(
    r"(?<=[0-9})\] ])(\s?)(" + "|".join(re.escape(name) for name in _LONGEST_FIRST if len(name) > 3) + r")\.?$",
    re.IGNORECASE,
)
_SIGN_BEFORE = re.compile(r"(-?)\s?([$€£¥₹])\s?(?=[0-9.-])")


def split_unit(text: str) -> tuple[str, Unit | None]:
    """The number's text and its unit; the text alone where none is known to stand there."""
    if found := _SIGN_BEFORE.match(text):
        return found[1] + text[found.end() :], UNITS[found[2]]
    found = _AT_END.search(text) or _AT_END_FOLDED.search(text)
    if found is None:
        return text, None
    unit = UNITS.get(found[2]) or _BY_FOLDED[found[2].casefold()]
    glued = (
        len(found[2]) == 1
        and found[2].isascii()
        and found[2].isalpha()
        and not text[found.start() - 1 : found.start() + 1].count(" ")
    )
    number = text[: found.start()].strip()
    return number, Unit(unit.kind, unit.worth, not glued)
