"""What errors say about what people, models and disks hand in: never longer than a page, and fit for any terminal."""

from __future__ import annotations

MOST_CHARACTERS = 8_000
"""Of a message. It names the place first and the remedy last, so what is left out is in between."""
TAIL = 2_000


class Refused(ValueError):
    """Something that was handed in cannot be used; the message says what was expected, what came, and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(message: str) -> str:
    """`message` without halves of surrogate pairs, which no terminal takes, and without the middle of a long one."""
    message = message.encode("utf-8", "backslashreplace").decode()
    if len(message) <= MOST_CHARACTERS:
        return message
    mark = " … "
    return message[: MOST_CHARACTERS - TAIL - len(mark)] + mark + message[-TAIL:]


def shown(value: object, longest: int = 80) -> str:
    """`repr(value)`, cut at `longest`; also of what Python has no repr for: deep lists, integers of 4300 digits."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        text = f"{type(value).__name__} that is too deep or too long to show"
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
