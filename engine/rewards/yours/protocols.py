"""What reward servers of other codebases are sent, and what they answer.

Each is how one codebase's own client speaks: which rows, in what form, and where the scores stand in an answer.

    unirl       POST /score, JSON: {"requests": [{"history": [{"text", "image_b64"}], "required_rewards", "metadata"}]}
                -> {"results": [{reward: {sub-metric: number}}], "errors": [{reward: text}]}
    verl_omni   POST, pickle: {"images": [JPEG], "prompts", "metadata": {}} -> {"scores"} or {"error"}
    flow_grpo   the same with "meta_datas" and "only_strict" -> {"scores"} or {"outputs"}
    openrlhf    POST, JSON: {"query", "prompts", "labels"} -> {"rewards"}

Source: UniRL's `unirl-reward-service/reward_service/schemas.py` and `unirl/reward/remote.py`, verl-omni's
page on HTTP scorers and `verl_omni/utils/reward_score/http_scorer_client.py`, flow_grpo's `flow_grpo/rewards.py`
and its reward-server's `app_{geneval,deqa}.py`, OpenRLHF's `openrlhf/utils/agent.py`.  Dims: n rows of a request.
"""

from __future__ import annotations

import base64
import io
import json
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

from PIL import Image

from ...errors import ChatError, shown
from ...pictures import open_picture
from ...records import Prompt
from ..hooks import plain
from . import pickled
from .adapting import Columns, data_of, to_picture, with_image, with_text
from .verl_rewards import asked_of, truths

JSON, PICKLE = "application/json", "application/octet-stream"
_PROMPT_FIELDS = frozenset(
    {field.name for field in fields(Prompt)} | {"image", "shown_images", "mode", "follow_up_completions", "metadata"}
)


class Speech(Protocol):
    """How one codebase speaks to its reward servers."""

    @property
    def kind(self) -> str:
        """`text` or `image`: what is judged."""
        ...

    @property
    def media(self) -> str:
        """The type of requests and answers."""
        ...

    @property
    def path(self) -> str:
        """What is added to the address."""
        ...

    @property
    def batch(self) -> int:
        """Rows of one request, as that codebase sends them."""
        ...

    def rows(self, columns: Columns) -> list[int]:
        """Those that are judged."""
        ...

    def request(self, columns: Columns, rows: Sequence[int]) -> bytes:
        """What is sent for rows."""
        ...

    def scores(self, data: bytes, count: int) -> list[float | ChatError]:
        """What an answer says of n rows; ChatError of one that the server could not score, or raised for all."""
        ...

    def words(self, data: bytes) -> str:
        """The text of an answer that is an error."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Unirl:
    """UniRL's RewardService. A row whose prompt shows a picture goes as two turns, as its editing rewards want it."""

    reward: str
    """The server's name for it, e.g. `pickscore`."""
    metric: str = ""
    """Which of its sub-metrics; "": the first, as UniRL's own client takes by default."""
    quality: int = 95
    """Of JPEG pictures."""
    kind: ClassVar[str] = "image"
    media: ClassVar[str] = JSON
    path: ClassVar[str] = "/score"
    batch: ClassVar[int] = 8

    def rows(self, columns: Columns) -> list[int]:
        return with_image(columns)

    def request(self, columns: Columns, rows: Sequence[int]) -> bytes:
        given, shown = columns.get("metadata"), columns.get("shown_images")
        requests = []
        for row in rows:
            text = asked_of(columns, row)
            pictures = [open_picture(ref) for ref in shown[row]] if shown else []
            pictures.append(to_picture(columns["images"][row]))
            turns = [{"text": text, "image_b64": _base64(_jpeg(picture, self.quality))} for picture in pictures]
            about = plain(given[row]) if given and isinstance(given[row], Mapping) else None
            requests.append({"history": turns, "required_rewards": [self.reward], "metadata": about})
        return json.dumps({"requests": requests}).encode()

    def scores(self, data: bytes, count: int) -> list[float | ChatError]:
        answer = _json(data)
        results = _listed(answer.get("results"), count, "results")
        errors = answer.get("errors")
        errors = errors if isinstance(errors, list) and len(errors) == count else [{}] * count
        return [self._score(result, error) for result, error in zip(results, errors, strict=True)]

    def _score(self, result: Any, errors: Any) -> float | ChatError:
        """A sub-metric that is no finite number spoils the row, as for UniRL's client."""
        metrics = result.get(self.reward) if isinstance(result, Mapping) else None
        if not isinstance(metrics, Mapping) or not metrics:
            said = errors.get(self.reward) if isinstance(errors, Mapping) else None
            return ChatError(f"{self.reward}: {said or 'neither a score nor an error in the answer'}", status=200)
        for name, value in metrics.items():
            if not _is_score(value):
                return ChatError(f"{self.reward}: expected a finite {name}, got {shown(value, 40)}", status=200)
        if self.metric and self.metric not in metrics:
            raise ChatError(f"{self.reward}: no {self.metric!r} in the answer; it has {', '.join(metrics)}", status=200)
        return float(metrics[self.metric] if self.metric else next(iter(metrics.values())))

    def words(self, data: bytes) -> str:
        return _text(data)


