"""The stream that a run draws its prompts from: step by step, split over ranks, resumable.

An *order* says which prompts come next: `Shuffled`, here, takes whole samples (CoRL); `Mixture` mixes tasks (Sync-R1).

Dims: N samples.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ..errors import ConfigError, DataError
from ..records import Prompt
from .row_digests import RowDigests
from .samples import Sample


class Order(Protocol):
    """What comes in which step, the same on every rank."""

    prompts_per_step: int
    """Samples of a step over all ranks; a prompt that belongs to no other is a sample of one."""
    samples: Sequence[Sample]
    """All that can come."""
    fingerprint: str
    """Of what the prompts say: a state from before there were `rows` fits only these."""
    rows: RowDigests
    """Of `samples`."""
    kinds_dealt_out: bool
    """Ranks get as many drawings and as many answers as each other, where a step has them."""

    def next_step(self) -> list[Sample]: ...

    def more(self, count: int) -> list[Sample]:
        """At most `count` others for the step under way, rewarded ones; fewer where it has had all that there are."""
        ...

    def used(self) -> set[int]:
        """Which of `samples` have come so far."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class PromptStream:
    """Prompts step by step, endlessly.

    Every rank holds the same stream and takes its part of each step, so a state saved on one world size resumes on
    another. A step never holds a sample twice: a prompt is a group, and the sampler's random numbers are keyed by its
    id.
    """

    def __init__(self, order: Order, rank: int = 0, world_size: int = 1) -> None:
        """
        Args:
            order: of this stream alone, which moves it on.
            rank, world_size: this process's place.

        Raises:
            ConfigError: a step cannot be split over the ranks.
            DataError: ids of prompts are not unique.
        """
        size = order.prompts_per_step
        if not 0 <= rank < world_size or size < 1 or size % world_size:
            raise ConfigError(
                f"prompts_per_step: expected a multiple of the {world_size} ranks, got {size}; take "
                f"{max(1, round(size / world_size)) * world_size}"
            )
        ids = [prompt.id for sample in order.samples for prompt in sample]
        if len(set(ids)) != len(ids):
            repeated, _ = Counter(ids).most_common(1)[0]
            raise DataError(f"data: expected an id of its own for each prompt, got {repeated!r} twice; rename one")
        self.order, self.rank, self.world_size = order, rank, world_size

    def next_step(self) -> list[Prompt]:
        """This rank's prompts of the next step: those of prompts_per_step / world_size samples."""
        step = self.order.next_step()
        if self.order.kinds_dealt_out and self.world_size > 1:  # all wait for the rank with the most drawings
            step.sort(key=_kind)
        return [prompt for sample in step[self.rank :: self.world_size] for prompt in sample]

    def more(self, wanted: Sequence[int]) -> list[Prompt] | None:
        """New prompts for the step under way, in place of some of this rank's samples.

        Args:
            wanted: how many samples each rank wants; all ranks call this with the same numbers.

        Returns:
            Those of this rank, whole samples, possibly fewer than it wants; None when no rank gets any.
        """
        added = self.order.more(sum(wanted))
        left, turn, mine = list(wanted), 0, list[Prompt]()
        for sample in added:
            while not left[turn % self.world_size]:
                turn += 1
            rank = turn % self.world_size
            left[rank] -= 1
            turn += 1
            mine += sample if rank == self.rank else ()
        return mine if added else None

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on; plain numbers and text, so it can go into JSON."""
        return {**self.order.state_dict(), "fingerprint": self.order.fingerprint, "rows": self.order.rows.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken; ValueError when what was used, or what orders it, is not the same."""
        rows = state.get("rows")
        if rows is None and state["fingerprint"] != self.order.fingerprint:
            raise ValueError(
                "PromptStream: the saved state is of other prompts; resume with the data that the run began with"
            )
        if rows is not None:
            self.order.rows.check_places(rows)
        self.order.load_state_dict(state)
        if rows is not None:
            self.order.rows.check_used(rows, self.order.used())


def _kind(sample: Sample) -> int:
    """What draws lies together in this order, and so does what writes; either is then even over ranks, to one."""
    kinds = {kind for prompt in sample for kind in prompt.segments}
    return ("text" in kinds) + ("image" not in kinds)


