"""Rewards behind an address: servers that speak UniRL's, verl-omni's, flow_grpo's or OpenRLHF's protocol.

Rows go out in batches, several at once; what fails is tried again, by the rules of transport.py, as long as the budget
lasts.  A row without an answer is None and counted; where nothing at all is scored, the reward has failed.

Dims: S trajectories.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypedDict, Unpack
from urllib.parse import urlsplit

from ...errors import ChatError, RewardSpecError
from ...settings.reward_specs import reward_name, served_name, server_problem, split_spec
from ...settings.rules import SCORER_ADDRESS
from ..reward import LARGEST, RewardValues
from ..transport import Transport
from .protocols import speech_of

logger = logging.getLogger(__name__)

BUDGET = 110.0
"""Seconds for all requests of a step: below the 120 after which even the answers that came would be lost."""
MAX_BYTES = 1 << 22
"""Of an answer; scores of a batch are far shorter."""


class ScorerOptions(TypedDict, total=False):
    """What goes on to `Transport`; its meanings are there."""

    api_key_env: str | None
    timeout: float
    retries: int
    backoff: float
    max_bytes: int
    allow_http: bool


class RemoteReward:
    """A reward that a server gives: `RemoteReward("unirl@http://127.0.0.1:8080#pickscore")`."""

    defined = ""
    """No file of a user's own."""

    def __init__(
        self,
        spec: str,
        *,
        batch_size: int | None = None,
        max_concurrency: int = 4,
        budget: float = BUDGET,
        **server: Unpack[ScorerOptions],
    ) -> None:
        """
        Args:
            spec: the codebase whose protocol the server speaks, and its address: `unirl@https://host:8080#REWARD` or
                `#REWARD/SUB-METRIC`; `verl_omni@`, `flow_grpo@`, `openrlhf@` and the address, `#name` names the column.
            batch_size: rows of one request; None: as many as that codebase's own client sends.
            max_concurrency: requests under way at once.
            budget: seconds for all requests of one batch of rewards; what has no answer by then is None.
            server: `api_key_env`, `timeout` (half of the budget), `retries` and the other settings of `Transport`.

        Raises:
            RewardSpecError: an unknown codebase, no name for UniRL's reward, or an address, key or number that cannot
                work.
        """
        before, target = split_spec(spec)
        if problem := server_problem(before[-1:], target):
            raise RewardSpecError(f"reward {reward_name(spec)!r}: {problem}")
        size = 1 if batch_size is None else batch_size
        if not (size >= 1 and max_concurrency >= 1 and budget > 0):
            raise RewardSpecError(
                f"reward {reward_name(spec)!r}: expected batch_size >= 1, max_concurrency >= 1 and budget > 0, got "
                f"{batch_size}, {max_concurrency} and {budget}; correct them"
            )
        self.speech = speech_of(before[-1], served_name(target))
        address = target.partition("#")[0].rstrip("/").removesuffix(self.speech.path)
        options: dict[str, Any] = {"timeout": budget / 2, "max_bytes": MAX_BYTES, **server}
        try:
            self.transport = Transport(
                f"reward {reward_name(spec)!r}",
                address,
                self.speech.path,
                media=self.speech.media,
                words=self.speech.words,
                form=SCORER_ADDRESS,
                **options,
            )
        except ValueError as error:
            raise RewardSpecError(str(error)) from None
        self.batch_size = self.speech.batch if batch_size is None else batch_size
        self.max_concurrency, self.budget = max_concurrency, budget
        self.num_failed_calls = 0
        """Requests that were given up, or of which the server could not score a row."""
        self.__name__, self.kind = reward_name(spec), self.speech.kind
        self.who = f"the {before[-1]} reward server at {urlsplit(address).netloc}"
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"RemoteReward({self.__name__!r}, {self.who})"

    def __call__(self, **columns: Any) -> RewardValues:
        """What the server says of each trajectory; None where it does not apply, or where there is no answer.

        Raises:
            ChatError: nothing was scored: a reward that failed, and is counted as one.
        """
        values: RewardValues = [None] * len(columns["images"])
        rows = self.speech.rows(columns)
        batches = [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
        if not batches:
            return values
        deadline = time.monotonic() + self.budget

        def ask(batch: Sequence[int]) -> list[float | ChatError]:
            try:
                return self._asked(columns, batch, deadline)
            except ChatError as error:
                return [error] * len(batch)

        with ThreadPoolExecutor(min(self.max_concurrency, len(batches)), thread_name_prefix="scorer") as pool:
            answers = list(pool.map(ask, batches))
        for batch, answer in zip(batches, answers, strict=True):
            for row, value in zip(batch, answer, strict=True):
                values[row] = None if isinstance(value, ChatError) else value
        self._count(answers)
        return values

    def _asked(self, columns: dict[str, Any], batch: Sequence[int], deadline: float) -> list[float | ChatError]:
        data = self.transport.post(self.speech.request(columns, batch), deadline=deadline)
        try:
            found = self.speech.scores(data, len(batch))
        except ChatError as error:
            raise ChatError(f"{self.transport.host}: {error}", status=error.status) from None
        far = ChatError(f"{self.transport.host}: a score that is too large for a float32", status=200)
        return [far if isinstance(value, float) and not abs(value) <= LARGEST else value for value in found]

    def _count(self, answers: Sequence[Sequence[float | ChatError]]) -> None:
        """Counts and reports what failed; raises where nothing else happened."""
        failed = [[value for value in answer if isinstance(value, ChatError)] for answer in answers]
        lost, total = sum(map(len, failed)), sum(map(len, answers))
        if not lost:
            return
        first = next(error for errors in failed for error in errors)
        with self._lock:
            self.num_failed_calls += sum(map(bool, failed))
        if lost == total:
            raise first
        logger.warning("reward %r: no score for %d of %d; the first: %s", self.__name__, lost, total, first)
