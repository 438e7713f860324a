"""What people put around an answer: `\boxed{B}`, `**B**`, `$B$`, `"B"`, `Answer: B`; taken off, layer by layer."""

from __future__ import annotations

import re

MOST_LAYERS = 8
_PAIRS = (
    *(("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("***", "***"), ("**", "**"), ("__", "__"), ("*", "*")),
    *(
        ("```", "```"),
        ("`", "`"),
        ('"', '"'),
        ("'", "'"),
        ("“", "”"),
        ("‘", "’"),
        ("「", "」"),
        ("『", "』"),
        ("《", "》"),
    ),
)
_COMMAND = re.compile(r"\\(?:boxed|fbox|text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox|emph)\s*\{")
_LEAD = re.compile(
    r"(?:(?:so|thus|therefore|hence)[ ,]{1,2})?(?:(?:my|the)\s)?(?:(?:final|correct|right|best)\s)?answer"
    r"(?:\sis\s?[:：]?|\s?[:：=])|(?:最终)?(?:正确)?答案(?:应该)?(?:是|为|选)?\s?[:：]?|(?:so|thus|therefore|hence),",
    re.IGNORECASE,
)


def undressed(text: str) -> str:
    """`text` without what is put around a whole answer; as it is where nothing is. Two answers stay two."""
    for _ in range(MOST_LAYERS):
        bare = _without_pair(_without_command(_without_lead(text.strip())))
        if bare == text:
            break
        text = bare
    return text


def _without_lead(text: str) -> str:
    found = _LEAD.match(text)
    if found is None or not (rest := text[found.end() :].strip()):
        return text
    return rest


def _without_command(text: str) -> str:
    """`x` of `\\boxed{x}`; only where the brace that opens there closes at the end."""
    found = _COMMAND.match(text)
    bare = text.rstrip(".。 ")
    if found is None or not bare.endswith("}") or closing_brace(bare, found.end() - 1) != len(bare) - 1:
        return text
    return bare[found.end() : -1]


def closing_brace(text: str, start: int) -> int:
    """Where the brace that opens at `start` closes; -1 where it does not."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return at
    return -1


def _without_pair(text: str) -> str:
    for shown in (text, text.rstrip(".。")):
        for left, right in _PAIRS:
            if len(shown) > len(left) + len(right) and shown.startswith(left) and shown.endswith(right):
                inner = shown[len(left) : -len(right)]
                if left[0] not in inner and right not in inner:
                    return inner
    return text
