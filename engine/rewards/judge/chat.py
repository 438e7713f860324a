"""A client for OpenAI-compatible `/chat/completions`: one request, one text back, or a `ChatError` that says why.

What goes over the network, and by what rules, is transport.py's. (The `openai` package was tried in its place: NOTES.md
has the numbers.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from ...errors import ChatError
from ..transport import Transport

Message = Mapping[str, Any]
"""`{"role": …, "content": text or list of parts}`, as the API has it."""


class ServerOptions(TypedDict, total=False):
    """What `ChatClient` takes beside address and model; its defaults and meanings are there."""

    api_key_env: str | None
    timeout: float
    retries: int
    backoff: float
    max_bytes: int
    max_tokens: int
    temperature: float
    allow_http: bool


class ChatClient:
    """`complete(messages) -> text`. Safe to call from many threads at once; every call has its own connection."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 1.0,
        max_bytes: int = 1 << 20,
        max_tokens: int = 512,
        temperature: float = 0.0,
        allow_http: bool = False,
    ) -> None:
        """
        Args:
            base_url: what stands before `/chat/completions`, e.g. `https://host/v1`.
            model: the model's name at that server.
            api_key_env: environment variable that holds the key; None sends none (a server of one's own).
            timeout: seconds for one try, from connecting to the last byte.
            retries: further tries after 429, 5xx, a timeout or a lost connection; nothing else is tried again.
            backoff: seconds before the first retry; doubles each time, times a random number in [.5, 1].
            max_bytes: of an answer; more is refused.
            max_tokens, temperature: as the API has them.
            allow_http: plain http to other hosts than this machine; pictures and key are then readable on the way.

        Raises:
            ValueError: an address, number or key that cannot work. The text never holds the key.
        """
        self.transport = Transport(
            "chat client",
            base_url,
            "/chat/completions",
            api_key_env=api_key_env,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            max_bytes=max_bytes,
            allow_http=allow_http,
        )
        self.host, self.retries, self.api_key_env = self.transport.host, retries, api_key_env
        self.model, self.max_tokens, self.temperature = model, max_tokens, temperature

    def __repr__(self) -> str:
        return f"ChatClient(host={self.host!r}, model={self.model!r}, api_key_env={self.api_key_env!r})"

    def complete(self, messages: Sequence[Message], *, deadline: float | None = None) -> str:
        """The text of the first choice.

        Args:
            messages: the conversation.
            deadline: on `time.monotonic()`; no try lasts longer and none begins after it.

        Raises:
            ChatError: no answer after all retries, one that is refused, or one that cannot be read.
        """
        content = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }
        deadline = float("inf") if deadline is None else deadline
        return _text_of(self.transport.post(json.dumps(content).encode(), deadline=deadline), self.host)


def _text_of(data: bytes, host: str) -> str:
    try:
        text = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise ChatError(f"{host}: the answer is no chat completion (no choices[0].message.content)", status=200)
    return text
