"""Which ids of a tokenizer steer a model, which end a text, which exist; and texts that cannot hold a control token.

A special token is *structural*, and then is never sampled within a text, dropped from what is read, and kept out of
what users write, when it is

1. one that the tokenizer names (BOS, EOS, padding, the image placeholder, …), or that the model's settings name;
2. one that the chat template writes: a turn marker;
3. one that vendors keep for the machine: between bars (`<|fim_prefix|>`, `<｜User｜>`), or called reserved, unused,
   placeholder, image, … (`RESERVED`).

All other special tokens are words of the model, and so is every one that marks a part of an answer, by its name
(`PARTS`: think, answer, …), unless the tokenizer names it, or the template writes it between bars.  People make
`<think>` a special token so that it is one id; it must stay samplable and readable, or no answer could have the form
that is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

RESERVED = frozenset(
    {
        *("reserved", "unused", "placeholder", "extra", "image", "img", "video", "audio", "vision", "patch", "fim"),
        *("turn", "s", "pad", "mask", "unk", "sep", "cls", "bos", "eos", "eot", "eod", "boi", "eoi"),
    }
)
"""Words in the names of tokens that no text has."""
PARTS = ("think", "thought", "reason", "reflect", "working", "answer", "solution", "conclusion", "summary", "caption")
"""Beginnings of words in the names of tokens that mark a part of an answer."""
_BARS = re.compile(r"[|｜]")
_WORD = re.compile(r"[a-z]+")


def control_tokens(tokenizer: Any, template: Any = None) -> dict[str, int]:
    """Text -> id of every structural token, by the rule above.

    Args:
        tokenizer: of transformers.
        template: the chat template, where it is the processor's; None: the tokenizer's own.
    """
    written = _text_of(getattr(tokenizer, "chat_template", None) if template is None else template)
    named = set(map(str, tokenizer.special_tokens_map.values()))
    listed = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    added = ((token.content, index) for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    special = {str(text): int(index) for text, index in (*listed, *added)}
    return {text: index for text, index in special.items() if text in named or _is_structural(text, written)}


def _is_structural(text: str, template: str) -> bool:
    """Whether a special token without a name is one."""
    words, barred, written = _WORD.findall(text.lower()), _BARS.search(text), bool(template) and text in template
    if any(word.startswith(PARTS) for word in words):
        return bool(barred and written)
    return bool(written or barred or RESERVED & set(words))


def _text_of(template: Any) -> str:
    """A chat template's source; of several under names, all."""
    if isinstance(template, Mapping):
        return "\n".join(map(str, template.values()))
    return "" if template is None else str(template)


def escape_control_tokens(text: str, tokenizer: Any, tokens: Iterable[str] | None = None) -> str:
    """Control tokens in a user's text lose their brackets: it can neither open an image slot nor end its turn.

    Again until none is left, because what stays of one may complete another (`<<image>>`); each pass shortens it.

    Args:
        text: the user's.
        tokenizer: whose control tokens they are.
        tokens: those, where they are known already: published tokenizers have up to 33 000.
    """
    known = tuple(control_tokens(tokenizer) if tokens is None else tokens)
    while held := [token for token in known if token in text]:
        for token in held:
            words = re.sub(r"\W", "", token)
            text = text.replace(token, words if len(words) < len(token) else "")
    return text


def ids_of(value: Any) -> list[int]:
    """Token ids as a configuration writes them: one, several, or none."""
    if value is None:
        return []
    if hasattr(value, "tolist"):  # a tensor, once transformers has prepared it
        value = value.tolist()
    return [int(i) for i in (value if isinstance(value, list | tuple) else [value]) if i is not None]


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """All ids that end a text: those of the generation configuration, of which a chat model lists several, and the
    tokenizer's own; empty where neither names one."""
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return frozenset([*ids_of(listed), *ids_of(tokenizer.eos_token_id)])


def never_sampled(model: Any, tokenizer: Any, control: Iterable[int], ends: Iterable[int], vocabulary: int) -> set[int]:
    """Ids of the text vocabulary that a text never holds: structural ones except its ends, rows of a padded vocabulary
    that have no token, and what the generation configuration suppresses.

    Args:
        model: for its generation configuration.
        tokenizer: for the tokens that there are.
        control: the structural ids.
        ends: ids that end a text.
        vocabulary: rows of the head.
    """
    suppressed = ids_of(getattr(getattr(model, "generation_config", None), "suppress_tokens", None))
    without_token = set(range(vocabulary)) - set(tokenizer.get_vocab().values())
    never = {*control, *without_token, *suppressed} - set(ends)
    return {index for index in never if 0 <= index < vocabulary}
