"""Which option does an answer choose? By its letter in any dress, by its text, or by both.

`B`, `(B)`, `**B**`, `\boxed{B}`, `Answer: B`, `option B`, `选B`, `B. text` and an option's text are B. A letter with
the text of another option, two letters, or a letter and another one behind it are none: two answers at once never earn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from .dress import undressed
from .plain_texts import canonical, spelled_out
from .same import same_answer

_LETTER = re.compile(r"[(\[【]?\s?([A-Za-z])\s?[)\]】.:,、。!]{0,3}")
_LETTER_AND_TEXT = re.compile(
    r"[(\[【]?([A-Za-z])(?:[)\]】.:,、。]{1,3}\s*|\s[-–—]\s|\s(?=because\s|since\s))(\S.*)", re.DOTALL
)
_TEXT_IN_BRACKETS = re.compile(r"([A-Z])\s?[(\[](.*)[)\]]", re.DOTALL)
_LETTER_BEHIND_TEXT = re.compile(r"(.*\S)(?:\s?[(\[]|,\s)([A-Z])[)\]]?", re.DOTALL)
_LETTER_BESIDE_TEXT = re.compile(r"([A-Z])\s+(\S.*)", re.DOTALL)
"""None backtracks over more than a few characters."""
_LEAD = re.compile(
    r"(?:it\sis\s|it's\s|i\s(?:choose|pick|select|think)\s)?(?:the\s)?(?:(?:correct|right)\s)?(?:option|choice|letter)\s?(?:is\s)?[:：]?\s?"
    r"|it(?:\sis|'s)\s|i\s(?:choose|pick|select|think)\s|(?:choose|pick|select)\s|(?:故|因此|所以|应|应该)?(?:我?选择?项?)\s?[:：]?\s?|选项\s?",
    re.IGNORECASE,
)
_TRAIL = re.compile(
    r"\s?(?:is\s(?:the\s)?(?:correct|right)(?:\s(?:answer|option|choice|one))?|选项|项|正确|是正确的|对)[.。]?$",
    re.IGNORECASE,
)
_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox|emph|boxed)\s*\{([^{}]*)\}")
_OTHER_LETTER = re.compile(r"(?<![\w'’])([A-Z])(?![\w'’])")
_JOINING = re.compile(r"(?<!\w)(?:or|and|both|also|maybe|perhaps|either)(?!\w)|[&/,]|[或和]")
LONGEST = 2000
"""Characters; a longer text names no option."""


def true_letter(answer: str, options: Sequence[str]) -> str | None:
    """The ground truth's letter, upper case: of whatever `chosen_letter` understands, save that what stands behind a
    letter must be that option's text. None where it names no option, or a text that two have: which is not said."""
    letter = chosen_letter(answer, options)
    if letter is None or _lettered(answer.strip(), options) or _lettered(plain := bare_choice(answer), options):
        return letter
    if named := _named(plain, options):
        return letter if len(named) < 2 else None
    found = _LETTER_AND_TEXT.fullmatch(plain)
    return letter if found is None or letter in _named(found[2], options) else None


def chosen_letter(said: str, options: Sequence[str], prefer: str | None = None) -> str | None:
    """The letter, upper case, that an answer names; None where it names none or contradicts itself.

    A letter, an option's text, or both, read in this order: an option whose text is `A` is not meant by `A`; a small
    letter that is an option's text is that text. `B. text` with another option's text behind the letter names none,
    and neither does a list of letters.

    Args:
        said: what stands in the tags.
        options: the texts of A, B, C, …; empty: unknown, and any letter will do.
        prefer: taken where several options have the same text.
    """
    if len(said) > LONGEST:
        return None
    if letter := _lettered(said.strip(), options) or _lettered(said := bare_choice(said), options):
        return letter
    if _LETTER.fullmatch(said) and not _named(said, options):
        return None
    if _contradicts(said, options):
        return None
    if named := _named(said, options):
        if not all(
            same_answer(options[ord(other) - ord("A")], options[ord(named[0]) - ord("A")]) for other in named[1:]
        ):
            return None  # `5` of `5 cm` and `5 m`
        return prefer if prefer in named else named[0]
    found = _LETTER_AND_TEXT.fullmatch(said)
    if found is not None and (letter := _known(found[1], options)):
        return letter if _agrees(letter, found[2], options) else None
    for letter, text in _sides(said, options):
        if letter in _named(text, options):
            return letter
    return None


