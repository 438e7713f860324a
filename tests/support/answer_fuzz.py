"""Answers that nobody wrote: rows of docs/answers.md cut, glued and bent, and noise of the signs in them."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from helpers import ROOT

from syncr1.engine.answers.letters import chosen_letter
from syncr1.engine.answers.same import same_answer

ROWS = re.findall(r"^\| [^|`]+ \| `([^|]+)` \| (?:`([^|]+)` \| )?", (ROOT / "docs" / "answers.md").read_text(), re.M)
WRITTEN = [text for row in ROWS for text in row if text]
_LATEX = r"\frac \sqrt \boxed{ \left( \right) \text{ \pi \infty \cup \pm ^{ _{ } { ( ) [ ] | , . ; : ! ? % $ ** + / ^ ="
_PLAIN = (
    "0 1 2 9 10 99999999999999999999 1e9 3.14 .5 1,000 x y e i sin log a the A B C D or and cm m² km/h ° 2024 Jan pm"
)
_OTHER = "一 二 十 百 万 亿 分之 点 负 百分之 个 年 月 日 答案 选 ² ⁻ ₂ ½ √ ∞ ± ∪ Ａ １ \u0301 \U0001f600 \ud800 \x00"
PIECES = [*_LATEX.split(), *_PLAIN.split(), *_OTHER.split(" "), "\u200b", "\n"]
OPTIONS = ("a cat", r"\frac{1}{2}", "2 cm", "x^2+1")


@dataclass(frozen=True, slots=True)
class Timed:
    """One answer, and how long it took to compare it with a truth and with options, in seconds."""

    said: str
    right: str
    seconds: float


def fuzzed(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """`count` pairs of an answer and a truth."""
    draw = random.Random(seed)
    for _ in range(count):
        yield _answer(draw), draw.choice(WRITTEN) if draw.random() < 0.7 else _answer(draw)


def _answer(draw: random.Random) -> str:
    kind = draw.randrange(4)
    if kind == 0:
        return draw.choice(("", " ")).join(draw.choices(PIECES, k=draw.randint(1, 30)))
    text = draw.choice(WRITTEN)
    if kind == 1:
        return text + draw.choice(("", " ", ", ", "^", "/", " or ")) + draw.choice(WRITTEN)
    at, length = draw.randrange(len(text) + 1), draw.randrange(4)
    if kind == 2:
        return text[:at] + "".join(draw.choices(PIECES, k=length)) + text[at + length :]
    return draw.choice(("**{}**", r"\boxed{{{}}}", "${}$", "Answer: {}", "({})", r"\sqrt{{{}}}", "{}!")).format(text)


def timed(pairs: Iterator[tuple[str, str]]) -> list[Timed]:
    """Each pair compared as open and as multiple choice; what is raised is raised."""
    found = []
    for said, right in pairs:
        start = time.thread_time()
        same_answer(said, right)
        middle = time.thread_time()
        chosen_letter(said, OPTIONS)
        found.append(Timed(said, right, max(middle - start, time.thread_time() - middle)))
    return found
