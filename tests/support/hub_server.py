"""A hub on this machine that speaks as much of the Hugging Face hub's HTTP as an upload needs, and keeps what it got.

GET  /api/whoami-v2                             whose token it is
POST /api/repos/create                          200, or 409 for one that is there
POST /api/validate-yaml                         the card's front matter
POST /api/models/<id>/preupload/<revision>      which files go through LFS: the large ones, as .gitattributes says
POST /<id>.git/info/lfs/objects/batch           where their bytes go
PUT  /lfs/<oid>                                 the bytes, which must have that SHA-256
POST /lfs/verify                                whether they came
POST /api/models/<id>/commit/<revision>         lines of JSON: header, small files, references to large ones
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "q" * 34
LARGE = (".safetensors", ".bin", ".model")


class HubServer:
    """Repositories by name, with their files as bytes."""

    def __init__(self) -> None:
        self.owner: dict[str, Any] = {
            "name": "alice",
            "orgs": [{"name": "lab"}],
            "auth": {"accessToken": {"role": "write"}},
        }
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.visibility: dict[str, str | None] = {}
        self.refused: dict[str, tuple[int, str]] = {}
        """Part of a path -> what is answered there instead."""
        self.answers = threading.Event()
        """Cleared: nothing is answered at all."""
        self.answers.set()
        self.requests: list[str] = []
        self._large: dict[str, bytes] = {}
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server._serve(self, b"")

            def do_POST(self) -> None:
                server._serve(self, _body(self))

            def do_PUT(self) -> None:
                server._serve(self, _body(self))

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def _serve(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        path = request.path.partition("?")[0]
        self.requests.append(f"{request.command} {path}")
        self.answers.wait(20)
        stopped = next((answer for part, answer in self.refused.items() if part in path), None)
        known = request.headers.get("Authorization") == f"Bearer {TOKEN}"
        if stopped is not None:
            status, answer = stopped[0], {"error": stopped[1]}
        elif not known and not path.startswith("/lfs/"):  # as S3: those addresses are signed
            status, answer = 401, {"error": "Invalid username or password."}
        else:
            status, answer = self._answer(request.command, path, body)
        content = json.dumps(answer).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def _answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if method == "PUT":
            oid = path.removeprefix("/lfs/")
            if hashlib.sha256(body).hexdigest() != oid:
                return 400, {"error": "these bytes have another SHA-256"}
            self._large[oid] = body
            return 200, {}
        if path == "/api/whoami-v2":
            return 200, self.owner
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/lfs/verify":
            return (200, {}) if json.loads(body)["oid"] in self._large else (404, {"error": "not uploaded"})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._place(one) for one in json.loads(body)["objects"]]}
        name, _, action = path.removeprefix("/api/models/").partition("/preupload/")
        if action:
            return 200, {"files": [_mode(file) for file in json.loads(body)["files"]]}
        name, _, action = name.partition("/commit/")
        if action and name in self.repositories:
            return self._commit(name, body)
        return 404, {"error": f"{method} {path}: nothing here"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked.get('organization') or self.owner['name']}/{asked['name']}"
        answer = {"url": f"{self.url}/{name}"}
        if name in self.repositories:
            return 409, answer | {"error": "You already created this model repo"}
        hidden = "private" if asked.get("private") else "public"  # as its library asks up to 1.x
        self.repositories[name], self.visibility[name] = {}, asked.get("visibility", hidden)
        return 200, answer

    def _place(self, one: dict[str, Any]) -> dict[str, Any]:
        actions = {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}, "verify": {"href": f"{self.url}/lfs/verify"}}
        return {**one, "actions": actions}

    def _commit(self, name: str, body: bytes) -> tuple[int, Any]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if len(self._large.get(value["oid"], b"")) != value["size"]:
                    return 400, {"error": f"{value['path']}: its bytes did not come"}
                self.repositories[name][value["path"]] = self._large[value["oid"]]
        oid = hashlib.sha1(body).hexdigest()
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"}


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    large = file["path"].endswith(LARGE) or file["size"] > 10_000_000
    return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": None}


def _body(request: BaseHTTPRequestHandler) -> bytes:
    if request.headers.get("Transfer-Encoding") != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length") or 0))
    parts = []
    while size := int(request.rfile.readline(), 16):
        parts.append(request.rfile.read(size))
        request.rfile.readline()
    request.rfile.readline()
    return b"".join(parts)


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A hub of the test's own."""
    server = HubServer()
    try:
        yield server
    finally:
        server.answers.set()
        server.http.shutdown()
        server.http.server_close()
