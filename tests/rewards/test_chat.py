"""The chat client against a real server on this machine: retries, limits, refusals, and a key that never shows."""

from __future__ import annotations

import email.utils
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from syncr1.engine.errors import ChatError
from syncr1.engine.rewards.judge.chat import ChatClient

KEY = "sk-secret-0123456789"
MESSAGES = [{"role": "user", "content": "hello"}]

Reply = Callable[[BaseHTTPRequestHandler], None]


def completion(text: str) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def send(body: bytes, status: int = 200, **headers: str) -> Reply:
    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def good(text: str = "hi") -> Reply:
    return send(completion(text))


class Server:
    """Answers request i with `replies[i]`, the last one for good; keeps what it was sent."""

    def __init__(self) -> None:
        self.replies: list[Reply] = [good()]
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.release = threading.Event()
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with lock:
                    number = len(server.requests)
                    server.requests.append((self.path, dict(self.headers), json.loads(body)))
                try:
                    server.replies[min(number, len(server.replies) - 1)](self)
                except OSError:  # the client hung up, as some tests want it to
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1/"

    def hang(self, _: BaseHTTPRequestHandler) -> None:
        self.release.wait(20)

    def drip(self, handler: BaseHTTPRequestHandler) -> None:
        """A byte every 20 ms for longer than any test waits: no single read takes long."""
        handler.send_response(200)
        handler.end_headers()
        end = time.monotonic() + 10
        while not self.release.wait(0.02) and time.monotonic() < end:
            handler.wfile.write(b" ")
            handler.wfile.flush()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.release.set()
    server.http.shutdown()
    server.http.server_close()


def client(server: Server, **settings: Any) -> ChatClient:
    return ChatClient(server.url, "judge-1", **{"backoff": 0.01, "timeout": 5.0, **settings})


def test_what_is_sent_and_what_comes_back(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY + "\n")
    server.replies = [good("two, née 二")]
    assert client(server, api_key_env="JUDGE_KEY", max_tokens=7).complete(MESSAGES) == "two, née 二"
    [(path, headers, body)] = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body == {"model": "judge-1", "messages": MESSAGES, "max_tokens": 7, "temperature": 0.0}


def test_without_a_key_none_is_sent(server: Server) -> None:
    client(server).complete(MESSAGES)
    assert "Authorization" not in server.requests[0][1]


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_busy_and_broken_servers_are_asked_again(server: Server, status: int) -> None:
    server.replies = [send(b"{}", status), send(b"", status), good()]
    assert client(server).complete(MESSAGES) == "hi"
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_other_refusals_are_final(server: Server, status: int) -> None:
    server.replies = [send(b'{"error": "no such model"}', status), good()]
    with pytest.raises(ChatError, match=rf"HTTP {status}.*no such model") as caught:
        client(server).complete(MESSAGES)
    assert caught.value.status == status and caught.value.permanent
    assert len(server.requests) == 1


def test_retries_end(server: Server) -> None:
    server.replies = [send(b"busy", 503)]
    with pytest.raises(ChatError, match="HTTP 503: busy") as caught:
        client(server, retries=2).complete(MESSAGES)
    assert len(server.requests) == 3 and not caught.value.permanent


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_waited_for(server: Server, as_date: bool) -> None:
    start = time.monotonic()
    after = email.utils.formatdate(time.time() + 2, usegmt=True) if as_date else "0.3"
    server.replies = [send(b"", 429, Retry_After=after), good()]
    assert client(server).complete(MESSAGES) == "hi"
    assert time.monotonic() - start >= 0.3


def test_a_long_retry_after_does_not_outlast_the_deadline(server: Server) -> None:
    server.replies = [send(b"", 429, Retry_After="9999"), good()]
    with pytest.raises(ChatError, match="HTTP 429"):
        client(server).complete(MESSAGES, deadline=time.monotonic() + 5)
    assert len(server.requests) == 1


def test_after_the_deadline_nothing_is_sent(server: Server) -> None:
    with pytest.raises(ChatError, match="no time left"):
        client(server).complete(MESSAGES, deadline=time.monotonic() - 1)
    assert server.requests == []


@pytest.mark.parametrize("behaviour", ["hang", "drip"])
def test_a_server_that_never_finishes_is_left(server: Server, behaviour: str) -> None:
    server.replies = [getattr(server, behaviour)]
    start = time.monotonic()
    with pytest.raises(ChatError, match=r"no answer within 0\.2 s"):
        client(server, timeout=0.2, retries=1).complete(MESSAGES)
    assert time.monotonic() - start < 5.0, "the timeout is for the whole answer, not for each byte"
    assert len(server.requests) == 2


def test_an_answer_after_a_hang_counts(server: Server) -> None:
    server.replies = [server.hang, good()]
    assert client(server, timeout=0.3).complete(MESSAGES) == "hi"


