"""Arguments of a checkpoint's chat template, as settings write them: `enable_thinking=false`, or a JSON object.

TRL's `chat_template_kwargs` is the same as a dictionary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from ..errors import shown

OURS = frozenset(
    {
        *("conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
        *("processor_kwargs", "return_assistant_tokens_mask", "sanitize_control_tokens"),
    }
)
"""What is not the template's, or is set by whoever asks."""


def arguments_of(items: Sequence[str]) -> dict[str, Any]:
    """The arguments by name; a value is YAML's, and a text where that would make a date of it.

    Raises:
        ValueError: says what is wrong with an item.
    """
    found: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if item.lstrip().startswith("{"):
            given = _loaded(item)
            if not isinstance(given, dict):
                raise ValueError(f"expected NAME=VALUE or a JSON object, got {shown(item)}; correct it")
        elif not equals:
            raise ValueError(f"expected NAME=VALUE, got {shown(item)}; write enable_thinking=false")
        else:
            given = {name.strip(): _loaded(value)}
        for key, content in given.items():
            if not (isinstance(key, str) and key.isidentifier()) or key in OURS:
                what = "one that is set here" if key in OURS else "none"
                raise ValueError(f"expected an argument's name, got {what}: {shown(str(key))}; leave it out")
            found[key] = content
    return found


def _loaded(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # a colon in a sentence, a date that there is not
        return text
    if isinstance(value, list | dict):  # a sentence with a colon is none, nor one behind a dash
        return value if text.lstrip()[0] in "[{" else text
    return value if value is None or isinstance(value, bool | int | float | str) else text


def template_kwargs_problems(c: Any) -> list[str]:
    try:
        arguments_of(c.chat_template_kwargs)
    except ValueError as error:
        return [f"chat_template_kwargs: {error}"]
    return []
