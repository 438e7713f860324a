"""Chats: OpenAI's and TRL's `messages`, LLaVA's `conversations`, typed parts, pictures that stand in parts.

A chat is one turn of the user, with or without a system message before it, and, where the data say what is right in
the chat itself, the assistant's reply behind it.

Sources: TRL's dataset formats, LLaVA's page on custom data, Qwen-VL's and OpenAI's message parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import DataError, shown
from ...pictures import PICTURE

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot"), "assistant"),
}
TEXT_PARTS = ("text", "input_text", "output_text")
PICTURE_PARTS = ("image", "image_url", "input_image")
PICTURE_KEYS = ("image", "image_url", "path", "url", "base64")
"""Where a part that stands for a picture holds it, if it does."""


@dataclass(frozen=True)
class Chat:
    """What a chat says; "" where it says nothing."""

    asked: str
    """System messages and the user's turn as one text."""
    reply: str
    """The assistant's turn behind it."""


def is_chat(value: Any) -> bool:
    """A list of turns, as against a text, a list of texts, or nothing."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def read_chat(value: Any, column: str) -> Chat:
    """The one question of a chat, and the reply to it.

    Raises:
        DataError: no chat, an unknown role or part, or more turns than one of the user and one reply behind it.
    """
    if not isinstance(value, list | tuple) or not all(isinstance(turn, Mapping) for turn in value):
        raise DataError(f"column {column!r} must be text or chat messages, got {shown(value)}")
    said: list[tuple[str, str]] = []
    for turn in value:
        role, text = _role(turn, column), _content(turn, column).strip()
        if text or role == "user":  # templates write an empty turn of the assistant last
            said.append((role, text))
    order = [role for role, _ in said if role != "system"]
    if order not in (["user"], ["user", "assistant"]):
        raise DataError(
            f"column {column!r} must hold one turn of the user and at most one answer behind it, got "
            f"{order.count('user')} turns and {order.count('assistant')} answers; put what was said before into that "
            "one turn, or give each question a row of its own"
        )
    asked = [text for wanted in ("system", "user") for role, text in said if role == wanted and text]
    return Chat("\n\n".join(asked), next((text for role, text in said if role == "assistant"), ""))


def reply_of(value: Any, column: str) -> str | None:
    """The assistant's reply in a chat, or a text that is one; None where there is none."""
    if is_chat(value):
        if all(_role(turn, column) == "assistant" for turn in value):  # TRL's `completion`
            return "\n\n".join(_content(turn, column).strip() for turn in value).strip() or None
        return read_chat(value, column).reply or None
    return value if isinstance(value, str) and value.strip() else None


def has_reply(value: Any) -> bool:
    """Whether a chat ends with something that the assistant says; what is wrong with it is said where it is read."""
    if not is_chat(value):
        return False
    last = value[-1]
    role = last.get("role", last.get("from"))
    known = ROLES.get(role.strip("<|>").lower()) if isinstance(role, str) else None
    return known == "assistant" and bool(last.get("content", last.get("value")))


def pictures_in(value: Any) -> list[Any]:
    """What the parts of a chat hold as pictures: paths, addresses, base64; parts that only stand for one hold none."""
    return [held for part in _parts(value) if (held := _held(part)) is not None]


def _parts(value: Any) -> Iterator[Mapping[str, Any]]:
    for turn in value if is_chat(value) else ():
        content = turn.get("content", turn.get("value"))
        for part in content if isinstance(content, list | tuple) else ():
            if isinstance(part, Mapping) and part.get("type") in PICTURE_PARTS:
                yield part


def _held(part: Mapping[str, Any]) -> Any:
    for key in PICTURE_KEYS:
        held = part.get(key)
        held = held.get("url") if isinstance(held, Mapping) and "url" in held else held
        if held:
            return held.removeprefix("file://") if isinstance(held, str) else held
    return None


def _role(turn: Mapping[str, Any], column: str) -> str:
    told = turn.get("role", turn.get("from"))
    role = ROLES.get(told.strip("<|>").lower()) if isinstance(told, str) else None
    if role is None:
        name = told if isinstance(told, str) else shown(told)
        raise DataError(f"column {column!r} has a message of role {name!r}; expected system, user or assistant")
    return role


def _content(turn: Mapping[str, Any], column: str) -> str:
    """A message's text: plain, or its typed parts; a part that stands for a picture becomes `<image>`."""
    value = turn.get("content", turn.get("value"))
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list | tuple):
        raise DataError(f"column {column!r} has a message whose content is {shown(value)}; expected text or parts")
    return "\n".join(_part(part, column) for part in value)


def _part(part: Any, column: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind in PICTURE_PARTS:
        return PICTURE
    raise DataError(f"column {column!r} has a part {shown(part)}; expected type 'text' or 'image'")
