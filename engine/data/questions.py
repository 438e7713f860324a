"""Questions as data sets write them: chat messages, lettered options, tagged answers; and the instruction to think.

Nothing here knows of rows or pictures. What cannot be used raises DataError, which names the column; the caller says
in which row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from ..answers.letters import true_letter
from ..errors import DataError, shown
from .forms.dialogue import read_chat
from .forms.solutions import final_answer

THINK_THEN_ANSWER = (
    "{question}\n\n"
    "Reason first, from the picture if there is one and from what you know about the world. Write the reasoning "
    "between <think> and </think>, and then {form} between <answer> and </answer>.\n"
    "Write nothing else. The form is exactly: <think> ... </think><answer> ... </answer>"
)
"""Default instruction: same meaning as that of the released CoRL data. `{form}` says what an answer looks like."""
LETTER_FORM = "the letter of the right option alone"
LETTERS_FORM = "the letters of all right options, separated by commas,"
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
    text = value if isinstance(value, str) else _asked(value, column)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"column {column!r} holds half of a surrogate pair ({error}); write it as UTF-8") from error
    if not text.strip():
        raise DataError(f"column {column!r} is empty; fill it or drop the row")
    return text.strip()


def _asked(value: Any, column: str) -> str:
    chat = read_chat(value, column)
    if chat.reply:
        raise DataError(
            f"column {column!r} must hold one turn of the user and no answer, got {shown(chat.reply)}; name the column "
            "'messages', whose last turn is what is right, or leave the answer out"
        )
    return chat.asked


def answer_of(value: Any, column: str) -> str:
    """A ground truth: text or a number, or a list of one; the last <answer>...</answer> of a text that has one; of a
    worked solution what it comes to.

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
        remedy = "write yes or no" if isinstance(value, bool) else "write what is right as text"
        raise DataError(f"column {column!r} must be one answer, text or a number, got {shown(value)}; {remedy}")
    ends = [found.end() for found in ANSWER_END.finditer(value)]
    # Each opening after the last end would be searched to the end of the text for nothing.
    tagged = ANSWER_TAG.findall(value[: ends[-1]]) if ends else []
    return final_answer(text_of(tagged[-1] if tagged else value, column), column)


def letter_of(answer: str, options: Sequence[str]) -> str | None:
    """The letter that a ground truth names, by the rules by which answers are scored: `B`, `b`, `(B)`, `B. text` or an
    option's text; None when it names no option, or a text that several have.

    Without options, any letter is taken.
    """
    return true_letter(answer, options)


def instructed(problem: str, qa_type: str, answer: str, instruction: str | None, *, several: bool = False) -> str:
    """`problem` within the instruction; as it is when it has one already (it says <think>), or for None.

    `several`: more than one answer is right; of options all must be chosen, of texts any will do.
    """
    if instruction is None or "<think>" in problem:
        return problem
    form = WORDS_FORM if len(answer.split()) <= MAX_WORDS else LONGER_FORM
    if qa_type == "MC":
        form = LETTERS_FORM if several else LETTER_FORM
    return instruction.replace("{form}", form).replace("{question}", problem)
