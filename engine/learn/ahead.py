"""`rollout_staleness` 1: while a step is trained, another process draws and scores the next one, one step behind.

    this process     take 0 | ask 1 | train 0 | take 1 | ask 2 | train 1 | ...
    the other one    draw 0         | draw 1           | draw 2          | ...
    weights          of step 0      | of step 0        | of step 1

Step s is drawn with the weights that step s - 1 begins with, whoever is faster: both processes wait for each other once
a step, and what is asked for says all that the answer depends on (weights, place in the data, the preview's threshold).
The trainer weighs what it learns by how far its policy has moved since (correction.py).

A checkpoint is taken when the next step's trajectories have come, and holds them; its other state is what it would be
without another process.

Source: the order is PRIME-RL's (its step n samples with the weights of n - 1) and NeMo-RL's at an age of one step; the
loss is AReaL's decoupled one (arXiv 2505.24298) with truncated or masked weights.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import DataError
from ..policies.base import Policy
from ..policies.shared_weights import SharedWeights
from ..processes.beside import Beside, Message
from ..records import Prompt
from ..rollout.preview_gate import PreviewGate
from .carried import gathered_of
from .trajectories import Gathered, ResumablePrompts

RANDOM = "random/"
"""Before the names of the other process's generators among an answer's tensors."""


class Ahead:
    """This process's side of the one that gathers.

    Args:
        process: ahead_worker.py there.
        weights: memory that it reads.
        prompts: its source of prompts is in the same place; this one goes on when an answer is taken.
        preview: its threshold is this one's.
    """

    def __init__(
        self, process: Beside, weights: SharedWeights, prompts: ResumablePrompts, preview: PreviewGate | None
    ) -> None:
        self.process, self.weights, self.prompts, self.preview = process, weights, prompts, preview
        self._is_ready, self._asked = False, False
        self._answer: Message | None = None
        self._error: Exception | None = None
        self._generators: dict[str, Tensor] = {}

    def wait_until_ready(self) -> None:
        """Returns once the other process has loaded; raises as `ask`."""
        if self._is_ready:
            return
        theirs, ours = self.process.receive().about["layout"], self.weights.layout
        if theirs != ours:
            other = next((pair for pair in zip(theirs, ours, strict=False) if pair[0] != pair[1]), ("more", "fewer"))
            raise RuntimeError(
                f"ahead: expected the same weights in both processes, got there {other[0]}, here {other[1]}"
            )
        self._is_ready = True

    def ask(self, step: int, policy: Policy, *, trained: int) -> None:
        """Has a step drawn with the policy's weights, of which `trained` steps are done; nothing else is under way.

        Raises:
            RankFailed: the other process has ended; any error that it had while it loaded.
        """
        self.wait_until_ready()
        self.weights.write(policy)
        preview = None if self.preview is None else self.preview.state_dict()
        about = {"step": step, "trained": trained, "prompts": self.prompts.state_dict(), "preview": preview}
        self.process.send(Message(about, self._generators))
        self._asked, self._generators = True, {}

    def take(self, step: int, policy: Policy) -> Gathered:
        """What a step is trained on; asks for it where nobody has, which is so at the start.

        Raises:
            RankFailed: the other process has ended; any error that it had.
        """
        if not self._asked:
            self.ask(step, policy, trained=step)
        answer = self._waited_for()
        self._asked, self._answer = False, None
        try:
            gathered = gathered_of(answer, self._prompts_of(answer.about))
        except ValueError as error:
            raise DataError(
                f"data: expected the same prompts in both processes of rollout_staleness 1, got others: {error}; the "
                "files changed while the run began, start it again"
            ) from error
        if self.preview is not None:
            self.preview.load_state_dict(answer.about["gate"])
        return gathered

    def settled(self) -> Message | None:
        """What is under way, once it has come; None where nothing is, or where `take` will raise what went wrong."""
        if not self._asked:
            return None
        try:
            return self._waited_for()
        except Exception:
            return None

    def restore(self, answer: Message) -> None:
        """Takes up what `settled` told when the state was saved; prompts are in their place.

        Raises:
            ValueError, KeyError, TypeError: it is no such answer, or one of other prompts.
        """
        begin = self.prompts.state_dict()
        gathered_of(answer, self._prompts_of(answer.about))
        self.prompts.load_state_dict(begin)
        self._asked, self._answer = True, answer
        self._generators = {name: tensor for name, tensor in answer.tensors.items() if name.startswith(RANDOM)}

    def _waited_for(self) -> Message:
        if self._error is not None:
            raise self._error
        if self._answer is None:
            try:
                self._answer = self.process.receive()
            except Exception as error:
                self._error = error
                raise
        return self._answer

    def _prompts_of(self, about: Any) -> list[Prompt]:
        """The prompts that an answer is of: this source goes the way that the other one went."""
        prompts = list(self.prompts.next_step())
        for numbers in about["wanted"]:
            prompts += self.prompts.more(numbers) or ()
        return prompts
