"""Questions as data sets write them: chat messages, lettered options, tagged answers; and the instruction to think.

Nothing here knows of rows or pictures. What cannot be used raises DataError, which names the column; the caller says
in which row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..answers.letters import true_letter
from ..errors import DataError, shown

THINK_THEN_ANSWER = (
    "{question}\n\n"
    "Reason first, from the picture if there is one and from what you know about the world. Write the reasoning "
    "between <think> and </think>, and then {form} between <answer> and </answer>.\n"
    "Write nothing else. The form is exactly: <think> ... </think><answer> ... </answer>"
)
"""Default instruction: same meaning as that of the released CoRL data. `{form}` says what an answer looks like."""
LETTER_FORM = "the letter of the right option alone"
WORDS_FORM = "a short answer of one to three words"
LONGER_FORM = "a concise answer"
MAX_WORDS = 3

OPTION_LINE = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]+(\S.*)$", re.MULTILINE)
"""The caller strips white space at the end: a lazy star before it would take quadratic time."""
ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
ANSWER_END = re.compile("</answer>", re.IGNORECASE)


def text_of(value: Any, column: str) -> str:
    """A text that is not empty; messages of a chat become one text, a system message first.

    Raises:
        DataError: it is neither, or more than one turn of a user.
    """
    text = value if isinstance(value, str) else _messages(value, column)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"column {column!r} holds half of a surrogate pair ({error}); write it as UTF-8") from error
    if not text.strip():
        raise DataError(f"column {column!r} is empty; fill it or drop the row")
    return text.strip()


def _messages(value: Any, column: str) -> str:
    if not isinstance(value, list | tuple) or not all(isinstance(turn, Mapping) for turn in value):
        raise DataError(f"column {column!r} must be text or chat messages, got {shown(value)}")
    said: dict[str, list[str]] = {"system": [], "user": [], "assistant": []}
    for turn in value:
        told = turn.get("role")
        role = told.strip("<|>").lower() if isinstance(told, str) else shown(told)
        if role not in said:
            raise DataError(f"column {column!r} has a message of role {role!r}; expected system, user or assistant")
        said[role].append(_content(turn.get("content"), column))
    if len(said["user"]) != 1 or any(text.strip() for text in said["assistant"]):
        raise DataError(
            f"column {column!r} must hold one turn of the user and no answer, got {len(said['user'])} turns and "
            f"{len(said['assistant'])} answers; put what was said before into that one turn"
        )
    return "\n\n".join(text.strip() for text in (*said["system"], *said["user"]) if text.strip())


def _content(value: Any, column: str) -> str:
    """A message's text: plain, or its typed parts; a part that stands for a picture becomes `<image>`."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list | tuple):
        raise DataError(f"column {column!r} has a message whose content is {shown(value)}; expected text or parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image":
            texts.append("<image>")
        else:
            raise DataError(f"column {column!r} has a part {shown(part)}; expected type 'text' or 'image'")
    return "\n".join(texts)


def answer_of(value: Any, column: str) -> str:
    """A ground truth: text or a number, or a list of one; the last <answer>...</answer> of a text that has one.

    Raises:
        DataError: anything else, or an empty answer.
    """
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"column {column!r} must be one answer, text or a number, got {shown(value)}")
    ends = [found.end() for found in ANSWER_END.finditer(value)]
    # Each opening after the last end would be searched to the end of the text for nothing.
    tagged = ANSWER_TAG.findall(value[: ends[-1]]) if ends else []
    return text_of(tagged[-1] if tagged else value, column)


def options_in(problem: str) -> tuple[str, ...]:
    """The texts of the lines `A. text`, `B. text`, …: the longest run of letters that begins with A."""
    best: list[str] = []
    run: list[str] = []
    for letter, text in OPTION_LINE.findall(problem):
        if letter == "A":
            run = []
        if ord(letter) - ord("A") == len(run):
            run.append(text.rstrip(" \t"))
            best = run if len(run) > len(best) else best
    return tuple(best) if len(best) > 1 else ()


def with_options(problem: str, options: Sequence[str]) -> str:
    """`problem` with its options below, one `A. text` a line."""
    return "\n".join([problem, *(f"{chr(ord('A') + i)}. {text}" for i, text in enumerate(options))])


def letter_of(answer: str, options: Sequence[str]) -> str | None:
    """The letter that a ground truth names, by the rules by which answers are scored: `B`, `b`, `(B)`, `B. text` or an
    option's text; None when it names no option, or a text that several have.

    Without options, any letter is taken.
    """
    return true_letter(answer, options)


def option_of(answer: str, options: Sequence[str], column: str) -> str:
    """The text of the option that a ground truth names, by its letter or its text.

    Raises:
        DataError: it names none.
    """
    if answer in options:
        return answer
    letter = letter_of(answer, options)
    if letter is None:
        raise DataError(
            f"column {column!r}: the answer {answer!r} is not among the options {list(options)}; correct it"
        )
    return options[ord(letter) - ord("A")]


def instructed(problem: str, qa_type: str, answer: str, instruction: str | None) -> str:
    """`problem` within the instruction; as it is when it has one already (it says <think>), or for None."""
    if instruction is None or "<think>" in problem:
        return problem
    form = LETTER_FORM if qa_type == "MC" else WORDS_FORM if len(answer.split()) <= MAX_WORDS else LONGER_FORM
    return instruction.replace("{form}", form).replace("{question}", problem)
