"""The stream that a run draws its samples from: shuffled anew each epoch, split over ranks, resumable at any step.

Dims: N samples, n samples of a step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..records import Prompt
from .samples import Sample


class SampleStream:
    """Samples step by step, endlessly; every epoch holds each sample once, in an order of its own.

    Every rank holds the same stream and takes its part of each step, so a state saved on one world size resumes on
    another. A step that an epoch's end leaves incomplete goes on into the next epoch, and never holds a sample twice.
    """

    def __init__(
        self, samples: Sequence[Sample], *, seed: int, samples_per_step: int, rank: int = 0, world_size: int = 1
    ) -> None:
        """
        Args:
            samples: what is trained on; each stays whole.
            seed: of the shuffling.
            samples_per_step: samples of a step over all ranks: a multiple of `world_size`, at most `len(samples)`.
            rank, world_size: this process's place.

        Raises:
            ValueError: numbers that do not fit together, or ids of prompts that are not unique.
        """
        if not 0 <= rank < world_size or samples_per_step < 1 or samples_per_step % world_size:
            raise ValueError(
                f"SampleStream: samples_per_step must be a multiple of the {world_size} ranks, got {samples_per_step} "
                f"(rank {rank}); take {max(1, round(samples_per_step / world_size)) * world_size}"
            )
        if samples_per_step > len(samples):
            raise ValueError(
                f"SampleStream: a step of {samples_per_step} samples cannot come from {len(samples)}; "
                f"lower samples_per_step"
            )
        ids = [prompt.id for sample in samples for prompt in sample]
        if len(set(ids)) != len(ids):
            raise ValueError(f"SampleStream: {len(ids) - len(set(ids))} ids are not unique; load a source only once")
        self.samples, self.seed, self.samples_per_step = tuple(samples), seed, samples_per_step
        self.rank, self.world_size = rank, world_size
        self._fingerprint = _fingerprint(samples)
        self._epoch, self._drawn = 0, 0
        self._carried: list[int] = []
        self._order = self._shuffled()

    @property
    def epoch(self) -> float:
        """How often all samples have been drawn, with the part of the epoch that runs."""
        return self._epoch + self._drawn / len(self.samples)

    def next_step(self) -> list[Prompt]:
        """The prompts of this rank's samples of the next step: samples_per_step / world_size samples, in order."""
        step: list[int] = []
        while len(step) < self.samples_per_step:
            if self._drawn == len(self.samples):
                self._epoch, self._drawn, self._carried = self._epoch + 1, 0, list(step)
                self._order = self._shuffled()
            taken = self._order[self._drawn : self._drawn + self.samples_per_step - len(step)]
            self._drawn += len(taken)
            step += taken
        return [prompt for index in step[self.rank :: self.world_size] for prompt in self.samples[index]]

    def _shuffled(self) -> list[int]:
        """This epoch's order. Samples that the step under way has already are moved behind the rest of that step."""
        key = hashlib.blake2b(f"{self.seed}/{self._epoch}".encode(), digest_size=8).digest()
        order = np.random.default_rng(int.from_bytes(key)).permutation(len(self.samples)).tolist()
        carried = set(self._carried)
        missing = self.samples_per_step - len(carried)
        first = [index for index in order if index not in carried][:missing] if carried else []
        ahead = set(first)
        return first + [index for index in order if index not in ahead]

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on; plain numbers and text, so it can go into JSON."""
        return {
            "epoch": self._epoch,
            "drawn": self._drawn,
            "carried": list(self._carried),
            "samples_per_step": self.samples_per_step,
            "seed": self.seed,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken; ValueError when the data, the seed or the size of a step differs."""
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                "SampleStream: the saved state is of other data; resume with the data that the run began with"
            )
        for name in ("seed", "samples_per_step"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"SampleStream: the saved state has {name} {state[name]}, this run {getattr(self, name)}; "
                    f"resume with {state[name]}"
                )
        self._epoch, self._drawn = int(state["epoch"]), int(state["drawn"])
        self._carried = [int(index) for index in state["carried"]]
        self._order = self._shuffled()


def _fingerprint(samples: Sequence[Sample]) -> str:
    """Of what the prompts say. Not of where pictures lie: a folder may have moved."""
    digest = hashlib.blake2b(digest_size=8)
    for sample in samples:
        for prompt in sample:
            told = (prompt.id, prompt.task, prompt.text, prompt.answer, prompt.options, prompt.segments)
            digest.update(repr(told).encode("utf-8", "backslashreplace"))
        digest.update(b"\0")
    return digest.hexdigest()
