"""Requests to a server that a reward asks: bytes out, bytes back, or a `ChatError` that says why.

The server is not trusted: redirects are refused (they would carry the key to another host), an answer has a size limit,
and a deadline holds for the whole of it, not for each packet. The key is read from an environment variable right
before it is sent, and is in no attribute, log or error text. Standard library only; proxies are not used.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from ..errors import ChatError
from ..settings.rules import CHAT_ADDRESS, AddressForm, address_problem

logger = logging.getLogger(__name__)

MAX_WAIT = 30.0
"""Seconds between two tries, whatever a server asks for."""

_jitter = random.Random()  # its own generator: the global one belongs to the run's seed


def key_problem(variable: str) -> str:
    """What is wrong with the key in an environment variable, in words; "" where nothing is. Never the key."""
    key = os.environ.get(variable, "").strip()
    if not key:
        return f"expected a key in the environment variable {variable}, got nothing; put it there"
    if not (key.isascii() and key.isprintable()):  # http.client would quote it in its error
        return f"expected a key that a header can carry, got other characters in {variable}; copy it again"
    return ""


class Transport:
    """`post(body) -> bytes`. Safe to call from many threads at once; every call has its own connection."""

    def __init__(
        self,
        who: str,
        url: str,
        path: str = "",
        *,
        media: str = "application/json",
        api_key_env: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 1.0,
        max_bytes: int = 1 << 20,
        allow_http: bool = False,
        words: Callable[[bytes], str] = lambda data: data.decode("utf-8", "replace"),
        form: AddressForm = CHAT_ADDRESS,
    ) -> None:
        """
        Args:
            who: begins the texts of errors.
            url, path: where requests go; `path` is added to what the address has.
            media: the type of what is sent and asked for.
            api_key_env: environment variable that holds the key; None sends none (a server of one's own).
            timeout: seconds for one try, from connecting to the last byte.
            retries: further tries after 408, 429, 5xx, a timeout or a lost connection; nothing else is tried again.
            backoff: seconds before the first retry; doubles each time, times a random number in [.5, 1].
            max_bytes: of an answer; more is refused.
            allow_http: plain http to other hosts than this machine; pictures and key are then readable on the way.
            words: the text of an answer that is an error.
            form: what the address is of, for words about it.

        Raises:
            ValueError: an address, number or key that cannot work. The text never holds the key.
        """
        self.who = who
        if problem := address_problem(url, allow_http=allow_http, form=form):
            in_code = " (in code, on a network that you trust: allow_http=True)" if "plain http" in problem else ""
            raise ValueError(f"{who}: {problem}{in_code}")
        if not (timeout > 0 and retries >= 0 and backoff >= 0 and max_bytes > 0):
            raise ValueError(
                f"{who}: expected timeout > 0, retries >= 0, backoff >= 0 and max_bytes > 0, "
                f"got {timeout}, {retries}, {backoff} and {max_bytes}"
            )
        parts = urlsplit(url)
        self.host, self.port, self.is_https = parts.hostname or "", parts.port, parts.scheme == "https"
        self.path = (parts.path.rstrip("/") + path) if path else (parts.path or "/")
        self.media, self.api_key_env, self.words = media, api_key_env, words
        self.timeout, self.retries, self.backoff, self.max_bytes = timeout, retries, backoff, max_bytes
        self._key()  # a missing key is found before a run starts

    def post(self, body: bytes, *, deadline: float = float("inf")) -> bytes:
        """The body of the answer.

        Args:
            body: of the request.
            deadline: on `time.monotonic()`; no try lasts longer and none begins after it.

        Raises:
            ChatError: no answer after all retries, or one that is refused.
        """
        for attempt in range(self.retries + 1):
            left = deadline - time.monotonic()
            if left <= 0:
                raise ChatError(f"{self.host}: no time left for try {attempt + 1}")
            try:
                return self._post(body, min(self.timeout, left))
            except ChatError as error:
                wait = max(error.wait, self.backoff * 2**attempt * _jitter.uniform(0.5, 1.0))
                wait = min(wait, MAX_WAIT)
                if not error.again or attempt == self.retries or time.monotonic() + wait >= deadline:
                    raise
                logger.info("%s: try %d of %d failed (%s)", self.who, attempt + 1, self.retries + 1, error)
                time.sleep(wait)
        raise AssertionError("unreachable: the last try returns or raises")

    def _key(self) -> str | None:
        if self.api_key_env is None:
            return None
        if problem := key_problem(self.api_key_env):
            raise ValueError(f"{self.who}: {problem}")
        return os.environ[self.api_key_env].strip()

    def _post(self, body: bytes, seconds: float) -> bytes:
        """One try: the body of a 200 answer."""
        key = self._key()
        headers = {"Content-Type": self.media, "Accept": self.media, "Accept-Encoding": "identity"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        connection = self._connection(seconds)
        expired = threading.Event()
        # A socket's timeout counts from packet to packet, so a server that drips bytes would never time out.
        watchdog = threading.Timer(seconds, lambda: _hang_up(opened, expired))
        watchdog.daemon = True
        opened: list[socket.socket] = []  # the connection forgets its socket while an answer is still being read
        try:
            watchdog.start()
            connection.connect()
            opened.append(connection.sock)
            if expired.is_set():
                raise TimeoutError
            connection.request("POST", self.path, body, headers)
            response = connection.getresponse()
            status, after = response.status, response.getheader("Retry-After")
            data = response.read(self.max_bytes + 1)
            cut_off = len(data) <= self.max_bytes and response.length not in (None, 0)
        except (OSError, http.client.HTTPException) as error:
            raise self._failed(error, expired.is_set(), seconds) from None
        finally:
            watchdog.cancel()
            connection.close()
        if expired.is_set() or cut_off:
            raise self._failed(ConnectionError(), expired.is_set(), seconds)
        if status != 200:
            raise self._refused(status, after, data, key)
        if len(data) > self.max_bytes:
            raise ChatError(f"{self.host}: an answer above {self.max_bytes} bytes; refused", status=status)
        return data

    def _connection(self, seconds: float) -> http.client.HTTPConnection:
        if self.is_https:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(self.host, self.port, timeout=seconds, context=context)
        return http.client.HTTPConnection(self.host, self.port, timeout=seconds)

    def _failed(self, error: Exception, expired: bool, seconds: float) -> ChatError:
        if expired or isinstance(error, TimeoutError):
            return ChatError(f"{self.host}: no answer within {seconds:.3g} s", again=True)
        lost = isinstance(error, ConnectionError | http.client.IncompleteRead)
        said = f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""  # no host, no certificate
        return ChatError(f"{self.host}: {type(error).__name__}{said}", again=lost)

    def _refused(self, status: int, after: str | None, data: bytes, key: str | None) -> ChatError:
        if 300 <= status < 400:
            problem = f"HTTP {status}, a redirect; refused, give its target as the address"
            return ChatError(f"{self.host}: {problem}", status=status)
        said = " ".join(self.words(data[: self.max_bytes]).split())
        if key:
            said = said.replace(key, "***")
        again = status in (408, 429) or status >= 500
        wait = _seconds_of(after) if again else 0.0
        return ChatError(f"{self.host}: HTTP {status}: {said[:200]}", status=status, again=again, wait=wait)


def _hang_up(opened: list[socket.socket], expired: threading.Event) -> None:
    expired.set()
    for connected in opened:
        with contextlib.suppress(OSError):  # closed already
            connected.shutdown(socket.SHUT_RDWR)


def _seconds_of(retry_after: str | None) -> float:
    """`Retry-After` as seconds from now: a number or a date; 0 where it is neither."""
    if not retry_after:
        return 0.0
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return min(MAX_WAIT, max(0.0, float(retry_after)))
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return min(MAX_WAIT, max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time()))
    return 0.0