class _Pickled:
    """What the servers of flow_grpo and verl-omni have in common."""

    kind, media, path = "image", PICKLE, ""

    def rows(self, columns: Columns) -> list[int]:
        return with_image(columns)

    def scores(self, data: bytes, count: int) -> list[float | ChatError]:
        try:
            answer = pickled.loads(data)
        except ValueError as error:
            raise ChatError(str(error), status=200) from None
        if isinstance(answer, Mapping) and answer.get("error") is not None:
            raise ChatError(f"the server says: {_last_line(answer['error'])}", status=200)
        found = answer if isinstance(answer, Mapping) else {}
        name = next((name for name in ("scores", "outputs") if name in found), "scores")
        return [_scored(value, name) for value in _listed(found.get(name), count, name)]

    def words(self, data: bytes) -> str:
        """Their errors are pickled, or a traceback in plain text."""
        try:
            answer = pickled.loads(data)
        except ValueError:
            return _last_line(_text(data))
        return _last_line(answer["error"]) if isinstance(answer, Mapping) and "error" in answer else _text(data)


class VerlOmni(_Pickled):
    """verl-omni's HTTP scorer: the ground truth of the row stands for its prompt, as its client sends it."""

    batch = 16

    def request(self, columns: Columns, rows: Sequence[int]) -> bytes:
        texts = [str(truth) for truth in truths(columns, rows, drawn=True)]
        return pickled.dumps({"images": _jpegs(columns, rows), "prompts": texts, "metadata": {}})


class FlowGrpo(_Pickled):
    """flow_grpo's reward-server and those that follow it: GenEval, DeQA, UnifiedReward, OCR and others.

    Each reads of the request what it needs, so one form serves all. `meta_datas` are the rows' columns `metadata` and
    those that are no field of `Prompt`, which is what a row of GenEval's file has."""

    batch = 64

    def request(self, columns: Columns, rows: Sequence[int]) -> bytes:
        texts = [asked_of(columns, row) for row in rows]
        about = [{"prompt": text, **_further(columns, row)} for row, text in zip(rows, texts, strict=True)]
        strict = {"meta_datas": about, "only_strict": True}
        return pickled.dumps({"images": _jpegs(columns, rows), "prompts": texts, "metadata": strict, **strict})


class OpenRlhf:
    """OpenRLHF's remote reward model: texts, the prompt and what was written behind it."""

    kind, media, path, batch = "text", JSON, "", 64

    def rows(self, columns: Columns) -> list[int]:
        return with_text(columns)

    def request(self, columns: Columns, rows: Sequence[int]) -> bytes:
        prompts = [columns["prompts"][row] for row in rows]
        queries = [prompt + columns["completions"][row] for prompt, row in zip(prompts, rows, strict=True)]
        labels = plain([columns["answer"][row] for row in rows])
        return json.dumps({"query": queries, "prompts": prompts, "labels": labels}).encode()

    def scores(self, data: bytes, count: int) -> list[float | ChatError]:
        found = _json(data).get("rewards")
        found = [found] if isinstance(found, int | float) else found
        return [_scored(value, "rewards") for value in _listed(found, count, "rewards")]

    def words(self, data: bytes) -> str:
        return _text(data)


def speech_of(codebase: str, name: str) -> Speech:
    """How the servers of a codebase are spoken to; `name`: what stands behind the # of the address, `reward/metric` for
    UniRL's."""
    if codebase == "unirl":
        reward, _, metric = name.partition("/")
        return Unirl(reward=reward, metric=metric)
    made: dict[str, Callable[[], Speech]] = {"verl_omni": VerlOmni, "flow_grpo": FlowGrpo, "openrlhf": OpenRlhf}
    return made[codebase]()


# Parts of requests and answers ----------------------------------------------------------------------------------------


def _jpeg(picture: Image.Image, quality: int = 75) -> bytes:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def _jpegs(columns: Columns, rows: Sequence[int]) -> list[bytes]:
    return [_jpeg(to_picture(columns["images"][row])) for row in rows]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _further(columns: Columns, row: int) -> dict[str, Any]:
    """Columns of the data beside the fields of `Prompt`; those in `metadata` come first."""
    values = {name: column[row] for name, column in data_of(columns).items() if name not in _PROMPT_FIELDS}
    given = columns["metadata"][row] if "metadata" in columns else None
    found: dict[str, Any] = plain({**values, **(given if isinstance(given, Mapping) else {})})
    return found


def _json(data: bytes) -> Mapping[str, Any]:
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, Mapping):
        raise ChatError("expected an answer that is a JSON object, got something else", status=200)
    return answer


def _listed(found: Any, count: int, name: str) -> list[Any]:
    """The entries of a list, or of a pickle's tuple."""
    if not isinstance(found, list | tuple) or len(found) != count:
        got = f"{len(found)}" if isinstance(found, list | tuple) else "none"
        raise ChatError(f"expected {count} {name} in the answer, one per row, got {got}", status=200)
    return list(found)


def _is_score(value: Any) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # integers of JSON and of pickles have no limit
        return False


def _scored(value: Any, name: str) -> float | ChatError:
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not _is_score(value):
        return ChatError(f"expected finite numbers as {name}, got {shown(value, 40)}", status=200)
    return float(value)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _last_line(said: Any) -> str:
    """Of a traceback, what went wrong."""
    lines = str(said).strip().splitlines()
    return lines[-1] if lines else ""
