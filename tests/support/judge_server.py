"""Servers on this machine that answer as a judge does."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

from PIL import Image


class JudgeServer:
    """A judge whose score of an image is the per cent of its red; `answer(content, call)` replaces it."""

    def __init__(self) -> None:
        self.answer: Answer = lambda content, _: (200, json.dumps(reds(content)))
        self.calls: list[list[dict[str, Any]]] = []
        self.most_at_once = self._now = 0
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                content = sent["messages"][-1]["content"]
                with lock:
                    number = len(server.calls)
                    server.calls.append(content)
                    server._now += 1
                    server.most_at_once = max(server.most_at_once, server._now)
                status, text = server.answer(content, number)
                with lock:
                    server._now -= 1
                body = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
                with contextlib.suppress(OSError):  # the client hung up, as one test wants it to
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


def reds(content: list[dict[str, Any]]) -> list[float]:
    return [round(picture.getpixel((0, 0))[0] / 255 * 100, 1) for picture in pictures(content)]  # type: ignore[index]


@contextmanager
def server(reply: Callable[[dict[str, Any]], tuple[int, str]]) -> Iterator[str]:
    """The address of an OpenAI-compatible server on the loopback; `reply`: request to (status, text)."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, text = reply(request)
            body = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


Answer = Callable[[list[dict[str, Any]], int], tuple[int, str]]


def pictures(content: list[dict[str, Any]]) -> list[Image.Image]:
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    prefix = "data:image/png;base64,"
    assert all(url.startswith(prefix) for url in urls)
    return [Image.open(io.BytesIO(base64.b64decode(url.removeprefix(prefix), validate=True))) for url in urls]
