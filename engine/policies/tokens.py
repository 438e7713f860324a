"""Control tokens of a tokenizer, and texts that cannot hold one."""

from __future__ import annotations

import re
from typing import Any


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Text -> id of every token that steers the model: the named special ones and the added ones marked special.

    A chat model's turn markers are often only the latter (`<|start_header_id|>` of Llama 3).
    """
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    added = ((token.content, index) for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    return {str(text): int(index) for text, index in (*named, *added)}


def escape_control_tokens(text: str, tokenizer: Any) -> str:
    """Control tokens in a user's text lose their brackets: it can neither open an image slot nor end its turn.

    Again until none is left, because what stays of one may complete another (`<<image>>`); each pass shortens it.
    """
    tokens = control_tokens(tokenizer)
    while any(token in text for token in tokens):
        for token in tokens:
            words = re.sub(r"\W", "", token)
            text = text.replace(token, words if len(words) < len(token) else "")
    return text