@pytest.mark.parametrize("declared", [True, False])
def test_an_oversized_answer_is_refused(server: Server, declared: bool) -> None:
    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not server.release.is_set():
            handler.wfile.write(b"x" * 65536)

    server.replies = [send(completion("x" * 5000)) if declared else endless]
    with pytest.raises(ChatError, match="above 4000 bytes"):
        client(server, max_bytes=4000).complete(MESSAGES)
    assert len(server.requests) == 1


def test_an_answer_of_just_the_limit_is_taken(server: Server) -> None:
    assert client(server, max_bytes=len(completion("hi"))).complete(MESSAGES) == "hi"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"no", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": 1}}]}', b"[" * 9999],
)
def test_what_is_no_completion_is_refused(server: Server, body: bytes) -> None:
    server.replies = [send(body)]
    with pytest.raises(ChatError, match="no chat completion"):
        client(server).complete(MESSAGES)
    assert len(server.requests) == 1


def test_a_connection_lost_halfway_is_tried_again(server: Server) -> None:
    server.replies = [send(completion("x"), Content_Length="500"), good()]
    assert client(server).complete(MESSAGES) == "hi"


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_refused(server: Server, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    elsewhere = Server()
    try:
        server.replies = [send(b"", status, Location=elsewhere.url + "chat/completions")]
        with pytest.raises(ChatError, match="redirect; refused") as caught:
            client(server, api_key_env="JUDGE_KEY").complete(MESSAGES)
        assert caught.value.permanent and elsewhere.requests == [] and len(server.requests) == 1
    finally:
        elsewhere.http.shutdown()
        elsewhere.http.server_close()


def test_a_server_without_tls_is_no_https_server(server: Server) -> None:
    with pytest.raises(ChatError, match="SSL") as caught:
        ChatClient(server.url.replace("http://", "https://"), "m", retries=3, backoff=0.01).complete(MESSAGES)
    assert not caught.value.again and server.requests == []


def test_nobody_listening(server: Server) -> None:
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(ChatError, match="ConnectionRefusedError"):
        client(server, retries=1).complete(MESSAGES)


def test_the_key_shows_nowhere(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    echo = f'{{"error": "Incorrect API key provided: {KEY}"}}'.encode()
    server.replies = [send(echo, 500), send(echo, 401)]
    judge = client(server, api_key_env="JUDGE_KEY")
    with caplog.at_level(logging.DEBUG), pytest.raises(ChatError) as caught:
        judge.complete(MESSAGES)
    assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}", "else the test shows nothing"
    assert "Incorrect API key provided: ***" in str(caught.value)
    chain = [caught.value, caught.value.__cause__, caught.value.__context__]
    assert KEY not in f"{judge!r} {vars(judge)} {caplog.text} {chain!r} {[str(link) for link in chain]}"
    assert "JUDGE_KEY" in repr(judge)


@pytest.mark.parametrize("key", ["", "  ", "sk-\nX-Evil: 1", "sk-ключ", "sk-\x00"])
def test_keys_that_no_header_can_carry(monkeypatch: pytest.MonkeyPatch, server: Server, key: str) -> None:
    if "\x00" not in key:
        monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(ValueError, match="JUDGE_KEY") as caught:
        client(server, api_key_env="JUDGE_KEY")
    assert "sk-" not in str(caught.value)


def test_a_key_that_goes_bad_later_is_an_error_without_it(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    judge = client(server, api_key_env="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", KEY + "\r\nX-Evil: 1")
    with pytest.raises(ValueError, match="JUDGE_KEY") as caught:
        judge.complete(MESSAGES)
    assert KEY not in str(caught.value) and server.requests == []


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host/v1",
        "ftp://host/v1",
        "https://",
        "https://me:pw@host/v1",
        "https://host/v1?key=pw",
        "https://host/v1#pw",
    ],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match="expected an address like https://host/v1") as caught:
        ChatClient(url, "m")
    assert "pw" not in str(caught.value).replace("password", "")


def test_plain_http_to_other_machines_needs_leave() -> None:
    for url in ("http://judge.example/v1", "http://10.0.0.7/v1", "http://localhost.example/v1"):
        with pytest.raises(ValueError, match="plain http"):
            ChatClient(url, "m")
        assert ChatClient(url, "m", allow_http=True).transport.path == "/v1/chat/completions"
    for url in ("http://localhost:8000", "http://127.0.0.1", "http://[::1]:8000", "https://judge.example/"):
        assert ChatClient(url, "m").transport.path == "/chat/completions"


@pytest.mark.parametrize("setting", [{"timeout": 0}, {"retries": -1}, {"backoff": -1}, {"max_bytes": 0}])
def test_settings_that_cannot_work(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected timeout > 0"):
        ChatClient("https://judge.example/v1", "m", **setting)