def _sides(said: str, options: Sequence[str]) -> list[tuple[str, str]]:
    """A letter and a text beside it: `B a dog`, `B (a dog)`, `a dog (B)`, `a dog, B`."""
    found = [form.fullmatch(said) for form in (_LETTER_BESIDE_TEXT, _TEXT_IN_BRACKETS)]
    sides = [(match[1], match[2]) for match in found if match]
    if behind := _LETTER_BEHIND_TEXT.fullmatch(said):
        sides.append((behind[2], behind[1]))
    return [(letter, text) for letter, text in sides if _known(letter, options)]


def _contradicts(said: str, options: Sequence[str]) -> bool:
    """`A (a dog)`, which without its brackets is a dog: a letter beside the text of another option."""
    if (found := _TEXT_IN_BRACKETS.fullmatch(said)) is None or _known(found[1], options) is None:
        return False
    return bool(named := _named(found[2], options)) and found[1] not in named


def bare_choice(said: str) -> str:
    """`said` without dress, emphasis and what leads to a letter or follows it."""
    text = said.strip()
    for _ in range(3):
        text = undressed(_COMMAND.sub(r"\1", spelled_out(text)).replace("**", "").replace("`", ""))
    bare = _TRAIL.sub("", text)
    lead = _LEAD.match(bare)
    bare = bare[lead.end() :] if lead else bare
    bare = undressed(bare)
    # `option B` is a letter; an option whose text begins so is not cut.
    return bare if _LETTER.fullmatch(bare) or _LETTER_AND_TEXT.fullmatch(bare) else text


def _lettered(said: str, options: Sequence[str]) -> str | None:
    """The letter of a text that is a letter alone."""
    found = _LETTER.fullmatch(said)
    if found is None or (found[1] == said and said.islower() and said in options):
        return None
    return _known(found[1], options)


def _agrees(letter: str, rest: str, options: Sequence[str]) -> bool:
    """Whether what stands behind a letter names no other option."""
    if named := _named(rest, options):
        return letter in named
    others = [other for other in _OTHER_LETTER.findall(rest) if other != letter and _known(other, options)]
    if others or ((bare := _LETTER.fullmatch(rest)) and _known(bare[1], options) not in (None, letter)):
        return False
    if (inner := _LETTER_AND_TEXT.fullmatch(rest)) and _known(inner[1], options) not in (None, letter):
        return False
    if not _JOINING.search(rest):
        return True
    padded, own = f" {canonical(rest)} ", canonical(options[ord(letter) - ord("A")]) if options else ""
    without_own = padded.replace(f" {own} ", " ") if own else padded
    return not any((plain := canonical(option)) and f" {plain} " in without_own for option in options if option)


def _named(text: str, options: Sequence[str]) -> list[str]:
    """The letters of the options that have this text: to the letter, else in normal form, else by what they say."""
    plain, folded = canonical(text), text.strip().casefold()
    tiers: tuple[Callable[[str], bool], ...] = (
        lambda option: bool(folded) and folded == option.strip().casefold(),
        lambda option: bool(plain) and plain == canonical(option) and same_answer(text, option),
        lambda option: same_answer(text, option),
    )
    for tier in tiers:
        if letters := [chr(ord("A") + index) for index, option in enumerate(options) if tier(option)]:
            return letters
    return []


def _known(letter: str, options: Sequence[str]) -> str | None:
    letter = letter.upper()
    return letter if not options or ord(letter) - ord("A") < len(options) else None
