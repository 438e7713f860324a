"""A hub on this machine that speaks as much of the Hugging Face hub's HTTP as a download needs.

GET       /api/models/<id>[/revision/<revision>]   what a repository holds
GET       /api/models/<id>/tree/<revision>         its files
GET       /api/models/<id>/auth-check              whether its files are open to the asker
HEAD, GET /<id>/resolve/<revision>/<file>          a file, whole or, where the server is told so, cut off in the middle
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "c" * 40


class HubFiles:
    """Repositories by name, with their files as bytes."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        """Everybody is told what these hold, and nobody may fetch it."""
        self.broken: set[str] = set()
        """Asked for these, the server itself fails."""
        self.cut: str = ""
        """A file whose download ends in the middle, every time."""
        self.fetched: list[str] = []
        """Files whose bytes went out."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server._serve(self, body=True)

            def do_HEAD(self) -> None:
                server._serve(self, body=False)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """This process asks it from now on, with a cache of its own; it is empty again."""
        self.repositories.clear()
        self.gated.clear()
        self.broken.clear()
        self.fetched.clear()
        self.cut = ""
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", self.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(cache))
        settings = {"ENDPOINT": self.url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": False}
        settings |= {"HUGGINGFACE_CO_URL_TEMPLATE": f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"}
        for name, value in {**settings, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setattr("huggingface_hub.hf_api.HfApi.endpoint", self.url, raising=False)

    def add(self, name: str, folder: Path) -> None:
        """A folder's files as a repository."""
        self.repositories[name] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def _serve(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = request.path.partition("?")[0].strip("/")
        if path.startswith("api/models/"):
            status, code, answer = self._told(path.removeprefix("api/models/"))
            content = json.dumps(answer).encode()
            _answer(request, status, {"X-Error-Code": code} if code else {}, content if body else b"", len(content))
            return
        name, _, rest = path.partition("/resolve/")
        revision, _, file = rest.partition("/")
        status, code = self._refusal(name, revision)
        if not code and file not in self.repositories[name]:
            status, code = 404, "EntryNotFound"
        if not code and name in self.gated:
            status, code = 403, "GatedRepo"
        if code:
            _answer(request, status, {"X-Error-Code": code, "X-Repo-Commit": COMMIT}, b"", 0)
            return
        content = self.repositories[name][file]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if not body:
            _answer(request, 200, headers, b"", len(content))
            return
        self.fetched.append(file)
        sent = content[: len(content) // 2] if file == self.cut else content
        _answer(request, 200, headers, sent, len(content))
        if file == self.cut:
            request.close_connection = True

    def _refusal(self, name: str, revision: str) -> tuple[int, str]:
        if name in self.broken:
            return 500, "Broken"
        if name not in self.repositories:
            return 404, "RepoNotFound"
        return (200, "") if revision in ("main", COMMIT) else (404, "RevisionNotFound")

    def _told(self, path: str) -> tuple[int, str, Any]:
        if path.endswith("/auth-check"):
            name = path.removesuffix("/auth-check")
            return (403, "GatedRepo", {"error": "ask"}) if name in self.gated else (200, "", {})
        if "/tree/" in path:
            files = self.repositories[path.partition("/tree/")[0]]
            return 200, "", [{"type": "file", "path": f, "size": len(c), "oid": "0"} for f, c in files.items()]
        name, _, revision = path.partition("/revision/")
        status, code = self._refusal(name, revision or "main")
        if code:
            return status, code, {"error": "no"}
        files = self.repositories[name]
        siblings = [{"rfilename": file, "size": len(content), "blobId": "0"} for file, content in files.items()]
        told_of = json.loads(files.get("config.json", b"{}"))
        kind = {"model_type": told_of.get("model_type")}
        if "_class_name" in told_of:
            kind = {"diffusers": {"_class_name": told_of["_class_name"]}}
        gated = "manual" if name in self.gated else False
        told = {"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False, "gated": gated}
        return 200, "", told | {"config": kind}


def _answer(request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], sent: bytes, length: int) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(length))
    request.end_headers()
    request.wfile.write(sent)


@contextmanager
def hub_files() -> Iterator[HubFiles]:
    """A hub of the test's own."""
    server = HubFiles()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