def permutation(key: str, count: int) -> list[int]:
    """0 … count - 1, shuffled; the same for the same key, on every machine."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())
    shuffled: list[int] = np.random.default_rng(seed).permutation(count).tolist()
    return shuffled


class Shuffled:
    """Every epoch holds each sample once, in an order of its own.

    A step that an epoch's end leaves incomplete goes on into the next epoch.
    """

    kinds_dealt_out = False

    def __init__(self, samples: Sequence[Sample], *, seed: int, prompts_per_step: int) -> None:
        """
        Args:
            samples: what is trained on; each stays whole.
            seed: of the shuffling.
            prompts_per_step: samples of a step over all ranks, at most N.

        Raises:
            ConfigError: there are fewer samples than a step takes.
        """
        if prompts_per_step > len(samples):
            raise ConfigError(
                f"prompts_per_step: expected at most {len(samples)}, the samples that there are, got "
                f"{prompts_per_step}; lower it, or add rows"
            )
        self.samples: Sequence[Sample] = tuple(samples)
        self.seed, self.prompts_per_step = seed, prompts_per_step
        self.fingerprint = _fingerprint(samples)
        self.rows = RowDigests(samples, [[prompt.id for prompt in sample] for sample in samples])
        self._epoch, self._drawn = 0, 0
        self._carried: list[int] = []
        self._missing = 0
        self._step: list[int] = []
        self._order = self._shuffled()

    def next_step(self) -> list[Sample]:
        self._step = []
        return self._draw(self.prompts_per_step)

    def more(self, count: int) -> list[Sample]:
        """One that the step has from the epoch before is passed over, and waits for the next epoch."""
        return self._draw(min(count, len(self.samples) - len(self._step)))

    def _draw(self, count: int) -> list[Sample]:
        """The next `count` that the step under way has not; it has them then."""
        begin = len(self._step)
        while (missing := begin + count - len(self._step)) > 0:
            if self._drawn == len(self.samples):
                self._epoch, self._drawn, self._carried, self._missing = self._epoch + 1, 0, list(self._step), missing
                self._order = self._shuffled()
            index = self._order[self._drawn]
            self._drawn += 1
            self._step += [] if index in self._step else [index]
        return [self.samples[index] for index in self._step[begin:]]

    def _shuffled(self) -> list[int]:
        """This epoch's order. Samples that the step under way has already are moved behind the rest of that step."""
        order = permutation(f"{self.seed}/{self._epoch}", len(self.samples))
        carried = set(self._carried)
        first = [index for index in order if index not in carried][: self._missing] if carried else []
        return first + [index for index in order if index not in first]

    def used(self) -> set[int]:
        return {*self._order[: self._drawn]} if self._epoch == 0 else {*range(len(self.samples))}

    def state_dict(self) -> dict[str, Any]:
        state = {
            "epoch": self._epoch,
            "drawn": self._drawn,
            "carried": list(self._carried),
            "samples_per_step": self.prompts_per_step,
            "seed": self.seed,
        }
        refilled = self._carried and self._missing != self.prompts_per_step - len(self._carried)
        return {**state, "missing": self._missing} if refilled else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        size = state["samples_per_step"]  # what states have always called it
        for name, then, now in (("seed", state["seed"], self.seed), ("prompts_per_step", size, self.prompts_per_step)):
            if then != now:
                raise ValueError(f"PromptStream: the saved state has {name} {then}, this run {now}; resume with {then}")
        self._epoch, self._drawn = int(state["epoch"]), int(state["drawn"])
        self._carried = [int(index) for index in state["carried"]]
        self._missing = int(state.get("missing", self.prompts_per_step - len(self._carried)))
        self._order = self._shuffled()


def _fingerprint(samples: Sequence[Sample]) -> str:
    """Of what the prompts say. Not of where pictures are: a folder may have moved."""
    digest = hashlib.blake2b(digest_size=8)
    for sample in samples:
        for prompt in sample:
            told = (prompt.id, prompt.task, prompt.text, prompt.answer, prompt.options, prompt.segments)
            digest.update(repr(told).encode("utf-8", "backslashreplace"))
        digest.update(b"\0")
    return digest.hexdigest()
