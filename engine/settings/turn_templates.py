"""How an image is asked for behind the policy's own text: the names of drawing turns, and templates of a user's own.

    none     no turn: the image follows the text, in the same answer
    sync_r1  "{prompt}. {info} {text}"     the request, what is said of the concept, and the text
    t2i_r1   "{prompt}. {text}"            the request and the text

Sources: Sync-R1's released `grpo.py` (its condition is the request or "A photo of <c>.", then `info`, then the text);
T2I-R1's `{prompt}. {answer}`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from string import Formatter
from typing import Any

NONE = "none"
TEMPLATES = {"sync_r1": "{prompt}. {info} {text}", "t2i_r1": "{prompt}. {text}"}
FIELDS = ("prompt", "text", "info", "concept")
ENDS = (".", "!", "?", "…", ":", ";", ",", "。", "！", "？")
"""What a full stop of the template does not follow: it would be doubled."""
_BRACES = "write {{ and }} for braces that are text"


def template_of(drawing_turn: str) -> str | None:
    """The template that a setting stands for; None: there is no drawing turn."""
    return None if drawing_turn == NONE else TEMPLATES.get(drawing_turn, drawing_turn)


def template_problem(drawing_turn: str) -> str:
    """What is wrong with a setting, in words: what was expected, what came, the remedy; "" where nothing is."""
    template = template_of(drawing_turn)
    if template is None:
        return ""
    fields = " ".join(f"{{{name}}}" for name in FIELDS)
    names = ", ".join((NONE, *TEMPLATES))
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        return f"expected a template with {fields}, got {drawing_turn!r} ({error}); close every brace, or {_BRACES}"
    found = [(field, spec, conversion) for _, field, spec, conversion in parts if field is not None]
    for field, spec, conversion in found:
        if field not in FIELDS or spec or conversion:
            written = f"{field}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}"
            return f"expected {fields} in the template, got {{{written}}} in {drawing_turn!r}; take one, or {_BRACES}"
    if not found:
        return f"expected {names}, or a template with {fields}, got {drawing_turn!r}; correct the name, or add a field"
    return ""


def filled(template: str, values: Mapping[str, str]) -> str:
    """A template's words, its fields given their values, whose braces mean nothing.

    Of a field that is empty nothing stays, neither a space nor a full stop; a full stop behind a value that ends a
    sentence already is left out.
    """
    words = ""
    for literal, field, _, _ in Formatter().parse(template):
        if literal.startswith(".") and (not words.strip() or words.rstrip().endswith(ENDS)):
            literal = literal[1:]
        if not words or words.endswith((" ", "\n")):
            literal = literal.lstrip(" ")
        words += literal + values.get(field or "", "").strip()
    return re.sub(r"[ \t]+$", "", words).strip()


def drawing_problems(c: Any) -> list[str]:
    problem = "" if c.drawing_turn is None else template_problem(c.drawing_turn)
    return [f"drawing_turn: {problem}"] if problem else []
