"""What a checkpoint's chat template makes of turns: the opening of a conversation, and a turn within it.

A template may write a preamble (a system prompt, today's date) before the first turn. It stands there once: a later
turn is what the template adds for it behind an answer, not what it would make of that turn alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..errors import ConfigError, DataError
from ..pictures import PICTURE
from ..records import Prompt

ANSWER = "xyzzyanswer"
"""Stands for the policy's answer where a later turn is rendered; a word that no template writes."""

PLACE = re.compile(rf"(?:\n[ \t]*)?{PICTURE}(?:[ \t]*\n)?")


def text_part(words: str) -> list[dict[str, str]]:
    """A turn's content that is words alone, as processors' templates read it."""
    return [{"type": "text", "text": words}]


def user_turn(words: str, *, shows_image: bool) -> dict[str, Any]:
    """A user's turn for a processor's template, an image before the words if there is one."""
    shown = [{"type": "image"}] if shows_image else []
    return {"role": "user", "content": [*shown, *text_part(words)]}


def pieces_of(prompt: Prompt) -> list[str | None]:
    """What a prompt says, in order: words, and None where a picture goes.

    Words stay as they are, but for white space before the first and the ends of lines beside a picture: templates and
    tokens of pictures separate them.

    Raises:
        DataError: it shows another number of pictures than it has places for.
    """
    if not prompt.images:
        return [prompt.text]
    words, *behind = PLACE.split(prompt.text)
    if not behind and len(prompt.images) == 1:
        return [None, words]
    if len(behind) != len(prompt.images):
        raise DataError(
            f"prompt {prompt.id}: expected as many signs {PICTURE} in the text as pictures, got {len(behind)} and "
            f"{len(prompt.images)}; write one where each picture goes"
        )
    pieces: list[str | None] = []
    for part in (words, *behind):
        part = part if any(pieces) else part.lstrip()
        pieces += [part, None] if part.strip() else [None]
    return pieces[:-1]


def opening_turn(prompt: Prompt, escape: Callable[[str], str]) -> dict[str, Any]:
    """A prompt's turn for a processor's template, pictures in their places; `escape` is what is done to words."""
    parts: list[dict[str, str]] = []
    for piece in pieces_of(prompt):
        parts += [{"type": "image"}] if piece is None else text_part(escape(piece))
    return {"role": "user", "content": parts}


def follow_up_of(prompt: Prompt) -> str:
    """The question about the image that was drawn; DataError where the prompt has none."""
    if prompt.follow_up is None:
        raise DataError(
            f"prompt {prompt.id}: expected a follow_up question before text after the image, got none; add one"
        )
    return prompt.follow_up


def render(owner: Any, turns: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any], *, opens: bool = True) -> str:
    """A conversation as text.

    Args:
        owner: a processor or tokenizer of transformers with a chat template.
        turns: role and content of each.
        arguments: of the template, beside them.
        opens: the answer that comes next.

    Raises:
        ConfigError: there is no template, or it fails.
    """
    try:
        text = owner.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=opens, **arguments)
    except Exception as error:  # a template is a program, which may raise whatever it wants to
        if getattr(owner, "chat_template", None) is None:
            raise ConfigError(
                f"expected a chat template for answers, got a {type(owner).__name__} without; set it in the checkpoint"
            ) from error
        raise ConfigError(
            f"the checkpoint's chat template fails ({type(error).__name__}: {error}); correct its chat_template, or "
            "give it what it asks for with --chat_template_kwargs NAME=VALUE"
        ) from error
    return str(text)


def later_turn(
    owner: Any,
    content_of: Callable[[str], Any],
    turn: Mapping[str, Any],
    arguments: Mapping[str, Any],
    ends: Iterable[str],
) -> str:
    """A user's turn behind an answer, and the opening of the next answer.

    Args:
        owner, arguments: as in `render`.
        content_of: a text to a turn's content, in the form that the template reads.
        turn: the user's.
        ends: texts of the tokens that end an answer; the one that the template puts there was sampled, and is left out.
    """
    before = [{"role": "user", "content": content_of("a")}, {"role": "assistant", "content": content_of(ANSWER)}]
    whole = render(owner, [*before, turn], arguments)
    _, found, behind = whole.partition(ANSWER)
    if not found:  # a template that does not write answers down
        return render(owner, [turn], arguments)
    for end in sorted(ends, key=len, reverse=True):
        if end and behind.lstrip().startswith(end):
            return behind.lstrip().removeprefix(end)
    return behind
