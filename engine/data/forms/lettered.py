"""Options that stand in the text of a question: a line each, or on one line, in Latin or full-width dress.

A. red          (A) red (B) blue          A.红色 B.蓝色          - **A)** red
B. blue                                   （A）红色（B）蓝色
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest

from ...answers.plain_texts import canonical
from ...errors import DataError, shown

LINE = re.compile(
    r"^[ \t]*(?:[-*•][ \t]+)?\*{0,2}[(（]?([A-ZＡ-Ｚ])\*{0,2}[.):．、）：]\*{0,2}[ \t\u3000]*(\S.*)$", re.MULTILINE
)
"""The caller strips white space at the end: a lazy star before it would take quadratic time."""
INLINE = re.compile(r"(?<![A-Za-z0-9])(?:([(（])([A-Za-z])[)）]|([A-ZＡ-Ｚ])([.．、:：)）]))")
"""A mark within a line: a letter in brackets, or a capital with a stop; letters inside of words are none."""
SEPARATORS = " \t\r\n\u3000;；,，|/"
"""What stands between two options and belongs to neither."""
BETWEEN = ("or", "and", "和", "或", "还是", "与")
"""Words between two marks that name no option: `panel (A) or (B)`."""
FULL_WIDTH = {ord("Ａ") + index: ord("A") + index for index in range(26)}


def options_in(problem: str) -> tuple[str, ...]:
    """The texts of the options that a question lists: the longest run of letters that begins with A.

    Lines come first; marks within lines count where they make the longer run, and then all are written alike.
    """
    lines = _longest((_latin(letter), text.rstrip()) for letter, text in LINE.findall(problem))
    return max(lines, *_inline(problem), key=len)


def shows_options(problem: str, options: Sequence[str], column: str) -> bool:
    """Whether a question lists the options of its row, each by its letter; one that lists others shows them not.

    Raises:
        DataError: it lists one of them by another letter, so that a letter would mean two things.
    """
    there, given = [list(map(_plain, texts)) for texts in (options_in(problem), options)]
    for at, (text, own) in enumerate(zip_longest(there, given)):
        if text is not None and text != own and text in given:
            other = given.index(text)
            raise DataError(
                f"column {column!r} has {shown(options[other])} as option {_letter(other)}, and the question lists it "
                f"as {_letter(at)}; write them in one order, or take the list out of the question"
            )
    # The last of a line may have the rest of the sentence behind it.
    pairs = zip(there, given, strict=False)
    return len(there) >= len(given) and all(text == own or text.startswith(f"{own} ") for text, own in pairs)


def says_options(problem: str, options: Sequence[str]) -> bool:
    """Whether a question names all its options in words of its own, without letters: `red or blue?`"""
    words = f" {canonical(problem)} "
    return not options_in(problem) and all(f" {_plain(option)} " in words for option in options)


def _plain(text: str) -> str:
    return canonical(text) or text.strip()


def _letter(index: int) -> str:
    return chr(ord("A") + index)


def with_options(problem: str, options: Sequence[str]) -> str:
    """`problem` with its options below, one `A. text` a line."""
    return "\n".join([problem, *(f"{chr(ord('A') + i)}. {text}" for i, text in enumerate(options))])


def _inline(problem: str) -> list[tuple[str, ...]]:
    """The longest run of each way to write marks."""
    styles: dict[str, list[re.Match[str]]] = {}
    for mark in INLINE.finditer(problem):
        letter = mark[2] or mark[3]
        style = f"{mark[1]}{'a' if letter.islower() else 'A'}" if mark[1] else mark[4]
        styles.setdefault(style, []).append(mark)
    return [_longest(_between(problem, marks)) for marks in styles.values()] or [()]


def _between(problem: str, marks: Sequence[re.Match[str]]) -> Iterable[tuple[str, str]]:
    """Letter and text of each mark: up to the next mark, or to the end of the line behind the last."""
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        letter = _latin(mark[2] or mark[3])
        end = following.start() if following is not None else len(problem)
        text = problem[mark.end() : end].strip(SEPARATORS)
        text = text.split("\n")[0].rstrip(SEPARATORS)
        yield letter, text if text not in BETWEEN and any(map(str.isalnum, text)) else ""


def _latin(letter: str) -> str:
    """A capital letter of ASCII."""
    return letter.upper() if letter.isascii() else letter.translate(FULL_WIDTH)


def _longest(marked: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    best: list[str] = []
    run: list[str] = []
    for letter, text in marked:
        if letter == "A":
            run = []
        if ord(letter) - ord("A") == len(run) and text:
            run.append(text)
            best = run if len(run) > len(best) else best
    return tuple(best) if len(best) > 1 else ()
