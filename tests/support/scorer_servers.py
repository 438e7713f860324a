"""Small reward servers on this machine that speak what UniRL's, verl-omni's, flow_grpo's and OpenRLHF's servers speak.

Each checks its request as the real one does (schemas of pydantic, the keys that are read, JPEG alone) and scores a
picture by its share of red, a text by its length.  They unpickle, as those servers do.

Source: UniRL's reward_service/{schemas,server}.py; the reward-server of flow_grpo, app_geneval.py and app_deqa.py; the
services of deepgen_rl that verl-omni names, ocr_scorer_service/app.py; OpenRLHF's utils/agent.py.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import numpy as np
from PIL import Image

Reply = tuple[int, bytes]
Speaks = Callable[[str, bytes], Reply]


class ScorerServer:
    """`speaks` makes the answer; `replies` stands before it, request by request, None for what `speaks` says."""

    def __init__(self, speaks: Speaks) -> None:
        self.speaks = speaks
        self.replies: list[Reply | None] = []
        self.requests: list[tuple[str, bytes]] = []
        self.headers: list[Mapping[str, str]] = []
        self.hangs = threading.Event()
        self.release = threading.Event()
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with lock:
                    number = len(server.requests)
                    server.requests.append((self.path, body))
                    server.headers.append(dict(self.headers))
                if server.hangs.is_set():
                    server.release.wait(20)
                given = server.replies[number] if number < len(server.replies) else None
                status, data = given or server.speaks(self.path, body)
                with contextlib.suppress(OSError):  # the client hung up
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@contextmanager
def serving(speaks: Speaks) -> Iterator[ScorerServer]:
    server = ScorerServer(speaks)
    try:
        yield server
    finally:
        server.release.set()
        server.http.shutdown()
        server.http.server_close()


def red(data: bytes, formats: list[str] | None = None) -> float:
    """The red of a picture's middle, in [0, 1], to two places: JPEG loses more."""
    picture = Image.open(io.BytesIO(data), formats=formats).convert("RGB")
    pixel: Any = picture.getpixel((picture.width // 2, picture.height // 2))
    return round(pixel[0] / 255, 2)


def unirl(path: str, body: bytes) -> Reply:
    """UniRL's gateway: `red` scores the last picture, `size` has two sub-metrics, `broken` fails, `unread` of a black
    picture is NaN, which arrives as null."""
    if path != "/score":
        return 404, b'{"detail": "Not Found"}'
    results: list[dict[str, Any]] = []
    errors: list[dict[str, str]] = []
    for request in json.loads(body)["requests"]:
        assert set(request) <= {"history", "required_rewards", "metadata"}
        assert request["metadata"] is None or isinstance(request["metadata"], dict)
        if not request["history"]:
            return 400, b'{"detail": "history must not be empty"}'
        if any(turn.get("image_b64") is None or not isinstance(turn["text"], str) for turn in request["history"]):
            return 422, b'{"detail": "HistoryTurn must include at least one of image_b64, video_b64, or video_path"}'
        share = red(base64.b64decode(request["history"][-1]["image_b64"]))
        known: dict[str, dict[str, float | None]] = {
            "red": {"red": share},
            "size": {"turns": float(len(request["history"])), "Aesthetic Quality": share / 2},
            "unread": {"unread": share if share > 0.01 else None},
        }
        results.append({})
        errors.append({})
        for name in request["required_rewards"]:
            if name == "broken":
                errors[-1][name] = "TimeoutError(\"reward 'broken' exceeded 120.0s\")"
            elif name in known:
                results[-1][name] = known[name]
            else:
                said = f"unknown reward: {name}. available: {[*known, 'broken']}"
                return 400, json.dumps({"detail": said}).encode()
    return 200, json.dumps({"results": results, "errors": errors}).encode()


def verl_omni(_: str, body: bytes) -> Reply:
    """A service as verl-omni's docs have it: half of the score is for a prompt that names red."""
    payload = pickle.loads(body)
    if set(payload) != {"images", "prompts", "metadata"} or not payload["prompts"]:
        return 500, pickle.dumps({"error": "Traceback ...\nValueError: OCR Scorer requires prompts with target text."})
    pairs = zip(payload["images"], payload["prompts"], strict=True)
    scores = [(red(image, ["jpeg"]) + ("red" in prompt)) / 2 for image, prompt in pairs]
    return 200, pickle.dumps({"scores": scores})


def geneval(_: str, body: bytes) -> Reply:
    """flow_grpo's reward-server for GenEval: right where the picture is red and the metadata ask for it."""
    try:
        data = pickle.loads(body)
        pairs = zip(data["images"], data["meta_datas"], strict=True)
        right = [float(red(image, ["jpeg"]) > 0.5 and about["tag"] == "colors") for image, about in pairs]
        assert data["only_strict"] is True
    except Exception as error:  # as the server itself does
        return 500, f"Traceback (most recent call last):\n{type(error).__name__}: {error}".encode()
    groups = {"colors": right}
    answer = {"scores": right, "rewards": right, "strict_rewards": right, "group_rewards": groups}
    return 200, pickle.dumps({**answer, "group_strict_rewards": groups})


def deqa(_: str, body: bytes) -> Reply:
    """flow_grpo's server for DeQA, which reads pictures alone and gives NumPy's numbers back."""
    outputs = np.array([red(image, ["jpeg"]) for image in pickle.loads(body)["images"]], dtype=np.float32)
    return 200, pickle.dumps({"outputs": list(outputs)})


def openrlhf(_: str, body: bytes) -> Reply:
    """OpenRLHF's remote reward model: how much of the query is response."""
    data = json.loads(body)
    assert set(data) == {"query", "prompts", "labels"}
    scores = [float(len(q) - len(p)) for q, p in zip(data["query"], data["prompts"], strict=True)]
    return 200, json.dumps({"rewards": scores, "scores": scores, "extra_logs": {"dummy_scores": scores}}).encode()
